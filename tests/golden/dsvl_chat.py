"""DeepSeek-VL's conversations: text, ids, labels and the left-padded batch (systems/deepseek_vl.md, sections 3.3 to 3.5)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from tests import tiny
from tests.golden.case import Case
from tests.golden.dsvl import ignored
from vlm.config import LLMSpec, ModelSpec
from vlm.connectors.mlp import MLPSpec
from vlm.data.sample import Picture, Sample, Turn, held
from vlm.encoders.base import FixedSizeSpec, Mode
from vlm.features import Layouts, TokenLayout
from vlm.processor import VLMProcessor, collate
from vlm.prompt import PromptSpec

__all__ = ["chat"]


@dataclass(frozen=True, kw_only=True)
class _Tower(FixedSizeSpec):
    """Gives `count` tokens of every picture."""

    count: int

    def layout(self, width: int, height: int, mode: Mode) -> Layouts:
        return {"image": TokenLayout.grid(1, self.count)}


def chat(case: Case) -> dict[str, Any]:
    """Through the processor, beside a tower that gives the case's tokens per picture."""
    config = case.config
    config.expect(sft_format="deepseek", add_special_token=False)
    ignored(config, "ignore_id", "mask_prompt")
    names = {name: config[name] for name in ("bos_token", "eos_token", "pad_token")}
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=str(case.folder / "tokenizer.json"), **names)
    tag, count, prompt = config["image_tag"], config["num_image_tokens"], PromptSpec(use="deepseek_vl", system=config["system_prompt"])
    processor = VLMProcessor(ModelSpec(encoder=_Tower(count=count), connector=MLPSpec(), llm=LLMSpec()), 32, tokenizer, prompt)
    samples, encoded = [], []
    for number, messages in enumerate(case.inputs["conversations"]):
        generate = messages[-1]["role"] == "Assistant" and not messages[-1]["content"].strip()
        said = messages[:-1] if generate else messages
        row = processor.row(Sample(str(number), tuple(_turn(message, tag) for message in said)), mode="infer", generate=generate)
        encoded.append(row)
        text = _text(processor, said, generate)
        samples.append({"sft_format": text, "input_ids": row.ids, "num_image_tokens": [image.layout.count for image in row.images], "labels": row.labels})
    batch = collate(encoded, pad_id=processor.pad_id, left=True)
    return {"samples": samples, **_ids(processor), **_masks(batch, encoded, count)}


def _text(processor: VLMProcessor, messages: list[Mapping[str, Any]], generate: bool) -> str:
    """By the prompt's template; ids do not give it back where the tokenizer lacks characters."""
    system = [{"role": "system", "content": processor.prompt.spec.system}]
    talk = [{"role": message["role"].lower(), "content": message["content"]} for message in messages]
    tokenizer: Any = processor.tokenizer
    text = tokenizer.apply_chat_template(system + talk, chat_template=processor.prompt.template.chat, tokenize=False, add_generation_prompt=generate)
    return text.removeprefix(tokenizer.bos_token)


def _turn(message: Mapping[str, Any], tag: str) -> Turn:
    role, content = message["role"].lower(), message["content"]
    parts: list[str | Picture] = []
    for place, text in enumerate(content.split(tag)):
        parts += [*([held(tiny.picture_bytes(tiny.picture()))] if place else []), text]
    return Turn(role, tuple(parts), supervised=role == "assistant" and bool(content.strip()))


def _ids(processor: VLMProcessor) -> dict[str, int]:
    words: Any = processor.tokenizer
    return {"image_id": processor.image_token_id, "pad_id": processor.pad_id, "bos_id": words.bos_token_id, "eos_id": words.eos_token_id, "vocab_size": processor.vocabulary}


def _masks(batch: Mapping[str, Any], rows: list[Any], count: int) -> dict[str, torch.Tensor]:
    seen = torch.tensor([len(row.images) for row in rows])
    places = torch.arange(max(1, int(seen.max())))[None, :, None] < seen[:, None, None]
    return {
        "input_ids": batch["input_ids"],
        "labels": batch["labels"],
        "attention_mask": (batch["document_ids"] >= 0).long(),
        "images_seq_mask": batch["mm_token_type_ids"].bool(),
        "images_emb_mask": places.expand(-1, -1, count),
    }
