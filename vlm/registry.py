"""Name -> Spec class, one registry per axis. A part's file is imported when the part is first named."""

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import TypeVar

from vlm.errors import ConfigurationError

__all__ = ["Registry"]

T = TypeVar("T")


class Registry:
    """The parts of one axis.

    Args:
        axis: what the parts are, singular, as errors call them ("encoder").
        package: where `package/NAME.py` registers the part NAME.
    """

    def __init__(self, axis: str, package: str):
        self.axis, self.package = axis, package
        self._specs: dict[str, type] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator of a part's Spec."""

        def keep(spec: type[T]) -> type[T]:
            known = self._specs.get(name)
            if known is not None and (known.__module__, known.__qualname__) != (spec.__module__, spec.__qualname__):
                raise ConfigurationError(f"two parts are called {self.axis} {name!r}", got=f"{known.__module__} and {spec.__module__}", cure="rename one of them")
            self._specs[name] = spec
            spec.use = name  # type: ignore[attr-defined]
            return spec

        return keep

    def get(self, name: str) -> type:
        """The Spec class called `name`; raises ConfigurationError with the table of known names."""
        if name not in self._specs and name in self._files():
            importlib.import_module(f"{self.package}.{name}")
        if name not in self._specs:
            _load_entry_points()
        if name not in self._specs:
            near = difflib.get_close_matches(name, self.names(), 1)
            raise ConfigurationError(
                f"no {self.axis} is called {name!r}",
                expected=f"one of {', '.join(self.names())}" if self.names() else f"nothing: there is no {self.axis} yet",
                cure=f"did you mean {near[0]!r}?" if near else "a part of your own is made known by `import:` in the YAML, or by `import` before loading",
            )
        return self._specs[name]

    def names(self) -> list[str]:
        """All names, registered or lying in the package as a file."""
        return sorted(set(self._specs) | set(self._files()))

    def _files(self) -> list[str]:
        folder = importlib.import_module(self.package)
        return [module.name for module in pkgutil.iter_modules(folder.__path__) if module.name != "base" and module.name not in getattr(folder, "NOT_PARTS", ())]


def _load_entry_points() -> None:
    for entry in entry_points(group="vlm.parts"):
        entry.load()
