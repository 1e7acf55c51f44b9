"""LoRA into the weights: a merged model has no adapter, computes the same, and is what other formats can hold."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlm.errors import ConfigurationError, NumericsError
from vlm.folders import new_folder, taken

if TYPE_CHECKING:
    from vlm.model import VLM

__all__ = ["Merged", "merge_lora", "merge_run"]


@dataclass(frozen=True)
class Merged:
    """names: adaptations that are merged. modules: how many weights they changed. untied: whether head and embedding had to become two tensors."""

    names: tuple[str, ...]
    modules: int
    untied: bool

    def __str__(self) -> str:
        text = f"merged {', '.join(self.names)} into {self.modules} weights"
        return f"{text}; the tied head was untied first: tie_word_embeddings is false now" if self.untied else text


@torch.no_grad()
def merge_lora(model: "VLM") -> Merged:
    """Merge every plain LoRA of a model, in place: in fp32, then back to the weights' own dtype. A model without one stays as it is.

    A head that is tied to the embedding is untied first where one of the two carries LoRA: merged into the shared tensor, the change would reach both (huggingface/peft#2018).
    Raises NumericsError where a merged weight is not finite.
    """
    found: dict[str, Any] = {name: spec for name, spec in model.spec.adapt.items() if spec.mergeable}
    carriers = {name: spec.layers(model.part(spec)) for name, spec in found.items()}
    untied = any(_untie(model, carriers[name]) for name, spec in found.items() if spec.part == "llm")
    for name, spec in found.items():
        part = model.part(spec)
        for path, layer in carriers[name].items():
            part.set_submodule(path, _merged(layer, f"{spec.part}.{path}"))
    model.config.adapt = {name: plain for name, plain in model.config.adapt.items() if name not in found}
    model.spec = model.config.spec()
    model.name_tied()
    return Merged(tuple(found), sum(map(len, carriers.values())), untied)


def _untie(model: "VLM", layers: Mapping[str, Any]) -> bool:
    """Give the head a tensor of its own where LoRA sits on a tied head or embedding."""
    head: Any = model.get_output_embeddings()
    ends = (head, model.get_input_embeddings())
    if not model.config.text_config.tie_word_embeddings or not any(layer is end for layer in layers.values() for end in ends):
        return False
    base = head.get_base_layer() if hasattr(head, "get_base_layer") else head
    base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=base.weight.requires_grad)
    model.config.text_config.tie_word_embeddings = False
    model.llm.config.tie_word_embeddings = False
    return True


def _merged(layer: Any, where: str) -> nn.Module:
    base = layer.get_base_layer()
    dtype = base.weight.dtype
    layer.float()
    try:
        layer.merge(safe_merge=True)
    except ValueError as problem:
        raise NumericsError(f"{where} cannot be merged: its LoRA is not finite", cure="merge an earlier stage") from problem
    return base.to(dtype)


def merge_run(source: str | Path, out: str | Path | None = None) -> tuple[Path, Merged]:
    """Write a model whose LoRA is merged; it loads like any other folder.

    Args:
        source: folder of a run, a stage or an export of vlm. out: where to, new or empty; default: `source/merged`.

    Raises ConfigurationError where there is nothing to merge, or `out` holds something.
    """
    from vlm.loading import load

    out = Path(out) if out is not None else Path(source) / "merged"
    if taken(out):
        raise ConfigurationError(f"{out} holds something already", cure="give another folder as --out, or remove it")
    model, processor = load(source)
    done = merge_lora(model)
    if not done.names:
        raise ConfigurationError(f"{source} has no LoRA", got=", ".join(model.spec.adapt) or "no adaptation", cure="there is nothing to merge")
    with new_folder(out) as partial:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
    return out, done
