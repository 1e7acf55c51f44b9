"""What several runs scored, setting by setting, paired by seed: numbers, tables, files."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlm.whole import write_whole

__all__ = ["Comparison", "Run", "Scores", "interval"]

ENOUGH = 3
"""Seeds from which on an interval is given."""
COLUMNS = ("kind", "setting", "seeds", "accuracy", "difference", "95 % interval", "blind", "chance")
TITLE = "per cent of its questions; ± standard deviation over seeds; differences from the first setting, seed by seed"

Scores = Mapping[str, Mapping[str, Any]]
"""Source -> `kinds`, `mean` and `protocol`, as `vlm eval` writes them."""


class Run(NamedTuple):
    """setting: its words. Runs of one seed are compared with one another."""

    name: str
    setting: str
    seed: int


@dataclass
class Comparison:
    """Runs and what they scored. scores, failed: name of a run -> its scores, or why it has none. remarks: what a reader must know to compare, as far as the runs' configurations tell."""

    config: str
    folder: Path
    runs: Sequence[Run]
    remarks: Sequence[str] = ()
    scores: dict[str, Scores] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def settings(self) -> list[str]:
        """In their order; the others are compared with the first."""
        return list(dict.fromkeys(run.setting for run in self.runs))

    @property
    def seeds(self) -> list[int]:
        return list(dict.fromkeys(run.seed for run in self.runs))

    @property
    def notes(self) -> list[str]:
        found = list(self.remarks)
        if len(self.seeds) == 1:
            found.append(f"one seed shows neither spread nor interval ({ENOUGH} or more give both)")
        elif len(self.seeds) < ENOUGH:
            found.append(f"{len(self.seeds)} seeds are too few for an interval of the differences ({ENOUGH} or more give one)")
        asked = {(source, result["protocol"]["hash"]) for scores in self.scores.values() for source, result in scores.items()}
        if len(asked) > len({source for source, _ in asked}):
            found.append("the settings are not asked in the same way (questions, prompt, pictures or end marks differ), which is part of a difference")
        return found

    # ---- numbers -----------------------------------------------------------------------------------------------------

    def sources(self) -> dict[str, dict[str, list[dict[str, Any]]]]:
        """Source -> kind, and `mean` of the kinds -> one entry per setting. Accuracies, differences and intervals are shares; a difference is over the seeds that both settings have."""
        found: dict[str, dict[str, list[dict[str, Any]]]] = {}
        results = list(self.scores.values())
        for source in dict.fromkeys(name for scores in results for name in scores):
            kinds = dict.fromkeys(kind for scores in results if source in scores for kind in scores[source]["kinds"])
            found[source] = {kind: self._rows(source, lambda result, kind=kind: result["kinds"].get(kind)) for kind in kinds}
            if len(kinds) > 1:
                found[source]["mean"] = self._rows(source, lambda result: result["mean"])
        return found

    def _rows(self, source: str, pick: Callable[[Mapping[str, Any]], Mapping[str, Any] | None]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for setting in self.settings:
            names = {run.seed: run.name for run in self.runs if run.setting == setting}
            seen = {seed: row for seed, name in names.items() if source in self.scores.get(name, {}) and (row := pick(self.scores[name][source]))}
            right = {seed: row["accuracy"] for seed, row in seen.items()}
            first = rows[0]["accuracy"]["by_seed"] if rows else None
            paired = None if first is None else {seed: right[seed] - first[seed] for seed in right if seed in first}
            difference = None if paired is None else {**_described(paired), "interval": interval(list(paired.values()))}
            rows.append({"setting": setting, "accuracy": _described(right), "difference": difference, **{name: _mean(seen.values(), name) for name in ("blind", "chance")}})
        return rows

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        runs = [{**run._asdict(), "state": self._state(run.name), "error": self.failed.get(run.name)} for run in self.runs]
        return {"config": self.config, "settings": self.settings, "seeds": self.seeds, "notes": self.notes, "runs": runs, "sources": self.sources()}

    def _state(self, name: str) -> str:
        return "finished" if name in self.scores else "failed" if name in self.failed else "not run yet"

    # ---- what is shown -----------------------------------------------------------------------------------------------

    def print(self, console: Console | None = None) -> None:
        console = console or Console(width=None if Console().is_terminal else 180)
        for source, kinds in self.sources().items():
            table = Table(title=f"{source}: {TITLE}", title_justify="left")
            for column in COLUMNS:
                table.add_column(column, justify="left" if column in ("kind", "setting") else "right")
            for kind, rows in kinds.items():
                for row in rows:
                    table.add_row(*map(Text, _cells(kind, row)))
                table.add_section()
            console.print(table)
        for line in (*self._lines(), f"{self.folder}/ablation.json, {self.folder}/ablation.md"):
            console.print(Text(line), soft_wrap=True)

    def _lines(self) -> list[str]:
        done = f"{len(self.scores)} of {len(self.runs)} runs are finished, seeds {', '.join(map(str, self.seeds))}"
        return [done, *(f"note: {note}" for note in self.notes), *(f"failed: {name}: {error}" for name, error in self.failed.items())]

    def markdown(self) -> str:
        parts = [f"# Ablation of {self.config}", "\n".join(f"- {' '.join(line.split())}" for line in self._lines())]
        for source, kinds in self.sources().items():
            lines = [COLUMNS, ["---"] * 2 + ["---:"] * (len(COLUMNS) - 2), *(_cells(kind, row) for kind, rows in kinds.items() for row in rows)]
            parts += [f"## {source}: {TITLE}", "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)]
        return "\n\n".join(parts) + "\n"

    def write(self) -> None:
        """ablation.json and ablation.md, each whole or as it was."""
        write_whole(self.folder / "ablation.json", json.dumps(self.plain(), indent=1, ensure_ascii=False))
        write_whole(self.folder / "ablation.md", self.markdown())


def _mean(rows: Iterable[Mapping[str, Any]], name: str) -> float | None:
    known = [row[name] for row in rows if row[name] is not None]
    return fmean(known) if known else None


def _described(by_seed: Mapping[int, float]) -> dict[str, Any]:
    """Mean and spread (standard deviation of the sample), None where there are too few."""
    numbers = list(by_seed.values())
    return {"by_seed": dict(by_seed), "mean": fmean(numbers) if numbers else None, "spread": stdev(numbers) if len(numbers) > 1 else None}


def interval(numbers: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean by Student's t, for numbers that scatter about normally; None for fewer than ENOUGH."""
    if len(numbers) < ENOUGH:
        return None
    middle, half = fmean(numbers), _quantile(len(numbers) - 1) * stdev(numbers) / math.sqrt(len(numbers))
    return middle - half, middle + half


def _quantile(freedom: int) -> float:
    """The 97.5 % point of Student's t, by bisection over its integral (Simpson's rule); freedom from 2 on, where it lies between 1.9 and 4.4."""
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)

    def density(x: float) -> float:
        return math.exp(log_scale - (freedom + 1) / 2 * math.log1p(x * x / freedom))

    def above_zero(x: float, pieces: int = 400) -> float:
        step = x / pieces
        return step / 3 * sum(density(i * step) * (1 if i in (0, pieces) else 4 if i % 2 else 2) for i in range(pieces + 1))

    low, high = 1.9, 4.4
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if above_zero(middle) < 0.475 else (low, middle)
    return high


def _cells(kind: str, row: Mapping[str, Any]) -> list[str]:
    """One row of a table, in per cent."""
    right, difference = row["accuracy"], row["difference"]
    bounds = difference and difference["interval"]
    return [
        kind,
        row["setting"],
        str(len(right["by_seed"])),
        _spread(right, ""),
        _spread(difference, "+") if difference else "first",
        f"{100 * bounds[0]:+.1f} to {100 * bounds[1]:+.1f}" if bounds else "-",
        *("-" if row[name] is None else f"{100 * row[name]:.1f}" for name in ("blind", "chance")),
    ]


def _spread(described: Mapping[str, Any], sign: str) -> str:
    if described["mean"] is None:
        return "-"
    return f"{100 * described['mean']:{sign}.1f}" + ("" if described["spread"] is None else f" ± {100 * described['spread']:.1f}")
