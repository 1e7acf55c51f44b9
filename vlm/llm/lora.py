"""LoRA (Hu et al. 2021) on any part, through peft's layers: y = W x + alpha / rank * B A x, A drawn, B zero, so that nothing changes at step 0."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.errors import CheckpointError, ConfigurationError
from vlm.llm import register
from vlm.llm.base import AdaptationSpec, Part
from vlm.llm.context import Scope
from vlm.llm.decoder import layers, skeleton
from vlm.llm.head import LossHead, adapt_head
from vlm.weights.files import find_folder

__all__ = ["ADAPTER", "LoRASpec", "outside_adapters"]

ADAPTER = "default"
"""What peft's layers call our adapter: the name that stock adapter files leave out."""


@register("lora")
@dataclass(frozen=True, kw_only=True)
class LoRASpec(AdaptationSpec):
    """rank, alpha: the update is scaled by alpha / rank (rslora: alpha / sqrt(rank)); alpha is twice the rank by default. dropout: before A, in training only.

    targets: names of modules, each the end of a path (`q_proj`, `layers.0.mlp.up_proj`, `lm_head`) or a pattern of it (`layers.[01].*_proj`). Default: every linear of the part's blocks.
    part: llm, encoder or connector. path: folder of an adapter of others, whose values it starts from; rank, alpha, rslora and targets then come from its adapter_config.json.
    """

    mergeable: ClassVar[bool] = True
    part: Part = "llm"  # type: ignore[misc]  # a field here, a fact of the class elsewhere
    rank: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None
    rslora: bool | None = None
    path: str | None = None

    def __post_init__(self) -> None:
        written = self._written()
        for name, default in (("rank", 8), ("alpha", None), ("rslora", False), ("targets", None)):
            given, value = getattr(self, name), written.get(name, default)
            if given is not None and name in written and given != value:
                raise ConfigurationError(f"lora: {name} is not that of the adapter {self.path}", got=given, expected=value, cure=f"leave {name} out")
            object.__setattr__(self, name, value if given is None else given)
        assert self.rank is not None
        if self.alpha is None:
            object.__setattr__(self, "alpha", 2.0 * self.rank)
        for name, bad, expected in (
            ("rank", self.rank < 1, "1 or more"),
            ("dropout", not 0 <= self.dropout < 1, "from 0 to below 1"),
            ("targets", self.targets == (), "names, or nothing for all"),
        ):
            if bad:
                raise ConfigurationError(f"lora: {name} cannot be this", got=getattr(self, name), expected=expected, cure=f"set {name}")

    def _written(self) -> Mapping[str, Any]:
        """What adapter_config.json settles. A run's own config.yaml says it all, so that it can be read where the adapter is no longer there."""
        if self.path is None or "${" in self.path:
            return {}
        from vlm.weights.adapter import read_settings

        try:
            return read_settings(self.path)
        except CheckpointError as problem:
            if None not in (self.rank, self.alpha, self.rslora, self.targets):
                return {}
            raise ConfigurationError(f"lora: {problem.what}", got=problem.got, expected=problem.expected, cure="give the folder of an adapter as path") from problem

    def form(self) -> "LoRASpec":
        return replace(self, path=None)

    def plan(self, llm_config: Any) -> Sequence[str]:
        """Targets that are named are claimed. Those of the default are not: another adaptation may take them along."""
        if self.part != "llm" or self.targets is None:
            return ()
        return tuple(self._found(skeleton(llm_config)))

    def build(self, decoder: nn.Module, scope: Scope) -> None:
        from peft import LoraConfig
        from peft.tuners.lora.layer import dispatch_default

        config = LoraConfig(r=cast(int, self.rank), lora_alpha=cast(Any, self.alpha), lora_dropout=self.dropout, use_rslora=bool(self.rslora), init_lora_weights=False)
        for path, target in self._found(decoder).items():
            layer = dispatch_default(target, ADAPTER, config, r=self.rank, lora_alpha=self.alpha)
            if layer is None or isinstance(target, nn.modules.linear.NonDynamicallyQuantizableLinear):
                raise ConfigurationError(
                    f"lora: {path} of the {self.part} cannot carry LoRA", got=type(target).__name__, expected="a linear, an embedding or a convolution that is called"
                )
            layer.train(target.training)  # peft's layers are born in training mode
            if isinstance(target, LossHead):
                adapt_head(layer, target.decoder_config, LoRAHead)
            decoder.set_submodule(path, layer)
            _rename_tied(decoder, path)

    def initialise(self, decoder: nn.Module) -> None:
        found = self.layers(decoder)
        for layer in found.values():
            layer.reset_lora_parameters(ADAPTER, True)
        if self.path is not None:
            from vlm.weights.adapter import load_adapter

            load_adapter(decoder, found, self.path)

    def projector(self) -> str | None:
        if self.path is None or self.part != "llm":
            return None
        file = find_folder(self.path) / "non_lora_trainables.bin"  # LLaVA's LoRA script puts the projector there
        return str(file) if file.is_file() else None

    def groups(self, decoder: nn.Module) -> Mapping[str, list[nn.Parameter]]:
        found: dict[str, list[nn.Parameter]] = {}
        for path, layer in self.layers(decoder).items():
            group = f"{path.partition('.')[0]}.lora" if self.part == "connector" else "lora"
            found.setdefault(group, []).extend(parameter for name, parameter in layer.named_parameters() if name.startswith("lora_"))
        return found

    def layers(self, part: nn.Module) -> dict[str, Any]:
        """peft's layers of this adaptation by path, in a part that carries it."""
        return self._found(part, built=True)

    def _found(self, part: nn.Module, built: bool = False) -> dict[str, nn.Module]:
        """The targets by path. Raises ConfigurationError for a name that fits nothing, and where LoRA is there already."""
        from peft.tuners.lora import LoraLayer

        modules = dict(outside_adapters(part))
        named = {path: module for path, module in modules.items() if isinstance(module, LoraLayer) or not any(module.children())}
        if self.targets is None:
            found = {path: named[path] for path in _linears_of_blocks(part, self.part, named)}
        else:
            found = {path: module for path, module in named.items() if any(_fits(path, target) for target in self.targets)}
            for target in self.targets:
                if not any(_fits(path, target) for path in found):
                    raise _no_such_target(target, named, self.part)
        taken = next((path for path, module in found.items() if isinstance(module, LoraLayer)), None)
        if not built and taken:
            raise ConfigurationError(f"lora: {taken} of the {self.part} carries LoRA already", expected="one LoRA per module", cure="name other targets, or merge the first one")
        if not found:
            raise ConfigurationError(f"lora: the {self.part} has no linear that could be adapted", cure="name targets")
        return found


