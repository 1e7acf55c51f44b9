"""Cases of Arcana's QLadder and of MM-LoRA in a linear, an attention and a decoder layer (systems/arcana.md, section 8).

They stand for evaluation: no part drops anything, whatever its configuration says and whichever mode it is in.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from tests.golden.case import Case, Fields
from vlm.config import links
from vlm.connectors.mlp import MLPSpec
from vlm.connectors.qladder import QLadder, QLadderSpec
from vlm.encoders.clip import CLIPSpec
from vlm.features import ImageInput, TokenLayout
from vlm.llm.context import Keys, Scope, TokenContext
from vlm.llm.decoder import build_decoder, decoder_config, scope
from vlm.llm.mm_lora import MMLoRASpec
from vlm.weights.arcana_keys import from_arcana, to_arcana
from vlm.weights.strict import load_tensors

__all__ = ["clip_spec", "ladder_spec", "mm_lora_spec", "mmlora", "pictures", "qladder", "text"]

TOWER = "model.vision_tower.vision_tower."


def clip_spec(config: Fields) -> CLIPSpec:
    return CLIPSpec(config={**config["vision_config"], "attention_dropout": 0.0}, weights="random")


def ladder_spec(config: Fields) -> QLadderSpec:
    config.expect(mm_vision_select_feature="patch")
    return QLadderSpec(queries=config["num_queries"], select=config["selection"], level=config["mm_vision_select_layer"], official=True, then=MLPSpec())


def mm_lora_spec(config: Fields) -> MMLoRASpec:
    return MMLoRASpec(
        rank={"vision": config["rank_visual"], "language": config["rank_language"]},
        scale={"vision": float(config["scaling_visual"]), "language": float(config["scaling_language"])},
        dropout=0.0,
    )


def text(config: Fields) -> Any:
    return decoder_config({"model_type": "llama", "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **config["llm_config"], "attention_dropout": 0.0})


def pictures(pixels: Tensor) -> list[ImageInput]:
    """(n, 3, H, W), or (m, k, 3, H, W) where k stand for each placeholder; normalised."""
    return [ImageInput({"pixels": one}, 0, 0, TokenLayout(())) for one in pixels.flatten(0, -4)]


# ---- QLadder -------------------------------------------------------------------------------------------------------------


def qladder(case: Case) -> dict[str, Any]:
    """Every hidden state, every ladder level, the tokens and the gradients of the ladder."""
    config, given = case.config, case.tensors
    encoder, spec = clip_spec(config), ladder_spec(config)
    config.expect(num_ladder_layers=encoder.depth)
    (_, link), _ = links(encoder, spec, 1)
    tower, ladder = encoder.build(), spec.build(encoder, link)
    holder = nn.ModuleDict({"encoder": tower, "connector": nn.ModuleDict({"qladder": ladder})})
    load_tensors(holder, case.weights.items(), source=case.name, key=lambda name: from_arcana(TOWER + name))
    images = pictures(given["pixel_values"])
    features = tower(images, {"image": [*range(encoder.depth + 1), spec.level]})
    hidden = {index: features.stream().levels[index].unflatten(0, (len(images), -1)) for index in range(encoder.depth + 1)}
    tokens = ladder(features).tokens.unflatten(0, (len(images), -1))
    (tokens * given["cotangent"]).sum().backward()
    climbed = _levels(ladder, hidden)
    return {
        **{f"hidden_states.{index}": state for index, state in hidden.items()},
        **{f"ladder_hidden_states.{index}": level for index, level in enumerate(climbed)},
        "ladder_last": climbed[-1],
        "image_features": tokens,
        **{f"grad.{_official(name)}": parameter.grad for name, parameter in ladder.named_parameters() if parameter.grad is not None},
    }


def _levels(ladder: QLadder, hidden: Mapping[int, Tensor]) -> list[Tensor]:
    """What each layer gives, those that are never read too."""
    queries, found = ladder.queries.expand(len(hidden[0]), -1, -1), []
    for index, layer in enumerate(ladder.layers):
        queries = layer(queries, hidden[index])
        found.append(queries)
    return found


def _official(name: str) -> str:
    return to_arcana(f"connector.qladder.{name}").removeprefix(TOWER)


# ---- MM-LoRA -------------------------------------------------------------------------------------------------------------


def mmlora(case: Case) -> dict[str, Any]:
    """A linear where the configuration has its size, else the attention or the layer whose weights there are."""
    if "in_features" in case.config:
        return _linear(case)
    return _inside(case, "" if "input_layernorm.weight" in case.weights else "self_attn.")


def _linear(case: Case) -> dict[str, Any]:
    config, given = case.config, case.tensors
    target = nn.Linear(config["in_features"], config["out_features"], bias=config["bias"])
    layer = mm_lora_spec(config).routed(target, Scope()).eval()
    _load(layer, case, "self_attn.q_proj.")
    outputs: dict[str, Any] = {}
    for part in dict.fromkeys(name.partition(".")[0] for name in given):
        x = given[f"{part}.x"].clone().requires_grad_(True)
        vision = given.get(f"{part}.im_mask")
        layer.zero_grad(set_to_none=True)
        if f"{part}.keep_visual" in given:
            assert vision is not None
            keep = torch.empty_like(given[f"{part}.x"])
            keep[vision], keep[~vision] = given[f"{part}.keep_visual"], given[f"{part}.keep_language"]
            dropped = patch.object(layer, "drop", lambda tokens, vision, keep=keep: tokens * keep)
        else:
            dropped = nullcontext()
        with dropped, layer.scope.use(None if vision is None else _context(vision, torch.ones_like(vision))):
            out = layer(x)
        (out * given[f"{part}.cotangent"]).sum().backward()
        outputs |= {f"{part}.out": out, f"{part}.grad.x": x.grad} | {f"{part}.{name}": grad for name, grad in _gradients(layer, "self_attn.q_proj.").items()}
    return outputs


def _inside(case: Case, place: str) -> dict[str, Any]:
    """place: of the module within a decoder layer, with a dot behind."""
    config, given = case.config, case.tensors
    decoder = build_decoder(text(config))
    decoder.set_attn_implementation("eager")
    mm_lora_spec(config).build(decoder, scope(decoder))
    layer: Any = decoder.get_submodule("model.layers.0")
    module = layer.get_submodule(place[:-1]) if place else layer
    _load(module, case, place)
    x = given["x"].clone().requires_grad_(True)
    context = _context(given["im_mask"], given["attention_mask"], given["position_ids"])
    angles = decoder.get_submodule("model.rotary_emb")(x, given["position_ids"])
    if place:
        with layer.scope.use(context):
            out, _ = module(x, position_embeddings=angles, attention_mask=context.mask())
    else:
        out = module(x, context=context, position_embeddings=angles, position_ids=given["position_ids"])
    (out * given["cotangent"]).sum().backward()
    kept = given["attention_mask"].bool()[..., None]  # outputs of padding say nothing
    return {"out": torch.where(kept, out, case.expected["out"]), "grad.x": x.grad, **_gradients(module, place)}


def _context(vision: Tensor, real: Tensor, position: Tensor | None = None) -> TokenContext:
    """One document per row."""
    rows, length = vision.shape
    order = torch.arange(length).expand(rows, -1)
    position = order if position is None else position.expand(rows, -1)
    document = torch.where(real.bool(), torch.arange(rows)[:, None], -1)
    zeros = torch.zeros_like(order)
    keys = Keys(document, zeros, position)
    return TokenContext(type=vision.long(), document=document, picture=zeros, branch=zeros, order=order, position=position, keys=keys, additive=True)


def _load(module: nn.Module, case: Case, place: str) -> None:
    load_tensors(module, case.weights.items(), source=case.name, key=lambda name: from_arcana(f"model.layers.0.{place}{name}").removeprefix(f"llm.model.layers.0.{place}"))


def _gradients(module: nn.Module, place: str) -> dict[str, Tensor | None]:
    return {f"grad.{to_arcana(f'llm.model.layers.0.{place}{name}').removeprefix(f'model.layers.0.{place}')}": parameter.grad for name, parameter in module.named_parameters()}
