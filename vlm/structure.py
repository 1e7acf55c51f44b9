"""Structures of other makers without values, and whole ones where ZeRO 3 partitions everything else."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["hollow", "unpartitioned"]


@contextmanager
def unpartitioned() -> Iterator[Callable[[nn.Module], None]]:
    """Modules made inside are whole even where ZeRO 3 partitions what is constructed: foreign constructors look at values and shapes. Gives what partitions them afterwards."""
    zero: Any = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    active = zero.top_level_context if zero is not None else None
    if zero is None or active is None or not active.patched:  # no ZeRO 3, or inside another of these
        yield lambda module: None
        return

    def partition(module: nn.Module) -> None:
        for one in module.modules():
            active._post_init_method(one)

    zero.shutdown_init_context()
    try:
        yield partition
    finally:
        zero.restore_init_context()


@contextmanager
def hollow() -> Iterator[None]:
    """On the meta device, outside of ZeRO 3, drawing no random number that others would miss."""
    with unpartitioned(), torch.device("meta"), torch.random.fork_rng(devices=[]):
        yield
