"""LLaVA: the names of its tensors, read and written, and export as transformers' own `LlavaForConditionalGeneration` (llava_read.py reads its folders)."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.config import ModelSpec
from vlm.errors import CheckpointError, ConfigurationError
from vlm.weights.public import chat_template, common_obstacles, mlp_obstacles, public_tokenizer, save, sentences, single_connector, unadapted

if TYPE_CHECKING:
    from vlm.model import VLM
    from vlm.processor import VLMProcessor

__all__ = ["KEYS", "TOWERS", "as_written", "from_llava", "obstacles", "projector_key", "row_of", "to_llava", "write"]

POLICIES = ("native", "pad", "crop", "squash")
WRITES = "transformers' LlavaForConditionalGeneration"
KEYS = (
    ("encoder.tower.", "vision_tower.vision_model."),
    ("connector.mlp.layers.0.", "multi_modal_projector.linear_1."),
    ("connector.mlp.layers.2.", "multi_modal_projector.linear_2."),
    ("llm.model.", "language_model.model."),
    ("llm.lm_head.", "language_model.lm_head."),
    # transformers 5 saves the tower so
    ("encoder.tower.", "vision_tower."),
    # transformers 4.52 and later in memory
    ("encoder.tower.", "model.vision_tower.vision_model."),
    ("encoder.tower.", "model.vision_tower."),
    ("connector.mlp.layers.0.", "model.multi_modal_projector.linear_1."),
    ("connector.mlp.layers.2.", "model.multi_modal_projector.linear_2."),
    ("llm.model.", "model.language_model."),
    ("llm.lm_head.", "lm_head."),
    # LLaVA's own program
    ("encoder.tower.", "model.vision_tower.vision_tower.vision_model."),
    ("encoder.tower.", "model.vision_tower.vision_tower."),
    ("connector.linear.layers.0.weight", "model.mm_projector.weight"),
    ("connector.linear.layers.0.bias", "model.mm_projector.bias"),
    ("connector.mlp.layers.", "model.mm_projector."),
    ("llm.model.", "model."),
)
"""Start of our names -> start of the names in files. Written in the first row that fits, which is how released files are spelt; read in any, by the longest start that fits."""

PROJECTORS = ("base_model.model.model.mm_projector.", "model.mm_projector.", "mm_projector.", "model.multi_modal_projector.", "multi_modal_projector.")
"""Starts of the names in files that hold a projector alone; some have none."""

TOWERS = {"clip": "default", "siglip": "full"}
"""Encoder -> `vision_feature_select_strategy`: "default" drops the class token, "full" keeps every token."""


def to_llava(name: str) -> str:
    """Name of a parameter of VLM -> its name in a LLaVA file. Raises CheckpointError for a part that LLaVA does not have."""
    for ours, theirs in KEYS:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise CheckpointError(f"LLaVA has no place for the parameter {name}", expected=f"names that start with {', '.join(dict(KEYS))}")


def from_llava(name: str) -> str:
    """Name in a LLaVA file -> name in VLM; a name that LLaVA does not have comes back as it is, for the loader to report."""
    row = row_of(name)
    return row[0] + name.removeprefix(row[1]) if row else name


def row_of(name: str) -> tuple[str, str] | None:
    """The row of KEYS by which a file's name is read."""
    return max((row for row in KEYS if name.startswith(row[1])), key=lambda row: len(row[1]), default=None)


def projector_key(name: str) -> str:
    """Name in a projector's file, whatever stands in front of it -> name in VLM."""
    start = next((start for start in PROJECTORS if name.startswith(start)), "")
    own = name.removeprefix(start)
    return from_llava(("multi_modal_projector." if own.startswith("linear_") else "model.mm_projector.") + own)


# ---- what can be exported ------------------------------------------------------------------------------------------------


def obstacles(model: ModelSpec, text_config: Any) -> list[str]:
    """All that keeps a model from being a LlavaForConditionalGeneration; empty where nothing does."""
    encoder, connector = model.encoder, model.connector
    rows = [
        (encoder.use not in TOWERS, "model.encoder", encoder.use, " or ".join(TOWERS)),
        *common_obstacles(model, text_config),
        unadapted(model),
        (not isinstance(connector.level, int), "model.connector.level", connector.level, "a numbered hidden state, such as -2"),
        (connector.use != "mlp", "model.connector", connector.use, "mlp with depth 2"),
        *(mlp_obstacles(connector, text_config.hidden_size) if connector.use == "mlp" else ()),
        single_connector(connector),
    ]
    return sentences(rows, "LLaVA")


