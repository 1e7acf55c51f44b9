"""The table of golden families, and how one case is run. `make test-golden` runs every case of a folder through it.

A family is added by a file beside this one and its rows below. Prefixes: the last section of each systems/*.md.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.golden import anyres, arcana, arcana_model, arcana_parts, dsvl, dsvl_chat, dsvl_model
from tests.golden.case import Case
from tests.golden.compare import Aliases, differences

__all__ = ["TABLE", "NotBuilt", "Row", "folders", "row_of", "run"]


@dataclass(frozen=True)
class Row:
    """A built kind of case. run: case -> outputs by name. without_effect: fields of `config` that are known and change nothing. aliases: see `tolerance_of`."""

    run: Callable[[Case], Mapping[str, Any]]
    without_effect: frozenset[str] = frozenset()
    aliases: Aliases = lambda name: ()


@dataclass(frozen=True)
class NotBuilt:
    """A kind that the framework does not have yet; its cases are skipped with the reason."""

    reason: str


_BUILT = {
    "arcana_image": Row(arcana.image, frozenset({"_processor_class"}), arcana.tolerance_names),
    "arcana_mmlora": Row(arcana_parts.mmlora, arcana.IDLE, arcana.tolerance_names),
    "arcana_model": Row(arcana_model.model, arcana.IDLE, arcana.tolerance_names),
    "arcana_prompt": Row(arcana.prompt, aliases=arcana.tolerance_names),
    "arcana_qladder": Row(arcana_parts.qladder, arcana.IDLE, arcana.tolerance_names),
    "dsvl_aligner": Row(dsvl.aligner, frozenset({"class"})),
    "dsvl_chat": Row(dsvl_chat.chat, frozenset({"class"})),
    "dsvl_hybrid": Row(dsvl.hybrid, dsvl.IDLE | {"class"}),
    "dsvl_model": Row(dsvl_model.model, dsvl.IDLE | {"class"}),
    "dsvl_native": Row(dsvl_model.native, dsvl.IDLE | {"class", "freeze_high", "freeze_low"}),
    "dsvl_pixels": Row(dsvl.pixels),
    "dsvl_sam": Row(dsvl.sam, frozenset({"class"})),
    "dsvl_siglip": Row(dsvl.siglip, dsvl.IDLE | {"class"}),
    "pmod_anyres_counts": Row(anyres.counts),
    "pmod_anyres_features": Row(anyres.tokens),
    "pmod_anyres_max": Row(anyres.tokens),
    "pmod_anyres_pixels": Row(anyres.pixels, frozenset({"image_processor_type"})),
}

_NOT_BUILT = {
    "EVE v1": ("eve_v1_align", "eve_v1_data", "eve_v1_model", "eve_v1_patch", "eve_v1_pixels", "eve_v1_pixels_sizes"),
    "EVE v2": ("eve_v2_data", "eve_v2_embed", "eve_v2_layer", "eve_v2_model", "eve_v2_pixels", "eve_v2_pixels_sizes"),
    "mixture of experts": ("moe_block", "moe_convert", "moe_gate", "moe_layer", "moe_model", "moe_upcycle", "moe_upcycle_deepspeed_files", "moe_upcycle_modes"),
    "Mixture-of-Depths": ("pmod_decode", "pmod_layer", "pmod_llava", "pmod_model", "pmod_schedule"),
}

TABLE: dict[str, Row | NotBuilt] = {**_BUILT, **{prefix: NotBuilt(f"{subject} is not built yet") for subject, prefixes in _NOT_BUILT.items() for prefix in prefixes}}


def folders() -> list[Path]:
    """The cases copied into the repository, and those of `VLM_GOLDEN`, by default of `shared/golden` beside the repository (which may be absent)."""
    here = Path(__file__).resolve().parent
    named = os.environ.get("VLM_GOLDEN")
    other = Path(named).resolve() if named else here.parents[2] / "shared" / "golden"
    roots = [here / "cases"] + ([other] if named or other.is_dir() else [])
    found = {root: sorted(folder for folder in root.iterdir() if folder.is_dir()) for root in roots}
    assert all(found.values()), f"no cases in {', '.join(str(root) for root, cases in found.items() if not cases)}"
    return [folder for cases in found.values() for folder in cases]


def row_of(name: str) -> Row | NotBuilt:
    """The row with the longest prefix of a case's folder name.

    Raises:
        AssertionError: no prefix fits.
    """
    prefixes = [prefix for prefix in TABLE if name.startswith(prefix)]
    assert prefixes, f"unknown prefix: {name}; known are {', '.join(sorted(TABLE))}"
    return TABLE[max(prefixes, key=len)]


def run(case: Case, row: Row) -> list[str]:
    """Run a case, in float32 on one thread; the lines say why it does not pass."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        got = row.run(case)
    finally:
        torch.set_num_threads(threads)
    unknown = [f"unknown field in config: {name}" for name in case.config.unread(row.without_effect)]
    return unknown + differences(case.expected, got, case.tolerance, row.aliases)
