"""Export in the keys of Arcana's own program, a folder that its `LlavaLlamaForCausalLM` loads (arcana_read.py reads it; systems/arcana.md)."""

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from vlm.config import ModelSpec
from vlm.connectors.qladder import LadderLayer, QLadderSpec
from vlm.encoders.clip import CLIPSpec
from vlm.errors import ConfigurationError
from vlm.llm.mm_lora import MMLoRASpec
from vlm.prompt import Prompt
from vlm.weights.arcana_keys import LINEARS, to_arcana
from vlm.weights.arcana_read import MODEL_TYPES, SCALE, SELECT
from vlm.weights.found import METADATA, flat_text
from vlm.weights.public import Obstacle, common_obstacles, generation_settings, kept, mlp_obstacles, own_tensors, public_tokenizer, sentences

if TYPE_CHECKING:
    from vlm.model import VLM
    from vlm.processor import VLMProcessor

__all__ = ["as_written", "obstacles", "write"]

QUERIES, RANKS = 64, {"vision": 64, "language": 192}
"""Constants in the program's code."""
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14, "hidden_act": "quick_gelu"}
TOWERS = {336: "openai/clip-vit-large-patch14-336", 224: "openai/clip-vit-large-patch14"}
"""CLIP's large towers by picture size: what `mm_vision_tower` calls them."""

NAME = "Arcana"
POLICIES = ("pad", "native")
WRITES = "Arcana's own keys"


# ---- what can be exported --------------------------------------------------------------------------------------------------


def obstacles(model: ModelSpec, text_config: Any) -> list[str]:
    """All that keeps a model from being one; empty where nothing does."""
    rows = [*_seeing(model, text_config.hidden_size), *common_obstacles(model, text_config, ("llama",)), *_adapting(model, text_config)]
    return sentences(rows, NAME) or sentences(_differences(text_config), NAME)


def _seeing(model: ModelSpec, width: int) -> Iterator[Obstacle]:
    """Of encoder and connectors."""
    encoder, connector, then = model.encoder, model.connector, model.connector.then
    yield not isinstance(encoder, CLIPSpec), "model.encoder", encoder.use, "clip"
    if isinstance(encoder, CLIPSpec):
        yield from (
            (getattr(encoder, name) != getattr(CLIPSpec, name), f"model.encoder.{name}", getattr(encoder, name), getattr(CLIPSpec, name)) for name in ("fit", "mean", "std")
        )
    yield not isinstance(connector, QLadderSpec), "model.connector", connector.use, "qladder, then mlp"
    yield not isinstance(connector.level, int), "model.connector.level", connector.level, "a numbered hidden state, such as -2"
    if isinstance(connector, QLadderSpec):
        yield then is None or then.use != "mlp", "model.connector.then", then and then.use, "mlp"
    if then is not None:
        yield then.then is not None, "model.connector.then.then", then.then and then.then.use, "two connectors"
        for bad, part, got, expected in mlp_obstacles(then, width) if then.use == "mlp" else ():
            yield bad, part.replace("connector", "connector.then"), got, expected


def _adapting(model: ModelSpec, text_config: Any) -> Iterator[Obstacle]:
    """Of what adapts the decoder."""
    adapt = kept(model)
    others = [name for name, spec in adapt.items() if not isinstance(spec, MMLoRASpec)]
    yield bool(others) or len(adapt) != 1, "model.adapt", ", ".join(adapt) or "no MM-LoRA", "one mm_lora"
    for name, spec in adapt.items():
        if isinstance(spec, MMLoRASpec):
            scales = {modality: spec.settings(modality).lora_alpha / rank for modality, rank in spec.adapters.items()}
            yield len(scales) < len(RANKS), f"model.adapt.{name}.rank", dict(spec.rank), "1 or more for both"
            yield any(scale != SCALE for scale in scales.values()), f"model.adapt.{name}.scale", scales, f"{SCALE:g}"
            if spec.targets is not None and text_config.model_type == "llama":
                yield _targets(name, spec.plan(text_config), text_config)


def _targets(name: str, paths: Iterable[str], text_config: Any) -> Obstacle:
    """paths: of the linears that carry MM-LoRA."""
    wanted = {f"model.layers.{index}.{linear}" for index in range(text_config.num_hidden_layers) for linear in LINEARS}
    found = set(paths)
    return (
        found != wanted,
        f"model.adapt.{name}.targets",
        f"{len(found & wanted)} of {len(wanted)} linears",
        f"{', '.join(linear.split('.')[1] for linear in LINEARS)} of every layer",
    )


def _differences(text_config: Any) -> Iterator[Obstacle]:
    """Numbers of the decoder that a flat config.json cannot hold, such as scaled rotary positions."""
    ours, theirs = text_config.to_dict(), flat_text("llama", _text(text_config)).to_dict()
    yield from ((ours[key] != theirs.get(key), f"model.llm.{key}", ours[key], theirs.get(key)) for key in ours if key not in METADATA)


