"""The one strict loader: tensors into a module, each exactly once, aware of ZeRO 3's partitioning."""

import re
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from vlm.errors import CheckpointError, listed
from vlm.initial import gathered

__all__ = ["DERIVED", "copy_rows", "load_tensors"]

DERIVED = re.compile(r"(rotary_emb\.inv_freq|\.masked_bias|\.attn\.bias|attention\.bias|position_ids)$")
"""Buffers that old files carry and modules compute by themselves."""


def load_tensors(
    module: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    source: str,
    key: Callable[[str], str | None] = lambda name: name,
    grow: Iterable[str] = (),
    spell: Callable[[str], str] = lambda name: name,
    what: str = "model",
    whole: bool = False,
) -> None:
    """Copy tensors into a module, every parameter and persistent buffer exactly once; a tied one may come under both names where its values are the same.

    Args:
        source: what the messages call the checkpoint. key: name in the file -> name in the module, None to leave it out.
        grow: names whose rows may be more than the file's (embedding and head of a vocabulary with added tokens); new rows start as the mean of the old ones.
        spell: name in the module -> how messages call it. what: how they call the module.
        whole: the caller has gathered the module's parameters, and this may not scatter them.

    Raises CheckpointError naming missing, unexpected, contradictory and mis-shaped keys.
    """
    targets = {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}
    storage: dict[int, list[str]] = {}
    for name, tensor in targets.items():
        storage.setdefault(id(tensor), []).append(name)
    seen: set[str] = set()
    unexpected: list[str] = []
    misshaped: list[str] = []
    contradictory: list[str] = []
    growing = set(grow)
    for file_name, tensor in tensors:
        name = key(file_name)
        if name is None or (name not in targets and DERIVED.search(name)):
            continue
        if name not in targets:
            unexpected.append(file_name)
            continue
        target = targets[name]
        with gathered([target] if isinstance(target, nn.Parameter) and not whole else []):
            if name in seen:
                if not _holds(target, tensor):
                    contradictory.append(file_name)
                continue
            seen.update(storage[id(target)])
            if not copy_rows(target, tensor, name in growing):
                misshaped.append(f"{file_name} {tuple(tensor.shape)} for {_shape(target)}")
    missing = sorted(spell(name) for name in set(targets) - seen)
    kinds = (("missing", missing), ("unexpected", unexpected), ("given twice with different values", contradictory), ("mis-shaped", misshaped))
    problems = [f"{len(names)} {kind} ({listed(names)})" for kind, names in kinds if names]
    if problems:
        raise CheckpointError(
            f"{source} does not fit the {what}",
            got="; ".join(problems),
            expected=f"{len(targets)} tensors, each once, in their shapes",
            cure="check that the configuration describes this checkpoint",
        )


@torch.no_grad()
def copy_rows(target: Tensor, tensor: Tensor, grow: bool = False) -> bool:
    """Copy a tensor into one of its shape or, with `grow`, into one of more rows, the new ones the mean of the old; whether it fits. Under ZeRO 3 the caller has gathered the target."""
    shape = _shape(target)
    if tuple(tensor.shape) != shape and not (grow and tensor.ndim == 2 and tensor.shape[1:] == shape[1:] and 0 < len(tensor) < shape[0]):
        return False
    if target.numel():  # under ZeRO 3 only the gathering rank holds it whole
        target[: len(tensor)].copy_(tensor) if tensor.ndim else target.copy_(tensor)
        if tensor.ndim and len(tensor) < len(target):
            target[len(tensor) :].copy_(tensor.float().mean(0, keepdim=True))
    return True


def _shape(target: Tensor) -> tuple[int, ...]:
    return tuple(getattr(target, "ds_shape", target.shape))


def _holds(target: Tensor, tensor: Tensor) -> bool:
    """Whether the target already has these values, in its dtype."""
    held = target[: len(tensor)] if tensor.ndim else target
    return not target.numel() or torch.equal(held, tensor.to(target.dtype).to(target.device))
