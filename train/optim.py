"""Who is trained at what rate: a stage's `train` tree laid over the parameter groups that the parts declare."""

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlm.errors import ConfigurationError
from vlm.train.config import OptimizerSpec

__all__ = ["Group", "adamw", "decays", "elements", "plan", "rates"]

_NEVER_DECAYED = re.compile(
    r"(cls_token|class_token|reg_token|register_tokens?|mask_token|pos_embed|position_embedding|embed_positions|\bwpe\b|class_embedding|queries|query_tokens?)"
)


@dataclass(frozen=True)
class Group:
    """One line of the ledger: tensors of one parameter group with one rate and one decay. rate None: frozen. idle: kept for a checkpoint's sake, never trained."""

    path: str
    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    rate: float | None
    decay: float = 0.0
    idle: bool = False

    @property
    def count(self) -> int:
        """Number of parameters."""
        return elements(self.parameters)


def elements(parameters: Iterable[nn.Parameter]) -> int:
    """How many numbers they hold, whole ones also where ZeRO 3 has partitioned them."""
    return sum(int(getattr(parameter, "ds_numel", parameter.numel())) for parameter in parameters)


def rates(paths: Iterable[str], tree: Mapping[str, Any]) -> dict[str, float | None]:
    """Rate per group path, None = frozen.

    A number covers everything below; in a mapping `rest` covers what is not named there; `frozen` freezes; what nobody names is frozen. Raises ConfigurationError for a name that no group has.
    """
    paths = list(paths)
    _check_names(paths, tree, ())
    return {path: _rate(path, tree) for path in paths}


def _rate(path: str, tree: Mapping[str, Any]) -> float | None:
    node: Any = {**tree}
    for word in path.split("."):
        if not isinstance(node, Mapping):
            break
        node = node[word] if word in node else node.get("rest")
    if isinstance(node, Mapping):
        node = node.get("rest")
    return None if node is None or node == "frozen" else float(node)


def _check_names(paths: list[str], tree: Mapping[str, Any], prefix: tuple[str, ...]) -> None:
    known = {path.split(".")[len(prefix)] for path in paths if tuple(path.split(".")[: len(prefix)]) == prefix and path.count(".") >= len(prefix)}
    for word, node in tree.items():
        here = ".".join((*prefix, word))
        if word != "rest" and word not in known:
            near = difflib.get_close_matches(word, known, 1)
            raise ConfigurationError(
                f"train: no group {here!r}",
                expected=f"one of {', '.join(sorted(known)) or 'nothing below ' + '.'.join(prefix)}",
                cure=f"did you mean {near[0]!r}?" if near else None,
            )
        if isinstance(node, Mapping) and word != "rest":
            _check_names(paths, node, (*prefix, word))
        elif not _is_rate(node):
            raise ConfigurationError(
                f"train: the rate of {here!r} is no rate", got=repr(node), expected="a number from 0 on, or frozen" + (", or a mapping" if word != "rest" else "")
            )


def _is_rate(node: object) -> bool:
    return node == "frozen" or (isinstance(node, int | float) and not isinstance(node, bool) and 0 <= node < math.inf)


def decays(name: str, shape: Iterable[int]) -> bool:
    """Whether weight decay applies: matrices only; no vectors, biases, norms, learned tokens or positions."""
    return len(list(shape)) > 1 and not _NEVER_DECAYED.search(name)


def plan(
    named: Mapping[str, nn.Parameter], groups: Mapping[str, Iterable[nn.Parameter]], tree: Mapping[str, Any], optimizer: OptimizerSpec, unused: Iterable[nn.Parameter] = ()
) -> list[Group]:
    """Every parameter in exactly one Group (a tied one once), in the model's order of names.

    named: name -> parameter of the whole model. groups: path -> parameters. Raises ConfigurationError where a parameter has no group or two, or where nothing would be trained.
    """
    names: dict[int, str] = {}
    for name, parameter in named.items():
        names.setdefault(id(parameter), name)
    owner: dict[int, str] = {}
    for path, parameters in groups.items():
        for parameter in parameters:
            if owner.setdefault(id(parameter), path) != path:
                raise ConfigurationError(f"parameter {names.get(id(parameter), '?')} is in two groups", got=f"{owner[id(parameter)]} and {path}", cure="mend the part's groups()")
    homeless = [name for key, name in names.items() if key not in owner]
    if homeless:
        raise ConfigurationError("parameters without a group", got=", ".join(homeless[:5]), cure="mend the part's groups()")
    wanted = rates(groups, tree)
    idle = {id(parameter) for parameter in unused}
    lines: dict[tuple[str, float, bool], list[nn.Parameter]] = {}
    by_id = {id(parameter): parameter for parameter in named.values()}
    for key, name in names.items():
        parameter = by_id[key]
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        decay = optimizer.weight_decay if decays(name, shape) else 0.0
        lines.setdefault((owner[key], decay, key in idle), []).append(parameter)
    planned = [Group(path, tuple(names[id(p)] for p in found), tuple(found), None if still else wanted[path], decay, still) for (path, decay, still), found in lines.items()]
    if not any(group.rate is not None for group in planned):
        raise ConfigurationError("train: this stage would train nothing", got=repr(dict(tree)), expected=f"a rate for one of {', '.join(sorted(groups))}")
    return planned


def adamw(groups: Iterable[Group], spec: OptimizerSpec) -> torch.optim.AdamW:
    """Client AdamW over the trained groups; freezes all others. Each optimizer group carries its `path` and its peak rate."""
    trained = []
    for group in groups:
        for parameter in group.parameters:
            parameter.requires_grad_(group.rate is not None)
        if group.rate is not None:
            trained.append({"params": list(group.parameters), "lr": group.rate, "peak": group.rate, "weight_decay": group.decay, "path": group.path})
    return torch.optim.AdamW(trained, betas=spec.betas, eps=spec.eps, fused=True)
