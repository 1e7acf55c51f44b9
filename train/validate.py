"""Validation while training: the loss on samples that are not trained on, always the same ones. It changes nothing of the run."""

import math
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from vlm.data.mixture import Mixture
from vlm.train.config import RunSpec
from vlm.train.engine import Engine
from vlm.train.forms import blocks_of
from vlm.train.loop import train_mode
from vlm.train.steps import StepData, loader
from vlm.whole import records

__all__ = ["Validation", "smallest_loss"]


def smallest_loss(run: RunSpec, folder: Path, stage: str) -> float:
    """Of the looks that a run's folder has of a stage; infinite where it has none, or should have the model of it and has not."""
    if run.validate.keep_best and not (folder / "best" / stage).is_dir():
        return math.inf
    losses = [record["loss"] for record in records(folder / "validation.jsonl") if record["stage"] == stage]
    return min(losses, default=math.inf)


class Validation:
    """The loss per supervised token of a stage's model on up to `samples` samples of each source, which the seed alone draws: all stages, ranks and restarts look at the same ones.

    The samples become rows as the stage's own do, one a row, in as many micro-batches on every rank; a rank without samples holds an empty row.

    Args:
        batch: samples that are made ready at once, over all ranks.
        like: the stage's data, for its rows and ranks. smallest: loss so far.

    Raises DataError for a source that cannot be opened.
    """

    def __init__(self, run: RunSpec, batch: int, like: StepData, smallest: float):
        self.workers, self.smallest = run.workers, smallest
        self.data = {name: _subset(run, source, batch, like) for name, source in run.validated.items()}

    def look(self, engine: Engine) -> dict[str, Any]:
        """loss, supervised (tokens), sources (name -> loss); skipped, where bad samples were replaced. Called on all ranks."""
        model = engine.model
        model.eval()
        model.training = True  # the root's own flag: pictures' dummies go along, so that all ranks make the same calls
        devices = [engine.device] if engine.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices), torch.no_grad():
                sums = engine.sum({key: value for name, data in self.data.items() for key, value in self._sums(engine, name, data).items()})
        finally:
            train_mode(model)
        losses, counts, skipped = ({name: sums[f"{what}/{name}"] for name in self.data} for what in ("loss", "supervised", "skipped"))
        supervised = sum(counts.values())
        found: dict[str, Any] = {
            "loss": sum(losses.values()) / supervised if supervised else math.nan,
            "supervised": int(supervised),
            "sources": {name: losses[name] / counts[name] for name in self.data if counts[name]},
        }
        return found | ({"skipped": int(sum(skipped.values()))} if any(skipped.values()) else {})

    def _sums(self, engine: Engine, name: str, data: StepData) -> Mapping[str, float]:
        """This rank's share of a source."""
        loss = supervised = skipped = 0.0
        for step in loader(data, 0, self.workers):
            skipped += len(step.skipped)
            for micro in step.micro_batches:
                output = engine.forward(micro.to(engine.device))
                loss += float(output.loss_sum)
                supervised += micro.supervised
        return {f"loss/{name}": loss, f"supervised/{name}": supervised, f"skipped/{name}": skipped}


def _subset(run: RunSpec, source: str, batch: int, like: StepData) -> StepData:
    spec = run.data[source]
    reader = spec.open()
    share = Fraction(min(run.validate.samples, len(reader)), len(reader))
    mixture = Mixture({source: len(reader)}, None, batch, run.seed, 0, epochs=share, blocks=blocks_of({source: reader}))
    return StepData(
        {source: reader}, mixture, like.processor, skip=[source] if spec.on_bad == "skip" else [],
        rank=like.rank, ranks=like.ranks, micro_batch=like.micro_batch, max_length=like.max_length, too_long=like.too_long,
    )  # fmt: skip
