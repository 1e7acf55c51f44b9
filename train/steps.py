"""A step's samples -> this rank's micro-batches. Runs in data workers; a pure function of (seed, stage, step), so that resuming needs one integer."""

import itertools
import math
import random
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from vlm.data.mixture import Mixture
from vlm.errors import DataError, VLMError
from vlm.llm.context import VISION, Unit
from vlm.processor import IGNORE, Row, VLMProcessor, collate

__all__ = ["MicroBatch", "Step", "StepData", "accumulation", "loader"]


def accumulation(batch: int, micro_batch: int, ranks: int) -> int:
    """Micro-batches per step and rank."""
    return max(1, math.ceil(batch / (micro_batch * ranks)))


@dataclass
class MicroBatch:
    """inputs: arguments of `VLM.forward`. supervised, units: what it counts, known on the host. ids, sources, modalities: of its rows."""

    inputs: dict[str, Any]
    supervised: int
    units: dict[Unit, int]
    ids: list[str]
    sources: list[str]
    modalities: list[str]

    def to(self, device: torch.device) -> dict[str, Any]:
        """The inputs on the device; the model moves its pictures itself."""
        return {name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value for name, value in self.inputs.items()}


@dataclass
class Step:
    """This rank's part of a step. skipped: samples that were left out, with the reason. notes: how often what happened to samples."""

    number: int
    micro_batches: list[MicroBatch]
    skipped: list[dict[str, str]] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)


class StepData(Dataset[Step]):
    """Step number -> Step, for one rank.

    readers: name -> opened reader; skip: names of those whose bad samples are left out. Samples of a step are dealt to the ranks in an order of the step's own (sources that take turns would else
    each fall to one rank); a rank sorts its share by length and cuts it into equally many micro-batches on every rank; one without samples holds an empty row, so that every rank calls the model
    equally often.
    """

    def __init__(
        self,
        readers: Mapping[str, Any],
        mixture: Mixture,
        processor: VLMProcessor,
        *,
        skip: Collection[str] = (),
        rank: int,
        ranks: int,
        batch: int,
        micro_batch: int,
        max_length: int,
        too_long: str,
    ):
        self.readers, self.skip, self.mixture, self.processor = dict(readers), frozenset(skip), mixture, processor
        self.rank, self.ranks, self.count = rank, ranks, accumulation(batch, micro_batch, ranks)
        self.max_length, self.too_long = max_length, too_long

    def __len__(self) -> int:
        return self.mixture.steps

    def __getitem__(self, number: int) -> Step:
        step = Step(number, [])
        samples = self.mixture.step(number)
        random.Random(number).shuffle(samples)
        rows = [row for source, index in samples[self.rank :: self.ranks] if (row := self._row(source, index, step)) is not None]
        rows.sort(key=len)
        edges = [round(part * len(rows) / self.count) for part in range(self.count + 1)]
        step.micro_batches = [self._micro_batch(rows[start:end]) for start, end in itertools.pairwise(edges)]
        return step

    def _row(self, source: str, index: int, step: Step) -> Row | None:
        try:
            row = self.processor.row(self.readers[source][index], max_length=self.max_length, too_long=self.too_long)
        except DataError as problem:
            if source not in self.skip:
                raise
            step.skipped.append({"source": source, "index": str(index), "reason": str(problem)})
            return None
        row.source = source
        for note in row.notes:
            step.notes[note] = step.notes.get(note, 0) + 1
        return row

    def _micro_batch(self, rows: list[Row]) -> MicroBatch:
        real = rows or [Row("", "", [self.processor.pad_id], [IGNORE], [0], [-1], [0], [0], [])]
        types = [kind for row in rows for kind in row.types]
        return MicroBatch(
            collate(real, pad_id=self.processor.pad_id),
            sum(row.supervised for row in rows),
            {"token": len(types), "vision_token": types.count(VISION), "document": len(rows)},
            [row.id for row in rows],
            [row.source for row in rows],
            ["vision" if row.images else "text" for row in rows],
        )


def loader(data: StepData, start: int, workers: int) -> Iterator[Step]:
    """Steps from `start` on, prepared by worker processes; with 0 workers in this one. Its own generator: a loader that drew from the default one would shift what a resumed run draws."""
    steps = DataLoader(
        _Told(data),
        batch_size=None,
        sampler=range(start, len(data)),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_one_thread,
        generator=torch.Generator(),
    )
    for step in steps:
        if isinstance(step, VLMError):
            raise step
        yield step


class _Told(Dataset[Any]):
    """The steps, with an error in the place of one that cannot be made: raised in a worker, it would arrive as a traceback in a string."""

    def __init__(self, data: StepData):
        self.data = data

    def __getitem__(self, number: int) -> Step | VLMError:
        try:
            return self.data[number]
        except VLMError as problem:
            return problem


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
