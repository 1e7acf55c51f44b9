"""Any Hugging Face causal LM as decoder: its construction, its layers, its parameter groups. Changed after construction, never copied."""

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from vlm.errors import ConfigurationError, EnvironmentProblem
from vlm.llm.base import AdaptationSpec
from vlm.llm.context import Scope
from vlm.llm.head import adapt_head
from vlm.llm.layer import adapt_layer

__all__ = [
    "VARLEN",
    "build_decoder",
    "check_attention",
    "decoder_config",
    "file_key",
    "groups",
    "in_order",
    "is_varlen",
    "layers",
    "output_embeddings",
    "scope",
    "set_attention",
    "skeleton",
    "stack",
]

VARLEN = ("llama", "qwen2", "qwen3", "mistral", "phi", "phi3", "gemma2", "gemma3_text", "gpt_neox")
"""Families in which packed rows were proven equal to rows apart with flash attention. Others may not hand its arguments on (StableLM does not), and documents would see one another."""

_IN_FILES = {"gpt_neox": {"embed_out.": "lm_head."}}
"""Beginnings of names in released files that transformers has renamed since."""


def decoder_config(numbers: Mapping[str, Any]) -> Any:
    """transformers' config object from `model_type` and its fields; raises ConfigurationError naming what does not fit."""
    numbers = dict(numbers)
    kind = numbers.pop("model_type", None)
    if kind is None:
        raise ConfigurationError("the decoder's config names no model_type", cure="write `model_type: llama` (or qwen2, gemma2, ...) into llm.config")
    try:
        return AutoConfig.for_model(kind, **numbers)
    except Exception as problem:  # transformers' strict configs raise several kinds
        raise ConfigurationError(f"transformers does not accept the decoder's config ({kind}): {' '.join(str(problem).split()).rstrip('.')}", cure="mend llm.config") from problem


def build_decoder(config: Any) -> PreTrainedModel:
    """The decoder's structure, ready for adaptations. Values come from elsewhere: first ones from loading.py, later ones from a checkpoint.

    Raises ConfigurationError for a family whose rows cannot be masked from outside.
    """
    try:
        decoder = cast(PreTrainedModel, AutoModelForCausalLM.from_config(config, dtype=torch.get_default_dtype()))  # not the files' dtype: that would train in it
    except ValueError as problem:
        raise _refused(config, str(problem).partition("\n")[0]) from problem
    if reason := _unfit(decoder, config):
        raise _refused(config, reason)
    shared = Scope()
    for index, layer in enumerate(layers(decoder)):
        adapt_layer(layer, index, shared, config)
    adapt_head(output_embeddings(decoder), config)
    return decoder


def skeleton(config: Any) -> PreTrainedModel:
    """The decoder without memory, for whoever has to know its modules before anything is built."""
    with torch.device("meta"), no_init_weights():
        return build_decoder(config)


def _refused(config: Any, reason: str) -> ConfigurationError:
    known = "llama, qwen3, mistral, phi3, gemma3_text or gpt_neox"
    return ConfigurationError(f"a model of type {config.model_type!r} cannot be the decoder: {reason}", cure=f"take a causal LM such as {known}")


def _unfit(decoder: nn.Module, config: Any) -> str | None:
    """Why the layers of a causal LM cannot be given the context's masks, None if they can."""
    if hasattr(config, "text_config"):
        return "it has a vision or audio part of its own"
    if kinds := set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        return f"it has layers of the kind {', '.join(sorted(kinds))}, which take other masks than ours or none"
    if getattr(config, "use_bidirectional_attention", False):
        return "it attends in both directions"
    inner = _layered(decoder)
    if not isinstance(getattr(inner, "layers", None), nn.ModuleList):
        return "it keeps its layers elsewhere than in `layers`"
    if "position_ids" not in inspect.signature(inner.forward).parameters:
        return "it takes no position_ids, so documents of a row could not begin anew"
    for index, layer in enumerate(layers(decoder)):
        if not any(_ATTENTION.search(f"{name}.") for name, _ in layer.named_children()):
            return f"layer {index} has no attention, or one of an unknown name"
        if hasattr(layer, "encoder_attn"):
            return f"layer {index} expects an encoder"
    return None


