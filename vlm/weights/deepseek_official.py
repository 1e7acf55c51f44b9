"""Export in the keys of DeepSeek-VL's own program, a folder of its `MultiModalityCausalLM` (deepseek_read.py reads it; systems/deepseek_vl.md, sections 2.1 to 2.7)."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from vlm.config import ModelSpec
from vlm.encoders.hybrid import HybridSpec, SAMSpec
from vlm.encoders.siglip import SigLIPSpec
from vlm.errors import ConfigurationError
from vlm.weights.deepseek import picture_rule
from vlm.weights.deepseek_keys import model_to_official
from vlm.weights.deepseek_program import CONFIG, INTERPOLATE, program_parts
from vlm.weights.deepseek_read import MIN_SIZE
from vlm.weights.found import METADATA, numbers
from vlm.weights.public import Obstacle, common_obstacles, generation_settings, own_tensors, public_tokenizer, sentences, single_connector, unadapted

if TYPE_CHECKING:
    from vlm.model import VLM
    from vlm.processor import VLMProcessor

__all__ = ["as_written", "obstacles", "write"]

NAME = "the official DeepSeek-VL"
ALIGNERS = {"hybrid_mlp": "low_high_hybrid_split_mlp_gelu", "mlp": "mlp_gelu", "linear": "linear", "identity": "identity"}
"""Our connectors -> its projector_type."""
TABLES = ("SAM_MODEL_CONFIG", "SigLIP_MODEL_CONFIG", "interpolate_size")
"""What config.json says beyond the program's own fields, of models whose numbers are not in its code. Our import reads it."""
POLICIES = ("native",)
WRITES = "DeepSeek-VL's own keys"
Entry = dict[str, Any]


def obstacles(model: ModelSpec, text_config: Any) -> list[str]:
    """All that keeps a model from being one; empty where nothing does."""
    encoder, connector = model.encoder, model.connector
    pair = isinstance(encoder, HybridSpec)
    fitting = ("hybrid_mlp",) if pair and encoder.concat == "tuple" else ("mlp", "linear", "identity")
    low = encoder.low if pair else encoder
    rows: list[Obstacle] = [
        (not isinstance(low, SigLIPSpec), "model.encoder.low" if pair else "model.encoder", low.use, "siglip" if pair else "hybrid or siglip"),
        (connector.use not in fitting, "model.connector", connector.use, " or ".join(fitting)),
        *common_obstacles(model, text_config, ("llama",)),
        unadapted(model),
        (connector.level != "final", "model.connector.level", connector.level, "final"),
        single_connector(connector),
        (getattr(connector, "hidden", None) not in (None, text_config.hidden_size), "model.connector.hidden", getattr(connector, "hidden", None), "the decoder's width"),
    ]
    if pair and encoder.concat == "tuple":
        widths = encoder.widths
        rows.append((len(set(widths.values())) > 1, "model.encoder", f"{widths['high']} wide high, {widths['low']} low", "one width"))
    elif isinstance(encoder, SigLIPSpec):
        rows.append((encoder.fit != "letterbox", "model.encoder.fit", encoder.fit, "letterbox"))
    return sentences(rows, NAME) or sentences(_differences(model, text_config), NAME)


def _differences(model: ModelSpec, text_config: Any) -> Iterator[Obstacle]:
    """Numbers that come back as others when the configuration is read again, because the program fixes them in its code."""
    encoder, _, text = program_parts(Path("config.json"), _config(model, text_config))
    sides: list[tuple[str, Mapping[str, Any], Mapping[str, Any]]] = [("model.llm", text_config.to_dict(), text.to_dict())]
    if isinstance(encoder, HybridSpec) and isinstance(model.encoder, HybridSpec):
        sides.append(("model.encoder.high", model.encoder.high.numbers(), encoder.high.numbers()))
        sides.append(("model.encoder.low", _low(model).numbers(), cast(SigLIPSpec, encoder.low).numbers()))
    else:
        sides.append(("model.encoder", _low(model).numbers(), cast(SigLIPSpec, encoder).numbers()))
    for part, ours, theirs in sides:
        ours, theirs = numbers(ours), numbers(theirs)
        yield from ((ours[key] != theirs.get(key), f"{part}.{key}", ours[key], theirs.get(key)) for key in ours)


def as_written(processor: "VLMProcessor") -> "tuple[VLMProcessor, str]":
    """The processor with the program's own rule for pictures, and what that changes."""
    return picture_rule(processor, official=True)


def write(model: "VLM", processor: "VLMProcessor", folder: Path) -> None:
    """Model, configuration, processor and generation settings into `folder`, dtypes kept. processor: as `as_written` gives it.

    Raises ConfigurationError where a part, the prompt, the picture policy or the tokenizer cannot be expressed.
    """
    from huggingface_hub import save_torch_state_dict

    text, prompt = model.config.text_config, processor.prompt
    said = [
        (prompt.spec.use != "deepseek_vl", "its prompt", prompt.spec.use, "deepseek_vl"),
        (processor.policy not in POLICIES, "its picture policy", processor.policy, " or ".join(POLICIES)),
    ]
    if found := obstacles(model.spec, text) + sentences(said, NAME):
        raise ConfigurationError(f"this model cannot be exported in official keys: {'; '.join(found)}", cure="export a model of these parts, or load it through vlm")
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(model_to_official(own_tensors(model)), folder, metadata={"format": "pt"})
    (folder / "config.json").write_text(_json(_config(model.spec, text) | {"torch_dtype": str(model.dtype).removeprefix("torch.")}), encoding="utf-8")
    for name, content in (("preprocessor_config.json", _pictures(processor)), ("processor_config.json", _talk(processor))):
        (folder / name).write_text(_json(content), encoding="utf-8")
    public_tokenizer(prompt).save_pretrained(folder)
    generation_settings(model, processor).save_pretrained(folder)


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


