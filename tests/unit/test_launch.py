"""Several processes, of one machine or of several: what is started, who is a rank, and what is said when one fails."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from interrupted import records

import vlm
from vlm.errors import ConfigurationError, EnvironmentProblem
from vlm.train import steps
from vlm.train.launch import Launch, start_ranks
from vlm.train.rank import End, as_rank, is_rank

FAULTS = """
import os, signal
from vlm.errors import DataError
from vlm.train.steps import StepData

whole, fault, where = StepData.__getitem__, os.environ["FAULT"], os.environ.get("FAULT_RANK")

def broken(self, number):
    if number == 2 and where in (None, str(self.rank)):
        if fault == "sentence":
            raise DataError("picture 7.png is cut", cure="fetch it again")
        if fault == "exception":
            raise ValueError("a fault of the program")
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(self, number)

StepData.__getitem__ = broken
"""
"""Step 3 fails, on the rank that the environment names or on all."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    tiny.data_root(folder / "data")
    (folder / "faults.py").write_text(FAULTS)
    return folder


def started(root: Path, name: str, *options: str, count: int = 4, fault: dict[str, str] | None = None) -> "subprocess.Popen[str]":
    """`vlm train llava_tiny` in the folder, in the background. fault: what faults.py reads."""
    overrides = ("data_root=data", f"name={name}", f"every_stage.steps={count}", "every_stage.epochs=null", "every_stage.deepspeed=zero0")
    command = [sys.executable, "-m", "vlm", *(["--import", "faults.py"] if fault else []), "train", "llava_tiny", *overrides, *options]
    return subprocess.Popen(command, cwd=root, env=os.environ | (fault or {}), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch_of(nodes: int = 1, node_rank: int | None = None) -> Launch:
    return Launch(4, nodes, node_rank, "node1:29500" if nodes > 1 else None, ("train", "llava_tiny", "data_root=/some data"), Path("runs/llava_tiny"))


# ---- what is started -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("nodes", "node_rank"), [(1, None), (2, None), (2, 1)])
def test_the_lines_mean_to_their_launchers_what_is_meant(nodes: int, node_rank: int | None) -> None:
    from deepspeed.launcher.runner import parse_args as deepspeed_arguments
    from torch.distributed.run import parse_args as torchrun_arguments

    torchrun, deepspeed = launch_of(nodes, node_rank).lines().splitlines()
    one = torchrun_arguments(shlex.split(torchrun)[1:])
    assert (one.nproc_per_node, one.training_script, one.training_script_args) == ("4", "vlm", ["train", "llava_tiny", "data_root=/some data"]) and one.no_python
    assert one.standalone if nodes == 1 else one.nnodes == "2"
    if node_rank is not None:
        assert (one.node_rank, one.master_addr, one.master_port) == (1, "node1", 29500)
    elif nodes > 1:
        assert (one.rdzv_backend, one.rdzv_endpoint) == ("c10d", "node1:29500")
    other = deepspeed_arguments(shlex.split(deepspeed)[1:])
    assert (other.num_gpus, other.user_script, other.user_args) == (4, "vlm", ["train", "llava_tiny", "data_root=/some data"]) and other.module and other.no_local_rank
    assert other.num_nodes == (nodes if nodes > 1 else -1)


@pytest.mark.parametrize("nodes", [1, 2])
def test_the_script_for_slurm_saves_requeues_and_goes_on(nodes: int, tmp_path: Path) -> None:
    """Run by bash, with stand-ins for Slurm's commands that write down what they are told."""
    for name, body in (("scontrol", 'echo "$0 $@" >> told; echo node1; echo node2'), ("srun", 'printf "%s\\n" "$@" > ran; exit 75')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    script = launch_of(nodes).sbatch()
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "node[1-2]"}, check=False
    )
    assert done.returncode == 75 and "scontrol requeue 17" in (tmp_path / "told").read_text()
    more = ["--nodes", "2", "--rendezvous", "node1:29500"] if nodes > 1 else []
    assert (tmp_path / "ran").read_text().splitlines()[1:] == ["vlm", "train", "llava_tiny", "data_root=/some data", "--resume", "--nproc", "4", *more]
    assert "#SBATCH --signal=TERM@120" in script.splitlines()


