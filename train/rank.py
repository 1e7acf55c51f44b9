"""One of a run's processes: who made it one, the log it writes, and how it ended, for the launcher to say."""

import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from vlm.errors import EnvironmentProblem, VLMError
from vlm.whole import write_whole

__all__ = ["AGAIN", "LAUNCHED", "End", "as_rank", "ends_since", "is_rank", "log_of"]

AGAIN = "go on with the command that began it, and --resume"
"""The cure of a run that stopped: number of processes and nodes belong to it as well."""
LAUNCHED = "VLM_LAUNCHED"
"""Set in the environment of processes that `vlm train` started."""


@dataclass(frozen=True)
class End:
    """How a rank ended other than well. expected: by a VLMError, whose sentence is the message; else the message is the exception's. time: seconds since 1970."""

    rank: int
    host: str
    time: float
    message: str
    expected: bool
    exit_code: int


def is_rank(environment: Mapping[str, str], several: bool) -> bool:
    """Whether this process is one of those that torchrun, the DeepSpeed launcher (both set RANK and WORLD_SIZE) or srun has started, and so must not start others.

    several: whether processes are asked for. A job step of srun with one task per node may be meant to start them; one with several tasks per node is not.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return True
    tasks, nodes = (int(environment.get(name, "1")) for name in ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES"))
    return tasks > (nodes if several else 1)


def _slurm_rank(environment: Mapping[str, str]) -> dict[str, str]:
    """What srun says, in torch's names; empty where it started one task, or another launcher has spoken. Raises EnvironmentProblem without an address at which the ranks find each other."""
    if "RANK" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return {}
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]:
        raise EnvironmentProblem(
            f"srun started {environment['SLURM_STEP_NUM_TASKS']} tasks, which need an address at which they find each other",
            got=f"no {' and no '.join(missing)}",
            cure='export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) MASTER_PORT=29500 before srun',
        )
    return {"RANK": environment["SLURM_PROCID"], "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"], "LOCAL_RANK": environment["SLURM_LOCALID"]}


def log_of(folder: Path, rank: int | str) -> Path:
    """Of a run's folder."""
    return folder / "logs" / f"rank-{rank}.log"


@contextmanager
def as_rank(folder: Path) -> Iterator[None]:
    """What `vlm train` has started writes to its log: all of it, or, of rank 0, what goes to stderr; and how it ended goes to a file beside. Other processes keep their terminal; those that srun
    has started learn their rank."""
    os.environ |= _slurm_rank(os.environ)
    if LAUNCHED not in os.environ:
        yield
        return
    rank = int(os.environ["RANK"])
    path = log_of(folder, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    _end_of(path).unlink(missing_ok=True)
    _redirect(path, both=rank > 0)
    print(f"---- {datetime.now():%Y-%m-%d %H:%M:%S} rank {rank} of {os.environ['WORLD_SIZE']} on {socket.gethostname()}, process {os.getpid()}", file=sys.stderr)
    try:
        yield
    except Exception as problem:
        expected = isinstance(problem, VLMError)
        message = f"{type(problem).__name__}: {problem if expected else str(problem).strip().partition(chr(10))[0]}"
        end = End(rank, socket.gethostname(), time.time(), message, expected, problem.exit_code if isinstance(problem, VLMError) else 1)
        write_whole(_end_of(path), json.dumps(asdict(end)))
        raise


def ends_since(folder: Path, began: float) -> list[End]:
    """Of ranks that ended badly since then, the earliest first. Ranks of other nodes are among them where the folder is shared."""
    ends = [End(**json.loads(path.read_text(encoding="utf-8"))) for path in (folder / "logs").glob("rank-*.json")]
    return sorted((end for end in ends if end.time >= began), key=lambda end: end.time)


def _end_of(log: Path) -> Path:
    return log.with_suffix(".json")


def _redirect(path: Path, *, both: bool) -> None:
    """By descriptor, so that what libraries in C++ print goes there too."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr) if both else (sys.stderr,):
        stream.flush()
        os.dup2(log, stream.fileno())
    os.close(log)
