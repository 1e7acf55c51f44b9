"""Which modules of a part carry low-rank updates (lora, mm_lora)."""

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from vlm.errors import ConfigurationError
from vlm.llm.base import Part
from vlm.llm.decoder import layers

__all__ = ["Targets", "outside_adapters"]


@dataclass(frozen=True)
class Targets:
    """names: each the end of a path (`q_proj`, `layers.0.mlp.up_proj`, `lm_head`) or a pattern of it (`layers.[01].*_proj`); None: every linear of the part's blocks. who: the adaptation."""

    who: str
    part: Part
    names: tuple[str, ...] | None

    def free(self, part: nn.Module, *, leave: bool = False) -> dict[str, nn.Module]:
        """Modules by path that are to carry updates. Raises ConfigurationError for a name that fits nothing, and where there are updates already; leave: such modules are passed over."""
        from peft.tuners.lora import LoraLayer

        found = self._meant(part)
        taken = [path for path, module in found.items() if isinstance(module, LoraLayer)]
        if taken and not leave:
            raise ConfigurationError(
                f"{self.who}: {taken[0]} of the {self.part} carries LoRA already", expected="one LoRA per module", cure="name other targets, or merge the first one"
            )
        found = {path: module for path, module in found.items() if path not in taken}
        if not found:
            raise ConfigurationError(f"{self.who}: the {self.part} has no linear that could be adapted", cure="name targets")
        return found

    def carrying(self, part: nn.Module, own: Callable[[nn.Module], bool]) -> dict[str, nn.Module]:
        """Modules by path that carry them. own: whether a module is one of this adaptation."""
        return {path: module for path, module in self._meant(part).items() if own(module)}

    def _meant(self, part: nn.Module) -> dict[str, nn.Module]:
        from peft.tuners.lora import LoraLayer

        named = {path: module for path, module in outside_adapters(part) if isinstance(module, LoraLayer) or not any(module.children())}
        if self.names is None:
            return {path: named[path] for path in _linears_of_blocks(part, self.part, named)}
        for name in self.names:
            if not any(_fits(path, name) for path in named):
                raise self._no_such(name, named)
        return {path: module for path, module in named.items() if any(_fits(path, name) for name in self.names)}

    def _no_such(self, name: str, named: Mapping[str, nn.Module]) -> ConfigurationError:
        words = dict.fromkeys(path.rpartition(".")[2] for path, module in named.items() if any(True for _ in module.parameters()))
        near = difflib.get_close_matches(name, [*words, *named], 1)
        cure = f"did you mean {near[0]!r}?" if near else "name a module that holds weights, not one that holds modules"
        return ConfigurationError(f"{self.who}: no module of the {self.part} is called {name!r}", expected=f"the end of a path, such as {', '.join(words)}", cure=cure)


def outside_adapters(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules by path; what lies inside a peft layer is not one."""
    from peft.tuners.lora import LoraLayer

    for name, child in module.named_children():
        yield prefix + name, child
        if not isinstance(child, LoraLayer):
            yield from outside_adapters(child, f"{prefix}{name}.")


def _linears_of_blocks(part: nn.Module, kind: Part, named: Mapping[str, nn.Module]) -> list[str]:
    """Linears of the decoder's layers, of an encoder's numbered blocks (so not of a pooling head), of all connectors."""
    from peft.tuners.lora import LoraLayer

    def linear(module: nn.Module) -> bool:
        inner = module.get_base_layer() if isinstance(module, LoraLayer) else module
        return isinstance(inner, nn.Linear) and not isinstance(inner, nn.modules.linear.NonDynamicallyQuantizableLinear)  # whose parent reads its weight without a call

    found = [path for path, module in named.items() if linear(module)]
    if kind == "connector":
        return found
    if kind == "encoder":
        return [path for path in found if any(word.isdigit() for word in path.split("."))]
    start = next(name for name, module in part.named_modules() if module is layers(part))
    return [path for path in found if path.startswith(f"{start}.")]


def _fits(path: str, target: str) -> bool:
    return fnmatchcase(path, target) or fnmatchcase(path, f"*.{target}")
