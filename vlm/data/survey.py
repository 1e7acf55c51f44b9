"""What a data source holds and what is wrong with it: every record is read, whatever is wrong with others."""

import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from vlm.data.base import Reader, Source
from vlm.data.pictures import check_pictures
from vlm.data.sample import Picture, Sample
from vlm.errors import DataError
from vlm.images import open_picture, upright_size
from vlm.whole import write_whole

__all__ = ["HEADERS", "Problems", "Survey", "survey_source", "write_report"]

HEADERS = 1000
"""Pictures per source whose headers are read, unless all are asked for."""
EXAMPLES = 3
LISTED = 20
"""Kinds of questions that are printed; the JSON has all."""


@dataclass
class Problems:
    """Problems of one kind. examples: the first ones, as sentences with file and record."""

    count: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass
class Survey:
    """What a source holds.

    samples: that are whole; text_only: those without pictures; independent: those of independent pairs. turns: by role. pictures: references. kinds: of questions. longest: characters of the longest
    turn, and where it is. files: bytes of picture files; sizes: (width, height) of those whose headers were read; modes: Pillow's names. decoded: pictures whose pixels were read too.
    notes: what the reader did to samples, and how often. warnings: what else the reader skipped. problems: by kind; each bad record counts once.
    """

    source: str
    reader: str
    samples: int = 0
    text_only: int = 0
    independent: int = 0
    pictures: int = 0
    turns: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    longest: tuple[int, str] = (0, "")
    files: list[int] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    modes: Counter[str] = field(default_factory=Counter)
    decoded: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    warnings: list[str] = field(default_factory=list)
    problems: dict[str, Problems] = field(default_factory=dict)

    @property
    def bad(self) -> int:
        """Bad records; a file that cannot be opened is one."""
        return sum(problems.count for problems in self.problems.values())

    @property
    def ok(self) -> bool:
        return not self.bad

    def to_json(self) -> dict[str, Any]:
        """Everything, for other programs; of sizes what is printed."""
        return vars(self) | {
            "bad": self.bad,
            "longest": {"characters": self.longest[0], "where": self.longest[1]},
            "headers": len(self.sizes),
            "sizes": self._spread(self._by_area()),
            "files": self._spread(sorted(self.files)),
            "problems": {kind: vars(problems) for kind, problems in self.problems.items()},
        }

    def print(self, console: Console | None = None) -> None:
        """One table of what is there, then the problems."""
        console = console or Console()
        console.print(Text(f"{self.source} ({self.reader})", "bold"), soft_wrap=True)
        for name, value in self._facts():
            console.print(Text(f"  {name:<13} {value}"), soft_wrap=True)
        for warning in self.warnings:
            console.print(Text("warning: ", "yellow").append(warning, "default"), soft_wrap=True)
        for kind, problems in sorted(self.problems.items(), key=lambda item: -item[1].count):
            console.print(Text(f"{problems.count:,} x {kind}", "bold red"))
            for example in problems.examples:
                console.print(Text(f"  {example}"), soft_wrap=True)
        verdict = f"{self.bad:,} bad record{'s' if self.bad > 1 else ''}" if self.bad else "nothing bad"
        rest = ", of pictures by their headers only: --decode reads them whole" if self.pictures > self.decoded else ""
        console.print(Text(verdict, "bold red" if self.bad else "bold green").append(rest), soft_wrap=True)

    def _facts(self) -> Iterator[tuple[str, str]]:
        yield (
            "samples",
            f"{self.samples:,}" + (f", {self.text_only:,} text only" if self.text_only else "") + (f", {self.independent:,} of independent pairs" if self.independent else ""),
        )
        yield "turns", _counts(self.turns)
        if self.kinds:
            yield "kinds", _counts(self.kinds)
        yield "longest turn", f"{self.longest[0]:,} characters, {self.longest[1]}" if self.longest[1] else "none"
        yield "pictures", f"{self.pictures:,}" + (f", headers of {len(self.sizes):,} read, {f'{self.decoded:,}' if self.decoded else 'none'} decoded" if self.pictures else "")
        if self.sizes:
            low, middle, high = (f"{width} x {height}" for width, height in self._spread(self._by_area()).values())
            yield "sizes", f"{low} (least), {middle} (median), {high} (most)"
            low, middle, high = self._spread(sorted(self.files)).values()
            yield "file sizes", f"{low:,}, {middle:,}, {high:,} bytes"
            yield "modes", _counts(self.modes)
        if self.notes:
            yield "notes", _counts(self.notes)

    def _by_area(self) -> list[tuple[int, int]]:
        return sorted(self.sizes, key=lambda size: size[0] * size[1])

    @staticmethod
    def _spread(ordered: list[Any]) -> dict[str, Any]:
        return {"least": ordered[0], "median": ordered[(len(ordered) - 1) // 2], "most": ordered[-1]} if ordered else {}

    def _see(self, sample: Sample) -> None:
        self.samples += 1
        self.text_only += not sample.pictures
        self.independent += sample.independent
        self.pictures += len(sample.pictures)
        self.notes.update(sample.notes)
        for number, turn in enumerate(sample.turns):
            self.turns[turn.role] += 1
            if turn.role == "assistant" and turn.kind is not None:
                self.kinds[turn.kind] += 1
            if len(turn.text) > self.longest[0]:
                self.longest = len(turn.text), f"{sample.where}, turn {number}"

    def _add(self, error: DataError) -> None:
        problems = self.problems.setdefault(error.kind, Problems())
        problems.count += 1
        if len(problems.examples) < EXAMPLES:
            problems.examples.append(str(error))


def survey_source(source: Source, *, everything: bool = False, decode: bool = False) -> Survey:
    """Opens a data source and reads every record, and the headers of the first 1,000 pictures (everything: of all; decode: all pictures whole, as training does).

    What is bad is counted and does not stop it. Where a file of a source of several cannot be opened, the others are read one by one.
    """
    found = Survey(source.file, source.use)
    readers = list(_readers(source, found))
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(source.file, total=sum(map(len, readers)))
        for reader in readers:
            found.warnings += reader.warnings
            for error in reader.bad:
                found._add(error)
            for index in range(len(reader)):
                _look(reader, index, found, everything, decode)
                progress.advance(task)
    return found


def write_report(file: Path, surveys: Mapping[str, Survey]) -> None:
    """Writes the surveys, by split, as JSON; folders are made."""
    write_whole(file, json.dumps({split: found.to_json() for split, found in surveys.items()}, ensure_ascii=False, indent=1) + "\n")


def _readers(source: Source, found: Survey, several: bool = False) -> Iterator[Reader[Any]]:
    """The opened source. Where its file is wrong: without its bad records; else its parts that can be opened. several: it is one of those parts, and may be empty."""
    try:
        yield source.open()
        return
    except DataError as error:
        problem = error
    if several and problem.kind == "empty":
        found.warnings.append(str(problem))
        return
    if len(parts := _parts(source)) > 1:
        for part in parts:
            yield from _readers(replace(source, file=part), found, several=True)
        return
    try:
        yield replace(source, on_bad="skip").open()
    except DataError:
        found._add(problem)


def _parts(source: Source) -> list[str]:
    try:
        return source.parts()
    except DataError:
        return []


def _look(reader: Reader[Any], index: int, found: Survey, everything: bool, decode: bool) -> None:
    try:
        sample: Sample = reader[index]
        check_pictures(sample)
        headers = [_header(picture, sample.where, decode) for picture in sample.pictures if everything or decode or len(found.sizes) < HEADERS]
    except DataError as error:
        found._add(error)
        return
    found._see(sample)
    for size, mode, length in headers:
        found.sizes.append(size)
        found.modes[mode] += 1
        found.files.append(length)
        found.decoded += decode


def _header(picture: Picture, where: str, decode: bool) -> tuple[tuple[int, int], str, int]:
    """Upright size, mode and bytes; of a file of its own without reading the whole, unless it is to be decoded."""
    try:
        if decode:
            source = picture.read()
            size = open_picture(source, where=f"{where}, {picture.name}").size
        else:
            source = picture.path if picture.data is None and picture.size is None and not picture.remote else picture.read()
            size = upright_size(source, where=f"{where}, {picture.name}")
        with Image.open(source if isinstance(source, str) else io.BytesIO(source)) as image:
            return size, image.mode, picture.length()
    except OSError as error:
        raise DataError(f"{where}: cannot read picture {picture.name}", kind="missing picture", got=error.strerror or error) from error


def _counts(counted: Mapping[str, int]) -> str:
    most = sorted(counted.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name} {count:,}" for name, count in most[:LISTED]) + (f" and {len(most) - LISTED:,} more" if len(most) > LISTED else "")
