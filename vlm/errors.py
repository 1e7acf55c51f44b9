"""One tree of errors. Each says what is wrong, what was got, what was expected and what to do."""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal, Self, get_args

__all__ = ["KINDS", "CheckpointError", "ConfigurationError", "DataError", "EnvironmentProblem", "Kind", "NumericsError", "Stopped", "VLMError", "listed"]

Kind = Literal[
    "placeholder count", "role", "outside of the root", "remote", "missing picture", "too large", "too long", "unsupported", "empty", "unreadable picture", "not JSON", "unreadable file", "other"
]  # fmt: skip
"""What can be wrong with data, in words that stay the same: for counting, in `vlm data check` and while training."""
KINDS: tuple[Kind, ...] = get_args(Kind)


class VLMError(Exception):
    """Root of all errors that a user can cause and cure.

    Args:
        what: one sentence without a full stop: what is wrong, and where.
        got, expected: the two sides, where there are two.
        cure: what to do next.
    """

    _FIELDS: ClassVar[tuple[str, ...]] = ("what", "got", "expected", "cure")
    exit_code: ClassVar[int] = 1
    """Of the command that ends with it."""

    def __init__(self, what: str, *, got: object = None, expected: object = None, cure: str | None = None):
        self.what, self.got, self.expected, self.cure = what, got, expected, cure
        sides = "; ".join(f"{side} {value}" for side, value in (("got", got), ("expected", expected)) if value is not None)
        super().__init__(". ".join(part for part in (what, sides, cure) if part))

    def changed(self, **fields: Any) -> Self:
        """An error of the same class that says the same, but for the fields that are named: `problem.changed(what=...)`."""
        return type(self)(**{name: getattr(self, name) for name in self._FIELDS} | fields)

    def __reduce__(self) -> tuple[Any, ...]:  # keyword arguments survive the way out of a data worker
        return partial(type(self), **{name: getattr(self, name) for name in self._FIELDS}), ()


class ConfigurationError(VLMError):
    """A YAML file, an override or a combination of parts."""


class DataError(VLMError):
    """A data file, a sample or a picture. kind: what is wrong, one of KINDS, for counting."""

    _FIELDS = (*VLMError._FIELDS, "kind")

    def __init__(self, what: str, *, kind: Kind = "other", got: object = None, expected: object = None, cure: str | None = None):
        super().__init__(what, got=got, expected=expected, cure=cure)
        self.kind: Kind = kind


class CheckpointError(VLMError):
    """Weights: missing, extra, mis-shaped, of another model."""


class EnvironmentProblem(VLMError):
    """A package, a device, a disk, a process group."""


class Stopped(VLMError):
    """A run that was asked to stop, and has saved where it stands."""

    exit_code = 75  # EX_TEMPFAIL: try again later


class NumericsError(VLMError):
    """A loss or gradient that is not finite; an equality that does not hold."""


def listed(names: Sequence[str]) -> str:
    """The first three names, and a mark where there are more."""
    return f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
