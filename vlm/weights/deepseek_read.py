"""A DeepSeek-VL folder as others wrote it -> our parts: the official program's `multi_modality` configuration, or transformers' own classes (systems/deepseek_vl.md, sections 2 and 3)."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from vlm.connectors.base import ConnectorSpec
from vlm.connectors.hybrid_mlp import HybridMLPSpec
from vlm.connectors.identity import IdentitySpec
from vlm.connectors.linear import LinearSpec
from vlm.connectors.mlp import MLPSpec
from vlm.encoders.base import EncoderSpec, Triple
from vlm.encoders.hybrid import HybridSpec, SAMSpec
from vlm.encoders.siglip import SigLIPSpec
from vlm.errors import CheckpointError, ConfigurationError, listed
from vlm.prompt import TEMPLATES, PromptSpec
from vlm.weights.deepseek_keys import model_from_official, native_key, native_name, official_name
from vlm.weights.files import read_json, read_shapes, read_tensors
from vlm.weights.found import Found, accepted, flat_text, image_processor, numbers, read_config, refuse, said

__all__ = ["CONFIG", "INTERPOLATE", "MIN_SIZE", "program_parts", "read"]

CONFIG = {
    "sam_b_downsample": {"width": 768, "layers": 12, "heads": 12, "global_attn_indexes": (2, 5, 8, 11), "downsample_channels": (512, 1024)},
    "sam_vit_b": {"width": 768, "layers": 12, "heads": 12, "global_attn_indexes": (2, 5, 8, 11)},
    "sam_vit_l": {"width": 1024, "layers": 24, "heads": 16, "global_attn_indexes": (5, 11, 17, 23)},
    "sam_vit_h": {"width": 1280, "layers": 32, "heads": 16, "global_attn_indexes": (7, 15, 23, 31)},
    "siglip_large_patch16_384": {"width": 1024, "layers": 24, "heads": 16, "patch_size": 16},
    "siglip_so400m_patch14_384": {"width": 1152, "layers": 27, "heads": 16, "patch_size": 14, "mlp_ratio": 3.7362},
    "siglip_so400m_patch14_224": {"width": 1152, "layers": 27, "heads": 16, "patch_size": 14, "mlp_ratio": 3.7362},
}
"""Towers that the official program knows by name; a configuration may bring others in its SAM_MODEL_CONFIG and SigLIP_MODEL_CONFIG."""
INTERPOLATE = (96, 96)
"""Rows and columns that the official program resizes SAM's map to."""
MIN_SIZE = 14
HALF = (0.5, 0.5, 0.5)
HEAD = re.compile(r"model\.vision_model\.(vision_model\.)?head\.")
"""transformers' pooling head, which its DeepSeek-VL never runs."""


@dataclass(frozen=True, kw_only=True)
class DeepSeekFound(Found):
    """official: spelt as by the official program, a qkv fused. Otherwise as by transformers."""

    official: bool

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        return self._ours(read_tensors(self.folder), [])

    def _ours(self, tensors: Iterable[tuple[str, Tensor]], dropped: list[str]) -> Iterator[tuple[str, Tensor]]:
        """By our names, without those that nothing reads; an unknown name stays as it is."""
        if self.official:
            yield from model_from_official(tensors, self.connector.use, dropped)
            return
        for name, tensor in tensors:
            if HEAD.match(name):
                dropped.append(name)
            else:
                yield native_key(name, isinstance(self.encoder, HybridSpec)), tensor

    def counted(self) -> "DeepSeekFound":
        """With shapes by our names, and a note of what is left out."""
        dropped: list[str] = []
        shapes = dict(self._ours(self.shapes.items(), dropped))
        notes = (f"{len(dropped)} tensors that are never used were left out ({listed(sorted(dropped))})",) if dropped else ()
        return replace(self, shapes=shapes, notes=self.notes + notes)

    def spelt(self, name: str) -> str:
        return official_name(name) if self.official else native_name(name)


def read(folder: Path, tower: str | None = None) -> Found:
    """Everything that a DeepSeek-VL folder says of its model, without values.

    Raises CheckpointError: no DeepSeek-VL. ConfigurationError naming everything that our parts cannot express.
    """
    if tower is not None:
        raise ConfigurationError("a DeepSeek-VL has its own towers", got=f"tower {tower}", cure="leave it out")
    config = read_config(folder)
    if config.get("model_type") in ("deepseek_vl", "deepseek_vl_hybrid"):
        return _of_transformers(folder, config).counted()
    if {"vision_config", "aligner_config", "language_config"} <= config.keys():
        return _of_program(folder, config).counted()
    expected = "multi_modality with vision_config, aligner_config and language_config, deepseek_vl or deepseek_vl_hybrid"
    raise CheckpointError(f"{folder} is no DeepSeek-VL", got=f"model_type {config.get('model_type')!r}", expected=expected)


# ---- the official program --------------------------------------------------------------------------------------------------


