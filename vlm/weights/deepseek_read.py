"""A DeepSeek-VL folder as others wrote it -> our parts: the official program's `multi_modality` configuration, or transformers' own classes (systems/deepseek_vl.md, sections 2 and 3)."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from vlm.connectors.base import ConnectorSpec
from vlm.connectors.hybrid_mlp import HybridMLPSpec
from vlm.connectors.mlp import MLPSpec
from vlm.encoders.base import EncoderSpec, Triple
from vlm.encoders.hybrid import HybridSpec, SAMSpec
from vlm.encoders.siglip import SigLIPSpec
from vlm.encoders.tower import CLIP_MEAN, CLIP_STD
from vlm.errors import CheckpointError, ConfigurationError, listed
from vlm.images import mean_color
from vlm.prompt import TEMPLATES, PromptSpec
from vlm.weights.deepseek_keys import VISION, model_key, native_key, native_name, official_name, parts
from vlm.weights.deepseek_program import program_parts, section
from vlm.weights.files import read_json, read_shapes, read_tensors
from vlm.weights.found import Found, accepted, image_processor, numbers, read_config, refuse, said

__all__ = ["MIN_SIZE", "read"]

MIN_SIZE = 14
HALF = (0.5, 0.5, 0.5)
HEAD = re.compile(r"model\.vision_model\.(vision_model\.)?head\.")
"""transformers' pooling head, which its DeepSeek-VL never runs."""


@dataclass(frozen=True, kw_only=True)
class DeepSeekFound(Found):
    """official: spelt as by the official program. Otherwise as by transformers."""

    official: bool

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        return self._used(read_tensors(self.folder), [])

    def _used(self, tensors: Iterable[tuple[str, Tensor]], dropped: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Without those that nothing reads."""
        if self.official:
            yield from parts(tensors, dropped, VISION)
            return
        for name, tensor in tensors:
            if HEAD.match(name):
                dropped.append(name)
            else:
                yield name, tensor

    def counted(self) -> "DeepSeekFound":
        """With the shapes of what is read, and a note of what is left out."""
        dropped: list[str] = []
        shapes = dict(self._used(self.shapes.items(), dropped))
        notes = (f"{len(dropped)} tensors that are never used were left out ({listed(sorted(dropped))})",) if dropped else ()
        return replace(self, shapes=shapes, notes=self.notes + notes)

    def key(self, name: str) -> str:
        return model_key(name, self.connector.use) if self.official else native_key(name, isinstance(self.encoder, HybridSpec))

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


@dataclass(frozen=True, kw_only=True)
class _Pictures:
    """What `VLMImageProcessor` is built of, with the program's own defaults. image_mean is also the colour of the padding; null: medium grey."""

    image_size: int | None = None
    min_size: int = MIN_SIZE
    image_mean: Triple | None = CLIP_MEAN
    image_std: Triple | None = CLIP_STD
    rescale_factor: float = 1 / 255
    do_normalize: bool = True


def _official_pictures(folder: Path, encoder: Any) -> EncoderSpec:
    """Normalisation lies in the towers, or (one tower) in the image processor; the padding has the mean's colour in either case."""
    written = image_processor(folder)
    if written is None:
        return encoder
    told = section(folder, "its image processor", written, _Pictures)
    mean, std = told.image_mean, told.image_std
    pair = isinstance(encoder, HybridSpec)
    plain = not pair and encoder.std == (1.0, 1.0, 1.0)
    rows = [
        (told.do_normalize and not plain, "do_normalize", told.do_normalize, "false beside towers that normalise"),
        (plain and not told.do_normalize, "do_normalize", told.do_normalize, "true beside a tower that does not normalise"),
        (plain and None in (mean, std), "image_mean or image_std", None, "three numbers, by which do_normalize goes"),
        (not plain and mean_color(mean or HALF) != mean_color(encoder.mean), "image_mean", mean, f"the tower's {encoder.mean}, in whose colour pictures are padded"),
        (told.image_size not in (None, encoder.size), "image_size", told.image_size, f"the tower's {encoder.size}"),
        (not pair and told.min_size != MIN_SIZE, "min_size", told.min_size, f"{MIN_SIZE} of a single tower"),
        (abs(told.rescale_factor - 1 / 255) > 1e-9, "rescale_factor", told.rescale_factor, "1 / 255"),
    ]
    refuse(folder, rows, "its image processor's ")
    if plain:
        return replace(encoder, mean=mean, std=std)
    return replace(encoder, min_size=told.min_size) if pair else encoder


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


def _triple(values: Iterable[float]) -> Triple:
    red, green, blue = map(float, values)
    return red, green, blue


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
