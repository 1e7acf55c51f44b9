"""A run: its folder, its stages one after another, its export. A stage starts from the folder of the stage before, adds the parts that enter with it, and trains."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from vlm.configuration import VLMConfig
from vlm.generate import prepare
from vlm.initial import gathered
from vlm.llm.decoder import set_attention
from vlm.loading import build, first_model, form, model_folder, read_generation, saved_model
from vlm.model import VLM
from vlm.processor import VLMProcessor, load_tokenizer
from vlm.train import checkpoint
from vlm.train.bad import BadSamples
from vlm.train.check import check_run
from vlm.train.config import RunSpec
from vlm.train.cost import planned
from vlm.train.engine import Engine, connect, deepspeed_config, precision_of
from vlm.train.findings import Report
from vlm.train.folder import absolute, fingerprint, open_folder, steps_of, write_export
from vlm.train.forms import blocks_of, model_at, stage_mixture, stage_processor
from vlm.train.ledger import check_ledger, ledger_rows, print_ledger
from vlm.train.log import Log, draw_curve
from vlm.train.loop import run_steps
from vlm.train.memory import find_micro_batch
from vlm.train.optim import adamw
from vlm.train.start import started_model
from vlm.train.steps import StepData, loader

__all__ = ["Stage", "fit", "whole_tensors"]


def fit(run: RunSpec, *, resume: bool = False) -> Path:
    """Train all stages of a run and write its export; returns the run's folder. Called on every rank.

    resume: go on from the newest whole checkpoint. Raises ConfigurationProblems with everything that `vlm check` finds wrong, ConfigurationError for an existing folder without resume.
    """
    rank, ranks, device = connect()
    folder = run.folder
    report = check_run(run, quick=True) if rank == 0 else Report(run.name)
    run = absolute(run)
    if rank == 0:
        open_folder(run, folder, resume)
    dist.barrier()
    log = Log(folder, rank, run.log_every)
    for warning in report.warnings:
        log.console.print(f"warning: {warning}")
    try:
        for index, name in enumerate(run.stages):
            if not (folder / "stages" / name).is_dir():
                Stage(run, index, folder, rank, ranks, device, log).train()
        if rank == 0:
            write_export(folder, list(run.stages)[-1])
            draw_curve(folder)
        dist.barrier()
        exports = "".join(f"    vlm export {folder} --to {family}" for family in report.exports)
        log.console.print(f"finished: {folder}\n  vlm eval {folder}    vlm chat {folder}{exports}")
    finally:
        log.close()
    return folder


class Stage:
    """One stage on one rank: what it is trained with, and the training.

    folder: of the run. Raises CheckpointError where there is no tokenizer, DataError for a source that cannot be opened.
    """

    def __init__(self, run: RunSpec, index: int, folder: Path, rank: int, ranks: int, device: torch.device, log: Log):
        self.run, self.index, self.folder, self.rank, self.device, self.log = run, index, folder, rank, device, log
        self.name, self.stage = list(run.stages.items())[index]
        self.fingerprint = fingerprint(run)
        self.dtype = precision_of(run.precision, device, self.stage.zero)
        self.config = deepspeed_config(self.stage, self.dtype)
        tokenizer = load_tokenizer(run.model)
        self.spec = model_at(run, index)
        width = form(self.spec, 0).text_config.hidden_size
        self.processor = stage_processor(VLMProcessor, self.stage, self.spec, width, tokenizer)
        self.data = self._data(rank, ranks)

    def _data(self, rank: int, ranks: int) -> StepData:
        stage, sources = self.stage, {name: self.run.data[name] for name in self.stage.sources}
        readers = {name: spec.open() for name, spec in sources.items()}
        return StepData(
            readers, stage_mixture(self.run, self.index, {name: len(reader) for name, reader in readers.items()}, blocks_of(readers)), self.processor,
            skip=[name for name, spec in sources.items() if spec.on_bad == "skip"],
            rank=rank, ranks=ranks, micro_batch=1 if stage.micro_batch == "auto" else stage.micro_batch, max_length=stage.max_length, too_long=stage.too_long, pack=stage.pack,
        )  # fmt: skip

    def train(self) -> None:
        """From the newest checkpoint of this stage, else from the stage before."""
        found = checkpoint.latest(self.folder / "resume")
        position = checkpoint.read_position(found, self.fingerprint) if found else None
        if position is not None and position.stage != self.index:
            position = None
        model = self.model(fresh=position is None)
        torch.nn.Module.to(model, self.device)
        groups = planned(model, self.stage)
        optimizer = adamw(groups, self.stage.optimizer)
        if self.stage.checkpointing:
            model.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self.rank == 0:
            print_ledger(groups, self.log.console, f"stage {self.name}: {len(self.data)} steps of {self.stage.batch} samples, ZeRO {self.stage.zero}, {self.dtype}")
            (self.folder / f"ledger-{self.name}.json").write_text(json.dumps(ledger_rows(groups), indent=1), encoding="utf-8")
        check_ledger(groups, model, optimizer)
        engine = Engine(model, optimizer, self.config, self.device)
        if self.stage.micro_batch == "auto":
            self.data.micro_batch = find_micro_batch(engine, self.data, self.folder / f"micro_batch-{self.name}.json", self.log)
        torch.manual_seed(_seed(self.run.seed, self.index, self.rank + 1))
        if position is not None and found is not None:
            checkpoint.restore(found, engine, position, self.stage.zero)
            self.log.console.print(f"stage {self.name} goes on behind step {position.step} of {len(self.data)} ({found})")
        self._steps(engine, position.step if position else 0)
        self._save(model)

    def model(self, *, fresh: bool) -> VLM:
        """The stage's model with the weights that it begins with; not fresh: its form, for the weights of a checkpoint. Raises CheckpointError, ConfigurationError."""
        model = self._built(fresh)
        llm = self.run.model.llm
        read_generation(model, llm if self.run.start is None else replace(llm, path=str(model_folder(self.run.start)), weights="path"))
        set_attention(model.llm, llm.attention)
        return model

    def _vocabulary(self) -> int:
        """Rows that the embedding needs; a padded one that the run starts from keeps its own."""
        if self.run.start is None:
            return self.processor.vocabulary
        return max(self.processor.vocabulary, VLMConfig.from_pretrained(model_folder(self.run.start)).text_config.vocab_size)

    def _built(self, fresh: bool) -> VLM:
        torch.manual_seed(_seed(self.run.seed, self.index, 0))
        token, vocabulary = self.processor.image_token_id, self._vocabulary()
        if not fresh:
            return build(form(self.spec, token, vocabulary), self.config)
        if self.index == 0 and self.run.start is not None:
            return started_model(self.run.start, self.spec, token, self.config, vocabulary)
        if self.index == 0:
            return first_model(self.spec, token, self.config, vocabulary)
        before = list(self.run.stages)[self.index - 1]
        model = saved_model(self.folder / "stages" / before, self.config)
        if self.spec.newline:
            model.add_newline()
        model.add_all({name: adaptation for name, adaptation in self.spec.adapt.items() if adaptation.since == self.name})
        return model

    def _steps(self, engine: Engine, start: int) -> None:
        before = sum(steps_of(self.folder, name) for name in list(self.run.stages)[: self.index])
        count, save = len(self.data), self.run.save
        self.log.rewind(before + start)

        def after(done: int) -> None:
            if save.every and done % save.every == 0 and done < count:
                position = checkpoint.Position(self.index, done, before + done, engine.ranks, self.stage.zero, self.fingerprint)
                checkpoint.save(self.folder / "resume", engine, position, save.keep)

        bad = BadSamples(self.folder, self.name, self.rank, self.run.bad_budget, self.data.mixture.samples)
        bad.rewind(start)
        dist.barrier()
        bad.opened(self.data.readers)
        steps = loader(self.data, start, self.run.workers)
        run_steps(engine, steps, self.stage, name=self.name, start=start, total_before=before, count=count, log=self.log, bad=bad, after=after)

    def _save(self, model: VLM) -> None:
        """stages/NAME: weights, configuration, processor; complete or not there."""
        final = self.folder / "stages" / self.name
        partial = final.with_name(f".partial-{self.name}")
        tensors = whole_tensors(model)
        if self.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            prepare(model, self.processor)
            model.save_pretrained(partial, state_dict=tensors)
            self.processor.save_pretrained(partial)
            (partial / "stage.json").write_text(json.dumps({"stage": self.name, "steps": len(self.data)}), encoding="utf-8")
            os.replace(partial, final)
        dist.barrier()


def whole_tensors(model: VLM) -> dict[str, torch.Tensor]:
    """The state dict on rank 0, gathered where ZeRO 3 has partitioned it; tied tensors once."""
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        with gathered([tensor] if isinstance(tensor, torch.nn.Parameter) else []):
            if dist.get_rank() == 0:
                tensors[name] = tensor.detach().cpu().clone()
    return tensors


def _seed(seed: int, stage: int, stream: int) -> int:
    """Distinct seeds for every stage and stream: 0 draws first values, the same on all ranks; 1 + rank is the stream of a rank's dropout."""
    return (seed * 1_000_003 + stage * 10_007 + stream) % 2**31