def as_written(processor: "VLMProcessor") -> "tuple[VLMProcessor, str]":
    """The processor with word marks where the program writes them, and what that changes or the program needs beyond the folder."""
    model = processor.model
    connector, [*adapters] = model.connector, [spec for spec in model.adapt.values() if isinstance(spec, MMLoRASpec)]
    found: list[str] = []
    marked = Prompt(replace(processor.prompt.spec, word_marks=True), processor.tokenizer)
    if marked.marked != processor.prompt.marked:
        processor = copy.copy(processor)
        processor.prompt = marked
        found.append("a word mark stands behind each picture, as the program tokenises; the run has none (with `word_marks: true` in its prompt it would)")
    if isinstance(connector, QLadderSpec) and adapters and (connector.queries, dict(adapters[0].rank)) != (QUERIES, RANKS):
        own = [connector.queries, *(adapters[0].rank[modality] for modality in RANKS)]
        found.append("the program's code has {} queries and ranks {} and {}: write {}, {} and {} there".format(QUERIES, *RANKS.values(), *own))
    if isinstance(connector, QLadderSpec) and connector.select == "last":
        found.append("its queries come from the last ladder layer, as in the program's archive; the program's main tree reads another")
    if isinstance(model.encoder, CLIPSpec) and _tower(model.encoder) is None:
        found.append("no released tower has its numbers: write a folder with one that has into mm_vision_tower of config.json")
    return processor, "; ".join(found)


# ---- files -----------------------------------------------------------------------------------------------------------------


def write(model: "VLM", processor: "VLMProcessor", folder: Path) -> None:
    """Model, configuration, tokenizer and generation settings into `folder`, dtypes kept.

    The picture token, which the program does not have, is left out where it is the last of the vocabulary; its rows, which nothing reads, become in `model` too what an import makes of them.
    Raises ConfigurationError where a part, the prompt, the picture policy or the tokenizer cannot be expressed.
    """
    from huggingface_hub import save_torch_state_dict

    text, prompt = model.config.text_config, processor.prompt
    found = obstacles(model.spec, text)
    if not found:
        [name], [adapter] = zip(*model.spec.adapt.items(), strict=True)
        found = sentences([_targets(name, cast(MMLoRASpec, adapter).layers(model.llm), text)], NAME)
    said = [
        (prompt.spec.use != "vicuna_v1" or prompt.spec.system is not None, "its prompt", prompt.spec.use, "vicuna_v1"),
        (processor.policy not in POLICIES, "its picture policy", processor.policy, " or ".join(POLICIES)),
    ]
    if found := found + sentences(said, NAME):
        raise ConfigurationError(f"this model cannot be exported as Arcana: {'; '.join(found)}", cure="export a model of these parts, or load it through vlm")
    folder.mkdir(parents=True, exist_ok=True)
    rows = _forget_picture(model)
    save_torch_state_dict({to_arcana(name): tensor for name, tensor in _tensors(model, rows)}, folder, metadata={"format": "pt"})
    config = _config(model.spec, text, processor.policy) | {"vocab_size": rows, "torch_dtype": str(model.dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    left_out = processor.image_token_id if rows == processor.image_token_id else None
    public_tokenizer(prompt, without=left_out).save_pretrained(folder)
    settings = generation_settings(model, processor)
    settings.suppress_tokens = [index for index in settings.suppress_tokens or () if index < rows] or None
    settings.save_pretrained(folder)


@torch.no_grad()
def _forget_picture(model: "VLM") -> int:
    """Rows of embedding and head that are written."""
    from vlm.loading import tables

    rows = model.config.text_config.vocab_size
    if model.config.image_token_id != rows - 1:
        return rows
    for name in tables(model):
        table = model.llm.get_parameter(name)
        table[-1] = table[:-1].float().mean(0)
    return rows - 1


def _tensors(model: "VLM", rows: int) -> Iterator[tuple[str, Tensor]]:
    """By our names; of a ladder without the layers that are never read, those as copies of their blocks too."""
    from vlm.loading import tables

    tokens = {f"llm.{name}" for name in tables(model)}
    yield from ((name, tensor[:rows].clone() if name in tokens else tensor) for name, tensor in own_tensors(model).items())
    ladder: Any = model.parts()[0]
    for index in range(len(ladder.layers), cast(CLIPSpec, model.spec.encoder).depth):
        block: Any = model.encoder.block(index)
        layer = LadderLayer(ladder.queries.shape[-1], block).to(model.dtype)
        layer.initialise(block)
        yield from ((f"connector.qladder.layers.{index}.{name}", tensor) for name, tensor in layer.state_dict().items())


# ---- config.json -----------------------------------------------------------------------------------------------------------


def _config(model: ModelSpec, text_config: Any, policy: str) -> dict[str, Any]:
    encoder, connector = cast(CLIPSpec, model.encoder), cast(QLadderSpec, model.connector)
    return {
        **_text(text_config),
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": MODEL_TYPES[0],
        "mm_vision_tower": _tower(encoder),
        "mm_vision_select_layer": connector.level,
        "mm_vision_select_feature": "patch",
        "mm_hidden_size": encoder.width,
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "image_aspect_ratio": {"pad": "pad", "native": "square"}[policy],
        "vision_config": {key: value for key, value in encoder.numbers().items() if key not in METADATA},
        **({SELECT: "last"} if connector.select == "last" else {}),
    }


def _text(text_config: Any) -> dict[str, Any]:
    """The decoder's numbers, flat and as old transformers, which the program asks for, spells them."""
    text: dict[str, Any] = {key: value for key, value in text_config.to_dict().items() if key not in METADATA}
    rotary: Mapping[str, Any] = text.pop("rope_parameters", None) or {}
    return text | ({"rope_theta": rotary["rope_theta"]} if "rope_theta" in rotary else {})


def _tower(encoder: CLIPSpec) -> str | None:
    found = encoder.numbers()
    return TOWERS.get(found["image_size"]) if all(found[key] == value for key, value in LARGE.items()) else None
