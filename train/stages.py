"""A run: its folder, its stages one after another, its export. A stage starts from the folder of the stage before, adds the parts that enter with it, and trains."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.distributed as dist

from vlm.config import ModelSpec
from vlm.configuration import VLMConfig
from vlm.errors import Stopped
from vlm.eval.report_page import SMALL, write_report
from vlm.folders import replace_folder
from vlm.generate import prepare
from vlm.initial import gathered
from vlm.llm.decoder import set_attention
from vlm.loading import first_model, form, model_folder, read_generation, saved_model
from vlm.model import VLM
from vlm.processor import VLMProcessor, load_tokenizer
from vlm.train import checkpoint
from vlm.train.bad import BadSamples
from vlm.train.check import check_run
from vlm.train.config import RunSpec
from vlm.train.cost import planned
from vlm.train.engine import Engine, connect, deepspeed_config, precision_of, together
from vlm.train.findings import Report
from vlm.train.folder import absolute, fingerprint, open_folder, steps_of, write_export
from vlm.train.forms import blocks_of, model_at, stage_mixture, stage_processor
from vlm.train.ledger import check_ledger, ledger_rows, print_ledger
from vlm.train.log import Log
from vlm.train.loop import run_steps
from vlm.train.memory import find_micro_batch
from vlm.train.optim import Group, adamw
from vlm.train.rank import AGAIN
from vlm.train.signals import StopSignals
from vlm.train.space import checkpoint_bytes, writing
from vlm.train.start import started_model
from vlm.train.steps import StepData, loader, watched_workers
from vlm.train.validate import Validation, smallest_loss

__all__ = ["Stage", "fit", "report_run", "starting_model", "whole_tensors"]


def fit(run: RunSpec, *, resume: bool = False) -> Path:
    """Train all stages of a run and write its export; returns the run's folder. Called on every rank.

    resume: go on from the newest whole checkpoint. Raises ConfigurationProblems with everything that `vlm check` finds wrong, ConfigurationError for an existing folder without resume.
    """
    with StopSignals() as asked:
        return _fit(run, resume, asked)


def _fit(run: RunSpec, resume: bool, asked: StopSignals) -> Path:
    rank, ranks, device = connect()
    folder = run.folder
    report = check_run(run, quick=True) if rank == 0 else Report(run.name)
    run = absolute(run)
    if rank == 0:
        open_folder(run, folder, resume)
    dist.barrier()
    log = Log(folder, rank, run.log_every)
    for warning in report.warnings:
        log.warn(warning)
    try:
        for index, name in enumerate(run.stages):
            if not (folder / "stages" / name).is_dir():
                Stage(run, index, folder, rank, ranks, device, log, asked).train()
        if rank == 0:
            write_export(folder, list(run.stages)[-1])
        dist.barrier()
        if rank == 0:
            _report(folder, log)
        exports = "".join(f"    vlm export {folder} --to {family}" for family in report.exports)
        log.console.print(f"finished: {folder}\n  vlm eval {folder}    vlm chat {folder}{exports}")
    finally:
        log.close()
    return folder


def report_run(run_folder: str | Path) -> Path:
    """Write the page about a run, finished or not; returns it. Raises CheckpointError for a folder without a run, ConfigurationError for parts that are not known here."""
    return write_report(run_folder, starting=starting_model)


def _report(folder: Path, log: Log) -> None:
    """The page about a finished run. What keeps it from being written is said in one sentence: the run is whole without it."""
    try:
        page = write_report(folder, starting=starting_model, largest=SMALL)
        log.console.print(f"report: {page}")
    except Exception as problem:
        log.console.print(f"no report was written ({type(problem).__name__}: {problem}); the run is whole. Try again with: vlm report {folder}")


def starting_model(run: RunSpec) -> tuple[VLM, VLMProcessor]:
    """The model before a run's first step, in evaluation mode, and the first stage's processor; torch's random numbers stay as they were. Raises CheckpointError, ConfigurationError."""
    spec, stage = model_at(run, 0), next(iter(run.stages.values()))
    processor = stage_processor(VLMProcessor, stage, spec, form(spec, 0).text_config.hidden_size, load_tokenizer(run.model))
    with torch.random.fork_rng():
        model = _first(run, spec, processor, None)
    prepare(model, processor)
    return model.eval(), processor


