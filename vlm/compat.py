"""Cures for faults of the libraries, each with its reason and the version that ends it. Imports nothing heavy."""

import importlib.abc
import importlib.util
import sys
from pathlib import Path
from typing import Any

_kept: list[Any] = []  # operator schemas are unregistered when their Library object is collected


class _TorchvisionCure(importlib.abc.MetaPathFinder):
    """Makes torchvision's Python half importable where its compiled half does not fit the installed torch.

    torchvision 0.28 beside a CPU-only torch 2.13 fails with `operator torchvision::nms does not exist`, and takes transformers, peft, timm and open_clip with it.
    Two operator schemas are all its import needs. Ends when PyPI's torchvision loads beside a CPU torch.
    """

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname != "torchvision":
            return
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torchvision")
        if spec is None or spec.origin is None:
            return
        import torch

        library = Path(spec.origin).parent / "_C.so"
        try:
            torch.ops.load_library(str(library))
        except OSError:
            schemas = torch.library.Library("torchvision", "FRAGMENT")
            schemas.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            schemas.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _kept.append(schemas)


def cure_torchvision() -> None:
    """Install the cure; it acts when `torchvision` is first imported, so it costs nothing before."""
    if not any(isinstance(finder, _TorchvisionCure) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TorchvisionCure())
