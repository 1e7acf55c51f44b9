"""Any Hugging Face causal LM as decoder: its construction, its layers, its parameter groups. Changed after construction, never copied."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from vlm.errors import ConfigurationError
from vlm.llm.base import AdaptationSpec
from vlm.llm.context import Scope
from vlm.llm.head import adapt_head
from vlm.llm.layer import adapt_layer

__all__ = ["build_decoder", "decoder_config", "groups", "in_order", "layers", "output_embeddings", "scope", "stack"]


def decoder_config(numbers: Mapping[str, Any]) -> Any:
    """transformers' config object from `model_type` and its fields; raises ConfigurationError naming what does not fit."""
    numbers = dict(numbers)
    kind = numbers.pop("model_type", None)
    if kind is None:
        raise ConfigurationError("the decoder's config names no model_type", cure="write `model_type: llama` (or qwen2, gemma2, ...) into llm.config")
    try:
        return AutoConfig.for_model(kind, **numbers)
    except (ValueError, TypeError, KeyError) as problem:
        raise ConfigurationError(f"transformers does not accept the decoder's config ({kind}): {problem}", cure="mend llm.config") from problem


def build_decoder(config: Any, adapt: Sequence[AdaptationSpec] = ()) -> PreTrainedModel:
    """The decoder's structure with its adaptations. Values come from elsewhere: first ones from loading.py, later ones from a checkpoint."""
    decoder = AutoModelForCausalLM.from_config(config, dtype=torch.get_default_dtype())  # not the files' dtype: that would train in it
    shared = Scope()
    for index, layer in enumerate(layers(decoder)):
        adapt_layer(layer, index, shared, config)
    adapt_head(output_embeddings(decoder), config)
    for adaptation in in_order(adapt):
        adaptation.build(decoder, shared)
        adaptation.release(decoder)
    return decoder


def scope(decoder: nn.Module) -> Scope:
    """The one scope through which a decoder's modules see the context."""
    return cast(Scope, layers(decoder)[0].scope)


def in_order(adapt: Sequence[AdaptationSpec]) -> list[AdaptationSpec]:
    """Adaptations in the order in which they are applied (DESIGN section 3)."""
    return sorted(adapt, key=lambda spec: spec.place)


def stack(decoder: nn.Module) -> PreTrainedModel:
    """The decoder without its head."""
    return cast(PreTrainedModel, getattr(decoder, cast(PreTrainedModel, decoder).base_model_prefix))


def output_embeddings(decoder: nn.Module) -> nn.Module:
    """The decoder's head. Every causal LM has one."""
    return cast(nn.Module, cast(PreTrainedModel, decoder).get_output_embeddings())


def layers(decoder: nn.Module) -> nn.ModuleList:
    """The decoder layers of any causal LM."""
    inner = stack(decoder)
    inner = getattr(inner, "decoder", inner)
    return cast(nn.ModuleList, inner.layers)


_ATTENTION = re.compile(r"(^|\.)(self_attn|attention|attn)\.")
_NORM = re.compile(r"norm", re.IGNORECASE)


def groups(decoder: PreTrainedModel, adapt: Sequence[AdaptationSpec] = ()) -> dict[str, list[nn.Parameter]]:
    """Every parameter of the decoder under one path below `llm`: embed, attention, ffn, norm, head, and what adaptations add. A tied head belongs to `embed`."""
    found: dict[str, list[nn.Parameter]] = {}
    owned: set[int] = set()
    for spec in in_order(adapt):
        for path, parameters in spec.groups(decoder).items():
            found.setdefault(path, []).extend(parameters)
            owned.update(id(parameter) for parameter in parameters)
    embedding = {id(p) for p in decoder.get_input_embeddings().parameters()}
    head = {id(p) for p in output_embeddings(decoder).parameters()} - embedding
    inside = {id(p) for p in layers(decoder).parameters()}
    modules = dict(decoder.named_modules())
    for name, parameter in decoder.named_parameters():
        if id(parameter) in owned:
            continue
        kind = type(modules[name.rpartition(".")[0]]).__name__
        if id(parameter) in head:
            path = "head"
        elif id(parameter) in embedding or (id(parameter) not in inside and not _NORM.search(kind)):
            path = "embed"  # learned positions and the like
        elif _NORM.search(kind):
            path = "norm"
        else:
            path = "attention" if _ATTENTION.search(name) else "ffn"
        found.setdefault(path, []).append(parameter)
    return found
