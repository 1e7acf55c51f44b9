"""Text files that are whole or as they were, and files of one JSON record per line, of which a kill may cut the last."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vlm.errors import CheckpointError

__all__ = ["keep_records", "records", "write_whole"]


def write_whole(file: Path, text: str) -> None:
    """Written beside and renamed; folders are made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".partial-{file.name}")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, file)


def records(file: Path) -> list[dict[str, Any]]:
    """The records of a file, none where it is not there; a cut last line is none. Raises CheckpointError for any other line that is no record."""
    return [record for _, record in _lines(file)] if file.is_file() else []


def keep_records(file: Path, wanted: Callable[[Mapping[str, Any]], bool]) -> None:
    """Leave only records that are wanted, as they were written. A file that is not there stays away. Raises CheckpointError as `records` does."""
    if file.is_file():
        write_whole(file, "".join(line for line, record in _lines(file) if wanted(record)))


def _lines(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """Every whole line with its record."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    return [(line, _record(file, number, line)) for number, line in enumerate(lines, 1) if line.endswith("\n")]


def _record(file: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise CheckpointError(f"{file} is damaged at line {number}", got=repr(line[:60]), expected="a JSON object", cure="restore the file, or take the line out")
    return record
