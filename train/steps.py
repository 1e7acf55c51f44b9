"""A step's samples -> this rank's micro-batches. Runs in data workers; a pure function of (seed, stage, step), so that resuming needs one integer."""

import itertools
import math
import os
import random
import signal
import sys
import threading
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from vlm.data.mixture import Mixture
from vlm.data.packing import pack_rows
from vlm.data.sample import Sample
from vlm.errors import DataError, EnvironmentProblem, VLMError
from vlm.llm.context import Unit
from vlm.processor import VLMProcessor
from vlm.row import IGNORE, Row, collate

__all__ = ["MicroBatch", "Step", "StepData", "accumulation", "loader", "watched_workers"]

REPLACEMENTS = 16
"""Samples that are tried in the place of a bad one."""


def accumulation(batch: int, micro_batch: int, ranks: int) -> int:
    """Micro-batches per step and rank."""
    return max(1, math.ceil(batch / (micro_batch * ranks)))


@dataclass
class MicroBatch:
    """inputs: arguments of `VLM.forward`. supervised, units: what it counts, known on the host. ids, sources, modalities: of its documents."""

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
    """This rank's part of a step. skipped: bad samples that others replace, with the reason. notes: how often what happened to samples. plan: a hash of 16 bits of what all ranks must agree on."""

    number: int
    micro_batches: list[MicroBatch]
    skipped: list[dict[str, Any]] = field(default_factory=list)
    notes: Mapping[str, int] = field(default_factory=dict)
    plan: int = 0


class _Taken(NamedTuple):
    """What stands for a drawn sample. place: 0 the sample itself, else which of its replacements."""

    row: Row
    sample: Sample
    place: int


