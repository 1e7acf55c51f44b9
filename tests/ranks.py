"""Scripts run by one process or by torchrun on two ranks, and gradients compared between them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

__all__ = ["assert_equal_steps", "assert_resumed", "launch"]


def launch(worker: Path, root: Path, out: Path, zero: int, ranks: int, *more: str) -> Path:
    """Run `worker ROOT OUT ZERO MORE...`; -> OUT."""
    out.mkdir(exist_ok=True)
    head = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([*head, str(worker), str(root), str(out), str(zero), *more], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return out


def assert_equal_steps(one: Path, two: Path) -> None:
    """DESIGN rule 3: the loss of one SGD step of rate 1, and the weights behind it, as `ranks_worker.sgd_step` writes them."""
    assert json.loads((two / "sgd.json").read_text()) == pytest.approx(json.loads((one / "sgd.json").read_text()), rel=1e-6), two
    expected, got = (load_file(folder / "sgd.safetensors") for folder in (one, two))
    assert expected.keys() == got.keys()
    largest = max(tensor.abs().max() for tensor in expected.values())
    for name, tensor in expected.items():
        gap = (tensor - got[name]).abs().max()
        assert gap <= 1e-5 * tensor.abs().max() + 1e-6 * largest, (name, float(gap))


def assert_resumed(folder: Path) -> None:
    """The exports of the runs `whole` and `cut`, as `ranks_worker.interrupted` writes them, are equal bit for bit."""
    whole, cut = (load_file(folder / name / "export" / "model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)
