"""Folders that appear under their name once they are whole."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["new_folder", "taken"]


def taken(folder: Path) -> bool:
    """Whether something is there that would be lost: a file, or a folder that holds something."""
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to be filled beside `folder`, which it becomes when all went well; else nothing is left. `folder` is not `taken`: callers say so in their words before they begin."""
    folder = Path(os.path.abspath(folder))
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial)
        raise
