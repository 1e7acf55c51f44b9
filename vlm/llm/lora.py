"""LoRA (Hu et al. 2021) on any part, through peft's layers: y = W x + alpha / rank * B A x, A drawn, B zero, so that nothing changes at step 0."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.errors import CheckpointError, ConfigurationError
from vlm.llm import register
from vlm.llm.base import AdaptationSpec, Part
from vlm.llm.context import Scope
from vlm.llm.decoder import skeleton
from vlm.llm.head import LossHead, adapt_head
from vlm.llm.targets import Targets
from vlm.weights.files import find_folder

__all__ = ["ADAPTER", "LoRASpec"]

ADAPTER = "default"
"""What peft's layers call our adapter: the name that stock adapter files leave out."""


@register("lora")
@dataclass(frozen=True, kw_only=True)
class LoRASpec(AdaptationSpec):
    """rank, alpha: the update is scaled by alpha / rank (rslora: alpha / sqrt(rank)); alpha is twice the rank by default. dropout: before A, in training only.

    targets: names of modules as `Targets` reads them. Default: every linear of the part's blocks.
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
        return tuple(self._targets.free(skeleton(llm_config)))

    def build(self, decoder: nn.Module, scope: Scope) -> None:
        from peft import LoraConfig
        from peft.tuners.lora.layer import dispatch_default

        config = LoraConfig(r=cast(int, self.rank), lora_alpha=cast(Any, self.alpha), lora_dropout=self.dropout, use_rslora=bool(self.rslora), init_lora_weights=False)
        for path, target in self._targets.free(decoder).items():
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
        from peft.tuners.lora import LoraLayer

        return self._targets.carrying(part, lambda module: isinstance(module, LoraLayer) and ADAPTER in module.r)

    @property
    def _targets(self) -> Targets:
        return Targets("lora", self.part, self.targets)


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


def _rename_tied(part: nn.Module, path: str) -> None:
    """transformers ties tensors by name, and peft has moved one into `base_layer`."""
    if getattr(part, "_tied_weights_keys", None) is None:
        return
    decoder = cast(Any, part)
    moved = {f"{path}.weight": f"{path}.base_layer.weight"}
    decoder._tied_weights_keys = {moved.get(key, key): moved.get(value, value) for key, value in decoder._tied_weights_keys.items()}
    decoder.all_tied_weights_keys = decoder.get_expanded_tied_weights_keys()
