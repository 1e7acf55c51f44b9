"""Small models with adaptations, and their scores."""

from collections.abc import Mapping
from typing import Any

import tiny
import torch
from torch import Tensor, nn

from vlm.config import LLMSpec, ModelSpec
from vlm.connectors.mlp import MLPSpec
from vlm.encoders.clip import CLIPSpec
from vlm.llm.base import AdaptationSpec
from vlm.loading import first_model
from vlm.model import VLM
from vlm.processor import placeholder_id


def model_spec(family: str = "llama", adapt: Mapping[str, AdaptationSpec] | None = None, **numbers: Any) -> ModelSpec:
    """A small CLIP tower, an MLP and a decoder of this family, with these adaptations. numbers: of the decoder."""
    llm = LLMSpec(config=tiny.llm_config(family, **numbers), weights="random")
    return ModelSpec(encoder=CLIPSpec(config=tiny.tower_config(), weights="random"), connector=MLPSpec(), llm=llm, adapt=adapt or {})


def made(spec: ModelSpec) -> VLM:
    """A model of this spec, in training mode, whose LoRA has values everywhere."""
    torch.manual_seed(0)
    model = first_model(spec, placeholder_id(tiny.tokenizer()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                nn.init.normal_(parameter, std=0.2)
    return model.train()


def logits(model: VLM, batch: Mapping[str, Any]) -> Tensor:
    """Of a batch, in eval mode, which the model keeps."""
    with torch.no_grad():
        return model.eval()(**{name: value for name, value in batch.items() if name != "labels"}).logits
