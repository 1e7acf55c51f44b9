"""What a run comes to, told without weights: parameters per stage on the meta device, batch and steps, and the length of every row from its text and its pictures' headers."""

import math
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vlm.config import ModelSpec, picture_tokens, typical_size
from vlm.data.sample import Picture, Sample, Turn
from vlm.encoders.base import Mode
from vlm.errors import DataError, VLMError
from vlm.features import ImageInput, TokenLayout
from vlm.images import upright_size
from vlm.loading import build, form
from vlm.model import VLM
from vlm.processor import VLMProcessor, naming
from vlm.train.config import RunSpec, StageSpec
from vlm.train.forms import stage_mixture
from vlm.train.optim import Group, plan
from vlm.train.steps import accumulation

__all__ = ["Length", "Measure", "Refusals", "RowLengths", "Scan", "batch_line", "length", "planned", "scan", "structure"]

NAMED = 5
"""Refused samples of one kind that are named before the others are only counted."""


# ---- model and steps -----------------------------------------------------------------------------------------------------


def structure(model: ModelSpec, image_token_id: int) -> VLM:
    """The model on the meta device: every parameter with its shape, none with a value."""
    with torch.device("meta"):
        return build(form(model, image_token_id))


def planned(model: VLM, stage: StageSpec) -> list[Group]:
    """Which parameters a stage trains, as training will plan it. Raises ConfigurationError."""
    return plan(dict(model.named_parameters()), model.groups(), stage.train, stage.optimizer, model.unused())


def batch_line(stage: StageSpec, ranks: int) -> str:
    """batch = ranks x micro x accumulation in words, also where that does not come out even."""
    if stage.pack is not None:
        rows = "as many rows as fit into memory" if stage.micro_batch == "auto" else f"at most {stage.micro_batch} {'row' if stage.micro_batch == 1 else 'rows'}"
        return f"{ranks} {'rank' if ranks == 1 else 'ranks'}, packed into rows of at most {stage.pack:,} tokens, {rows} per micro-batch"
    if stage.micro_batch == "auto":
        return f"{ranks} {'rank' if ranks == 1 else 'ranks'} x as many rows as fit into memory"
    count = accumulation(stage.batch, stage.micro_batch, ranks)
    rows = math.ceil(stage.batch / (ranks * count))
    line = f"{ranks} {'rank' if ranks == 1 else 'ranks'} x {rows} rows x {count} {'micro-batch' if count == 1 else 'micro-batches'}"
    return line if ranks * rows * count == stage.batch else f"{line} at most (not divisible: some hold fewer rows)"


@dataclass(frozen=True)
class Length:
    """How long a stage takes; None where the size of its data is not known."""

    steps: int | None
    samples: int | None
    epochs: float | None


def length(run: RunSpec, index: int, sizes: Mapping[str, int | None]) -> Length:
    """Steps, samples and epochs of a stage. sizes: samples per source, None where nobody knows. Raises ConfigurationError."""
    stage = list(run.stages.values())[index]
    known = {name: size for name in stage.sources if (size := sizes.get(name)) is not None}
    if len(known) < len(stage.sources):
        return Length(stage.steps, None if stage.steps is None else stage.steps * stage.batch, stage.epochs)
    mixture = stage_mixture(run, index, known)
    return Length(mixture.steps, mixture.samples, mixture.samples / sum(known.values()))


# ---- rows without pixels -------------------------------------------------------------------------------------------------


class RowLengths(VLMProcessor):
    """The processor of a stage, with pictures that are sizes only: its rows have the ids, labels and errors of training, and nothing is decoded.

    sizes: upright (width, height) of pictures whose headers were read. Others count as `typical_size`, which is exact where the tokens do not depend on the picture (`fixed`).
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.sizes: dict[Picture, tuple[int, int]] = {}
        self.typical = typical_size(self.model.encoder)
        self._layouts: dict[tuple[int, int], TokenLayout] = {}
        self.fixed = picture_tokens(self.model, self.width, self.policy, self.tiling)[1]

    def see(self, picture: Picture | Image.Image | bytes | str | Path, mode: Mode = "infer", where: str = "") -> ImageInput:
        size = self.sizes.get(picture, self.typical) if isinstance(picture, Picture) else self.typical
        if size not in self._layouts:
            with naming(picture, where):
                self._layouts[size] = self.layout(*size, mode)
        return ImageInput({}, *size, self._layouts[size])

    def knows(self, sample: Sample) -> bool:
        """Whether the row's length is certain."""
        return self.fixed or all(picture in self.sizes for picture in sample.pictures)