# ---- files ---------------------------------------------------------------------------------------------------------------


def as_written(processor: "VLMProcessor") -> "tuple[VLMProcessor, str]":
    """The processor as the exported one computes, and what that changes: nothing, LLaVA's expresses ours or is refused."""
    return processor, ""


def write(model: "VLM", processor: "VLMProcessor", folder: Path) -> None:
    """Model, configuration, processor and generation settings into `folder`, dtypes kept.

    Raises ConfigurationError where a part, the picture policy or the tokenizer cannot be expressed.
    """
    if found := obstacles(model.spec, model.config.text_config):
        raise ConfigurationError(f"this model cannot be exported as LLaVA: {'; '.join(found)}", cure="export a model of these parts, or load it through vlm or the Auto classes")
    assert not model.spec.adapt, "merge_lora comes first"
    save(model, processor, folder, rename=to_llava, config=_config(model), exported=_processor(processor))


def _config(model: "VLM") -> Any:
    from transformers import LlavaConfig

    encoder: Any = model.spec.encoder
    level: Any = model.spec.connector.level
    strategy: Any = TOWERS[encoder.use]
    return LlavaConfig(
        vision_config=copy.deepcopy(model.encoder.tower.config),  # type: ignore[union-attr]
        text_config=copy.deepcopy(model.config.text_config),
        image_token_index=model.config.image_token_id,
        image_seq_length=(encoder.size // encoder.patch) ** 2,
        projector_hidden_act="gelu",
        multimodal_projector_bias=True,
        vision_feature_layer=level or -encoder.depth - 1,  # transformers 5.23 takes 0 for "no hidden states wanted"
        vision_feature_select_strategy=strategy,
        architectures=["LlavaForConditionalGeneration"],
        dtype=model.dtype,
    )


# ---- processor -----------------------------------------------------------------------------------------------------------


def _processor(processor: "VLMProcessor") -> Any:
    from transformers import LlavaProcessor

    encoder: Any = processor.model.encoder
    tokenizer = public_tokenizer(processor.prompt)
    token = str(processor.tokenizer.convert_ids_to_tokens(processor.image_token_id))
    tokenizer.chat_template = chat_template(processor.prompt, token)
    return LlavaProcessor(
        image_processor=_image_processor(processor),
        tokenizer=tokenizer,
        patch_size=encoder.patch,
        vision_feature_select_strategy=TOWERS[encoder.use],
        num_additional_image_tokens=encoder.prefix,
        chat_template=tokenizer.chat_template,
        image_token=token,
    )


def _image_processor(processor: "VLMProcessor") -> Any:
    """The picture policy and the encoder's own fitting as settings of a public class: pad is LLaVA's, crop is CLIP's, squash is SigLIP's.

    Our pixels are Pillow's: load with `backend="pil"` where they must be reproduced to the last bit. Pictures 3 pixels high of an `official` encoder are the one exception.
    """
    from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil, SiglipImageProcessorPil

    encoder: Any = processor.model.encoder
    shape = encoder.fit if processor.policy in ("native", "pad") else processor.policy
    if shape not in ("crop", "squash"):
        raise ConfigurationError(f"LLaVA's image processors cannot express the picture policy {shape!r}", expected="native, pad, crop or squash")
    settings: dict[str, Any] = {
        "size": {"shortest_edge": encoder.size} if shape == "crop" else {"height": encoder.size, "width": encoder.size},
        "crop_size": {"height": encoder.size, "width": encoder.size},
        "do_center_crop": shape == "crop",
        "image_mean": list(encoder.mean),
        "image_std": list(encoder.std),
    }
    if processor.policy == "pad":
        return LlavaImageProcessorPil(do_pad=True, **settings)
    return CLIPImageProcessorPil(**settings) if shape == "crop" else SiglipImageProcessorPil(**settings)
