"""Schema of a model: which encoder, connector, decoder and adaptations. Composition fills it; a checkpoint's config.json carries it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from vlm.connectors.base import ConnectorSpec, Link
from vlm.encoders.base import EncoderSpec
from vlm.llm.base import AdaptationSpec

__all__ = ["LLMSpec", "ModelSpec", "links"]


@dataclass(frozen=True, kw_only=True)
class LLMSpec:
    """The decoder: any Hugging Face causal LM.

    path: local folder or cached hub snapshot with weights, config.json and tokenizer. config: architecture numbers (`model_type` and the fields of its transformers config), so that
    checking needs no folder. weights: "path" loads them, "random" draws. tokenizer: a folder, where it is not the one beside the weights.
    """

    path: str | None = None
    config: Mapping[str, Any] | None = None
    weights: Literal["path", "random"] = "path"
    tokenizer: str | None = None


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