def test_print_only_starts_nothing_and_keeps_the_other_arguments(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Launch, "start", lambda _: pytest.fail("started"))
    arguments = ["--import", "mine.py", "train", "x.yaml", "--nproc", "2", "--nodes=2", "--rendezvous", "a:1", "seed=1", "--print-only", "--resume"]
    assert start_ranks(arguments, Path("runs/x"), nproc="2", nodes=2, rendezvous="a:1", print_only=True) == 0
    said = capsys.readouterr().out
    assert "vlm --import mine.py train x.yaml seed=1 --resume\n" in said and "--resume --nproc 2 --nodes 2" in said and "--resume --resume" not in said


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ({"nproc": "all"}, "number of processes"),
        ({"nproc": "0"}, "number of processes"),
        ({"nodes": 2}, "HOST:PORT"),
        ({"nodes": 2, "rendezvous": "node1"}, "HOST:PORT"),
        ({"nodes": 2, "rendezvous": "node1:1", "node_rank": 2}, "no such node"),
    ],
)
def test_what_cannot_be_started_is_refused(asked: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        start_ranks([], Path("runs/x"), **asked)  # type: ignore[arg-type]


def test_nodes_that_do_not_come_are_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed import run
    from torch.distributed.elastic.rendezvous import RendezvousTimeoutError

    def alone(_: object) -> None:
        raise RendezvousTimeoutError

    monkeypatch.setattr(run, "run", alone)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr("logging.disable", lambda _: None)
    with pytest.raises(EnvironmentProblem, match=r"the 2 nodes did not find each other at node1:29500.*every node"):
        launch_of(2).start()


SRUN = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}


@pytest.mark.parametrize(
    ("environment", "several", "rank"),
    [
        ({}, True, False),
        ({"RANK": "0", "WORLD_SIZE": "2"}, True, True),  # torchrun, DeepSpeed
        (SRUN, True, True),  # two tasks per node
        (SRUN | {"SLURM_STEP_NUM_TASKS": "2"}, True, False),  # one task per node, which is to start --nproc
        (SRUN | {"SLURM_STEP_NUM_TASKS": "2"}, False, True),  # one task per node, and nothing else asked
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, True, False),  # the batch script itself
    ],
)
def test_who_is_a_rank(environment: dict[str, str], several: bool, rank: bool) -> None:
    assert is_rank(environment, several) == rank


