"""An Arcana folder as its own program wrote it -> our parts: LLaVA-1.5 with a QLadder beside the tower and MM-LoRA in the decoder (systems/arcana.md)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from vlm.connectors.mlp import MLPSpec
from vlm.connectors.qladder import QLadderSpec
from vlm.encoders.base import FixedSizeSpec
from vlm.encoders.clip import CLIPSpec
from vlm.errors import CheckpointError, ConfigurationError
from vlm.llm.mm_lora import MMLoRASpec
from vlm.prompt import PromptSpec
from vlm.weights.arcana_keys import LINEARS, SIDES, from_arcana, to_arcana
from vlm.weights.files import read_shapes
from vlm.weights.found import Found, flat_text, numbers, read_config, refuse, said
from vlm.weights.llava_read import program_tower

__all__ = ["DROPOUT", "MODEL_TYPES", "SCALE", "SELECT", "read"]

MODEL_TYPES = ("arcana_llama", "llava_llama")
"""What released folders call themselves, and what the program registers."""
SCALE, DROPOUT = 2.0, 0.05
"""Constants of the program's layers."""
SELECT = "qladder_select"
"""A setting of config.json that only we read and write: "last" where the query tokens come from the last ladder layer, as in the program's archive. Keys do not tell."""


@dataclass(frozen=True)
class ArcanaFound(Found):
    def key(self, name: str) -> str:
        return from_arcana(name)

    def spelt(self, name: str) -> str:
        return to_arcana(name)


def read(folder: Path, tower: str | None = None) -> Found:
    """Everything that an Arcana folder says of its model, without values. Numbers of queries and ranks, and whether the layers that are never read are there, come from shapes.

    tower: as for LLaVA's own program (llava_read.py). Raises CheckpointError: no Arcana, or a part is nowhere. ConfigurationError naming everything that our parts cannot express.
    """
    config = read_config(folder)
    shapes = read_shapes(folder)
    if config.get("model_type") not in MODEL_TYPES or not any("_Slora_" in name or "qladder" in name for name in shapes):
        raise CheckpointError(
            f"{folder} is no Arcana",
            got=f"model_type {config.get('model_type')!r}, {len(shapes)} tensors",
            expected=f"{' or '.join(MODEL_TYPES)}, with qladder_embeds and Slora tensors",
            cure="a LLaVA is imported with --family llava",
        )
    _check(folder, config)
    ours = {from_arcana(name): tensor for name, tensor in shapes.items()}
    encoder, place = _tower(folder, config, {name: tensor for name, tensor in ours.items() if name.startswith("encoder.")}, tower)
    ladder = _ladder(folder, config, ours, encoder.depth)
    policy = "pad" if config.get("image_aspect_ratio", "pad") == "pad" else "native"
    adapt = {"mm_lora": MMLoRASpec(rank=_ranks(folder, ours), scale=SCALE, dropout=DROPOUT)}
    return ArcanaFound(folder, shapes, encoder, ladder, flat_text("llama", config), policy, place, prompt=PromptSpec(use="vicuna_v1"), splits=True, adapt=adapt)


def _check(folder: Path, config: Mapping[str, Any]) -> None:
    allowed = {
        "mm_projector_type": (("mlp2x_gelu",), "mlp2x_gelu"),
        "mm_vision_select_feature": (("patch", None), "patch"),
        "mm_use_im_start_end": ((False, None), "false: no prompt here writes marks around pictures"),
        "mm_patch_merge_type": (("flat", None), "flat"),
        "image_aspect_ratio": (("pad", "square", None), "pad or square"),
        "pretraining_tp": ((1, None), "1: other values go past MM-LoRA"),
        SELECT: (("same", "last", None), "same or last"),
    }
    rows = [(config.get(key) not in values, key, expected) for key, (values, expected) in allowed.items()]
    rows.append((not isinstance(config.get("mm_vision_select_layer"), int), "mm_vision_select_layer", "a number, such as -2"))
    refuse(folder, said(config, rows))


def _tower(folder: Path, config: Mapping[str, Any], inside: Mapping[str, Tensor], asked: str | None) -> tuple[FixedSizeSpec, Path | None]:
    """Our export writes a tower's numbers into config.json, where the program has none."""
    if inside and asked is None and "vision_config" in config:
        return CLIPSpec(config=numbers(config["vision_config"])), None
    return program_tower(folder, config.get("mm_vision_tower"), inside, asked)


def _ladder(folder: Path, config: Mapping[str, Any], ours: Mapping[str, Tensor], depth: int) -> QLadderSpec:
    queries, level, select = _shape(folder, ours, "connector.qladder.queries")[1], config["mm_vision_select_layer"], config.get(SELECT) or "same"
    spec = QLadderSpec(queries=queries, level=level, select=select, official=True, then=MLPSpec())
    try:
        never_read = range(spec.used(depth), depth)
    except ConfigurationError as problem:
        cure = f'set mm_vision_select_layer, or "{SELECT}": "last" where its program is the archived one'
        raise problem.changed(what=f"{folder / 'config.json'}: the ladder has no layer of this number", got=f"mm_vision_select_layer {level}", cure=cure) from problem
    there = {name.split(".")[3] for name in ours if name.startswith("connector.qladder.layers.")}
    kept = not never_read or any(str(index) in there for index in never_read)
    return replace(spec, all_layers=None if kept else False)


def _ranks(folder: Path, ours: Mapping[str, Tensor]) -> dict[str, int]:
    return {modality: _shape(folder, ours, f"llm.model.layers.0.{LINEARS[0]}.lora_A.{modality}.weight")[0] for modality in SIDES}


def _shape(folder: Path, ours: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    if name not in ours:
        raise CheckpointError(f"{folder} holds no {to_arcana(name)}", cure="fetch the whole checkpoint")
    return tuple(ours[name].shape)