# ---- config.json -----------------------------------------------------------------------------------------------------------


def _config(model: ModelSpec, text_config: Any) -> dict[str, Any]:
    encoder, connector = model.encoder, model.connector
    text = {key: value for key, value in text_config.to_dict().items() if key not in METADATA}
    text["rope_theta"] = text.pop("rope_parameters")["rope_theta"]  # as old transformers, which the program asks for, spells it
    low = _low(model)
    tables: dict[str, Any] = {}
    params = {**_named(_siglip_entry(low), "siglip", "SigLIP_MODEL_CONFIG", tables), **_tower(low, low.width)}
    vision: dict[str, Any] = {"cls": "CLIPVisionTower", "params": params}
    if isinstance(encoder, HybridSpec):
        high = {**_named(_sam_entry(encoder.high), "sam", "SAM_MODEL_CONFIG", tables), **_tower(encoder.high, encoder.high_width)}
        vision = {"cls": "HybridVisionTower", "params": {"high_res_cfg": high, "low_res_cfg": params, "concat_type": encoder.concat, "freeze_high": True, "freeze_low": True}}
        if encoder.interpolated() != INTERPOLATE:
            tables["interpolate_size"] = list(encoder.interpolated())
    aligner = {
        "projector_type": ALIGNERS[connector.use],
        "depth": getattr(connector, "depth", 1),
        "input_dim": next(iter(encoder.widths.values())),
        "n_embed": text_config.hidden_size,
    }
    return {
        "architectures": ["MultiModalityCausalLM"],
        "model_type": "multi_modality",
        "vision_config": {"model_type": "vision", **vision},
        "aligner_config": {"model_type": "aligner", "cls": "MlpProjector", "params": aligner},
        "language_config": text,
        **tables,
    }


def _low(model: ModelSpec) -> SigLIPSpec:
    return cast(SigLIPSpec, model.encoder.low if isinstance(model.encoder, HybridSpec) else model.encoder)


def _tower(spec: Any, width: int) -> Entry:
    statistics = {"pixel_mean": list(spec.mean), "pixel_std": list(spec.std)}
    return {"image_size": spec.numbers()["image_size"], "select_feature": "same", "output_dim": width, **statistics}


def _siglip_entry(spec: SigLIPSpec) -> Entry:
    found = spec.numbers()
    return {**_body(found, found["intermediate_size"]), "patch_size": found["patch_size"]}


def _sam_entry(spec: SAMSpec) -> Entry:
    found = spec.numbers()
    neck = {"prompt_embed_dim": found["output_channels"], "downsample_channels": list(spec.downsample_channels)}
    return {**_body(found, found["mlp_dim"]), "patch_size": found["patch_size"], "global_attn_indexes": list(found["global_attn_indexes"]), **neck}


def _body(found: Mapping[str, Any], hidden: int) -> Entry:
    """The program multiplies by the ratio and cuts off."""
    width = found["hidden_size"]
    ratio = hidden / width
    return {
        "width": width,
        "layers": found["num_hidden_layers"],
        "heads": found["num_attention_heads"],
        "mlp_ratio": ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf),
    }


def _named(entry: Entry, kind: str, table: str, tables: dict[str, Any]) -> Entry:
    """The tower's name in the program and the layer that is selected, of a SigLIP whose last blocks are missing; one that it does not know goes to `tables`."""
    for name, known in CONFIG.items():
        cut = entry["layers"] - known["layers"]
        if name.startswith(kind) and _size(known) == _size(entry) and (cut == 0 or (kind == "siglip" and cut < 0)):
            return {"model_name": name, "select_layer": cut - 1}
    name = f"{kind}_own"
    tables[table] = {name: entry}
    return {"model_name": name, "select_layer": -1}


def _size(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    whole = {"mlp_ratio": 4, "patch_size": 16, "prompt_embed_dim": 256, "global_attn_indexes": (), "downsample_channels": ()} | dict(entry)
    channels = (tuple(whole["global_attn_indexes"]), tuple(whole["downsample_channels"]))
    return (whole["width"], whole["heads"], whole["patch_size"], int(whole["width"] * whole["mlp_ratio"]), whole["prompt_embed_dim"], *channels)


# ---- the processor ---------------------------------------------------------------------------------------------------------


def _pictures(processor: "VLMProcessor") -> dict[str, Any]:
    """The towers normalise; the mean is the colour of the padding."""
    encoder: Any = processor.model.encoder
    kinds = {"image_processor_type": "VLMImageProcessor", "processor_class": "VLChatProcessor"}
    colours = {"image_mean": list(encoder.mean), "image_std": list((encoder.high if isinstance(encoder, HybridSpec) else encoder).std)}
    return {**kinds, "image_size": encoder.size, "min_size": getattr(encoder, "min_size", MIN_SIZE), "do_normalize": False, "rescale_factor": 1 / 255, **colours}


def _talk(processor: "VLMProcessor") -> dict[str, Any]:
    tag = processor.tokenizer.convert_ids_to_tokens(processor.image_token_id)
    system = processor.prompt.spec.system
    said = {} if system is None else {"system_prompt": system}
    fixed = {"processor_class": "VLChatProcessor", "sft_format": "deepseek", "add_special_token": False, "ignore_id": -100, "mask_prompt": True}
    return {**fixed, "image_tag": tag, "num_image_tokens": processor.layout(1, 1).count, **said}