class Refusals:
    """Errors about samples by kind: the first few of a kind whole, the others counted."""

    def __init__(self) -> None:
        self._kinds: dict[str, tuple[list[VLMError], list[int]]] = {}

    def __len__(self) -> int:
        return sum(count[0] for _, count in self._kinds.values())

    def add(self, problem: VLMError, where: str) -> None:
        """where: start of the message that tells one sample from another; numbers and quoted words do not make a kind either."""
        named, count = self._kinds.setdefault(re.sub(r"'[^']*'|\d+", "#", problem.what.removeprefix(where)), ([], [0]))
        count[0] += 1
        if len(named) < NAMED:
            named.append(problem)

    def problems(self, source: str) -> Iterator[VLMError]:
        """The named ones, and one that counts the rest of each kind."""
        for named, (count,) in self._kinds.values():
            yield from named
            if count > len(named):
                yield DataError(f"{source}: {count - len(named):,} more samples are refused like the last one above", cure=named[-1].cure)


Shape = tuple[bool, tuple[tuple[str, bool, tuple[bool | None, ...]], ...]]
"""All that a template sees of a sample: independent or not; per turn its role, whether it is learned, and its parts: a text, an empty one, a picture (None)."""


def _shape(sample: Sample) -> Shape:
    return sample.independent, tuple((turn.role, turn.supervised, tuple(bool(part.strip()) if isinstance(part, str) else None for part in turn.parts)) for turn in sample.turns)


@dataclass
class Measure:
    """The rows that one stage makes of one source, as training will cut them.

    A template renders marks that stand for texts, so samples of one shape are refused together; and a row has no more tokens than its text has bytes, beside those of the
    template and of the pictures. So only new shapes and what may be longer than max_length are rendered, which makes hundreds of thousands of records bearable.

    rendered: rows that fit or are cut. unknown: rows whose pictures' sizes are not known. late: rows not rendered for want of time. cut: rows above max_length, longest: tokens
    of the longest. lost: refusals of rows that lose every supervised token. first_lost: the first, and the tokens that it needs. notes: what happened to samples, counted.
    """

    stage: str
    rows: RowLengths
    max_length: int
    too_long: str
    rendered: int = 0
    unknown: int = 0
    late: int = 0
    cut: int = 0
    longest: int = 0
    lost: Refusals = field(default_factory=Refusals)
    first_lost: tuple[str, int] | None = None
    notes: Counter[str] = field(default_factory=Counter)
    picture_tokens: set[int] = field(default_factory=set)
    _shapes: dict[Shape, tuple[int, tuple[str, ...]]] = field(default_factory=dict)

    def add(self, sample: Sample, sizes: Mapping[Picture, tuple[int, int]], in_time: bool) -> None:
        """Measure a sample. Raises DataError where training would refuse it, but for what goes into `lost`."""
        self.rows.sizes = dict(sizes)
        shape, official = _shape(sample), self.rows.prompt.spec.official
        if official and not in_time:
            self.late += 1
            return
        if official or shape not in self._shapes:  # the released label walk looks at the texts
            notes = self.rows.row(sample).notes
            self._shapes[shape] = self._overhead(sample), notes[len(sample.notes) :]
        overhead, notes = self._shapes[shape]
        self.notes.update(sample.notes + notes)
        if not self.rows.knows(sample):
            self.unknown += 1
            return
        counts = [self.rows.see(picture, where=sample.where).layout.count for picture in sample.pictures]
        self.picture_tokens.update(counts)
        fits = overhead + sum(counts) + _text_bytes(sample) <= self.max_length
        if not fits and not in_time:
            self.late += 1
            return
        self.rendered += 1
        if not fits:
            self._cut(sample, max(counts, default=0))

    def _overhead(self, sample: Sample) -> int:
        """Tokens of a sample of this shape with next to no text, of independent questions each with what they share."""
        turns = [Turn(turn.role, tuple("x" if isinstance(part, str) else part for part in turn.parts), turn.supervised) for turn in sample.turns]
        if not sample.independent:
            return len(self.rows.prompt.encode(turns).ids)
        answers = sum(turn.role == "assistant" for turn in turns)
        first = next(index for index, turn in enumerate(turns) if turn.role == "assistant")
        return answers * len(self.rows.prompt.encode(turns[: first + 1]).ids)

    def _cut(self, sample: Sample, largest: int) -> None:
        row = self.rows.row(sample)
        if len(row) <= self.max_length:
            return
        self.cut, self.longest = self.cut + 1, max(self.longest, len(row))
        try:
            self.rows.row(sample, max_length=self.max_length, too_long=self.too_long)
        except DataError as problem:
            if self.too_long == "error" or largest >= self.max_length:
                raise
            self.lost.add(problem, sample.where)
            self.first_lost = self.first_lost or (sample.where, len(row))

    @property
    def nothing_left(self) -> bool:
        """Whether no row is known to be of use."""
        return len(self.lost) == self.rendered and not self.unknown and not self.late

    def problems(self, source: str) -> Iterator[VLMError]:
        """What is lost at max_length: one problem where that is all."""
        if self.first_lost is None or not self.nothing_left:
            yield from self.lost.problems(source)
            return
        where, needed = self.first_lost
        yield DataError(
            f"{source}: all {self.rendered:,} samples lose every supervised token at max_length {self.max_length} of stage {self.stage}; the first is {where}",
            got=f"{needed} tokens needed there, {self.longest} by the longest",
            expected=f"an answer within {self.max_length} tokens",
            cure=f"raise stages.{self.stage}.max_length",
        )