def test_a_task_of_srun_learns_its_rank(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(EnvironmentProblem, match="no MASTER_ADDR and no MASTER_PORT"), as_rank(tmp_path):
        pass
    monkeypatch.setattr(os, "environ", dict(os.environ) | {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"})
    with as_rank(tmp_path):
        assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["3", "4", "1"]


# ---- what is said ----------------------------------------------------------------------------------------------------------------

GONE = "RuntimeError: [gloo/transport/tcp/pair.cc:538] Connection closed by peer [10.0.0.2]:4711"


def end(rank: int, message: str, *, expected: bool = False, code: int = 1) -> End:
    return End(rank, f"node{rank}", float(rank), message, expected, code)


@pytest.mark.parametrize(
    ("ends", "codes", "asked", "said", "code"),
    [
        ([end(0, GONE), end(1, "DataError: cut", expected=True)], {0: 1}, None, ["DataError: cut", "rank 1 on node1"], 1),
        ([end(0, "DataError: cut", expected=True), end(2, "DataError: cut", expected=True)], {0: 1, 2: 1}, None, ["ranks 0, 2"], 1),
        ([end(0, GONE), end(1, "ValueError: odd")], {0: 1, 1: 1}, None, ["rank 1 on node1 failed: ValueError: odd", "rank-1.log"], 1),
        ([end(0, GONE)], {0: 1, 1: -9}, None, ["rank 1", "SIGKILL", "memory", "--resume"], 137),
        ([end(0, GONE)], {0: 1}, None, ["another node", "Connection closed"], 1),
        ([], {0: -15, 1: -11}, None, ["rank 1", "SIGSEGV"], 139),
        ([], {1: 3}, None, ["rank 1 on", "exit code 3"], 3),
        ([], {0: -15}, None, ["rank 0", "SIGTERM"], 143),
        ([end(0, GONE)], {0: 1, 1: -15}, None, ["another node"], 1),
        ([end(0, "Stopped: saved", expected=True, code=75)], {}, signal.SIGTERM, ["Stopped: saved"], 75),
        ([], {}, signal.SIGINT, ["stopped by SIGINT", "--resume"], 130),
    ],
)
def test_one_sentence_names_the_cause(ends: list[End], codes: dict[int, int], asked: signal.Signals | None, said: list[str], code: int) -> None:
    sentence, got = launch_of().verdict(ends, codes, asked)
    assert all(part in sentence for part in said) and got == code, sentence


def finished(process: "subprocess.Popen[str]") -> tuple[str, str, int]:
    out, err = process.communicate(timeout=200)
    return out, err, process.returncode


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("fault", "rank", "said"),
    [
        ("sentence", None, "DataError: picture 7.png is cut. fetch it again\n  said by rank"),
        ("killed", "1", "rank 1 on"),
        ("exception", "1", "failed: ValueError: a fault of the program"),
    ],
)
def test_a_rank_that_fails_is_one_sentence(root: Path, fault: str, rank: str | None, said: str) -> None:
    process = started(root, fault, "workers=0", "--nproc", "2", fault={"FAULT": fault} | ({"FAULT_RANK": rank} if rank else {}))
    out, err, code = finished(process)
    assert code == (137 if fault == "killed" else 1) and said in err, err
    assert "Traceback" not in out + err and len(err.strip().splitlines()) == 2, err
    logs = [(root / "runs" / fault / "logs" / f"rank-{number}.log").read_text() for number in (0, 1)]
    assert all(f"rank {number} of 2" in text for number, text in enumerate(logs))
    assert ("ValueError: a fault" in logs[1]) == (fault == "exception")


@pytest.mark.ranks
def test_two_nodes_equal_one_process(root: Path) -> None:
    """Two launchers meet on the loopback, one process each."""
    overrides = ("every_stage.steps=4", "every_stage.epochs=null", "every_stage.deepspeed=zero0")
    one = vlm.fit(vlm.compose("llava_tiny", f"data_root={root / 'data'}", f"runs={root / 'runs'}", "name=one", *overrides))
    meet = ("--nodes", "2", "--nproc", "1", "--rendezvous", f"127.0.0.1:{free_port()}")
    both = [finished(process) for process in [started(root, "pair", *meet) for _ in range(2)]]
    assert [code for *_, code in both] == [0, 0], both
    assert sum("finished: " in out for out, *_ in both) == 1
    losses = [[record["loss"] for record in records(folder)] for folder in (one, root / "runs" / "pair")]
    assert len(losses[0]) == 8 and losses[1] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.ranks
def test_a_failure_on_one_node_is_told_on_both(root: Path) -> None:
    meet = ("--nodes", "2", "--rendezvous", f"127.0.0.1:{free_port()}", "--node-rank")
    both = [finished(process) for process in [started(root, "apart", "workers=0", *meet, str(node), fault={"FAULT": "sentence", "FAULT_RANK": "1"}) for node in range(2)]]
    for _, err, code in both:
        assert code == 1 and err.startswith("DataError: picture 7.png is cut") and "rank 1 on" in err and "Traceback" not in err, err


@pytest.mark.ranks
def test_a_launcher_that_is_asked_to_stop_saves(root: Path) -> None:
    """torchrun passes the signal to the whole process group of each rank, data workers included."""
    process = started(root, "stopped", "--nproc", "2", "workers=2", count=5000)
    metrics, deadline = root / "runs" / "stopped" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.is_file() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, err, code = finished(process)
    assert code == 75 and err.startswith("Stopped: SIGTERM") and "--resume" in err, err
    assert list((root / "runs" / "stopped" / "resume").glob("step-*"))


# ---- data workers ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("death", ["exit", "signal"])
def test_a_data_worker_that_dies_is_a_sentence(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, death: str) -> None:
    whole, parent = steps.StepData.__getitem__, os.getpid()

    def fatal(data: steps.StepData, number: int) -> steps.Step:
        if number == 3 and os.getpid() != parent:
            if death == "exit":
                os._exit(9)
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(data, number)

    monkeypatch.setattr(steps.StepData, "__getitem__", fatal)
    with pytest.raises(EnvironmentProblem, match="a data worker died") as caught:
        vlm.fit(vlm.compose("llava_tiny", f"data_root={root / 'data'}", f"runs={tmp_path}", "every_stage.steps=8", "every_stage.epochs=null", "workers=2"))
    assert "DataLoader worker (pid" in str(caught.value) and "workers: 0" in str(caught.value)  # how it died, torch does not always see


def test_an_exception_of_a_reader_in_a_worker_keeps_its_traceback(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def odd(*_: object) -> steps.Step:
        raise RuntimeError("a fault of the reader")

    monkeypatch.setattr(steps.StepData, "__getitem__", odd)
    with pytest.raises(RuntimeError, match="a fault of the reader"):
        vlm.fit(vlm.compose("llava_tiny", f"data_root={root / 'data'}", f"runs={tmp_path}", "every_stage.steps=8", "every_stage.epochs=null", "workers=1"))
