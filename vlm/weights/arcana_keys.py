"""Names of Arcana's tensors in its own program and ours (systems/arcana.md, sections 2.2 and 2.4): one table, read in both directions."""

import re
from collections.abc import Iterable

__all__ = ["LINEARS", "SIDES", "from_arcana", "to_arcana"]

TOWER = "model.vision_tower.vision_tower"
LADDER = (
    ("query_norm", "layer_norm0"),
    ("key_norm", "layer_norm1"),
    ("mlp_norm", "layer_norm2"),
    *((name, f"cross_attn.{name}") for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
    *((name, f"mlp.{name}") for name in ("fc1", "fc2")),
)
LINEARS = (*(f"self_attn.{name}_proj" for name in "qkvo"), *(f"mlp.{name}_proj" for name in ("gate", "up", "down")))
"""What carries MM-LoRA in every decoder layer."""
SIDES = {"vision": "V_Slora", "language": "L_Slora"}
"""Modality -> beginning of the names of its A and B."""
KEYS = (
    ("connector.qladder.queries", f"{TOWER}.qladder_embeds"),
    *((f"connector.qladder.layers.#.{ours}", f"{TOWER}.LadderAdapters.#.{theirs}") for ours, theirs in LADDER),
    ("encoder.tower", f"{TOWER}.vision_model"),
    ("connector.mlp_1.layers", "model.mm_projector"),
    *(
        (f"llm.model.layers.#.{linear}.lora_{matrix}.{modality}", f"model.layers.#.{linear}.{name}_{matrix}")
        for linear in LINEARS
        for modality, name in SIDES.items()
        for matrix in "AB"
    ),
    *((f"llm.model.layers.#.{linear}.base_layer", f"model.layers.#.{linear}") for linear in LINEARS),
    ("llm.model", "model"),
    ("llm.lm_head", "lm_head"),
)
"""Start of our names -> start of theirs, up to a dot; # stands for a number. The first row that fits counts."""


def from_arcana(name: str) -> str:
    """Name in a file -> name in a VLM; one that Arcana does not have comes back as none of ours."""
    return _translated(name, ((theirs, ours) for ours, theirs in KEYS))


def to_arcana(name: str) -> str:
    """The way back."""
    return _translated(name, KEYS)


def _translated(name: str, rows: Iterable[tuple[str, str]]) -> str:
    number = re.search(r"\.(?:layers|LadderAdapters)\.(\d+)\.", name)
    for source, target in rows:
        if number is not None:
            source, target = source.replace("#", number[1]), target.replace("#", number[1])
        if name == source or name.startswith(f"{source}."):
            return target + name.removeprefix(source)
    return name