def is_varlen(attention: str) -> bool:
    """Whether an attention implementation takes the beginnings of documents instead of a mask."""
    return "flash" in attention


def check_attention(config: Any, attention: str) -> None:
    """Raise ConfigurationError where a family cannot be packed with this attention (LLMSpec.attention). config: the decoder's."""
    if is_varlen(attention) and config.model_type not in VARLEN:
        raise ConfigurationError(
            f"llm.attention: {attention} is not safe for decoders of type {config.model_type!r}: documents of a row might see one another",
            expected=f"one of {', '.join(VARLEN)}",
            cure="set llm.attention: auto",
        )


def set_attention(decoder: PreTrainedModel, attention: str) -> None:
    """Choose how a built decoder computes its attention (LLMSpec.attention). Raises ConfigurationError where the family has no such way, EnvironmentProblem where the machine has not."""
    if attention == "auto":
        return
    check_attention(decoder.config, attention)
    try:
        decoder.set_attn_implementation(attention)
    except ImportError as problem:
        raise EnvironmentProblem(
            f"llm.attention: {attention} is not available here", got=str(problem).rstrip("."), cure="install flash-attn on a machine with a GPU, or set llm.attention: auto"
        ) from problem
    except ValueError as problem:
        raise ConfigurationError(
            f"decoders of type {decoder.config.model_type!r} have no attention {attention!r}", got=str(problem).partition(". ")[0], cure="set llm.attention: auto"
        ) from problem


def file_key(decoder: PreTrainedModel, name: str) -> str:
    """Name in a released file -> name in the decoder."""
    for released, own in _IN_FILES.get(decoder.config.model_type, {}).items():
        if name.startswith(released):
            return own + name.removeprefix(released)
    return name


def scope(decoder: nn.Module) -> Scope:
    """The one scope through which a decoder's modules see the context."""
    return cast(Scope, layers(decoder)[0].scope)


def in_order(adapt: Sequence[AdaptationSpec]) -> list[AdaptationSpec]:
    """Adaptations in the order in which they are applied (DESIGN section 3)."""
    return sorted(adapt, key=lambda spec: spec.order)


def stack(decoder: nn.Module) -> PreTrainedModel:
    """The decoder without its head."""
    return cast(PreTrainedModel, getattr(decoder, cast(PreTrainedModel, decoder).base_model_prefix))


def output_embeddings(decoder: nn.Module) -> nn.Module:
    """The decoder's head. Every causal LM has one."""
    return cast(nn.Module, cast(PreTrainedModel, decoder).get_output_embeddings())


def layers(decoder: nn.Module) -> nn.ModuleList:
    """The decoder layers of any causal LM."""
    return cast(nn.ModuleList, _layered(decoder).layers)


def _layered(decoder: nn.Module) -> nn.Module:
    """What holds the layers; some families say `model.decoder`."""
    inner = getattr(decoder, cast(PreTrainedModel, decoder).base_model_prefix, decoder)
    return cast(nn.Module, getattr(inner, "decoder", inner))


_ATTENTION = re.compile(r"(^|\.)(self_attn|attention|attn)\.")
_NORM = re.compile(r"norm", re.IGNORECASE)


def groups(decoder: PreTrainedModel) -> dict[str, list[nn.Parameter]]:
    """Every parameter of the decoder under one path below `llm`: embed, attention, ffn, norm, head. A tied head belongs to `embed`."""
    found: dict[str, list[nn.Parameter]] = {}
    embedding = {id(p) for p in decoder.get_input_embeddings().parameters()}
    head = {id(p) for p in output_embeddings(decoder).parameters()} - embedding
    inside = {id(p) for p in layers(decoder).parameters()}
    modules = dict(decoder.named_modules())
    for name, parameter in decoder.named_parameters():
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