def _of_program(folder: Path, config: Mapping[str, Any]) -> DeepSeekFound:
    encoder, connector, text = program_parts(folder, config)
    encoder = _official_pictures(folder, encoder)
    return DeepSeekFound(folder, read_shapes(folder), encoder, connector, text, "native", prompt=_prompt(folder), official=True)


def program_parts(folder: Path, config: Mapping[str, Any]) -> tuple[EncoderSpec, ConnectorSpec, Any]:
    """Encoder, connector and the decoder's config of a `multi_modality` configuration. Raises ConfigurationError, which names `folder`."""
    vision, aligner = config["vision_config"], config["aligner_config"].get("params", {})
    hybrid = vision.get("cls") == "HybridVisionTower"
    params, out = vision.get("params", {}), aligner.get("n_embed")
    text = flat_text("llama", config["language_config"])
    kinds = ("low_high_hybrid_split_mlp_gelu",) if hybrid and params.get("concat_type", "tuple") == "tuple" else ("mlp_gelu", "linear", "identity")
    kind = aligner.get("projector_type")
    towers = [params.get("high_res_cfg", {}), params.get("low_res_cfg", {})] if hybrid else [params]
    rows = [
        (vision.get("cls") not in ("HybridVisionTower", "CLIPVisionTower"), "vision_config.cls", repr(vision.get("cls")), "HybridVisionTower or CLIPVisionTower"),
        (kind not in kinds, "aligner_config.params.projector_type", repr(kind), " or ".join(kinds)),
        (kind != "identity" and out != text.hidden_size, "aligner_config.params.n_embed", repr(out), f"the decoder's width, {text.hidden_size}"),
        *((one.get("select_feature", "same") != "same", "select_feature", repr(one.get("select_feature")), "same") for one in towers),
    ]
    refuse(folder, rows)
    depth = aligner.get("depth", 1)
    connectors: dict[str, ConnectorSpec] = {
        "identity": IdentitySpec(level="final"),
        "linear": LinearSpec(level="final"),
        "mlp_gelu": MLPSpec(depth=depth, level="final"),
        "low_high_hybrid_split_mlp_gelu": HybridMLPSpec(depth=depth),
    }
    entries = {**CONFIG, **config.get("SAM_MODEL_CONFIG", {}), **config.get("SigLIP_MODEL_CONFIG", {})}
    encoder: EncoderSpec
    if hybrid:
        interpolate = config.get("interpolate_size", INTERPOLATE)
        high = _sam(folder, params["high_res_cfg"], entries, None if interpolate is None else tuple(interpolate))
        encoder = HybridSpec(high=high, low=_siglip(folder, params["low_res_cfg"], entries), concat=params.get("concat_type", "tuple"))
    else:
        encoder = replace(_siglip(folder, params, entries), fit="letterbox", official=True)
    return encoder, connectors[kind], text


def _entry(folder: Path, params: Mapping[str, Any], entries: Mapping[str, Any]) -> Mapping[str, Any]:
    name = str(params.get("model_name"))
    if name not in entries:
        raise ConfigurationError(
            f"{folder} cannot be imported: nothing says what tower {name!r} is", expected=f"one of {', '.join(entries)}", cure="import a checkpoint of these parts"
        )
    return entries[name]


def _sam(folder: Path, params: Mapping[str, Any], entries: Mapping[str, Any], interpolate: tuple[int, int] | None) -> SAMSpec:
    entry = _entry(folder, params, entries)
    config = {
        "hidden_size": entry["width"],
        "num_hidden_layers": entry["layers"],
        "num_attention_heads": entry["heads"],
        "mlp_dim": int(entry["width"] * entry.get("mlp_ratio", 4)),
        "image_size": params.get("image_size", 1024),
        "patch_size": entry.get("patch_size", 16),
        "output_channels": entry.get("prompt_embed_dim", 256),
        "window_size": 14,
        "global_attn_indexes": list(entry["global_attn_indexes"]),
    }
    return SAMSpec(config=config, downsample_channels=tuple(entry.get("downsample_channels", ())), interpolate=interpolate, **_statistics(params))


def _siglip(folder: Path, params: Mapping[str, Any], entries: Mapping[str, Any]) -> SigLIPSpec:
    entry = _entry(folder, params, entries)
    layers, select = entry["layers"], params.get("select_layer", -1)
    config = {
        "hidden_size": entry["width"],
        "intermediate_size": int(entry["width"] * entry.get("mlp_ratio", 4)),
        "num_hidden_layers": min(layers, layers + select + 1 if select <= 0 else select),
        "num_attention_heads": entry["heads"],
        "image_size": params.get("image_size", 384),
        "patch_size": entry["patch_size"],
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "vision_use_head": False,
    }
    return SigLIPSpec(config=config, **_statistics(params))


def _statistics(params: Mapping[str, Any]) -> dict[str, Any]:
    """A tower normalises only where both are given."""
    mean, std = params.get("pixel_mean"), params.get("pixel_std")
    return {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)} if mean is None or std is None else {"mean": _triple(mean), "std": _triple(std)}


def _triple(values: Iterable[float]) -> Triple:
    red, green, blue = map(float, values)
    return red, green, blue


