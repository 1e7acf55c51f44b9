"""A LLaVA folder as others wrote it -> our parts: config.json of transformers' own class or of LLaVA's own program, geometry from tensor shapes, picture settings."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path
from typing import Any

from torch import Tensor

from vlm import connectors, encoders
from vlm.composition import from_plain
from vlm.encoders.base import FixedSizeSpec
from vlm.errors import CheckpointError, ConfigurationError
from vlm.weights.files import find_folder, read_shapes
from vlm.weights.found import Found, accepted, flat_text, image_processor, numbers, read_config, refuse, said
from vlm.weights.llava import KEYS, TOWERS, from_llava, row_of
from vlm.weights.public import DECODERS

__all__ = ["program_tower", "read"]

FAMILIES = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2", "llava_qwen2": "qwen2"}
"""`model_type` of LLaVA's own program -> decoder family."""
VISION = {"clip_vision_model": "clip", "clip": "clip", "siglip_vision_model": "siglip", "siglip": "siglip"}
"""`model_type` of a tower's config.json -> encoder."""
HEAD_WIDTH = 64
"""Width of one attention head in every released CLIP tower. Shapes do not tell it."""


@dataclass(frozen=True)
class LLaVAFound(Found):
    """Names are spelt in the rows of KEYS that this file uses."""

    def key(self, name: str) -> str:
        return from_llava(name)

    def spelt(self, name: str) -> str:
        rows = [row for row in KEYS if name.startswith(row[0])]
        used = {row_of(one) for one in self.shapes}
        ours, theirs = next((row for row in rows if row in used), rows[0] if rows else ("", ""))
        return theirs + name.removeprefix(ours)


def read(folder: Path, tower: str | None = None) -> Found:
    """Everything that a LLaVA folder says of its model, without values.

    Args:
        tower: folder or cached snapshot of the tower: its numbers for one whose config.json has none, and its weights for a checkpoint that holds none.

    Raises CheckpointError: no LLaVA, or a part is nowhere. ConfigurationError naming everything that our parts cannot express.
    """
    config = read_config(folder)
    shapes = read_shapes(folder)
    inside = {ours: tensor for name, tensor in shapes.items() if (ours := from_llava(name)).startswith("encoder.")}
    if "text_config" in config and config.get("model_type") == "llava":
        return _of_transformers(folder, config, shapes, bool(inside), tower)
    if any(key.startswith("mm_") for key in config) and config.get("model_type") in FAMILIES:
        return _of_program(folder, config, shapes, inside, tower)
    raise CheckpointError(
        f"{folder} is no LLaVA", got=f"model_type {config.get('model_type')!r}", expected=f"llava with a text_config, or one of {', '.join(FAMILIES)} with mm_ keys"
    )


# ---- transformers' own class -----------------------------------------------------------------------------------------------


def _of_transformers(folder: Path, config: Mapping[str, Any], shapes: Mapping[str, Tensor], inside: bool, tower: str | None) -> Found:
    from transformers import LlavaConfig

    theirs = accepted(LlavaConfig, folder, config)
    text, vision, level = theirs.text_config, theirs.vision_config, theirs.vision_feature_layer
    use = VISION.get(vision.model_type, str(vision.model_type))
    refuse(
        folder,
        [
            (text.model_type not in DECODERS, "text_config.model_type", text.model_type, " or ".join(DECODERS)),
            (use not in TOWERS, "vision_config.model_type", use, " or ".join(f"{name}_vision_model" for name in TOWERS)),
            (not isinstance(level, int), "vision_feature_layer", level, "one number"),
            (use in TOWERS and theirs.vision_feature_select_strategy != TOWERS[use], "vision_feature_select_strategy", theirs.vision_feature_select_strategy, TOWERS.get(str(use))),
            (theirs.projector_hidden_act != "gelu", "projector_hidden_act", theirs.projector_hidden_act, "gelu"),
            (not theirs.multimodal_projector_bias, "multimodal_projector_bias", theirs.multimodal_projector_bias, "true"),
        ],
    )
    if inside and tower is not None:
        raise ConfigurationError(f"{folder} has its own tower with its numbers", got=f"tower {tower}", cure="leave it out")
    if not inside and tower is None:
        raise _no_tower(folder, None)
    encoder = _encoder(use, numbers(vision.to_diff_dict()))
    encoder, policy = _pictures(folder, encoder)
    text.tie_word_embeddings = theirs.tie_word_embeddings
    connector = from_plain(connectors.registry, {"use": "mlp", "level": level})
    return LLaVAFound(folder, shapes, encoder, connector, text, policy, find_folder(tower) if tower else None, theirs.image_token_id)


