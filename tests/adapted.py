"""Small models with adaptations, batches for them, and their scores."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tiny
import torch
from torch import Tensor, nn

from vlm.config import LLMSpec, ModelSpec
from vlm.connectors.mlp import MLPSpec
from vlm.data.sample import Picture, Sample, Turn
from vlm.encoders.clip import CLIPSpec
from vlm.llm.base import AdaptationSpec
from vlm.loading import first_model
from vlm.model import VLM
from vlm.processor import VLMProcessor, placeholder_id
from vlm.prompt import PromptSpec
from vlm.row import Row, collate


def model_spec(family: str = "llama", adapt: Mapping[str, AdaptationSpec] | None = None, **numbers: Any) -> ModelSpec:
    """A small CLIP tower, an MLP and a decoder of this family, with these adaptations. numbers: of the decoder."""
    llm = LLMSpec(config=tiny.llm_config(family, **numbers), weights="random")
    return ModelSpec(encoder=CLIPSpec(config=tiny.tower_config(), weights="random"), connector=MLPSpec(), llm=llm, adapt=adapt or {})


def made(spec: ModelSpec, std: float = 0.2) -> VLM:
    """A model of this spec, in training mode, whose LoRA has values of this spread everywhere."""
    torch.manual_seed(0)
    model = first_model(spec, placeholder_id(tiny.tokenizer()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                nn.init.normal_(parameter, std=std)
    return model.train()


def logits(model: VLM, batch: Mapping[str, Any]) -> Tensor:
    """Of a batch, in eval mode, which the model keeps."""
    with torch.no_grad():
        return model.eval()(**{name: value for name, value in batch.items() if name != "labels"}).logits


def batches_of(folder: Path) -> dict[str, dict[str, Any]]:
    """A row with a picture, a row of text, both in one batch, both in one row; and as questions, apart and together."""
    tiny.picture(seed=0).save(folder / "0.png")
    processor = VLMProcessor(model_spec(), 32, tiny.tokenizer(), PromptSpec(use="chatml"))
    picture = Turn("user", (Picture(str(folder / "0.png")), "\nWhat colour?"))
    text = Turn("user", ("How many objects are there?",))
    says = Turn("assistant", ("red and green",), True)
    rows = [processor.row(Sample("a", (picture, says))), processor.row(Sample("b", (text, says)))]
    asked = [Sample("a", (picture,)), Sample("b", (text,))]
    return {"vision": collate(rows[:1], pad_id=0), "text": collate(rows[1:], pad_id=0), "both": collate(rows, pad_id=0), "packed": collate([Row.packed(rows)], pad_id=0)} | {
        "ask_a": processor(asked[:1]), "ask_b": processor(asked[1:]), "ask": processor(asked)
    }  # fmt: skip
