"""Starting a run on several processes, of this machine or of several: through torchrun, whose tables of failures become one sentence; and the same start in the words of other launchers."""

import logging
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from socket import gethostname

from vlm.errors import ConfigurationError, EnvironmentProblem, Stopped
from vlm.folders import check_place
from vlm.train.rank import AGAIN, LAUNCHED, End, ends_since, is_rank, log_of

__all__ = ["Launch", "start_ranks"]

OPTIONS = {"--nproc": 1, "--nodes": 1, "--node-rank": 1, "--rendezvous": 1, "--print-only": 0}
"""Of `vlm train`, for the launcher alone, with the number of their values."""
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""That reach the ranks through torchrun."""
SAVING = 600
"""Seconds that ranks have for saving, when the launcher is asked to stop, before they are killed."""
LOST = ("DistBackendError", "DistNetworkError", "DistStoreError", "gloo", "Connection closed by peer", "Connection reset by peer")
"""Marks of an exception that tells only that another rank is gone."""


@dataclass(frozen=True)
class Launch:
    """processes: per node. node_rank: None where nodes may find their order by themselves. rendezvous: HOST:PORT of the first node, where there are several. arguments: of `vlm`, without those
    of OPTIONS. folder: of the run."""

    processes: int
    nodes: int
    node_rank: int | None
    rendezvous: str | None
    arguments: tuple[str, ...]
    folder: Path

    def check(self) -> None:
        """Raises ConfigurationError."""
        if self.nodes == 1:
            return
        host, _, port = (self.rendezvous or "").rpartition(":")
        if not host or not port.isdecimal():
            raise ConfigurationError(
                f"{self.nodes} nodes need an address at which they find each other",
                got=self.rendezvous,
                expected="--rendezvous HOST:PORT",
                cure="HOST: the first node; PORT: a free one, such as 29500",
            )
        if self.node_rank is not None and not 0 <= self.node_rank < self.nodes:
            raise ConfigurationError("no such node", got=f"--node-rank {self.node_rank}", expected=f"0 to {self.nodes - 1}")

    def torchrun(self) -> list[str]:
        """torchrun's arguments, without the program."""
        if self.nodes == 1:
            where = ["--standalone"]
        elif self.node_rank is None:
            where = ["--nnodes", str(self.nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", str(self.rendezvous), "--rdzv-id", self.folder.name]
        else:
            host, _, port = str(self.rendezvous).rpartition(":")
            where = ["--nnodes", str(self.nodes), "--node-rank", str(self.node_rank), "--master-addr", host, "--master-port", port]
        return [*where, "--nproc-per-node", str(self.processes), "--shutdown-timeout", str(SAVING), "--signals-to-handle", SIGNALS, "--no-python"]

    def deepspeed(self) -> list[str]:
        """The DeepSpeed launcher's arguments, without the program. A hostfile has lines such as `node1 slots=8`."""
        if self.nodes == 1:
            return ["--num_gpus", str(self.processes), "--no_local_rank", "--module"]
        return ["--hostfile", "hostfile", "--num_nodes", str(self.nodes), "--num_gpus", str(self.processes), "--no_local_rank", "--module"]

    def lines(self) -> str:
        """The same start by torchrun and by the DeepSpeed launcher, one line each."""
        return f"torchrun {shlex.join([*self.torchrun(), 'vlm', *self.arguments])}\ndeepspeed {shlex.join([*self.deepspeed(), 'vlm', *self.arguments])}"

    def sbatch(self) -> str:
        """A script for Slurm: one task per node, which starts its ranks; a job whose time is over saves, goes back into the queue, and goes on."""
        again = () if "--resume" in self.arguments else ("--resume",)
        several = f' --nodes {self.nodes} --rendezvous "$head:29500"' if self.nodes > 1 else ""
        head = ['head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'] if several else []
        return "\n".join(
            (
                "#!/bin/bash",
                f"#SBATCH --job-name={self.folder.name}",
                f"#SBATCH --nodes={self.nodes}",
                "#SBATCH --ntasks-per-node=1",
                f"#SBATCH --gpus-per-node={self.processes}",
                "#SBATCH --exclusive",
                "#SBATCH --signal=TERM@120",
                "#SBATCH --requeue",
                "#SBATCH --open-mode=append",
                f"#SBATCH --output={self.folder.name}-%j.log",
                *head,
                f"srun --kill-on-bad-exit=1 vlm {shlex.join([*self.arguments, *again])} --nproc {self.processes}{several}",
                "code=$?",
                '[ "$code" -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"  # 75: saved, start again',
                'exit "$code"',
            )
        )

    def start(self) -> int:
        """Run the ranks of this node to their end; returns the exit code. Raises ConfigurationError for more processes than GPUs, EnvironmentProblem where the other nodes do not come."""
        import torch
        from torch.distributed import DistError, run
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.elastic.rendezvous import RendezvousError

        if torch.cuda.is_available() and self.processes > torch.cuda.device_count():
            raise ConfigurationError("a process needs a GPU of its own", got=f"--nproc {self.processes}, {torch.cuda.device_count()} GPUs", cure="--nproc auto")
        logging.disable(logging.CRITICAL)  # torchrun's; the ranks are processes of their own
        threads = max(1, (os.cpu_count() or 1) // self.processes)
        os.environ |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)), LAUNCHED: "1"}
        began = time.time()
        with tempfile.TemporaryDirectory() as scratch:
            # -P keeps the folder one stands in off sys.path
            program = [sys.executable, "-P", "-m", "vlm", *self.arguments]
            try:
                run.run(run.parse_args(["--log-dir", scratch, *self.torchrun(), *program]))
            except ChildFailedError as failed:
                return self._say(ends_since(self.folder, began), {rank: failure.exitcode for rank, failure in failed.failures.items()})
            except SignalException as asked:
                return self._say(ends_since(self.folder, began), {}, signal.Signals(asked.sigval))
            except (RendezvousError, DistError) as problem:
                if self.nodes == 1:
                    raise
                raise EnvironmentProblem(
                    f"the {self.nodes} nodes did not find each other at {self.rendezvous}",
                    got=f"{type(problem).__name__}: {str(problem).partition(chr(10))[0]}",
                    cure="start the same command on every node within some minutes; HOST must be the first node, under a name or address that the others reach, with PORT open and free",
                ) from problem
        return 0

    def _say(self, ends: Sequence[End], codes: Mapping[int, int], asked: signal.Signals | None = None) -> int:
        sentence, code = self.verdict(ends, codes, asked)
        print(sentence, file=sys.stderr, flush=True)
        return code

    def verdict(self, ends: Sequence[End], codes: Mapping[int, int], asked: signal.Signals | None = None) -> tuple[str, int]:
        """Why the run ended, in one sentence, and the exit code. ends: what ranks left behind, the earliest first. codes: rank -> exit code, negative for a signal, of this node's. asked: the signal
        that told the launcher to stop.

        The first sentence that a rank could say is the cause; else the first exception that is more than a lost connection; else a signal that is not torchrun's own.
        """
        if said := [end for end in ends if end.expected]:
            first = said[0]
            if first.exit_code == Stopped.exit_code:
                return first.message, first.exit_code
            same = [end.rank for end in said if end.message == first.message]
            return f"{first.message}\n  said by {_ranks(same)} on {first.host}; logs: {log_of(self.folder, '*')}", first.exit_code
        if asked is not None:
            return f"stopped by {asked.name}; {AGAIN}", 128 + asked
        own = [end for end in ends if not any(mark in end.message for mark in LOST)]
        if own:
            return f"rank {own[0].rank} on {own[0].host} failed: {own[0].message}\n  its log: {log_of(self.folder, own[0].rank)}", 1
        if strange := {rank: code for rank, code in codes.items() if code < 0 and -code != signal.SIGTERM}:
            return self._ended(*next(iter(strange.items())))
        if ends:
            return f"rank {ends[0].rank} on {ends[0].host} lost the other ranks: the cause is with one of another node, see what was said there\n  {ends[0].message}", 1
        return self._ended(*next(iter(codes.items())))

    def _ended(self, rank: int, code: int) -> tuple[str, int]:
        """Of a rank that could say nothing."""
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        why = "; mostly that means that the machine's memory ran out (dmesg says so): fewer `workers`" if -code == signal.SIGKILL else ""
        log = f"its log: {log_of(self.folder, rank)}; {AGAIN}"
        return f"rank {rank} on {gethostname()} was ended by {how}{why}\n  {log}", code if code > 0 else 128 - code


