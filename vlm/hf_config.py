"""Configurations of transformers' models, where a YAML gives their numbers: transformers takes any key, so a misspelt one would leave a default in its place without a word."""

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any

from vlm.errors import ConfigurationError

__all__ = ["refuse_unknown"]

OLD = frozenset(
    (
        "rope_theta",
        "rope_scaling",
        "rope_local_base_freq",
        "partial_rotary_factor",
        "rotary_pct",
        "rotary_emb_base",
        "sliding_window_pattern",
        "use_sliding_window",
        "max_window_layers",
    )
)
"""Keys of released files that transformers turns into others, or reads without declaring them."""


def refuse_unknown(config_class: Any, names: Iterable[str]) -> None:
    """Raise ConfigurationError for a name that the class has no field for."""
    known = {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map) | set(config_class().to_dict()) | OLD
    if unknown := sorted(set(names) - known):
        near = difflib.get_close_matches(unknown[0], known, 1)
        cure = f"did you mean {near[0]!r}?" if near else f"take it out, or look at {config_class.__name__} of transformers"
        raise ConfigurationError(f"{config_class.__name__} has no {', '.join(unknown)}", cure=cure)