def _first(run: RunSpec, spec: ModelSpec, processor: VLMProcessor, zero: Mapping[str, Any] | None) -> VLM:
    """The first stage's model with the weights that it begins with. spec: its form; a padded vocabulary that the run starts from keeps its size."""
    torch.manual_seed(_seed(run.seed, 0, 0))
    if run.start is None:
        return first_model(spec, processor.image_token_id, zero, processor.vocabulary)
    rows = max(processor.vocabulary, VLMConfig.read(model_folder(run.start)).text_config.vocab_size)
    return started_model(run.start, spec, processor.image_token_id, zero, rows)


class Stage:
    """One stage on one rank: what it is trained with, and the training.

    folder: of the run. asked: whether it is to stop. Raises CheckpointError where there is no tokenizer, DataError for a source that cannot be opened.
    """

    DATA: ClassVar[type[StepData]] = StepData
    ENGINE: ClassVar[type[Engine]] = Engine

    def __init__(self, run: RunSpec, index: int, folder: Path, rank: int, ranks: int, device: torch.device, log: Log, asked: StopSignals):
        self.run, self.index, self.folder, self.rank, self.ranks, self.device, self.log, self.asked = run, index, folder, rank, ranks, device, log, asked
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
        return self.DATA(
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
        converted = None
        if position is not None and found is not None:
            checkpoint.check_ranks(found, position, self.ranks)
            if position.ranks != self.ranks and self.stage.zero:
                converted = checkpoint.universal(found, self.folder / ".universal")
                self.config |= {"checkpoint": {"load_universal": True}}
        model = self.model()
        groups = planned(model, self.stage)
        if self.rank == 0:
            print_ledger(groups, self.log.console, f"stage {self.name}: {len(self.data)} steps of {self.stage.batch} samples, ZeRO {self.stage.zero}, {self.dtype}")
            (self.folder / f"ledger-{self.name}.json").write_text(json.dumps(ledger_rows(groups), indent=1), encoding="utf-8")
        engine = self.engine(model, groups)
        if position is not None and found is not None:
            checkpoint.restore(found, engine, position, converted)
            if converted is not None and self.rank == 0:
                shutil.rmtree(converted)
            self.log.console.print(f"stage {self.name} goes on behind step {position.step} of {len(self.data)} ({found})")
        self._steps(engine, position.step if position else 0, checkpoint_bytes(groups, self.dtype.itemsize, self.stage.zero))
        self._save(model)
        if self.index + 1 < len(self.run.stages):
            self._stop_if_asked(engine, "its weights are written")

    def engine(self, model: VLM, groups: Sequence[Group]) -> Engine:
        """The engine before its first step, with the size of micro-batches known and the rank's random numbers seeded. Raises ConfigurationError where the ledger does not balance."""
        torch.nn.Module.to(model, self.device)
        optimizer = adamw(groups, self.stage.optimizer)
        if self.stage.checkpointing:
            model.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        check_ledger(groups, model, optimizer)
        engine = self.ENGINE(model, optimizer, self.config, self.device)
        if self.stage.micro_batch == "auto":
            self.data.micro_batch = find_micro_batch(engine, self.data, self.folder / f"micro_batch-{self.name}.json", self.log)
        torch.manual_seed(_seed(self.run.seed, self.index, self.rank + 1))
        return engine

    def model(self) -> VLM:
        """The stage's model with the weights that it begins with, of which a checkpoint replaces those that are trained. Raises CheckpointError, ConfigurationError."""
        model = self._built()
        llm = self.run.model.llm
        read_generation(model, llm if self.run.start is None else replace(llm, path=str(model_folder(self.run.start)), weights="path"))
        set_attention(model.llm, llm.attention)
        return model

    def _built(self) -> VLM:
        if self.index == 0:
            return _first(self.run, self.spec, self.processor, self.config)
        torch.manual_seed(_seed(self.run.seed, self.index, 0))
        before = list(self.run.stages)[self.index - 1]
        model = saved_model(self.folder / "stages" / before, self.config)
        if self.spec.newline:
            model.add_newline()
        model.add_all({name: adaptation for name, adaptation in self.spec.adapt.items() if adaptation.since == self.name})
        return model

    def _steps(self, engine: Engine, start: int, room: int) -> None:
        """room: bytes of a checkpoint. Raises Stopped where the run was asked to stop."""
        before = sum(steps_of(self.folder, name) for name in list(self.run.stages)[: self.index])
        count, save = len(self.data), self.run.save
        self.log.rewind(before + start)

        @cache
        def frozen() -> tuple[str, ...]:
            return tuple(engine.gather(checkpoint.frozen_hash(engine.model)))

        def validate(done: int) -> None:
            every = self.run.validate.every
            if not every or (done % every and done < count):
                return
            record = {"stage": self.name, "step": done, "total": before + done, **validation.look(engine)}
            best = record["loss"] < validation.smallest
            if best:
                validation.smallest = record["loss"]
                if self.run.validate.keep_best:
                    self._write(cast(VLM, engine.model), self.folder / "best" / self.name, "best.json", record)
            self.log.validation(record, best)

        def after(done: int) -> None:
            validate(done)  # before the checkpoint, which else would stand behind what is not written yet
            if done == count:
                return
            stop = engine.any(self.asked.name is not None)
            if stop or (save.every and done % save.every == 0):
                position = checkpoint.Position(self.index, done, before + done, engine.ranks, self.stage.zero, self.fingerprint, frozen())
                checkpoint.save(self.folder / "resume", engine, position, save.keep, room)
            if stop:
                self._stop_if_asked(engine, f"stopped behind step {done} of {count}, and saved")

        bad = BadSamples(self.folder, self.name, self.rank, self.run.bad_budget, self.data.mixture.samples)
        bad.rewind(start)
        dist.barrier()
        bad.opened(self.data.readers)
        validation = Validation(self.run, self.stage.batch, self.data, smallest_loss(self.run, self.folder, self.name))
        steps = loader(self.data, start, self.run.workers)
        with watched_workers(self.run.workers):
            run_steps(engine, steps, self.stage, name=self.name, start=start, total_before=before, count=count, log=self.log, bad=bad, after=after)

    def _stop_if_asked(self, engine: Engine, state: str) -> None:
        """Raise Stopped on all ranks where any was asked to stop."""
        names = [name for name in engine.gather(self.asked.name) if name]
        if names:
            raise Stopped(f"{names[0]}: stage {self.name}: {state}", cure=AGAIN)

    def _save(self, model: VLM) -> None:
        self._write(model, self.folder / "stages" / self.name, "stage.json", {"stage": self.name, "steps": len(self.data)})

    def _write(self, model: VLM, final: Path, file: str, facts: Mapping[str, Any]) -> None:
        """A folder with weights, configuration, processor, and what is to be known in a JSON file of its own; complete or not there."""
        partial = final.with_name(f".partial-{final.name}")
        tensors = whole_tensors(model)

        def write() -> None:
            shutil.rmtree(partial, ignore_errors=True)
            with writing(f"the weights of stage {self.name}"):
                partial.mkdir(parents=True)
                prepare(model, self.processor)
                model.save_pretrained(partial, state_dict=tensors)
                self.processor.save_pretrained(partial)
                (partial / file).write_text(json.dumps(facts), encoding="utf-8")
            replace_folder(partial, final)

        together(write, self.rank == 0)


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