def start_ranks(
    arguments: Sequence[str], folder: Path, *, nproc: str = "1", nodes: int = 1, node_rank: int | None = None, rendezvous: str | None = None, print_only: bool = False
) -> int | None:
    """What `vlm train` is asked for beyond one process: the exit code of the ranks that were started, or None where this process is to train, as the only one or as one that others have started.

    arguments: of `vlm`. folder: of the run. nproc: per node, a number or `auto`. Under srun a node's rank is Slurm's. Raises ConfigurationError for numbers that cannot be, or several nodes without
    a meeting point.
    """
    several = nodes > 1 or nproc != "1"
    if is_rank(os.environ, several) or not (several or print_only):
        return None
    if nodes > 1 and node_rank is None and "SLURM_STEP_NUM_TASKS" in os.environ:
        node_rank = int(os.environ["SLURM_NODEID"])
    found = Launch(processes_of(nproc), nodes, node_rank, rendezvous, _kept(arguments), folder)
    found.check()
    check_place(folder)
    if print_only:
        print(f"{found.lines()}\n\n{found.sbatch()}")
        return 0
    if found.processes * nodes == 1:
        return None
    print(f"{found.lines()}\nfor Slurm: the same command with --print-only. Logs: {log_of(folder, '*')}", flush=True)
    return found.start()


def processes_of(asked: str) -> int:
    """--nproc: a number, or `auto`: one per GPU, one without. Raises ConfigurationError."""
    if asked == "auto":
        import torch

        return max(1, torch.cuda.device_count())
    if not asked.isdecimal() or not int(asked):
        raise ConfigurationError("--nproc is a number of processes", got=asked, expected="1, 2, ... or auto")
    return int(asked)


def _kept(arguments: Sequence[str]) -> tuple[str, ...]:
    kept, skip = [], 0
    for argument in arguments:
        if skip:
            skip -= 1
        elif argument in OPTIONS:
            skip = OPTIONS[argument]
        elif argument.partition("=")[0] not in OPTIONS:
            kept.append(argument)
    return tuple(kept)


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, sorted(ranks)))}"
