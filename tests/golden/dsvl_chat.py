"""DeepSeek-VL's conversations: text, ids, labels and the left-padded batch (systems/deepseek_vl.md, sections 3.3 to 3.5)."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from tests import tiny
from tests.golden.case import Case
from vlm.config import LLMSpec, ModelSpec
from vlm.connectors.mlp import MLPSpec
from vlm.data.sample import Picture, Sample, Turn, held
from vlm.encoders.siglip import SigLIPSpec
from vlm.processor import VLMProcessor, collate
from vlm.prompt import TEMPLATES, PromptSpec

__all__ = ["chat"]


def chat(case: Case) -> dict[str, Any]:
    """Through the processor, beside a tower that gives the case's tokens per picture."""
    config = case.config
    config.expect(sft_format="deepseek", add_special_token=False, ignore_id=-100, system_prompt=TEMPLATES["deepseek_vl"].system)
    names = {name: config[name] for name in ("bos_token", "eos_token", "pad_token")}
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=str(case.folder / "tokenizer.json"), **names)
    tag, count = config["image_tag"], config["num_image_tokens"]
    rows, columns = next((rows, count // rows) for rows in range(int(count**0.5), 0, -1) if count % rows == 0)
    assert rows == columns, "the tower of this case is square"
    tower = SigLIPSpec(config=tiny.tower_config("siglip", image_size=14 * rows), weights="random")
    processor = VLMProcessor(ModelSpec(encoder=tower, connector=MLPSpec(), llm=LLMSpec()), 32, tokenizer, PromptSpec(use="deepseek_vl"))
    samples, encoded = [], []
    for number, messages in enumerate(case.inputs["conversations"]):
        generate = not messages[-1]["content"]
        turns = [_turn(message, tag) for message in (messages[:-1] if generate else messages)]
        row = processor.row(Sample(str(number), tuple(turns)), mode="infer", generate=generate)
        encoded.append(row)
        unexpanded = [index for place, index in enumerate(row.ids) if row.pictures[place] < 0 or row.pictures[place] != (row.pictures[place - 1] if place else -1)]
        text = tokenizer.decode(unexpanded, skip_special_tokens=False).removeprefix(names["bos_token"])
        samples.append({"sft_format": text, "input_ids": row.ids, "num_image_tokens": [image.layout.count for image in row.images], "labels": row.labels})
    batch = collate(encoded, pad_id=processor.pad_id, left=True)
    return {"samples": samples, **_ids(processor), **_masks(batch, encoded, count)}


def _turn(message: Mapping[str, Any], tag: str) -> Turn:
    role = message["role"].lower()
    parts: list[str | Picture] = []
    for place, text in enumerate(message["content"].split(tag)):
        parts += [*([held(tiny.picture_bytes(tiny.picture()))] if place else []), text]
    return Turn(role, tuple(parts), supervised=role == "assistant")


def _ids(processor: VLMProcessor) -> dict[str, int]:
    words: Any = processor.tokenizer
    return {"image_id": processor.image_token_id, "pad_id": processor.pad_id, "bos_id": words.bos_token_id, "eos_id": words.eos_token_id, "vocab_size": processor.vocabulary}


def _masks(batch: Mapping[str, Any], rows: list[Any], count: int) -> dict[str, torch.Tensor]:
    seen = torch.tensor([len(row.images) for row in rows])
    places = torch.arange(int(seen.max()))[None, :, None] < seen[:, None, None]
    return {
        "input_ids": batch["input_ids"],
        "labels": batch["labels"],
        "attention_mask": (batch["document_ids"] >= 0).long(),
        "images_seq_mask": batch["mm_token_type_ids"].bool(),
        "images_emb_mask": places.expand(-1, -1, count),
    }
