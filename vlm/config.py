"""Schema of a model: which encoder, connector, decoder and adaptations. Composition fills it; a checkpoint's config.json carries it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from vlm.connectors.base import ConnectorSpec, Link
from vlm.encoders.base import EncoderSpec
from vlm.llm.base import AdaptationSpec

__all__ = ["LLMSpec", "ModelSpec", "links", "picture_tokens", "typical_size"]


@dataclass(frozen=True, kw_only=True)
class LLMSpec:
    """The decoder: any Hugging Face causal LM.

    path: local folder or cached hub snapshot with weights, config.json and tokenizer. config: architecture numbers (`model_type` and the fields of its transformers config), so that
    checking needs no folder. weights: "path" loads them, "random" draws. tokenizer: a folder, where it is not the one beside the weights.
    attention: how a run computes it (no part of the model): auto is sdpa, or eager for families without sdpa; flash_attention_2 needs a GPU and the package flash-attn.
    """

    path: str | None = None
    config: Mapping[str, Any] | None = None
    weights: Literal["path", "random"] = "path"
    tokenizer: str | None = None
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One model. `adapt`: adaptation name -> its Spec, in the order of DESIGN section 3."""

    encoder: EncoderSpec = field(metadata={"group": "encoder", "registry": "vlm.encoders"})
    connector: ConnectorSpec = field(metadata={"group": "connector", "registry": "vlm.connectors"})
    llm: LLMSpec = field(metadata={"group": "llm"})
    adapt: Mapping[str, AdaptationSpec] = field(default_factory=dict, metadata={"group": "adapt", "registry": "vlm.llm"})


def links(encoder: EncoderSpec, connector: ConnectorSpec, width: int) -> list[tuple[ConnectorSpec, Link]]:
    """The chain of connectors, each with what it is built on; `width`: the decoder's hidden size, which the last link reaches."""
    chain: list[tuple[ConnectorSpec, Link]] = []
    spec: ConnectorSpec | None = connector
    widths, levels = encoder.widths, encoder.levels
    while spec is not None:
        link = Link(widths, levels, width if spec.then is None else None)
        chain.append((spec, link))
        widths, levels = {"image": spec.width(link)}, {"image": 0}
        spec = spec.then
    return chain


def typical_size(encoder: EncoderSpec) -> tuple[int, int]:
    """Width and height of a picture as its encoder likes it: its own size, 448 x 448 for one that has none."""
    side = int(getattr(encoder, "size", None) or 448)
    return side, side


def picture_tokens(model: ModelSpec, width: int, policy: str) -> tuple[int, bool]:
    """Tokens that a picture of the encoder's own size becomes, and whether every picture becomes as many. width: the decoder's. policy: of the stage."""
    side, _ = typical_size(model.encoder)
    sizes = [(side, side)]
    if policy not in ("crop", "squash"):
        sizes += [(2 * side, 2 * side)] if policy == "pad" else [(2 * side, 2 * side), (side, 3 * side), (3 * side, side)]
    counts = []
    for size in sizes:
        layouts = model.encoder.layout(*size, "train")
        for spec, _ in links(model.encoder, model.connector, width):
            layouts = {"image": spec.layout(layouts)}
        counts.append(next(iter(layouts.values())).count)
    return counts[0], len(set(counts)) == 1
