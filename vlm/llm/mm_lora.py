"""MM-LoRA (Arcana, arXiv 2410.13733): two low-rank updates beside a linear, one for the tokens of pictures and one for all others.

They are two adapters of peft's, `vision` and `language`, in one layer; the token's type decides which counts.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoRALinear
from torch import Tensor, nn

from vlm.errors import ConfigurationError
from vlm.figures import Figure, Seen
from vlm.llm import register
from vlm.llm.base import AdaptationSpec
from vlm.llm.context import Scope, TokenContext
from vlm.llm.decoder import layers, skeleton
from vlm.llm.targets import Targets

__all__ = ["MODALITIES", "MMLoRALinear", "MMLoRASpec"]

MODALITIES = ("vision", "language")


@register("mm_lora")
@dataclass(frozen=True, kw_only=True)
class MMLoRASpec(AdaptationSpec):
    """y = W x + scale * B A x, with A and B of the token's modality; A drawn, B zero, so that nothing changes at step 0. The defaults are Arcana's.

    rank: per modality, 0 for none of it. scale, dropout: one number, or one per modality; dropout before A, in training only.
    targets: names of linears in the decoder's layers, as `Targets` reads them; default: every one that nothing else has changed.
    """

    rank: Mapping[str, int] = field(default_factory=lambda: {"vision": 64, "language": 192})
    scale: float | Mapping[str, float] = 2.0
    dropout: float | Mapping[str, float] = 0.05
    targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name, expected, fits in (("rank", "0 or more", _is_rank), ("scale", "a number above 0", _is_scale), ("dropout", "from 0 to below 1", _is_rate)):
            value = getattr(self, name)
            if isinstance(value, Mapping) and set(value) != set(MODALITIES):
                raise ConfigurationError(f"mm_lora: {name} is given per modality", got=", ".join(value) or "nothing", expected="vision and language", cure=f"set both in {name}")
            if wrong := [one for one in self._each(name).values() if not fits(one)]:
                raise ConfigurationError(f"mm_lora: {name} cannot be this", got=wrong[0], expected=expected, cure=f"set {name}")
        if not any(self.rank.values()):
            raise ConfigurationError("mm_lora: both ranks are 0", expected="1 or more for a modality", cure="set rank, or leave mm_lora out")
        if self.targets == ():
            raise ConfigurationError("mm_lora: targets cannot be this", got=(), expected="names, or nothing for all", cure="set targets")

    @property
    def takes_rest(self) -> bool:
        return self.targets is None

    def _each(self, name: str) -> dict[str, float]:
        value = getattr(self, name)
        return {modality: value[modality] if isinstance(value, Mapping) else value for modality in MODALITIES}

    @property
    def adapters(self) -> dict[str, int]:
        """Rank by modality, of those that have one."""
        return {modality: self.rank[modality] for modality in MODALITIES if self.rank[modality]}

    def settings(self, modality: str) -> LoraConfig:
        """peft's settings of one adapter. peft's factor is alpha / rank."""
        rank = self.rank[modality]
        alpha: Any = self._each("scale")[modality] * rank
        return LoraConfig(r=rank, lora_alpha=int(alpha) if float(alpha).is_integer() else alpha, lora_dropout=self._each("dropout")[modality], init_lora_weights=False)

    def plan(self, llm_config: Any) -> Sequence[str]:
        """Targets that are named are claimed; those of the default are what the claims of others leave."""
        return () if self.targets is None else tuple(self._free(skeleton(llm_config)))

    def build(self, decoder: nn.Module, scope: Scope) -> None:
        for path, target in self._free(decoder).items():
            decoder.set_submodule(path, self.routed(target, scope))

    def routed(self, target: nn.Module, scope: Scope) -> "MMLoRALinear":
        """A linear with the updates beside it: structure only."""
        first, *more = self.adapters
        layer = LoRALinear(target, first, self.settings(first), r=self.rank[first], lora_alpha=self.settings(first).lora_alpha)
        for modality in more:
            layer.update_layer(modality, self.rank[modality], self.settings(modality).lora_alpha, self.settings(modality))
        layer.set_adapter(list(self.adapters))
        layer.train(target.training)  # peft's layers are born in training mode
        layer.__class__ = MMLoRALinear
        layer.scope = scope  # type: ignore[assignment]
        return cast(MMLoRALinear, layer)

    def _free(self, decoder: nn.Module) -> dict[str, nn.Module]:
        """Linears by path that are to carry the updates. Raises ConfigurationError for what is none, and for the head: outside of the layers nothing tells pictures from text."""
        found = self._targets.free(decoder, leave=self.takes_rest)
        inside = f"{next(name for name, module in decoder.named_modules() if module is layers(decoder))}."
        for path, module in found.items():
            if not isinstance(module, nn.Linear) or not path.startswith(inside):
                raise ConfigurationError(
                    f"mm_lora: {path} cannot tell tokens of pictures from others",
                    got=type(module).__name__,
                    expected=f"a linear in {inside[:-1]}",
                    cure="use lora there, or name other targets",
                )
        return found

    @property
    def _targets(self) -> Targets:
        return Targets("mm_lora", "llm", self.targets)

    def initialise(self, decoder: nn.Module) -> None:
        for layer in self.layers(decoder).values():
            for modality in self.adapters:
                layer.reset_lora_parameters(modality, True)

    def groups(self, decoder: nn.Module) -> Mapping[str, list[nn.Parameter]]:
        found = self.layers(decoder).values()
        return {f"mm_lora.{modality}": [pair[modality].weight for layer in found for pair in (layer.lora_A, layer.lora_B)] for modality in self.adapters}

    def layers(self, part: nn.Module) -> dict[str, Any]:
        """The routed layers by path, in a decoder that carries them."""
        return self._targets.carrying(part, lambda module: isinstance(module, MMLoRALinear))

    def figures(self, part: nn.Module, seen: Seen) -> Iterable[Figure]:
        """How far training moved each linear, for pictures and for text."""
        found = self.layers(part)
        if found:
            weights = {path: float(layer.get_base_layer().weight.float().norm()) for path, layer in found.items()}
            yield _norm_maps({modality: {path: layer.update_norm(modality) for path, layer in found.items()} for modality in self.adapters}, weights)


def _is_rank(value: float) -> bool:
    return value == int(value) >= 0


def _is_scale(value: float) -> bool:
    return value > 0


def _is_rate(value: float) -> bool:
    return 0 <= value < 1


class MMLoRALinear(LoRALinear):
    """peft's layer with the adapters `vision` and `language`, of which each token takes its own.

    In training both pairs are one product: every parameter gets one in every call, and all come in one order, whatever the rows hold (DESIGN section 3).
    """

    scope: Scope

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """(..., in) -> (..., out). Without a context, as a decoder that is called by itself, every token is language."""
        base = self.base_layer(x, *args, **kwargs)
        return self._together(base, x) if self.training or torch.is_grad_enabled() else self._apart(base, x)

    def _together(self, base: Tensor, x: Tensor) -> Tensor:
        """Both pairs as one product, with the mask between A and B."""
        down, up, scale = self._pairs()
        context = self.scope.context
        low = F.linear(self.drop(x.to(down.dtype), self._vision(context, x)), down)
        low = low.masked_fill(self._closed(context, low), 0)
        out = torch.addmm(base.to(down.dtype).flatten(0, -2), low.flatten(0, -2), up.T, alpha=scale)
        return out.view(base.shape).to(base.dtype)

    def _apart(self, base: Tensor, x: Tensor) -> Tensor:
        """One pair after the other, as stock peft computes each, so that answers are those of the adapter alone to the last bit; a call without pictures, such as each new token, needs one."""
        context = self.scope.context
        vision = self._vision(context, x)
        if context is not None and vision is not None:
            if "mm_lora" not in context.memo:
                context.memo["mm_lora"] = bool(vision.any())
            vision = vision if context.memo["mm_lora"] else None
        if vision is None:
            return base + self._update("language", x) if "language" in self.r else base
        sides = [self._update(name, x) if name in self.r else base.new_zeros(()) for name in MODALITIES]
        return base + torch.where(vision[..., None], *sides)

    def _update(self, name: str, x: Tensor) -> Tensor:
        down, up = self._weight(self.lora_A, name), self._weight(self.lora_B, name)
        return (F.linear(F.linear(x.to(down.dtype), down), up) * self.scaling[name]).to(x.dtype)

    def update_norm(self, name: str) -> float:
        """Frobenius norm of the update scale * B A, through the products of a rank's size: |B A|^2 = tr(B^T B A A^T)."""
        down, up = self._weight(self.lora_A, name).double(), self._weight(self.lora_B, name).double()
        return float(self.scaling[name]) * float(((up.T @ up) * (down @ down.T)).sum().clamp(min=0)) ** 0.5

    def drop(self, x: Tensor, vision: Tensor | None) -> Tensor:
        """Dropout with the rate of each token's modality. vision: (...) bool, None = no token of a picture. The one place of this layer that draws random numbers."""
        rates = {modality: float(getattr(dropout, "p", 0.0)) for modality, dropout in self.lora_dropout.items()}
        if not self.training or not any(rates.values()):
            return x
        seeing, reading = rates.get("vision", 0.0), rates.get("language", 0.0)
        if seeing == reading or len(rates) == 1:
            return F.dropout(x, max(rates.values()))
        rate = torch.full(x.shape[:-1], reading, device=x.device) if vision is None else torch.where(vision, seeing, reading)
        keep = torch.rand_like(x) >= rate[..., None]
        return x * keep / (1 - rate[..., None]).to(x.dtype)

    def _pairs(self) -> tuple[Tensor, Tensor, float]:
        """A (R, in) and B (out, R) of all adapters, vision first, and the factor of the product; B takes in what their scales differ by."""
        downs, ups = {name: self._weight(self.lora_A, name) for name in self.r}, {name: self._weight(self.lora_B, name) for name in self.r}
        scale = float(self.scaling[next(iter(self.r))])
        return torch.cat(list(downs.values())), torch.cat([up if self.scaling[name] == scale else up * (self.scaling[name] / scale) for name, up in ups.items()], 1), scale

    @staticmethod
    def _weight(linears: nn.ModuleDict, name: str) -> Tensor:
        return linears[name].weight  # type: ignore[return-value]

    def _vision(self, context: TokenContext | None, x: Tensor) -> Tensor | None:
        return None if context is None else context.vision.view(x.shape[:-1])

    def _closed(self, context: TokenContext | None, low: Tensor) -> Tensor:
        """(..., R) bool: where A x is of the other modality than the token."""
        ranks = tuple(self.r.items())
        if context is None:
            return self._of_vision(ranks, low.device)
        memo = ("mm_lora", ranks, low.shape)
        if memo not in context.memo:
            context.memo[memo] = context.vision.view(low.shape[:-1])[..., None] != self._of_vision(ranks, low.device)
        return context.memo[memo]

    @staticmethod
    def _of_vision(ranks: Sequence[tuple[str, int]], device: torch.device) -> Tensor:
        """(R,) bool: which rows of A are those of vision."""
        return torch.cat([torch.full((rank,), name == "vision", device=device) for name, rank in ranks])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises ConfigurationError: one weight cannot hold two updates of which each token takes its own."""
        raise ConfigurationError(
            "mm_lora cannot be merged: which update a token takes depends on what it is", cure="keep it, or merge the language side alone for text: `vlm merge --text-only`"
        )


# ---- in a report ---------------------------------------------------------------------------------------------------------


def _norm_maps(norms: Mapping[str, Mapping[str, float]], weights: Mapping[str, float]) -> Figure:
    """Two heat maps per modality, layer by target. norms: modality -> path -> norm of the update; weights: path -> norm of the weight beside it."""
    places = {path: _place(path) for path in weights}
    rows, columns = (list(dict.fromkeys(place[axis] for place in places.values())) for axis in (0, 1))
    relative = {modality: {path: 100 * norm / weights[path] if weights[path] else math.nan for path, norm in found.items()} for modality, found in norms.items()}

    def draw(figure: Any) -> None:
        panels = figure.subplots(2, len(norms), squeeze=False)
        for line, (told, values, form) in enumerate((("|update|", norms, ".2f"), ("|update| / |W| in %", relative, ".1f"))):
            top = max((value for found in values.values() for value in found.values() if value == value), default=0.0) or 1.0
            for panel, (modality, found) in zip(panels[line], values.items(), strict=True):
                image = np.full((len(rows), len(columns)), np.nan)
                for path, value in found.items():
                    image[rows.index(places[path][0]), columns.index(places[path][1])] = value
                panel.imshow(image, cmap="Blues", vmin=0, vmax=top, aspect="auto")
                for (row, column), value in np.ndenumerate(image):
                    if value == value:
                        panel.text(column, row, f"{value:{form}}", ha="center", va="center", fontsize=7, color="white" if value > 0.6 * top else "black")
                panel.set_title(f"{modality}: {told}", fontsize=9)
                panel.set_xticks(range(len(columns)), columns, rotation=35, ha="right", fontsize=7)
                panel.set_yticks(range(len(rows)), rows, fontsize=7)

    caption = (
        f"Frobenius norms of scale * B A per layer (down) and target (across): {' beside '.join(norms)}. "
        + "; ".join(f"{modality}: mean {_mean(relative[modality]):.2f} % of the weight's norm, at most {max(relative[modality].values()):.2f} %" for modality in norms)
        + ". Maps of one row share their colours."
    )
    return Figure("MM-LoRA: how far training moved the linears", caption, draw, size=(4.5 * len(norms) + 0.5, 2.4 + 0.5 * len(rows)))


def _place(path: str) -> tuple[str, str]:
    """Layer and target of a linear: `model.layers.3.self_attn.q_proj` -> ("3", "q_proj")."""
    parts = path.split(".")
    return next((part for part in parts if part.isdigit()), ""), parts[-1]


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)
