"""Starting a run on several processes."""

import os
import subprocess
import sys
from collections.abc import Sequence

__all__ = ["torchrun"]


def torchrun(processes: int, arguments: Sequence[str]) -> int:
    """Run `vlm ARGUMENTS` (without --nproc) on so many processes of this machine; returns the exit code. `-P` keeps the folder one stands in off sys.path."""
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == "--nproc":
            skip = True
        elif not argument.startswith("--nproc="):
            kept.append(argument)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "--no-python", sys.executable, "-P", "-m", "vlm", *kept]
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}, check=False).returncode