def _encoder(use: str, config: dict[str, Any]) -> FixedSizeSpec:
    return from_plain(encoders.registry, {"use": use, "config": config})


# ---- LLaVA's own program -------------------------------------------------------------------------------------------------


def _of_program(folder: Path, config: Mapping[str, Any], shapes: Mapping[str, Tensor], inside: Mapping[str, Tensor], tower: str | None) -> Found:
    kind, level = str(config.get("mm_projector_type", "linear")), config.get("mm_vision_select_layer")
    depth = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    rows = [
        (kind != "linear" and not depth, "mm_projector_type", "linear or mlp2x_gelu"),
        (not isinstance(level, int), "mm_vision_select_layer", "a number, such as -2"),
        (config.get("mm_vision_select_feature", "patch") != "patch", "mm_vision_select_feature", "patch"),
        (bool(config.get("mm_use_im_start_end")), "mm_use_im_start_end", "false: no prompt here writes marks around pictures"),
        (config.get("mm_patch_merge_type", "flat") != "flat", "mm_patch_merge_type", "flat"),
        (config.get("image_aspect_ratio") not in (None, "square", "pad"), "image_aspect_ratio", "pad or square (pictures in tiles are of later models)"),
    ]
    refuse(folder, said(config, rows))
    encoder, place = program_tower(folder, config.get("mm_vision_tower"), inside, tower)
    connector = from_plain(connectors.registry, {"use": "mlp", "depth": int(depth[1]), "level": level} if depth else {"use": "linear", "level": level})
    policy = "pad" if config.get("image_aspect_ratio") == "pad" else "native"
    return LLaVAFound(folder, shapes, encoder, connector, flat_text(FAMILIES[config["model_type"]], config), policy, place, splits=True)


def program_tower(folder: Path, named: str | None, inside: Mapping[str, Tensor], asked: str | None) -> tuple[FixedSizeSpec, Path | None]:
    """The CLIP tower of a checkpoint of LLaVA's own program or a fork of it, and where its weights are if not in the checkpoint.

    Args:
        named: the config's `mm_vision_tower`. inside: the checkpoint's own tensors of the tower by our names. asked: a folder that counts before `named`.

    A tower inside is never looked up under the name in the config: it may have been trained. Raises CheckpointError, ConfigurationError.
    """
    place = asked if inside else asked or named
    if place is None:
        if not inside:
            raise _no_tower(folder, named)
        return _encoder("clip", _geometry(folder, inside)), None
    try:
        found = find_folder(place)
    except CheckpointError as problem:
        raise _no_tower(folder, place) from problem
    config = read_config(found)
    vision = config.get("vision_config", config)
    if (kind := vision.get("model_type", config.get("model_type"))) not in ("clip", "clip_vision_model"):
        raise ConfigurationError(f"{folder} cannot be imported with the tower {place}", got=kind, expected="a CLIP tower, as LLaVA-1.5's own program has it")
    return _encoder("clip", numbers(vision)), None if inside else found


def _no_tower(folder: Path, named: str | None) -> CheckpointError:
    return CheckpointError(
        f"{folder} holds no vision tower",
        got=f"{named!r}, which is neither a folder nor a cached hub snapshot" if named else "no name of one",
        expected="tensors of one in the checkpoint, or a folder with them",
        cure="fetch the tower, and give its folder with --tower",
    )


