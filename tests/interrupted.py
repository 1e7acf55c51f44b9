"""Runs that are stopped behind a checkpoint, and the lines of metrics.jsonl in which they must equal those that were not."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from vlm.train import checkpoint
from vlm.train.engine import Engine


class Stop(Exception):
    """Stands for a kill."""


@contextmanager
def stopped_at(total: int) -> Iterator[None]:
    """The run inside stops right behind the checkpoint of step `total`, counted over all stages; it must come that far."""
    save = checkpoint.save

    def save_and_stop(folder: Path, engine: Engine, position: checkpoint.Position, *more: int) -> Path:
        made = save(folder, engine, position, *more)
        if position.total == total:
            raise Stop
        return made

    with patch.object(checkpoint, "save", save_and_stop), pytest.raises(Stop):
        yield


def records(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def kept(record: dict[str, Any]) -> dict[str, Any]:
    """What of a record does not hang on the machine."""
    return {key: value for key, value in record.items() if key not in ("seconds", "wait", "memory", "tflops", "mfu")}
