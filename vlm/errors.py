"""One tree of errors. Each says what is wrong, what was got, what was expected and what to do."""

from typing import Any

__all__ = ["CheckpointError", "ConfigurationError", "DataError", "EnvironmentProblem", "NumericsError", "VLMError"]


class VLMError(Exception):
    """Root of all errors that a user can cause and cure.

    Args:
        what: one sentence without a full stop: what is wrong, and where.
        got, expected: the two sides, where there are two.
        cure: what to do next.
    """

    def __init__(self, what: str, *, got: object = None, expected: object = None, cure: str | None = None):
        self.what, self.got, self.expected, self.cure = what, got, expected, cure
        sides = "; ".join(f"{side} {value}" for side, value in (("got", got), ("expected", expected)) if value is not None)
        super().__init__(". ".join(part for part in (what, sides, cure) if part))

    def __reduce__(self) -> tuple[Any, ...]:  # keyword arguments survive the way out of a data worker
        return _rebuild, (type(self), self.what, self.got, self.expected, self.cure)


def _rebuild(cls: type[VLMError], what: str, got: object, expected: object, cure: str | None, more: dict[str, str] | None = None) -> VLMError:
    return cls(what, got=got, expected=expected, cure=cure, **(more or {}))


class ConfigurationError(VLMError):
    """A YAML file, an override or a combination of parts."""


class DataError(VLMError):
    """A data file, a sample or a picture. kind: what is wrong in a word or two, the same for all of its kind, for counting."""

    def __init__(self, what: str, *, kind: str = "other", got: object = None, expected: object = None, cure: str | None = None):
        super().__init__(what, got=got, expected=expected, cure=cure)
        self.kind = kind

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.what, self.got, self.expected, self.cure, {"kind": self.kind})


class CheckpointError(VLMError):
    """Weights: missing, extra, mis-shaped, of another model."""


class EnvironmentProblem(VLMError):
    """A package, a device, a disk, a process group."""


class NumericsError(VLMError):
    """A loss or gradient that is not finite; an equality that does not hold."""
