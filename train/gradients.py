"""Trained tensors that no gradient reaches: they cost memory and stay what they were, and no loss curve says so."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from vlm.errors import listed
from vlm.train.engine import Engine

__all__ = ["reached", "unreached"]


@contextmanager
def reached(model: nn.Module) -> Iterator[set[str]]:
    """Names of the trained tensors to which a backward inside brings a gradient, be it zero."""
    found: set[str] = set()

    def note(name: str) -> None:
        found.add(name)

    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(lambda _, name=name: note(name)) for name, parameter in trained]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def unreached(engine: Engine, found: set[str]) -> Iterator[str]:
    """A sentence per group with trained tensors that are `found` on no rank. Called on all ranks."""
    everywhere = set().union(*engine.gather(found))
    owner = {id(parameter): path for path, parameters in engine.model.groups().items() for parameter in parameters}  # type: ignore[operator]
    missed: dict[str, list[str]] = {}
    for name, parameter in engine.model.named_parameters():
        if parameter.requires_grad and name not in everywhere:
            missed.setdefault(owner[id(parameter)], []).append(name)
    for path, names in missed.items():
        what = f"{len(names)} trained tensors of {path}" if len(names) > 1 else f"a trained tensor of {path}"
        yield f"no gradient reaches {what} ({listed(names)}); freeze the group, or let the part's unused() name what is kept for a checkpoint's sake"