def _geometry(folder: Path, inside: Mapping[str, Tensor]) -> dict[str, Any]:
    """Numbers of CLIP's tower from the shapes of its tensors, what they do not tell as in every released one: heads 64 wide, quick_gelu."""

    def shape(name: str) -> tuple[int, ...]:
        if f"encoder.tower.{name}" not in inside:
            raise CheckpointError(f"the tower in {folder} is not CLIP's: it has no {name}", cure="give a folder with the tower's config.json with --tower")
        return tuple(inside[f"encoder.tower.{name}"].shape)

    (width,) = shape("embeddings.class_embedding")
    patch = shape("embeddings.patch_embedding.weight")[-1]
    places = shape("embeddings.position_embedding.weight")[0] - 1
    if width % HEAD_WIDTH:
        raise ConfigurationError(
            f"the number of attention heads of the tower in {folder} is not known: no config.json says it",
            got=f"width {width}",
            expected=f"a multiple of {HEAD_WIDTH}, the width of a head in CLIP's towers",
            cure="give a folder whose config.json has the tower's numbers with --tower",
        )
    blocks = {int(name.split(".")[4]) for name in inside if name.startswith("encoder.tower.encoder.layers.")}
    return {
        "hidden_size": width,
        "intermediate_size": shape("encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": max(blocks) + 1,
        "num_attention_heads": width // HEAD_WIDTH,
        "image_size": isqrt(places) * patch,
        "patch_size": patch,
        "hidden_act": "quick_gelu",
    }


# ---- pictures ------------------------------------------------------------------------------------------------------------


def _pictures(folder: Path, encoder: FixedSizeSpec) -> tuple[FixedSizeSpec, str]:
    """The encoder with the means of the folder's image processor, and the picture policy. Raises ConfigurationError naming settings that ours do not have."""
    written = image_processor(folder)
    if written is None:
        return encoder, "native"
    try:
        return _as_written(folder, encoder, written)
    except (AttributeError, TypeError, ValueError) as problem:
        got = ", ".join(f"{key} {written[key]!r}" for key in ("size", "crop_size", "rescale_factor", "image_mean", "image_std") if key in written)
        raise CheckpointError(f"the settings of the image processor of {folder} have another form than transformers writes", got=got, cure="fetch them again") from problem


def _as_written(folder: Path, encoder: FixedSizeSpec, written: Mapping[str, Any]) -> tuple[FixedSizeSpec, str]:
    clip = "Siglip" not in str(written.get("image_processor_type", written.get("feature_extractor_type", "CLIP")))
    size, crop = written.get("size", encoder.size), written.get("crop_size", encoder.size)
    sides = {key: size if isinstance(size, int) else size.get(key) for key in ("shortest_edge", "height", "width")}
    crops = {crop} if isinstance(crop, int) else set(crop.values())
    cut = bool(written.get("do_center_crop", clip))
    whole = {sides["shortest_edge"]} | crops if cut else {sides["height"], sides["width"]}
    rows = [
        (whole != {encoder.size}, "size", f"a square of the tower's {encoder.size} pixels"),
        (written.get("resample", 3) != 3, "resample", "3 (bicubic)"),
        (abs(written.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9, "rescale_factor", "1 / 255"),
        *((not written.get(key, True), key, "true") for key in ("do_resize", "do_rescale", "do_normalize")),
    ]
    refuse(folder, said(written, rows), "its image processor's ")
    mean, std = (tuple(float(value) for value in written.get(key, default)) for key, default in (("image_mean", encoder.mean), ("image_std", encoder.std)))
    return replace(encoder, mean=mean, std=std, fit="crop" if cut else "squash"), "pad" if written.get("do_pad") else "native"  # type: ignore[arg-type]
