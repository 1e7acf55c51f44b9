"""`vlm train` whose disk fills up while a checkpoint is written, at the call of this number: FULL_AT of the environment."""

import errno
import os
from pathlib import Path

from vlm.cli import app
from vlm.train.engine import Engine

calls = 0
save = Engine.save


def full(engine: Engine, folder: str, tag: str) -> None:
    global calls
    calls += 1
    save(engine, folder, tag)
    if calls == int(os.environ["FULL_AT"]):
        for file in Path(folder).rglob("*.pt"):
            file.write_bytes(file.read_bytes()[:100])
        raise OSError(errno.ENOSPC, "No space left on device")


if __name__ == "__main__":
    Engine.save = full  # type: ignore[method-assign]
    app()
