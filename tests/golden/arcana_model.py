"""Whole models of Arcana: a training batch, left padding, generation, the released program (systems/arcana.md, section 8)."""

from dataclasses import dataclass
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor

from tests.golden.arcana_parts import clip_spec, ladder_spec, mm_lora_spec, pictures, text
from tests.golden.case import Case
from vlm.config import LLMSpec, ModelSpec
from vlm.configuration import VLMConfig
from vlm.loading import build
from vlm.model import VLM
from vlm.weights.arcana_keys import from_arcana, to_arcana
from vlm.weights.strict import load_tensors

__all__ = ["model"]


@dataclass
class Batch:
    """Rows after the splice, padded: (B, S) each, and the embeddings (B, S, D)."""

    embeddings: Tensor
    labels: Tensor
    vision: Tensor
    position: Tensor
    real: Tensor


def model(case: Case) -> dict[str, Any]:
    """A generation where ids are expected, else one training batch."""
    given, trained = case.tensors, "generated_ids" not in case.expected
    made = loaded(case).train(trained)  # training gives a batch without pictures its zero gradients; nothing drops
    features = made.see(pictures(given["images"])).tokens.unflatten(0, (len(given["images"]), -1))
    batch = spliced(case, made, features.shape[1])
    outputs = {
        "image_features": features,
        "inputs_embeds": batch.embeddings,
        "im_mask": batch.vision,
        "labels": batch.labels,
        "position_ids_internal": batch.position,
    }
    facts = {"mm_token_type_ids": batch.vision.long()}
    if "attention_mask" in given:  # a missing one stays missing: padding is then attended to, and its logits count
        outputs["attention_mask"] = batch.real.to(given["attention_mask"].dtype)
        facts["attention_mask"] = batch.real.long()
    return outputs | (_trained if trained else _generated)(case, made, batch, facts)


def _trained(case: Case, made: VLM, batch: Batch, facts: dict[str, Any]) -> dict[str, Any]:
    output = made(inputs_embeds=batch.embeddings, labels=batch.labels, logits_to_keep=0, **facts)
    loss = cast(Tensor, output.loss)
    loss.backward()
    gradients = {f"grad.{to_arcana(name)}": parameter.grad for name, parameter in made.named_parameters() if parameter.grad is not None}
    return {"logits": _meant(case, "logits", cast(Tensor, output.logits), facts.get("attention_mask")), "loss": loss[None], **gradients}


@torch.no_grad()
def _generated(case: Case, made: VLM, batch: Batch, facts: dict[str, Any]) -> dict[str, Any]:
    config = case.config
    config.expect(do_sample=False, eos_token_id_for_generation=None)
    logits, mask = made(inputs_embeds=batch.embeddings, **facts).logits, facts.get("attention_mask")
    tail = logits.shape[1] - case.expected["logits_tail"].shape[1] if "logits_tail" in case.expected else 0
    with patch.object(made, "embed", lambda *_: batch.embeddings):  # ids cannot say that a picture was cut, or that padding is zeros
        said = made.generate(
            input_ids=torch.zeros_like(batch.labels),
            max_new_tokens=config["max_new_tokens"],
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
            **facts,
        )
    start = torch.full((len(said.sequences), 1), config["llm_config"]["bos_token_id"])
    return {
        "logits": _meant(case, "logits", logits, mask),
        "logits_tail": _meant(case, "logits_tail", logits[:, tail:], mask if mask is None else mask[:, tail:]),
        "scores": torch.cat(said.logits),
        "generated_ids": said.sequences,
        "returned_sequences": torch.cat([start, said.sequences], 1),
    }


def _meant(case: Case, name: str, logits: Tensor, mask: Tensor | None) -> Tensor:
    """Logits (B, S, V) with those that the mask (B, S) hides, which say nothing, as they are expected."""
    return logits if mask is None or name not in case.expected else torch.where(mask[..., None].bool(), logits, case.expected[name])


def loaded(case: Case) -> VLM:
    """Our model with the case's weights."""
    config = case.config
    config.expect(mm_projector_type="mlp2x_gelu", mm_patch_merge_type="flat")
    encoder = clip_spec(config)
    config.expect(mm_hidden_size=encoder.width)
    spec = ModelSpec(encoder=encoder, connector=ladder_spec(config), llm=LLMSpec(), adapt={"mm_lora": mm_lora_spec(config)})
    made = build(VLMConfig.of(spec, text(config), 0))
    load_tensors(made, case.weights.items(), source=case.name, key=from_arcana)
    return made


def spliced(case: Case, made: VLM, width: int) -> Batch:
    """The released splice: pictures in the order of the rows, of which one without a placeholder takes one too; cut to the longest length behind it; padded.

    width: tokens that stand for a placeholder.
    """
    config, given = case.config, case.tensors
    image, ignore = config["image_token_index"], config["ignore_index"]
    left = config.get("tokenizer_padding_side") == "left"
    longest = config.get("tokenizer_model_max_length")
    ids = given["input_ids"]
    labels = given.get("labels", torch.full_like(ids, ignore))
    kept = given.get("attention_mask", torch.ones_like(ids)).bool()
    rows, used = [], 0
    for row, targets, real in zip(ids, labels, kept, strict=True):
        row, targets = row[real], targets[real]
        count = int((row == image).sum())
        images = pictures(given["images"][used : used + count])
        used += max(1, count)
        repeats = torch.where(row == image, width, 1)
        vision = (row == image).repeat_interleave(repeats)
        embeddings = made.embed(row.clamp(min=0).repeat_interleave(repeats)[None], vision[None], images)[0]
        rows.append(
            [part[:longest] for part in (embeddings, targets.masked_fill(row == image, ignore).repeat_interleave(repeats), vision, torch.arange(len(vision)), vision | True)]
        )
    length = max(len(row[0]) for row in rows)

    def padded(part: Tensor, value: Any) -> Tensor:
        pad = part.new_full((length - len(part), *part.shape[1:]), value)
        return torch.cat([pad, part] if left else [part, pad])

    return Batch(*(torch.stack([padded(row[index], value) for row in rows]) for index, value in enumerate((0.0, ignore, False, 0, False))))