def _official_pictures(folder: Path, encoder: EncoderSpec) -> EncoderSpec:
    """Normalisation lies in the towers, or (one tower) in the image processor; the padding has the mean's colour in either case."""
    written = image_processor(folder)
    if written is None:
        return encoder
    plain = isinstance(encoder, SigLIPSpec) and encoder.std == (1.0, 1.0, 1.0)
    if plain and written.get("do_normalize", True):
        encoder = replace(encoder, mean=_triple(written.get("image_mean", HALF)), std=_triple(written.get("image_std", HALF)))
    if isinstance(encoder, HybridSpec):
        encoder = replace(encoder, min_size=written.get("min_size", MIN_SIZE))
    mean, size = getattr(encoder, "mean", HALF), getattr(encoder, "size", None)
    rows = [
        (not plain and bool(written.get("do_normalize", True)), "do_normalize", "false beside towers that normalise"),
        (plain and not written.get("do_normalize", True), "do_normalize", "true beside a tower that does not normalise"),
        (_triple(written.get("image_mean") or mean) != mean, "image_mean", f"the tower's {mean}"),
        (written.get("image_size", size) != size, "image_size", f"the tower's {size}"),
        (written.get("min_size", MIN_SIZE) != getattr(encoder, "min_size", MIN_SIZE), "min_size", f"{MIN_SIZE} of a single tower"),
        (abs(written.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9, "rescale_factor", "1 / 255"),
    ]
    refuse(folder, said(written, rows), "its image processor's ")
    return encoder


def _prompt(folder: Path) -> PromptSpec:
    """The released template, with the system text that the folder's processor names."""
    file = folder / "processor_config.json"
    written = read_json(file) if file.is_file() else {}
    if written.get("sft_format", "deepseek") != "deepseek":
        raise ConfigurationError(f"{folder} cannot be imported: its sft_format is {written['sft_format']!r}", expected="deepseek", cure="choose a prompt with --prompt")
    system = written.get("system_prompt")
    return PromptSpec(use="deepseek_vl", system=None if system == TEMPLATES["deepseek_vl"].system else system)


# ---- transformers' own classes ---------------------------------------------------------------------------------------------


def _of_transformers(folder: Path, config: Mapping[str, Any]) -> DeepSeekFound:
    from transformers import DeepseekVLConfig, DeepseekVLHybridConfig

    hybrid = config["model_type"] == "deepseek_vl_hybrid"
    theirs = accepted(DeepseekVLHybridConfig if hybrid else DeepseekVLConfig, folder, config)
    text, vision = theirs.text_config, theirs.vision_config
    towers = [("vision_config", vision, "siglip_vision_model"), *([("high_res_vision_config", theirs.high_res_vision_config, "sam_vision_model")] if hybrid else [])]
    refuse(folder, [(one.model_type != kind, f"{key}.model_type", one.model_type, kind) for key, one, kind in (("text_config", text, "llama"), *towers)])
    text.tie_word_embeddings = theirs.tie_word_embeddings
    written = image_processor(folder) or {}
    _check_native_pictures(folder, written, hybrid)
    low = SigLIPSpec(config=numbers(vision.to_diff_dict()) | {"vision_use_head": False}, **_native_statistics(written, ""))
    encoder: EncoderSpec = replace(low, fit="letterbox")
    connector: ConnectorSpec = MLPSpec(level="final")
    if hybrid:
        channels = theirs.high_res_vision_config.output_channels
        high = SAMSpec(config=numbers(theirs.high_res_vision_config.to_diff_dict()), downsample_channels=(2 * channels, 4 * channels), **_native_statistics(written, "high_res_"))
        resample: Any = {2: "bilinear", 3: "bicubic"}[written.get("resample", 3)]
        encoder = HybridSpec(high=high, low=low, rounding="round", resample=resample, min_size=written.get("min_size", MIN_SIZE))
        connector = HybridMLPSpec()
    return DeepSeekFound(folder, read_shapes(folder), encoder, connector, text, "native", image_id=theirs.image_token_id, prompt=PromptSpec(use="deepseek_vl"), official=False)


def _native_statistics(written: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The image processor's; the classes' own defaults are CLIP's."""
    mean, std = SAMSpec.mean, SAMSpec.std
    return {"mean": _triple(written.get(f"{prefix}image_mean") or mean), "std": _triple(written.get(f"{prefix}image_std") or std)}


def _check_native_pictures(folder: Path, written: Mapping[str, Any], hybrid: bool) -> None:
    filters = (2, 3) if hybrid else (3,)
    allowed = [
        ("resample", filters, "2 (bilinear) or 3 (bicubic)" if hybrid else "3 (bicubic)"),
        ("high_res_resample", (3,), "3 (bicubic)"),
        *([] if hybrid else [("min_size", (MIN_SIZE,), f"{MIN_SIZE}")]),
        *((name, (True,), "true") for name in ("do_resize", "do_rescale", "do_normalize", "do_pad")),
    ]
    rows = [(written.get(key) is not None and written[key] not in good, key, expected) for key, good, expected in allowed]
    refuse(folder, said(written, rows), "its image processor's ")
