"""First values of modules that load none. Works on parameters that ZeRO 3 has partitioned."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

__all__ = ["draw", "gathered"]


def gathered(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
    """Whole parameters inside the block; what rank 0 wrote is what all ranks keep. Without ZeRO 3 it does nothing."""
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0)


def draw(module: nn.Module) -> None:
    """Draw first values of a module tree: transformers' models by their own rules, everything else by `reset_parameters`. The caller has gathered the parameters."""
    from transformers import PreTrainedModel

    if isinstance(module, PreTrainedModel):
        for marked in (*module.modules(), *module.parameters()):
            marked._is_hf_initialized = False  # type: ignore[assignment]
        module.initialize_weights()
        return
    reset = getattr(module, "reset_parameters", None)
    if callable(reset):
        reset()
    for child in module.children():
        draw(child)
