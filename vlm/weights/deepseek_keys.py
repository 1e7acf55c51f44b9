"""Names of DeepSeek-VL's vision towers in the official program, and ours (systems/deepseek_vl.md, section 2.7). Both ways; a fused qkv is three linears here.

Ours are those of encoder `hybrid` (`high.`, `low.tower.`) for two towers and of encoder `siglip` (`tower.`) for one.
"""

import re
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

__all__ = ["from_official", "sam_key", "to_official"]

NECK = ("conv1", "layer_norm1", "conv2", "layer_norm2")
SAM = (
    ("pos_embed", "trunk.pos_embed"),
    ("patch_embed.proj", "trunk.patch_embed.projection"),
    *((f"blocks.#.norm{number}", f"trunk.layers.#.layer_norm{number}") for number in (1, 2)),
    ("blocks.#", "trunk.layers.#"),
    *((f"neck.{number}", f"trunk.neck.{name}") for number, name in enumerate(NECK)),
    *((f"neck_hd.{number}", f"neck_hd.{name}") for number, name in enumerate(NECK)),
    ("downsamples", "downsamples"),
    ("hd_alpha_downsamples", "alpha"),
)
VIT = (
    ("pos_embed", "embeddings.position_embedding.weight"),
    ("patch_embed.proj", "embeddings.patch_embedding"),
    *((f"blocks.#.norm{number}", f"encoder.layers.#.layer_norm{number}") for number in (1, 2)),
    ("blocks.#.mlp", "encoder.layers.#.mlp"),
    ("blocks.#.attn.proj", "encoder.layers.#.self_attn.out_proj"),
    *((f"blocks.#.attn.{part}", f"encoder.layers.#.self_attn.{part}_proj") for part in "qkv"),
    ("norm", "post_layernorm"),
)
TOWERS = (("vision_tower_high.vision_tower.", "high.", SAM), ("vision_tower_low.vision_tower.", "low.tower.", VIT), ("vision_tower.", "tower.", VIT))
UNUSED = re.compile(r"(vision_tower(_low\.vision_tower)?\.attn_pool|high_layer_norm|low_layer_norm)\.")
"""Stored by the official program and never read by it."""


def from_official(tensors: Iterable[tuple[str, Tensor]], dropped: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a `HybridVisionTower` or a `CLIPVisionTower` -> by our names; those that nothing reads go to `dropped`, an unknown name stays as it is."""
    for name, tensor in tensors:
        if UNUSED.match(name):
            dropped.append(name)
        elif ".attn.qkv." in name and not name.startswith("vision_tower_high."):
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                yield _renamed(name.replace(".qkv.", f".{part}."), official=True), third
        else:
            ours = _renamed(name, official=True)
            yield ours, tensor[0] if ours.endswith("position_embedding.weight") else tensor


def to_official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back; of an attention q, k and v must all be there."""
    found = {}
    for name, tensor in tensors.items():
        if name.endswith((".self_attn.q_proj.weight", ".self_attn.q_proj.bias")):
            thirds = [tensors[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            found[_renamed(name, official=False).replace(".attn.q.", ".attn.qkv.")] = torch.cat(thirds)
        elif not name.endswith((".self_attn.k_proj.weight", ".self_attn.k_proj.bias", ".self_attn.v_proj.weight", ".self_attn.v_proj.bias")):
            official = _renamed(name, official=False)
            found[official] = tensor[None] if name.endswith("position_embedding.weight") else tensor
    return found


def sam_key(name: str) -> str | None:
    """A tensor of SAM's own encoder, or of the high tower, by the official name -> its name in `SAMTower`; None for another spelling."""
    return _translated(name, SAM)


def _renamed(name: str, official: bool) -> str:
    """One name of a tower, from the official program's or to it; an unknown one comes back as it is."""
    for theirs, ours, rows in TOWERS:
        here, there = (theirs, ours) if official else (ours, theirs)
        if name.startswith(here) and (found := _translated(name.removeprefix(here), rows if official else [(b, a) for a, b in rows])):
            return there + found
    return name


def _translated(name: str, rows: Iterable[tuple[str, str]]) -> str | None:
    """By the first row that fits; # stands for a number."""
    for source, target in rows:
        found = re.fullmatch(re.escape(source).replace(r"\#", r"(\d+)") + r"(\..+)?", name)
        if found:
            *number, rest = found.groups()
            return (target.replace("#", number[0]) if number else target) + (rest or "")
    return None
