"""The printed table of what is trained, and the check that it is what was named."""

from collections.abc import Iterable, Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from vlm.errors import ConfigurationError
from vlm.train.optim import Group

__all__ = ["check_ledger", "ledger_rows", "print_ledger"]


def ledger_rows(groups: Iterable[Group]) -> list[dict[str, object]]:
    """One row per group, as it is printed and written into the run's folder."""
    return [
        {
            "group": group.path,
            "tensors": len(group.parameters),
            "parameters": group.count,
            "rate": group.rate,
            "decay": group.decay if group.rate is not None else None,
            "why": "trained" if group.rate is not None else "kept for the checkpoint, no gradient reaches it" if group.idle else "frozen",
        }
        for group in groups
    ]


def print_ledger(groups: Sequence[Group], console: Console, title: str) -> None:
    table = Table(title=title, title_justify="left")
    for name in ("group", "tensors", "parameters", "rate", "decay", "why"):
        table.add_column(name, justify="left" if name in ("group", "why") else "right", no_wrap=name == "group")
    for row in ledger_rows(groups):
        table.add_row(*("" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)


def check_ledger(groups: Iterable[Group], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Stop where what will be trained is not what was named: the planned parameters, those with requires_grad and those in the optimizer must be the same. Raises ConfigurationError."""
    groups = list(groups)
    names = {id(p): name for group in groups for p, name in zip(group.parameters, group.names, strict=True)}
    planned = {id(p) for group in groups if group.rate is not None for p in group.parameters}
    wanting = {id(p) for p in model.parameters() if p.requires_grad}
    held = [id(p) for entry in optimizer.param_groups for p in entry["params"]]
    for what, wrong in (
        ("is trained, but nobody named it", wanting - planned),
        ("was named, but is frozen", planned - wanting),
        ("wants a gradient, but no optimizer group holds it", wanting - set(held)),
        ("is held by the optimizer, but frozen", set(held) - wanting),
        ("is in two optimizer groups", {key for key in held if held.count(key) > 1} if len(held) != len(set(held)) else set()),
    ):
        if wrong:
            some = sorted(names.get(key, "a parameter outside of the model's groups") for key in wrong)
            raise ConfigurationError(
                f"the ledger does not balance: {some[0]} {what}", got=f"{len(some)} such tensors", cure="mend the part that changed requires_grad, or its groups()"
            )
