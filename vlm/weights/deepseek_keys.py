"""Names of DeepSeek-VL's tensors in the official program and in transformers' classes, and ours (systems/deepseek_vl.md, section 2.7). Both ways; a fused qkv is three linears here.

Ours are those of encoder `hybrid` (`high.`, `low.tower.`) for two towers and of encoder `siglip` (`tower.`) for one.
"""

import re
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

__all__ = [
    "NATIVE",
    "VISION",
    "from_official",
    "model_from_official",
    "model_key",
    "model_to_official",
    "native_key",
    "native_name",
    "official_name",
    "parts",
    "sam_key",
    "to_official",
    "tower_key",
]

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
VISION = "vision_model."
"""In front of the towers' names in a whole model."""
NATIVE = (
    ("encoder.high.trunk.", "model.high_res_vision_model.vision_encoder."),
    ("encoder.high.neck_hd.", "model.high_res_vision_neck."),
    ("encoder.high.downsamples.0.", "model.high_res_vision_proj.conv1."),
    ("encoder.high.downsamples.1.", "model.high_res_vision_proj.conv2."),
    ("encoder.high.alpha", "model.high_res_vision_alpha"),
    ("encoder.low.tower.", "model.vision_model."),
    ("connector.hybrid_mlp.high_up_proj.", "model.aligner.high_res_vision_proj."),
    ("connector.hybrid_mlp.low_up_proj.", "model.aligner.vision_proj."),
    ("connector.hybrid_mlp.layers.1.", "model.aligner.proj."),
    ("encoder.tower.", "model.vision_model."),
    ("connector.mlp.layers.0.", "model.aligner.linear1."),
    ("connector.mlp.layers.2.", "model.aligner.linear2."),
    ("llm.model.", "model.language_model."),
    ("llm.lm_head.", "lm_head."),
)
"""Start of our names -> start of the names of `DeepseekVLHybridForConditionalGeneration` and, with one tower, of `DeepseekVLForConditionalGeneration`."""


def parts(tensors: Iterable[tuple[str, Tensor]], dropped: list[str], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors of the program in our shapes, still by its names: of a SigLIP's qkv every third (`...attn.qkv.weight[q]`), its positions without their batch axis. Those that nothing reads go to `dropped`.

    prefix: of the towers' names; what has another one is no tower's.
    """
    for name, tensor in tensors:
        own = name.removeprefix(prefix) if name.startswith(prefix) else ""
        siglip = own.startswith(("vision_tower_low.vision_tower.", "vision_tower."))
        if UNUSED.match(own):
            dropped.append(name)
        elif siglip and ".attn.qkv." in own:
            yield from zip((f"{name}[{part}]" for part in "qkv"), torch.atleast_1d(tensor).tensor_split(3), strict=True)
        else:
            yield name, tensor.squeeze(0) if siglip and own.endswith(".pos_embed") else tensor


def tower_key(name: str) -> str:
    """Name in `parts` of a tower -> its name in the tower here; an unknown one stays as it is."""
    return _renamed(re.sub(r"\.attn\.qkv\.(\w+)\[([qkv])\]$", r".attn.\2.\1", name), official=True)


def from_official(tensors: Iterable[tuple[str, Tensor]], dropped: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a `HybridVisionTower` or a `CLIPVisionTower` -> by our names; those that nothing reads go to `dropped`, an unknown name stays as it is."""
    return ((tower_key(name), tensor) for name, tensor in parts(tensors, dropped))


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


def model_key(name: str, connector: str) -> str:
    """Name in `parts` of a whole model -> its name in a VLM with this connector; an unknown one stays as it is, or is none there."""
    if name.startswith(VISION):
        ours = tower_key(name.removeprefix(VISION))
        return f"encoder.{ours}" if ours.startswith(("high.", "low.", "tower.")) else name
    if name.startswith("aligner."):
        own = name.removeprefix("aligner.")
        return f"connector.{connector}." + (own.replace("layers.", "layers.0.") if connector == "linear" else own)
    return f"llm.{name.removeprefix('language_model.')}" if name.startswith("language_model.") else name


def model_from_official(tensors: Iterable[tuple[str, Tensor]], connector: str, dropped: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a `MultiModalityCausalLM` -> by the names of a VLM with this connector. Names that nothing reads go to `dropped`, an unknown one stays as it is."""
    return ((model_key(name, connector), tensor) for name, tensor in parts(tensors, dropped, VISION))


def model_to_official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back."""
    towers = to_official({name.removeprefix("encoder."): tensor for name, tensor in tensors.items() if name.startswith("encoder.")})
    found = {VISION + name: tensor for name, tensor in towers.items()}
    return found | {official_name(name): tensor for name, tensor in tensors.items() if not name.startswith("encoder.")}


def official_name(name: str) -> str:
    """One name of a VLM -> the official one; a tower's q, k and v as `parts` calls them."""
    if name.startswith("encoder."):
        own = _renamed(name.removeprefix("encoder."), official=False)
        return VISION + re.sub(r"\.attn\.([qkv])\.(\w+)$", r".attn.qkv.\2[\1]", own)
    if name.startswith("connector.linear.layers.0."):
        return name.replace("connector.linear.layers.0.", "aligner.layers.")
    if name.startswith("connector."):
        return f"aligner.{name.split('.', 2)[2]}"
    return f"language_model.{name.removeprefix('llm.')}"


def native_key(name: str, hybrid: bool) -> str:
    """Name in a file of transformers' classes -> name in a VLM; files of transformers 4 hold SigLIP one level deeper. An unknown one stays as it is."""
    name = name.replace("model.vision_model.vision_model.", "model.vision_model.")
    rows = [row for row in NATIVE if name.startswith(row[1]) and not row[0].startswith("encoder.tower." if hybrid else "encoder.low.")]
    return rows[0][0] + name.removeprefix(rows[0][1]) if rows else name


def native_name(name: str) -> str:
    """The way back; an unknown one stays as it is."""
    return next((theirs + name.removeprefix(ours) for ours, theirs in NATIVE if name.startswith(ours)), name)


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
