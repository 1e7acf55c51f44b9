"""The files with a run's scores, in `eval/`: where each lies, and what its figures are about. No model."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from vlm.data.base import Reader, Source
from vlm.errors import ConfigurationError
from vlm.eval.score import MATCHER
from vlm.schema import to_plain

__all__ = ["MAX_NEW_TOKENS", "scored", "scores_file"]

MAX_NEW_TOKENS = 32
"""Of an answer, where nothing else is said."""


def scores_file(folder: Path, name: str, stage: str | None = None, *, own: bool = True) -> Path:
    """Where the scores of a run's source lie, `eval/NAME.json` or `eval/NAME.STAGE.json`; of any other file (not own) in `eval/files/`.

    Raises ConfigurationError for a name that leads to another folder.
    """
    called = f"{name}.json" if stage is None else f"{name}.{stage}.json"
    if Path(called).name != called:
        raise ConfigurationError(f"the scores of {name!r} have no file of that name", got=called, expected="a name without slashes", cure="rename it under `eval`")
    return folder / "eval" / called if own else folder / "eval" / "files" / called


def scored(source: Source, reader: Reader[Any], *, stage: str | None = None, limit: int | None = None, max_new_tokens: int = MAX_NEW_TOKENS) -> dict[str, Any]:
    """What the figures of one model are about: two files where this is equal hold the same figures. For JSON.

    source: its local paths are written absolute. reader: what it opens. sha256: `file_hash()` of the data; pictures that lie beside them are not read for it.
    """
    plain = to_plain(source.absolute())
    return {
        "source": {"reader": plain.pop("use"), **plain},
        "sha256": reader.file_hash(),
        "stage": stage,
        "limit": limit,
        "max_new_tokens": max_new_tokens,
        "matcher": MATCHER,
        "version": version("vlm"),
    }
