"""Expected against got: shapes, dtypes, integers, strings and booleans exactly, floating-point numbers within the case's tolerance."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Aliases", "differences", "tolerance_of"]

Aliases = Callable[[str], Sequence[str]]


def tolerance_of(name: str, table: Any, aliases: Aliases = lambda name: ()) -> tuple[float, float]:
    """(atol, rtol) of the output `name`.

    `table`: "exact", a pair {atol, rtol}, or pairs and "exact" by name, where `default` or a pair at the top serves the rest. Looked up are the full name,
    what is left of it when dotted parts are cut from its end, then what the family says (`aliases`).

    Raises:
        AssertionError: the table has nothing for `name`.
    """
    if table == "exact":
        return 0.0, 0.0
    parts = name.split(".")
    tried = [".".join(parts[:count]) for count in range(len(parts), 0, -1)] + list(aliases(name)) + ["default"]
    for candidate in tried:
        if candidate in table:
            return tolerance_of(name, table[candidate])
    assert "atol" in table or "rtol" in table, f"no tolerance for {name}: tried {tried} in {sorted(table)}"
    return float(table.get("atol", 0.0)), float(table.get("rtol", 0.0))


def differences(expected: Mapping[str, Any], got: Mapping[str, Any], table: Any, aliases: Aliases = lambda name: ()) -> list[str]:
    """What keeps the case from passing, one line each; empty when every expected output was compared and agrees."""
    found = []
    for name, value in expected.items():
        if name not in got:
            found.append(f"{name}: was not computed")
            continue

        def tolerance(place: str) -> tuple[float, float]:
            return tolerance_of(place, table, aliases)

        found += _tensor(name, value, got[name], tolerance) if isinstance(value, Tensor) else _json(name, value, got[name], tolerance)
    return found


def _tensor(name: str, expected: Tensor, got: Any, tolerance: Callable[[str], tuple[float, float]]) -> list[str]:
    value = got.detach() if isinstance(got, Tensor) else torch.as_tensor(got)
    if value.shape != expected.shape or value.dtype != expected.dtype:
        return [f"{name}: {tuple(value.shape)} {value.dtype}, expected {tuple(expected.shape)} {expected.dtype}"]
    if not expected.dtype.is_floating_point:
        wrong = value != expected
        return [f"{name}: {int(wrong.sum())} of {wrong.numel()} differ, first at {wrong.nonzero()[0].tolist()}"] if wrong.any() else []
    atol, rtol = tolerance(name)
    value, expected = value.double(), expected.double()
    finite = expected.isfinite()
    distance = torch.where(finite, (value - expected).abs(), 0.0)
    wrong = torch.where(finite, ~(distance <= atol + rtol * expected.abs()), value != expected)
    if not wrong.any():
        return []
    where = f"{int(wrong.sum())} of {wrong.numel()}, first at {wrong.nonzero()[0].tolist()}"
    return [f"{name}: beyond atol {atol:g}, rtol {rtol:g} are {where}; largest difference {float(distance.max()):g}"]


def _json(name: str, expected: Any, got: Any, tolerance: Callable[[str], tuple[float, float]]) -> list[str]:
    got = got.tolist() if hasattr(got, "tolist") else got
    if isinstance(expected, Mapping):
        if not isinstance(got, Mapping) or set(expected) != {str(key) for key in got}:
            return [f"{name}: got {_short(got)}, expected the entries {sorted(expected)}"]
        entries = {str(key): value for key, value in got.items()}
        return [line for key, value in expected.items() for line in _json(f"{name}.{key}", value, entries[key], tolerance)]
    if isinstance(expected, list):
        if not isinstance(got, list | tuple) or len(got) != len(expected):
            return [f"{name}: got {_short(got)}, expected {len(expected)} entries"]
        return [line for place, pair in enumerate(zip(expected, got, strict=True)) for line in _json(f"{name}.{place}", *pair, tolerance)]
    if type(got) is not type(expected):
        return [f"{name}: got {_short(got)}, expected {_short(expected)}"]
    if not isinstance(expected, float) or not math.isfinite(expected):
        return [] if got == expected else [f"{name}: got {_short(got)}, expected {_short(expected)}"]
    atol, rtol = tolerance(name)
    return [] if abs(got - expected) <= atol + rtol * abs(expected) else [f"{name}: got {got!r}, expected {expected!r}, atol {atol:g}, rtol {rtol:g}"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