def _text_bytes(sample: Sample) -> int:
    """Bytes of the texts, those that independent questions share as often as there are questions."""
    if not sample.independent:
        return sum(len(turn.text.encode()) for turn in sample.turns)
    answers = sum(turn.role == "assistant" for turn in sample.turns)
    first = next(index for index, turn in enumerate(sample.turns) if turn.role == "assistant")
    shared = sum(len(turn.text.encode()) for turn in sample.turns[:first])
    return answers * shared + sum(len(turn.text.encode()) for turn in sample.turns)


@dataclass
class Scan:
    """What a look at every record of a source found.

    readable: records without a fault. vision: those with pictures. opened, closed: pictures whose headers were read, and were not.
    """

    readable: int = 0
    vision: int = 0
    opened: int = 0
    closed: int = 0
    refused: Refusals = field(default_factory=Refusals)


def scan(file: str, reader: Any, measures: Sequence[Measure], *, headers: float, until: float) -> Scan:
    """Read every record and the first `headers` pictures' headers; measure rows until the clock (`time.monotonic`) says `until`.

    file: what the messages of the reader begin with.
    """
    found = Scan()
    for index in range(len(reader)):
        try:
            sample: Sample = reader[index]
        except DataError as problem:
            found.refused.add(problem, file)
            continue
        found.readable += 1
        found.vision += bool(sample.pictures)
        try:
            sizes = _sizes(sample, found, headers)
        except DataError as problem:
            found.refused.add(problem, sample.where)
            continue
        for measure in measures:
            try:
                measure.add(sample, sizes, time.monotonic() <= until)
            except DataError as problem:
                found.refused.add(problem, sample.where)
    return found


def _sizes(sample: Sample, found: Scan, headers: float) -> dict[Picture, tuple[int, int]]:
    sizes: dict[Picture, tuple[int, int]] = {}
    for picture in sample.pictures:
        if picture in sizes:
            continue
        if picture.remote or found.opened >= headers:  # addresses are fetched when they are trained on
            found.closed += 1
            continue
        found.opened += 1
        with naming(picture, sample.where):
            sizes[picture] = upright_size(picture.read() if picture.size is not None or picture.data is not None else picture.path, where=sample.where)
    return sizes
