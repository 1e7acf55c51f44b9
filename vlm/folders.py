"""Folders that appear under their name once they are whole."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlm.errors import ConfigurationError

__all__ = ["check_place", "free", "new_folder", "partial_of", "replace_folder", "taken"]


def taken(folder: Path) -> bool:
    """Whether something is there that would be lost: a file, or a folder that holds something."""
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def check_place(folder: Path) -> None:
    """Raises ConfigurationError where no folder can be made, because a file has its name or that of a folder above it."""
    there = next(place for place in (folder, *Path(os.path.abspath(folder)).parents) if place.exists())
    if not there.is_dir():
        raise ConfigurationError(f"{folder} cannot be made", got=f"the file {there}", expected="a folder", cure="give a path of another name")


def free(folder: Path) -> Path:
    """`folder`, of which nothing would be lost: asked before what takes long. Raises ConfigurationError where it is `taken`, and as `check_place`."""
    check_place(folder.parent)
    if taken(folder):
        raise ConfigurationError(f"{os.path.abspath(folder)} holds something already", cure="name a folder that is new or empty, or delete this one if nothing needs it")
    return folder


def partial_of(folder: Path) -> Path:
    """Where `folder` is filled by this process until it is whole: beside it, hidden."""
    return folder.with_name(f".{folder.name}.partial-{os.getpid()}")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to be filled beside `folder`, which it becomes when all went well; else nothing is left. Raises ConfigurationError where `folder` is `taken`."""
    folder = Path(os.path.abspath(free(folder)))
    partial = partial_of(folder)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial)
        raise


def replace_folder(folder: Path, target: Path) -> None:
    """`folder` takes the name `target`; what had that name goes only when the new one is there. What an interrupted replacement left beside them goes first."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    folder.rename(target)
    shutil.rmtree(old, ignore_errors=True)