class StepData(Dataset[Step]):
    """Step number -> Step, for one rank. Every rank gets equally many micro-batches; one without samples holds an empty row, so that every rank calls the model equally often.

    Without `pack` samples are dealt to the ranks in an order of the step's own (sources that take turns would else each fall to one rank); a rank sorts its share by length, so that
    rows of a forward have similar ones. With it every rank plans the rows of all ranks from the samples' lengths, and opens the pictures of its own only.

    readers: name -> opened reader. skip: names of those whose bad samples are replaced: by others of the source, drawn from (seed, source, index) alone.
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
        micro_batch: int,
        max_length: int,
        too_long: str,
        pack: int | None = None,
    ):
        self.readers, self.skip, self.mixture, self.processor = dict(readers), frozenset(skip), mixture, processor
        self.rank, self.ranks, self.micro_batch, self.pack = rank, ranks, micro_batch, pack
        self.max_length, self.too_long = max_length, too_long

    def __len__(self) -> int:
        return self.mixture.steps

    def __getitem__(self, number: int) -> Step:
        step = Step(number, [])
        drawn = self.mixture.step(number)
        random.Random(number).shuffle(drawn)
        rows = self._packed(drawn, step) if self.pack else self._dealt(drawn, step)
        step.notes = Counter(note for part in rows for pack in part for row in pack for note in row.notes)
        step.micro_batches = [self.micro_batch_of(part) for part in rows]
        return step

    def _dealt(self, drawn: list[tuple[str, int]], step: Step) -> list[list[list[Row]]]:
        """Micro-batches of rows of one document each."""
        rows = [[self._take(source, index, step).row] for source, index in drawn[self.rank :: self.ranks]]
        rows.sort(key=lambda row: len(row[0]))
        return _parts(rows, accumulation(len(drawn), self.micro_batch, self.ranks))

    def _packed(self, drawn: list[tuple[str, int]], step: Step) -> list[list[list[Row]]]:
        """Micro-batches of rows of several documents each.

        A picture that turns out to be broken is known to this rank alone, and its replacement may be longer than the plan says: what has no room goes into a row more, since only the
        number of micro-batches must agree.
        """
        assert self.pack is not None
        sketches = [self._take(source, index, step, pixels=False) for source, index in drawn]
        planned = pack_rows([len(sketch.row) for sketch in sketches], [sketch.row.vision for sketch in sketches], self.pack, self.ranks)
        step.plan = zlib.crc32(repr((planned, [sketch.place for sketch in sketches])).encode()) & 0xFFFF
        rows: list[list[Row]] = []
        for documents in planned[self.rank]:
            row: list[Row] = []
            for document in documents:
                whole = self._look(*drawn[document], sketches[document], step)
                if sum(map(len, row)) + len(whole) <= self.pack:
                    row.append(whole)
                else:
                    rows.append([whole])
            rows.append(row)
        return _parts(rows, max(1, math.ceil(len(planned[self.rank]) / self.micro_batch)))

    def _take(self, source: str, index: int, step: Step, *, pixels: bool = True, place: int = 0) -> _Taken:
        """A sample's row, or that of the first good one of those that are drawn to replace it. place: how many of them are known to be bad."""
        for attempt in range(place, REPLACEMENTS + 1):
            try:
                sample = self.readers[source][self._candidate(source, index, attempt)]
                row = self.processor.row(sample, max_length=self.max_length, too_long=self.too_long, pixels=pixels)
            except DataError as problem:
                if pixels or self.rank == 0:  # sketches are made on every rank
                    self._note(problem, source, index, attempt, step)
                elif source not in self.skip:
                    raise
                continue
            row.source = source
            row.notes += ("replacement",) * bool(attempt)
            return _Taken(row, sample, attempt)
        raise DataError(f"{source}: sample {index} and {REPLACEMENTS} that were drawn to replace it are all bad", cure="look at the source with `vlm data check`")

    def _look(self, source: str, index: int, sketch: _Taken, step: Step) -> Row:
        try:
            self.processor.look(sketch.row, sketch.sample)
        except DataError as problem:
            self._note(problem, source, index, sketch.place, step)
            return self._take(source, index, step, place=sketch.place + 1).row
        return sketch.row

    def _candidate(self, source: str, index: int, attempt: int) -> int:
        return random.Random(f"{self.mixture.seed} {source} {index} {attempt}").randrange(len(self.readers[source])) if attempt else index

    def _note(self, problem: DataError, source: str, index: int, attempt: int, step: Step) -> None:
        if source not in self.skip:
            raise problem
        step.skipped.append({"source": source, "index": self._candidate(source, index, attempt), "kind": problem.kind, "reason": str(problem)})

    def longest(self, steps: int = 8) -> tuple[list[Row], int]:
        """The longest row of the first steps, with `pack` filled up to it, and how many rows a rank has in a step at most."""
        step = Step(0, [])
        drawn = [self.mixture.step(number) for number in range(min(steps, len(self)))]
        taken = [(source, index, self._take(source, index, step, pixels=False)) for samples in drawn for source, index in samples]
        source, index, sketch = max(taken, key=lambda one: len(one[2].row))
        row = self._look(source, index, sketch, step)
        if not self.pack:
            return [row], math.ceil(len(drawn[0]) / self.ranks)
        lengths, vision = ([measure(one.row) for *_, one in taken[: len(drawn[0])]] for measure in (len, lambda row: row.vision))
        return [row] * max(1, self.pack // len(row)), len(pack_rows(lengths, vision, self.pack, self.ranks)[0])

    def micro_batch_of(self, packs: Sequence[Sequence[Row]]) -> MicroBatch:
        """Rows of one or several documents each; without any a row of one padding token."""
        rows = [row for pack in packs for row in pack]
        real = [Row.packed(pack) if len(pack) > 1 else pack[0] for pack in packs if pack]
        real = real or [Row("", "", [self.processor.pad_id], [IGNORE], [0], [-1], [0], [0], [])]
        tokens, vision = sum(len(row) for row in rows), sum(row.vision for row in rows)
        return MicroBatch(
            collate(real, pad_id=self.processor.pad_id),
            sum(row.supervised for row in rows),
            {"token": tokens, "vision_token": vision, "document": len(rows)},
            [row.id for row in rows],
            [row.source for row in rows],
            ["vision" if row.images else "text" for row in rows],
        )


def _parts(rows: list[list[Row]], count: int) -> list[list[list[Row]]]:
    """Rows cut into `count` parts of nearly equal numbers."""
    edges = [round(part * len(rows) / count) for part in range(count + 1)]
    return [rows[start:end] for start, end in itertools.pairwise(edges)]


def loader(data: StepData, start: int, workers: int) -> Iterator[Step]:
    """Steps from `start` on, prepared by worker processes; with 0 workers in this one. Its own generator: a loader that drew from the default one would shift what a resumed run draws."""
    steps = DataLoader(
        _Told(data),
        batch_size=None,
        sampler=range(start, len(data)),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_begin_worker,
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


def _begin_worker(worker: int) -> None:
    """One thread. What is sent to the run's whole process group or job (by torchrun, Slurm, Ctrl-C) is the run's affair: it stops at a step's boundary, and lets its workers go then."""
    torch.set_num_threads(1)
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":  # macOS does not tell who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    """SIGTERM from the run ends a worker; torch and multiprocessing rely on that."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


@contextmanager
def watched_workers(workers: int) -> Iterator[None]:
    """Around all that runs while workers do: the death of one interrupts whatever the run is at. Raises EnvironmentProblem in the place of torch's RuntimeError."""
    try:
        yield
    except RuntimeError as problem:
        said = str(problem)
        if "DataLoader worker (pid" not in said:
            raise
        cure = f"set workers: 0 to see which sample it dies of; where the machine's memory ran out (dmesg says so), fewer than workers: {workers}"
        if "Bus error" in said or "shm" in said:
            cure = f"shared memory is full (df -h /dev/shm): enlarge it, such as by docker's --shm-size, or set fewer than workers: {workers}"
        raise EnvironmentProblem("a data worker died while it prepared samples", got=said.partition(". ")[0].strip(), cure=cure) from problem
