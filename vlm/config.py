"""Schema of a model: which encoder, connector, decoder and adaptations. Composition fills it; a checkpoint's config.json carries it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from vlm.connectors.base import ConnectorSpec, Link
from vlm.encoders.base import EncoderSpec, Mode
from vlm.features import TokenLayout
from vlm.images import policy_size
from vlm.llm.base import AdaptationSpec
from vlm.tiles import Tiling

__all__ = ["LLMSpec", "ModelSpec", "links", "picture_tokens", "typical_size", "whole_layout"]


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
    """One model. `adapt`: adaptation name -> its Spec, in the order of DESIGN section 3.

    newline: whether it has the learned token that ends a row of tiles (tiles.py). A run gives it one from the first stage on whose pictures are cut so.
    """

    encoder: EncoderSpec = field(metadata={"group": "encoder", "registry": "vlm.encoders"})
    connector: ConnectorSpec = field(metadata={"group": "connector", "registry": "vlm.connectors"})
    llm: LLMSpec = field(metadata={"group": "llm"})
    adapt: Mapping[str, AdaptationSpec] = field(default_factory=dict, metadata={"group": "adapt", "registry": "vlm.llm"})
    newline: bool = False


def links(encoder: EncoderSpec, connector: ConnectorSpec, width: int) -> list[tuple[ConnectorSpec, Link]]:
    """The chain of connectors, each with what it is built on; `width`: the decoder's hidden size, which the last link reaches."""
    chain: list[tuple[ConnectorSpec, Link]] = []
    spec: ConnectorSpec | None = connector
    widths, levels = encoder.widths, encoder.levels
    while spec is not None:
        link = Link(widths, levels, width if spec.then is None else None)
        chain.append((spec, link))
        widths = spec.widths(link)
        levels = dict.fromkeys(widths, 0)
        spec = spec.then
    return chain


def typical_size(encoder: EncoderSpec) -> tuple[int, int]:
    """Width and height of a picture as its encoder likes it: its own size, 448 x 448 for one that has none."""
    side = int(getattr(encoder, "size", None) or 448)
    return side, side


def whole_layout(encoder: EncoderSpec, chain: Sequence[tuple[ConnectorSpec, Link]], size: tuple[int, int], mode: Mode) -> TokenLayout:
    """Tokens behind the chain of connectors of a picture that is read whole. size: width and height."""
    layouts = encoder.layout(*size, mode)
    for spec, _ in chain:
        layouts = spec.layouts(layouts)
    return next(iter(layouts.values()))


def picture_tokens(model: ModelSpec, width: int, policy: str, tiling: Tiling | None = None) -> tuple[int, bool]:
    """Tokens that a picture of the encoder's own size becomes, and whether every picture becomes as many. width: the decoder's. policy, tiling: of the stage."""
    side, _ = typical_size(model.encoder)
    chain = links(model.encoder, model.connector, width)
    if tiling is not None:
        return tiling.plan(side, side, side, whole_layout(model.encoder, chain, (side, side), "train")).layout.count, False
    pictures = ((side, side), (2 * side, 2 * side), (side, 3 * side), (3 * side, side))
    sizes = dict.fromkeys(policy_size(policy, *size, side) for size in pictures)
    counts = [whole_layout(model.encoder, chain, size, "train").count for size in sizes]
    return counts[0], len(set(counts)) == 1
