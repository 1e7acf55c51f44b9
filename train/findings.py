"""What `vlm check` found, and how it is printed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.text import Text

from vlm.composition import ConfigurationProblems
from vlm.errors import ConfigurationError, VLMError
from vlm.train import cost
from vlm.train.ledger import print_ledger
from vlm.train.optim import Group

__all__ = ["Report", "Span", "StageReport"]

Span = tuple[str, bool]
"""Text of a rendered row, and whether it is supervised."""


@dataclass
class StageReport:
    """One stage.

    groups: the ledger. picture_tokens: of a picture of the encoder's own size. picture_range: least and most over the pictures seen. length: steps, samples, epochs.
    disk: what it writes. counted: what happens to samples, and how often. breaks: equalities that the adaptations give up. rendered: rows as they are trained on.
    """

    name: str
    groups: list[Group] = field(default_factory=list)
    picture_tokens: int | None = None
    picture_range: tuple[int, int] | None = None
    batch: str | None = None
    length: cost.Length | None = None
    disk: str | None = None
    counted: dict[str, int] = field(default_factory=dict)
    breaks: list[str] = field(default_factory=list)
    rendered: list[list[Span]] = field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(group.count for group in self.groups)

    @property
    def trainable(self) -> int:
        return sum(group.count for group in self.groups if group.rate is not None)


@dataclass
class Report:
    """What `check_run` found. problems: each keeps the run from training as it is written. wrong: paths that have one. validation: what the loss is looked at on. exports: what `--to` takes -> what it writes. impossible: the same -> why not."""

    name: str
    stages: list[StageReport] = field(default_factory=list)
    problems: list[VLMError] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)
    parts: dict[str, str] = field(default_factory=dict)
    validation: list[str] = field(default_factory=list)
    exports: dict[str, str] = field(default_factory=dict)
    impossible: dict[str, str] = field(default_factory=dict)
    wrong: set[str] = field(default_factory=set)

    @property
    def ok(self) -> bool:
        return not self.problems

    def stop(self) -> None:
        """Raises ConfigurationProblems with everything that was found; nothing where there are no problems."""
        if self.problems:
            raise ConfigurationProblems(self.problems, self.name)

    def print(self, console: Console | None = None) -> None:
        """For a terminal: supervised text in colour; elsewhere it stands in [[...]]."""
        console = console or Console()
        for name, text in self.parts.items():
            console.print(Text(f"{name}: {text}"), soft_wrap=True)
        for stage in self.stages:
            _print_stage(stage, console)
        for line in self.validation:
            console.print(Text(f"validation: {line}"), soft_wrap=True)
        for family, text in self.exports.items():
            console.print(Text(f"vlm export --to {family}: {text}"), soft_wrap=True)
        for family, text in self.impossible.items():
            console.print(Text(f"vlm export --to {family}: not possible: {text}"), soft_wrap=True)
        for title, style, lines in (("not checked", "cyan", self.not_checked), ("warning", "yellow", self.warnings), ("problem", "bold red", map(str, self.problems))):
            for line in lines:
                console.print(Text(f"{title}: ", style=style).append(line, style="default"), soft_wrap=True)
        count = len(self.problems)
        console.print(Text(f"{self.name}: {count or 'no'} {'problem' if count == 1 else 'problems'}", style="bold red" if count else "bold green"))

    def add(self, problem: VLMError) -> None:
        """A problem, once."""
        if str(problem) not in map(str, self.problems):
            self.problems.append(problem)

    @contextmanager
    def at(self, path: str) -> Iterator[None]:
        """A problem inside belongs to `path`."""
        try:
            yield
        except ConfigurationProblems as several:
            self.refuse(path, several.what)
        except VLMError as problem:
            self._add_at(path, problem)

    def refuse(self, path: str, what: str, *, kind: type[VLMError] = ConfigurationError, **sides: Any) -> None:
        """A problem of what stands at `path`."""
        self._add_at(path, kind(what, **sides))

    def _add_at(self, path: str, problem: VLMError) -> None:
        self.wrong.add(path)
        self.add(problem.changed(what=f"{path}: {problem.what}"))

    def leave(self, line: str) -> None:
        """What was not checked, once."""
        if line not in self.not_checked:
            self.not_checked.append(line)


def _print_stage(stage: StageReport, console: Console) -> None:
    console.print()
    if stage.groups:
        print_ledger(stage.groups, console, f"stage {stage.name}")
    else:
        console.print(Text(f"stage {stage.name}"))
    for line in _facts(stage):
        console.print(Text(f"  {line}"), soft_wrap=True)
    for number, spans in enumerate(stage.rendered, 1):
        text = Text().append(f"  sample {number}, what is learned {'in green' if console.is_terminal else 'in [[ ]]'}:\n", "dim")
        for part, supervised in spans:
            text.append(part if console.is_terminal else f"[[{part}]]" if supervised else part, style="bold green" if supervised else "default")
        console.print(text, soft_wrap=True)


def _facts(stage: StageReport) -> Iterator[str]:
    if stage.groups:
        yield f"parameters: {stage.total:,}, {stage.trainable:,} trained"
    if stage.picture_tokens is not None:
        low, high = stage.picture_range or (stage.picture_tokens,) * 2
        yield f"pictures: {stage.picture_tokens:,} tokens each" + (f", {low:,} to {high:,} in the data" if {low, high} != {stage.picture_tokens} else "")
    if stage.batch:
        yield f"batch: {stage.batch}"
    if stage.length:
        numbers = (("steps", stage.length.steps), ("samples", stage.length.samples), ("epochs", stage.length.epochs))
        yield "length: " + ", ".join(f"{value:,.4g} {name}" if isinstance(value, float) else f"{value:,} {name}" for name, value in numbers if value is not None)
    if stage.disk:
        yield f"disk: {stage.disk}"
    yield from (f"{count:,} samples of {note}" for note, count in stage.counted.items())
    yield from (f"does not hold: {text}" for text in stage.breaks)
