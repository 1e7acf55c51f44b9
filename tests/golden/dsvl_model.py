"""Whole models of DeepSeek-VL under their official names: both releases' layouts, and transformers' hybrid (systems/deepseek_vl.md, section 8)."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor

from tests.golden import dsvl
from tests.golden.case import Case, Fields
from vlm.config import LLMSpec, ModelSpec
from vlm.configuration import VLMConfig
from vlm.encoders.base import EncoderSpec
from vlm.encoders.hybrid import HybridSpec, normalised
from vlm.encoders.siglip import SigLIPSpec
from vlm.features import ImageInput, TokenLayout
from vlm.llm.decoder import decoder_config
from vlm.loading import build
from vlm.model import VLM
from vlm.weights.deepseek_keys import model_from_official, model_to_official
from vlm.weights.strict import load_tensors

__all__ = ["model", "native"]


def model(case: Case) -> dict[str, Any]:
    """A batch of the official program: embeddings, logits, loss, gradients, greedy ids, and what trains without a gradient."""
    config, given = case.config, case.tensors
    made, dropped = loaded(case)
    kept = given["images_emb_mask"].any(-1)  # the official program encodes pictures of text-only rows too, and drops them
    encoder = made.spec.encoder
    images = [picture(views_of(encoder, pixels)) for pixels in given["pixel_values"][kept]]
    ids, mask = given["input_ids"], given["attention_mask"]
    real = mask.bool()[..., None]
    embeddings = made.embed(ids, given["images_seq_mask"], images)
    output = made(input_ids=ids, attention_mask=mask, labels=given["labels"], images=images, mm_token_type_ids=given["images_seq_mask"].long(), logits_to_keep=0)
    cast(Tensor, output.loss).backward()
    greedy = generated(made, config, ids, images, attention_mask=mask, eos_token_id=config["eos_id"], pad_token_id=config["pad_id"])
    start = config["logits_from"]
    return {
        "inputs_embeds": embeddings * real,
        "logits": (cast(Tensor, output.logits) * real)[:, start:],
        "loss": cast(Tensor, output.loss)[None],
        "greedy_ids": greedy,
        "no_grad_parameters": without_gradient(case, made, dropped),
        **gradients(made),
    }


def native(case: Case) -> dict[str, Any]:
    """transformers' hybrid: views that are normalised already, features of each branch, and the rest as in `model`."""
    config, given = case.config, case.tensors
    made, _ = loaded(case)
    high, low = given["high_res_pixel_values"], given["pixel_values"]
    images = [picture({"high": one, "low": other}) for one, other in zip(high, low, strict=True)]
    features = made.encoder(images, {"high": [0], "low": ["final"]})
    ids = given["input_ids"]
    output = made(input_ids=ids, labels=given["labels"], images=images, logits_to_keep=0)
    cast(Tensor, output.loss).backward()
    return {
        "high_features": features.stream("high").levels[0].unflatten(0, (len(high), -1)),
        "low_features": features.stream("low").levels["final"].unflatten(0, (len(low), -1)),
        "image_features": made.see(images).tokens.unflatten(0, (len(low), -1)),
        "logits": output.logits,
        "loss": cast(Tensor, output.loss)[None],
        "greedy_ids": generated(made, config, ids, images),
        **gradients(made),
    }


def loaded(case: Case) -> tuple[VLM, list[str]]:
    """Our model with the case's weights, and the official names that it has no place for."""
    config = case.config
    config["vision_config"].expect(cls={True: "HybridVisionTower", False: "CLIPVisionTower"}[is_hybrid(config)])
    config["aligner_config"].expect(cls="MlpProjector")
    aligner = config["aligner_config"]["params"]
    encoder = encoder_spec(config)
    text = decoder_config({**config["language_config"], "bos_token_id": None, "eos_token_id": None, "pad_token_id": None})
    assert aligner["n_embed"] == text.hidden_size and set(encoder.widths.values()) == {aligner["input_dim"]}
    spec = ModelSpec(encoder=encoder, connector=dsvl.connector_spec(aligner), llm=LLMSpec())
    made = build(VLMConfig.of(spec, text, config["image_id"]))
    dropped: list[str] = []
    load_tensors(made, model_from_official(case.weights.items(), spec.connector.use, dropped), source=case.name)
    return made.train(), dropped


def is_hybrid(config: Fields) -> bool:
    return "high_res_cfg" in config["vision_config"]["params"]


def encoder_spec(config: Fields) -> EncoderSpec:
    params = config["vision_config"]["params"]
    return dsvl.hybrid_spec(params, config) if is_hybrid(config) else dsvl.siglip_spec(params, config["SigLIP_MODEL_CONFIG"])


def gradients(made: VLM) -> dict[str, Tensor]:
    found = model_to_official({name: parameter.grad for name, parameter in made.named_parameters() if parameter.grad is not None})
    return {f"grad.{name}": grad for name, grad in found.items()}


def without_gradient(case: Case, made: VLM, dropped: Sequence[str]) -> list[str]:
    """Official names of what the program leaves trainable and no gradient reaches, in the expected order."""
    params = case.config["vision_config"]["params"]
    freeze_high, freeze_low = (params[name] if is_hybrid(case.config) else False for name in ("freeze_high", "freeze_low"))
    frozen = {"encoder.high", *(("encoder.high.neck", "encoder.high.downsamples") if freeze_high else ()), *(("encoder.low",) if freeze_low else ())}
    trained = [parameter for name, found in made.groups().items() if name not in frozen for parameter in found]
    idle = {name: parameter.detach() for name, parameter in made.named_parameters() if parameter.grad is None and any(parameter is one for one in trained)}
    names = {*model_to_official(idle), *(name for name in dropped if not (freeze_low and "attn_pool" in name))}
    expected = case.expected["no_grad_parameters"]
    return [name for name in expected if name in names] + sorted(names - set(expected))


def views_of(encoder: EncoderSpec, pixels: Tensor) -> Mapping[str, Tensor]:
    """(3, S, S) in 0..1 -> the views that the encoder reads."""
    if isinstance(encoder, HybridSpec):
        return encoder.views(pixels)
    assert isinstance(encoder, SigLIPSpec)
    return {"pixels": normalised(pixels, encoder.mean, encoder.std)}


def picture(views: Mapping[str, Tensor]) -> ImageInput:
    return ImageInput(views, 0, 0, TokenLayout(()))


def generated(made: VLM, config: Fields, ids: Tensor, images: list[ImageInput], **kwargs: Any) -> Tensor:
    return cast(Tensor, made.eval().generate(input_ids=ids, images=images, max_new_tokens=config["max_new_tokens"], do_sample=False, **kwargs))