class LoRAHead(LossHead):
    """A head that is a peft layer. The adapters read all rows at once, and chunks read weights only: the number of calls of inner modules must not depend on the data (ZeRO 3)."""

    def prepare(self, hidden: Tensor) -> Tensor:
        """(N, D) -> (N, D + rank): the hidden states, and what A makes of them, scaled."""
        layer = cast(Any, self)
        low = layer.lora_A[ADAPTER](layer.lora_dropout[ADAPTER](hidden.to(layer.lora_A[ADAPTER].weight.dtype)))
        return torch.cat([hidden, low.to(hidden.dtype) * layer.scaling[ADAPTER]], -1)

    def project(self, prepared: Tensor) -> Tensor:
        layer = cast(Any, self)
        base, up = layer.get_base_layer(), layer.lora_B[ADAPTER].weight
        hidden, low = prepared.split([base.in_features, up.shape[1]], -1)
        return F.linear(hidden, base.weight, base.bias) + F.linear(low.to(up.dtype), up)


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


def _no_such_target(target: str, named: Mapping[str, nn.Module], part: str) -> ConfigurationError:
    names = dict.fromkeys(path.rpartition(".")[2] for path, module in named.items() if any(True for _ in module.parameters()))
    near = difflib.get_close_matches(target, [*names, *named], 1)
    cure = f"did you mean {near[0]!r}?" if near else "name a module that holds weights, not one that holds modules"
    return ConfigurationError(f"lora: no module of the {part} is called {target!r}", expected=f"the end of a path, such as {', '.join(names)}", cure=cure)


def _rename_tied(part: nn.Module, path: str) -> None:
    """transformers ties tensors by name, and peft has moved one into `base_layer`."""
    if getattr(part, "_tied_weights_keys", None) is None:
        return
    decoder = cast(Any, part)
    moved = {f"{path}.weight": f"{path}.base_layer.weight"}
    decoder._tied_weights_keys = {moved.get(key, key): moved.get(value, value) for key, value in decoder._tied_weights_keys.items()}
    decoder.all_tied_weights_keys = decoder.get_expanded_tied_weights_keys()
