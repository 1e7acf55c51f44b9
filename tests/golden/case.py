"""A golden case: one folder with a configuration, inputs, weights and the answers of an official implementation (`golden/README.md`)."""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

__all__ = ["Case", "Fields"]


class Fields(Mapping[str, Any]):
    """A configuration that remembers which of its fields were read; mappings inside it do the same. Iterating (`**fields`) reads all."""

    def __init__(self, values: Mapping[str, Any]):
        self._values = {name: Fields(value) if isinstance(value, Mapping) else value for name, value in values.items()}
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        value = self._values[name]
        self._read.add(name)
        return value

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def expect(self, **wanted: Any) -> None:
        """Read fields that the implementation knows in one value only."""
        other = {name: self[name] for name, value in wanted.items() if self[name] != value}
        assert not other, f"not implemented: {other}, only {[wanted[name] for name in other]}"

    def unread(self, without_effect: Collection[str], prefix: str = "") -> list[str]:
        """Dotted names of the fields that nobody read and that are not `without_effect` (by their own or their dotted name)."""
        found = []
        for name, value in self._values.items():
            if name in without_effect or prefix + name in without_effect:
                continue
            if isinstance(value, Fields) and len(value):
                found += value.unread(without_effect, f"{prefix}{name}.")
            elif name not in self._read:
                found.append(prefix + name)
        return found


@dataclass(frozen=True)
class Case:
    """One folder, read lazily. `expected` may be looked into by the function that runs the case (which outputs, a forced selection)."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def description(self) -> dict[str, Any]:
        return json.loads((self.folder / "case.json").read_text(encoding="utf-8"))

    @cached_property
    def config(self) -> Fields:
        return Fields(self.description["config"])

    @property
    def tolerance(self) -> Any:
        return self.description["tolerance"]

    @cached_property
    def inputs(self) -> dict[str, Any]:
        return self._json("inputs.json")

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return self._tensors("inputs.safetensors")

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        return self._tensors("weights.safetensors")

    @cached_property
    def expected(self) -> dict[str, Any]:
        """All outputs by name: tensors, and the top-level entries of expected.json; where that is a list, it is the output "expected.json"."""
        tensors, values = self._tensors("expected.safetensors"), self._json("expected.json")
        values = values if isinstance(values, dict) else {"expected.json": values}
        assert tensors or values, f"{self.folder} expects nothing"
        twice = tensors.keys() & values.keys()
        assert not twice, f"{self.folder} expects {sorted(twice)} twice"
        return {**tensors, **values}

    def bytes_of(self, file: str) -> bytes:
        return (self.folder / file).read_bytes()

    def _json(self, file: str) -> Any:
        path = self.folder / file
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def _tensors(self, file: str) -> dict[str, Tensor]:
        path = self.folder / file
        return load_file(path) if path.exists() else {}
