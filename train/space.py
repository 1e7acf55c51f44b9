"""Room on the disk: how much a run will write, and what happens where there is not enough."""

import errno
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vlm.errors import EnvironmentProblem
from vlm.train.optim import Group

__all__ = ["check_room", "checkpoint_bytes", "room", "size_of", "stage_bytes", "writing"]

OPTIMIZER = 8
"""Bytes of AdamW's two moments, in fp32."""
MASTER = 4
"""Bytes of the fp32 copy that DeepSpeed keeps, and saves, at ZeRO 1 to 3."""


def checkpoint_bytes(groups: Sequence[Group], width: int, zero: int) -> int:
    """What one `resume/` checkpoint of a stage takes: trained weights and their optimizer; frozen weights stay out. width: bytes of a weight in memory."""
    return sum(group.count for group in groups if group.rate is not None) * (width + OPTIMIZER + (MASTER if zero else 0))


def stage_bytes(groups: Sequence[Group], width: int) -> int:
    """What `stages/NAME` takes: all weights. `export/` shares them where the disk has hard links."""
    return sum(group.count for group in groups) * width


def room(folder: Path) -> int:
    """Bytes that are free where a folder lies, or will lie."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def check_room(folder: Path, needed: int, what: str) -> None:
    """Raise EnvironmentProblem where less than `needed` bytes are free."""
    free = room(folder)
    if free < needed:
        raise EnvironmentProblem(
            f"there is no room for {what} in {folder}",
            got=f"{free / 1e9:.2f} GB",
            expected=f"{needed / 1e9:.2f} GB",
            cure="free some, or set `runs` to another disk; what is saved already stays, and --resume goes on from it",
        )


@contextmanager
def writing(what: str) -> Iterator[None]:
    """A disk that fills up inside is an EnvironmentProblem; torch and safetensors have words of their own for it."""
    try:
        yield
    except Exception as problem:
        full = isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT)
        said = str(problem)
        if not full and not any(words in said for words in ("No space left", "PytorchStreamWriter failed", "file write failed", "os error 28", "unexpected pos")):
            raise
        raise EnvironmentProblem(f"the disk is full: {what} could not be written", got=said.partition("\n")[0], cure="free some room, then go on with --resume") from problem
