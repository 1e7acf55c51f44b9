"""LoRA into the weights: a merged model has no adapter, computes the same, and is what other formats can hold. Of MM-LoRA only the language side can be merged, for text alone."""

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlm.errors import ConfigurationError, NumericsError
from vlm.folders import free, new_folder

if TYPE_CHECKING:
    from vlm.llm.base import Part
    from vlm.model import VLM

__all__ = ["Merged", "merge_language", "merge_lora", "merge_run", "merge_text"]


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
def merge_lora(model: "VLM", part: "Part | None" = None) -> Merged:
    """Merge every plain LoRA of a model, or those of one part, in place: in fp32, then back to the weights' own dtype. A model without one stays as it is.

    A head that is tied to the embedding is untied first where one of the two carries LoRA: merged into the shared tensor, the change would reach both (huggingface/peft#2018).
    Raises NumericsError where a merged weight is not finite.
    """
    found: dict[str, Any] = {name: spec for name, spec in model.spec.adapt.items() if spec.mergeable and part in (None, spec.part)}
    carriers = {name: spec.layers(model.part(spec)) for name, spec in found.items()}
    untied = any(_untie(model, carriers[name]) for name, spec in found.items() if spec.part == "llm")
    for name, spec in found.items():
        changed = model.part(spec)
        for path, layer in carriers[name].items():
            changed.set_submodule(path, _merged(layer, layer.merge, f"{spec.part}.{path}"))
    _leave_out(model, found)
    return Merged(tuple(found), sum(map(len, carriers.values())), untied)


@torch.no_grad()
def merge_language(model: "VLM") -> Merged:
    """Merge every LoRA of the decoder as `merge_lora` does, and the language side of MM-LoRA too. Its vision side is dropped, so that what is left is right for text alone."""
    from peft.tuners.lora.layer import Linear as LoRALinear

    from vlm.llm.mm_lora import MMLoRASpec

    done = merge_lora(model, "llm")
    found = {name: spec for name, spec in model.spec.adapt.items() if isinstance(spec, MMLoRASpec)}
    count = 0
    for spec in found.values():
        for path, layer in spec.layers(model.llm).items():
            language = "language" in spec.adapters
            count += language
            merge = partial(LoRALinear.merge, layer, adapter_names=["language"])  # its own refuses
            model.llm.set_submodule(path, _merged(layer, merge, f"llm.{path}") if language else layer.get_base_layer())
    _leave_out(model, found)
    return replace(done, names=(*done.names, *found), modules=done.modules + count)


def _leave_out(model: "VLM", names: Collection[str]) -> None:
    """Adaptations that the model does not carry any more."""
    model.config.adapt = {name: plain for name, plain in model.config.adapt.items() if name not in names}
    model.spec = model.config.spec()
    model.name_tied()


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


def _merged(layer: Any, merge: Callable[..., None], where: str) -> nn.Module:
    base = layer.get_base_layer()
    dtype = base.weight.dtype
    layer.float()
    try:
        merge(safe_merge=True)
    except ValueError as problem:
        raise NumericsError(f"{where} cannot be merged: its LoRA is not finite", cure="merge an earlier stage") from problem
    return base.to(dtype)


def merge_run(source: str | Path, out: str | Path | None = None) -> tuple[Path, Merged]:
    """Write a model whose LoRA is merged; it loads like any other folder.

    Args:
        source: folder of a run, a stage or an export of vlm. out: where to, new or empty; default: `source/merged`.

    Raises ConfigurationError where there is nothing to merge, or MM-LoRA, or `out` holds something.
    """
    from vlm.llm.mm_lora import MMLoRASpec
    from vlm.loading import load

    out = free(Path(out) if out is not None else Path(source) / "merged")
    model, processor = load(source)
    for spec in model.spec.adapt.values():
        if isinstance(spec, MMLoRASpec):
            next(iter(spec.layers(model.llm).values())).merge()  # says why it cannot be
    done = merge_lora(model)
    if not done.names:
        raise _nothing(source, model)
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return out, done


def merge_text(source: str | Path, out: str | Path | None = None) -> tuple[Path, Merged]:
    """Write the decoder alone, as a text model of transformers: LoRA and the language side of MM-LoRA are merged, what reads pictures is left out.

    Args:
        source: folder of a run, a stage or an export of vlm. out: where to, new or empty; default: `source/merged-text`.

    Raises ConfigurationError where there is nothing to merge, another adaptation remains, the prompt has no room for text, or `out` holds something.
    """
    from huggingface_hub import save_torch_state_dict

    from vlm.loading import load
    from vlm.weights.public import chat_template, generation_settings, own_tensors, public_tokenizer

    out = free(Path(out) if out is not None else Path(source) / "merged-text")
    model, processor = load(source)
    done = merge_language(model)
    if not done.names:
        raise _nothing(source, model)
    if kept := [name for name, spec in model.spec.adapt.items() if spec.part == "llm"]:
        raise ConfigurationError(f"the decoder of {source} is no text model of transformers", got=", ".join(kept), expected="lora and mm_lora alone", cure="keep it as it is")
    if processor.prompt.template.pictures_only:
        raise ConfigurationError(f"the prompt {processor.prompt.spec.use} of {source} shows pictures and no text", cure="merge a later stage")
    tokenizer = public_tokenizer(processor.prompt)
    tokenizer.chat_template = chat_template(processor.prompt, str(processor.tokenizer.convert_ids_to_tokens(processor.image_token_id)))
    text = copy.deepcopy(model.config.text_config)
    text.architectures, text.dtype = [type(model.llm).__name__], model.dtype
    with new_folder(out) as folder:
        tensors = {name.removeprefix("llm."): tensor for name, tensor in own_tensors(model).items() if name.startswith("llm.")}
        save_torch_state_dict(tensors, folder, metadata={"format": "pt"})
        text.save_pretrained(folder)
        generation_settings(model, processor).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return out, done


def _nothing(source: str | Path, model: "VLM") -> ConfigurationError:
    return ConfigurationError(f"{source} has no LoRA", got=", ".join(model.spec.adapt) or "no adaptation", cure="there is nothing to merge")
