"""What test_encoders.py runs under torchrun: for every encoder one SGD step on ranks_worker.py's rows. The ranks hold different numbers of pictures, each of them a micro-batch of text only."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import tiny
from ranks_worker import sgd_step

from vlm.train.engine import connect


def main(root: Path, out: Path, zero: int, runs: Mapping[str, Sequence[str]]) -> None:
    rank, ranks, device = connect()
    for name, options in runs.items():
        (out / name).mkdir(exist_ok=True)
        sgd_step(root, out / name, zero, rank, ranks, device, options=options)


if __name__ == "__main__":
    tiny.seed(0)
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4]))
