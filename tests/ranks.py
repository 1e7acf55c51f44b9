"""Scripts run by one process or by torchrun on two ranks, and gradients compared between them."""

import os
import subprocess
import sys
from pathlib import Path

import torch

__all__ = ["assert_equal_gradients", "launch"]


def launch(worker: Path, root: Path, out: Path, zero: int, ranks: int, *more: str) -> Path:
    """Run `worker ROOT OUT ZERO MORE...`; -> OUT."""
    out.mkdir(exist_ok=True)
    head = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([*head, str(worker), str(root), str(out), str(zero), *more], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return out


def assert_equal_gradients(expected: dict[str, torch.Tensor], got: dict[str, torch.Tensor]) -> None:
    """DESIGN rule 3, of weights after one SGD step of rate 1."""
    assert expected.keys() == got.keys()
    largest = max(tensor.abs().max() for tensor in expected.values())
    for name, tensor in expected.items():
        gap = (tensor - got[name]).abs().max()
        assert gap <= 1e-5 * tensor.abs().max() + 1e-6 * largest, (name, float(gap))
