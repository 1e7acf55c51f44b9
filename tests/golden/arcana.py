"""Cases of Arcana and of the LLaVA it is a fork of (systems/arcana.md, section 8)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from tests.golden.case import Case
from vlm.encoders.base import FixedSizeSpec
from vlm.images import crop_to, mean_color, open_picture, pad
from vlm.prompt_official import IGNORE, IMAGE, TEMPLATES, collate, prompt_ids, prompt_text, train_ids_and_labels

__all__ = ["IDLE", "image", "prompt", "tolerance_names"]


IDLE = frozenset({"projection_dim", "initializer_range", "max_position_embeddings", "attention_dropout", "lora_dropout"})
"""Fields of the towers' and decoders' configurations without effect."""


def tolerance_names(name: str) -> Sequence[str]:
    """Entries of a tolerance table that serve the output `name` where neither it nor its first part is listed."""
    if name.endswith((".pad", ".default")):
        return ("pixel_values",)
    return ("logits",) if name == "logits_tail" else ("inputs_embeds",)


def image(case: Case) -> dict[str, Any]:
    """Picture files -> the padded picture, and the pixel values with and without padding."""
    config = case.config
    config.expect(do_resize=True, resample=3, do_center_crop=True, do_rescale=True, rescale_factor=1 / 255, do_normalize=True, do_convert_rgb=True)
    size, edge = config["crop_size"]["height"], config["size"]["shortest_edge"]
    config["crop_size"].expect(width=size)
    spec = FixedSizeSpec(size=size, mean=tuple(config["image_mean"]), std=tuple(config["image_std"]), fit="crop", official=True)

    def pixels(picture: Any) -> Any:
        return spec.preprocess(picture, "infer")["pixels"] if edge == size else spec.normalise(crop_to(picture, size, official=True, edge=edge))

    outputs = {}
    for name, entry in case.inputs.items():
        picture = open_picture(case.bytes_of(entry["file"]), where=entry["file"], official=True)
        padded = pad(picture, mean_color(spec.mean))
        outputs |= {f"{name}.padded_uint8": np.array(padded), f"{name}.pad": pixels(padded), f"{name}.default": pixels(picture)}
    return outputs


def prompt(case: Case) -> dict[str, Any]:
    """Conversations -> prompts, ids, labels and the padded batch, for each flavour of the tokenizer."""
    case.config.expect(mm_use_im_start_end=False, image_token_index=IMAGE, ignore_index=IGNORE)
    special = {name: case.config[name] for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    stages = {"train_v1": case.config["version_stage2"], "train_plain": case.config["version_stage1"]}
    longest = case.config["model_max_length"]

    def answer(part: str, flavour: str) -> dict[str, Any]:
        legacy = {"legacy_false": False, "legacy_true": True}[flavour]
        file = case.folder / ("tokenizer_legacy.json" if legacy else "tokenizer.json")
        tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=str(file), **special)
        if part == "inference":
            return {entry["name"]: _inference(entry, tokenizer) for entry in case.inputs[part]}
        options = {"template": stages[part], "model_max_length": longest, "legacy": legacy}
        labelled = {entry["name"]: train_ids_and_labels(entry["conversations"], tokenizer, has_image=entry.get("image", True), **options) for entry in case.inputs[part]}
        if part == "train_plain":  # these cases have no prompt and no batch
            return {name: {"input_ids": sample.input_ids, "labels": sample.labels} for name, sample in labelled.items()}
        outputs: dict[str, Any] = {"samples": {name: {"prompt": sample.prompt, "input_ids": sample.input_ids, "labels": sample.labels} for name, sample in labelled.items()}}
        if "collated" in case.expected[part][flavour]:
            named = case.expected[part][flavour]["collated"]["of"]
            batch = collate([sample for name, sample in labelled.items() if name in named], tokenizer.pad_token_id, longest)
            outputs["collated"] = {"of": named, **{name: tensor.long() for name, tensor in batch.items()}}
        return outputs

    return {part: {flavour: answer(part, flavour) for flavour in flavours} for part, flavours in case.expected.items()}


def _inference(entry: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    text = prompt_text([(role, said) for role, said in entry["turns"]], entry["template"])
    return {"prompt": text, "input_ids": prompt_ids(text, tokenizer), "stop_string": TEMPLATES[entry["template"]].stop}
