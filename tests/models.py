"""A small model of every decoder family."""

from typing import Any

import pytest
import tiny
import torch

from vlm.config import LLMSpec, ModelSpec
from vlm.connectors.mlp import MLPSpec
from vlm.encoders.clip import CLIPSpec
from vlm.encoders.siglip import SigLIPSpec
from vlm.loading import first_model
from vlm.model import VLM
from vlm.processor import placeholder_id

TOWERS = {"clip": CLIPSpec, "siglip": SigLIPSpec}
DECODERS = [(family, attention) for family in tiny.FAMILIES for attention in ("sdpa", "eager") if (family, attention) != ("gemma2", "sdpa")]  # which transformers does not have
FAMILY = pytest.mark.parametrize("family, attention", DECODERS)


def model_spec(family: str = "llama", tower: str = "clip", **numbers: Any) -> ModelSpec:
    """A small tower, an MLP and a decoder of this family. numbers: of the decoder."""
    encoder = TOWERS[tower](config=tiny.tower_config(tower), weights="random")
    return ModelSpec(encoder=encoder, connector=MLPSpec(), llm=LLMSpec(config=tiny.llm_config(family, **numbers), weights="random"))


def made(family: str = "llama", attention: str | None = None, tower: str = "clip", **numbers: Any) -> VLM:
    """The model of `model_spec` in training mode, its values drawn from seed 0."""
    torch.manual_seed(0)
    model = first_model(model_spec(family, tower, **numbers), placeholder_id(tiny.tokenizer()))
    with torch.no_grad():
        for parameter in model.llm.parameters():  # no bias is zero, no scale is one
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    if attention is not None:
        model.llm.set_attn_implementation(attention)
    return model.train()
