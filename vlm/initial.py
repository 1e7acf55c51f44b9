"""First values of modules that load none. Works on parameters that ZeRO 3 has partitioned."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from vlm.errors import ConfigurationError

__all__ = ["draw", "first_values", "gathered"]


def gathered(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
    """Whole parameters inside the block; what rank 0 wrote is what all ranks keep. Without ZeRO 3 it does nothing."""
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0)


def first_values(part: nn.Module, initialise: Callable[[], None], *, reads: nn.Module | None = None) -> None:
    """Run a part's `initialise` over whole parameters and prove that it gave every one a value. reads: a module that it copies from.

    Raises ConfigurationError naming parameters that kept whatever the memory held.
    """
    with gathered([*part.parameters(), *(reads.parameters() if reads is not None else ())]):
        with torch.no_grad():
            for parameter in part.parameters():
                parameter.fill_(torch.nan)
            initialise()
            forgotten = [name for name, parameter in part.named_parameters() if parameter.isnan().any()]
        if forgotten:
            raise ConfigurationError(
                f"{type(part).__name__} leaves parameters without a first value",
                got=", ".join(forgotten[:5]),
                cure="set them in `initialise`, or give their module `reset_parameters`",
            )


def draw(module: nn.Module) -> None:
    """Draw first values of a module tree: transformers' models by their own rules, everything else by `reset_parameters`. The caller has gathered the parameters."""
    from transformers import PreTrainedModel

    if isinstance(module, PreTrainedModel):
        for marked in (*module.modules(), *module.parameters()):
            marked._is_hf_initialized = False  # type: ignore[assignment]
        module.initialize_weights()
        return
    reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    if callable(reset):
        reset()
    for child in module.children():
        draw(child)
