"""Text files that are whole or as they were, and files of one JSON record per line, of which a kill may cut the last."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["keep_records", "records", "write_whole"]


def write_whole(file: Path, text: str) -> None:
    """Written beside and renamed; folders are made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".partial-{file.name}")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, file)


def records(file: Path) -> list[dict[str, Any]]:
    """The records of a file, none where it is not there; a cut last line is none."""
    return [json.loads(line) for line in _lines(file)] if file.is_file() else []


def keep_records(file: Path, wanted: Callable[[Mapping[str, Any]], bool]) -> None:
    """Leave only records that are wanted, as they were written. A file that is not there stays away."""
    if file.is_file():
        write_whole(file, "".join(line for line in _lines(file) if wanted(json.loads(line))))


def _lines(file: Path) -> list[str]:
    return [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
