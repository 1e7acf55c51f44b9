"""What lies in a run's folder, read once for its report: nothing is loaded, and what is not there is empty."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from vlm.composition import compose
from vlm.data.mixture import Mixture
from vlm.errors import CheckpointError, VLMError
from vlm.train.config import RunSpec
from vlm.whole import records

__all__ = ["Written", "read_run"]


@dataclass(frozen=True)
class Written:
    """steps: of metrics.jsonl, in order. validation: of validation.jsonl. ledgers: stage -> rows. warnings: of warnings.jsonl. bad: of bad_samples.jsonl. scores: what `vlm eval` wrote, by file name without `.json`. stages: those that are finished, in order. unread: files that cannot be read, and why."""

    folder: Path
    run: RunSpec
    environment: Mapping[str, Any]
    manifest: Mapping[str, Any]
    steps: Sequence[Mapping[str, Any]]
    validation: Sequence[Mapping[str, Any]]
    ledgers: Mapping[str, Sequence[Mapping[str, Any]]]
    warnings: Sequence[str]
    bad: Sequence[Mapping[str, Any]]
    scores: Mapping[str, Mapping[str, Any]]
    stages: Sequence[str]
    unread: Sequence[str] = ()

    @property
    def finished(self) -> bool:
        """Whether the run came to its end: the export is its last act."""
        return (self.folder / "export" / "config.json").is_file()

    @property
    def parameters(self) -> int | None:
        """Of the model in the last stage that began; None where none did."""
        ledgers = list(self.ledgers.values())
        return sum(int(row["parameters"]) for row in ledgers[-1]) if ledgers else None

    def of(self, stage: str) -> list[Mapping[str, Any]]:
        """The steps of a stage."""
        return [record for record in self.steps if record["stage"] == stage]

    def sizes(self, stage: str) -> dict[str, int]:
        """Samples per source of a stage, of those whose size the manifest names."""
        held = {name: self.manifest.get("sources", {}).get(name, {}).get("samples") for name in self.run.stages[stage].sources}
        return {name: int(size) for name, size in held.items() if size}

    def mixture(self, stage: str) -> Mixture | None:
        """What a stage asks of its sources: its steps, and samples by source in the long run. None where the manifest names no sizes or the two do not fit."""
        sizes, spec = self.sizes(stage), self.run.stages[stage]
        if set(sizes) != set(spec.sources):
            return None
        weights = None if isinstance(spec.data, str) else dict(spec.data)
        epochs = spec.epochs if spec.epochs is not None or spec.steps is not None else 1.0
        try:
            return Mixture(sizes, weights, spec.batch, self.run.seed, list(self.run.stages).index(stage), epochs=epochs, steps=spec.steps)
        except VLMError:
            return None

    def when(self) -> tuple[datetime, datetime]:
        """First and last writing, as far as the files' own times tell."""
        first, metrics = self.folder / "config.yaml", self.folder / "metrics.jsonl"
        last = metrics if metrics.is_file() else first
        return datetime.fromtimestamp(first.stat().st_mtime), datetime.fromtimestamp(last.stat().st_mtime)


def read_run(folder: Path) -> Written:
    """Everything but weights. Raises CheckpointError for a folder without a run, ConfigurationError where its config.yaml names parts that are not known here."""
    if not (folder / "config.yaml").is_file():
        raise CheckpointError(f"{folder} holds no run", expected="config.yaml, as `vlm train` writes it", cure="give the folder of a run, such as runs/demo")
    run = compose(RunSpec, folder / "config.yaml", allow_import=False)
    unread: list[str] = []
    ledgers = {stage: _json(folder / f"ledger-{stage}.json", unread) for stage in run.stages}
    scores = {str(file.relative_to(folder / "eval").with_suffix("")): _json(file, unread) for file in sorted((folder / "eval").rglob("*.json"))}
    return Written(
        folder=folder,
        run=run,
        environment=_json(folder / "environment.json", unread) or {},
        manifest=_json(folder / "manifest.json", unread) or {},
        steps=[record for record in records(folder / "metrics.jsonl") if "loss" in record],
        validation=records(folder / "validation.jsonl"),
        ledgers={stage: rows for stage, rows in ledgers.items() if rows},
        warnings=[record["text"] for record in records(folder / "warnings.jsonl")],
        bad=records(folder / "bad_samples.jsonl"),
        scores={name: found for name, found in scores.items() if found and "kinds" in found},
        stages=[stage for stage in run.stages if (folder / "stages" / stage / "config.json").is_file()],
        unread=unread,
    )


def _json(file: Path, unread: list[str]) -> Any:
    """The content of a file, None where it is not there; what cannot be read is named in `unread`."""
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as problem:
        unread.append(f"{file.name}: {problem}")
        return None
