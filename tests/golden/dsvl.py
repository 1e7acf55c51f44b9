"""Cases of DeepSeek-VL's towers, aligners and picture geometry (systems/deepseek_vl.md, section 8)."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn

from tests.golden.case import Case, Fields
from vlm.connectors.base import ConnectorSpec, Link
from vlm.encoders.base import FixedSizeSpec
from vlm.encoders.hybrid import HybridEncoder, HybridSpec, SAMSpec, normalised, unit
from vlm.encoders.siglip import SigLIPSpec
from vlm.features import Features, ImageInput, Stream, TokenLayout
from vlm.images import mean_color, open_picture
from vlm.letterbox import fit_square, inner_size
from vlm.weights.deepseek_keys import from_official, to_official
from vlm.weights.deepseek_program import projector
from vlm.weights.strict import load_tensors

__all__ = ["IDLE", "aligner", "connector_spec", "hybrid", "hybrid_spec", "ignored", "pixels", "sam", "siglip", "siglip_spec"]

IDLE = frozenset({"select_feature", "output_dim", "ckpt_path", "use_checkpoint", "global_pool", "model_type"})
"""Fields of the towers' configurations without effect (section 8)."""


# ---- towers --------------------------------------------------------------------------------------------------------------


def sam(case: Case) -> dict[str, Any]:
    """An `ImageEncoderViT`: blocks, necks, output and gradients."""
    config = case.config
    width = config["embed_dim"]
    spec = SAMSpec(
        config={
            "hidden_size": width,
            "num_hidden_layers": config["depth"],
            "num_attention_heads": config["num_heads"],
            "mlp_dim": int(width * config["mlp_ratio"]),
            "image_size": config["img_size"],
            "patch_size": config["patch_size"],
            "output_channels": config["out_chans"],
            "window_size": config["window_size"],
            "global_attn_indexes": list(config["global_attn_indexes"]),
            "qkv_bias": config["qkv_bias"],
            "use_rel_pos": config["use_rel_pos"],
            "use_abs_pos": config.get("use_abs_pos", True),
        },
        downsample_channels=tuple(config["downsample_channels"]),
    )
    prefix = "vision_tower_high.vision_tower."
    tower = spec.build(tuple(config.get("interpolate_size", (96, 96))))
    fill(tower, {f"{prefix}{name}": tensor for name, tensor in case.weights.items()}, "high.")
    seen: dict[str, Tensor] = {}
    keep(seen, {"neck": tower.trunk.neck, "neck_hd": tower.neck_hd, **{f"block.{index}": layer for index, layer in enumerate(tower.trunk.layers)}})
    output = tower(case.tensors["pixel_values"])
    (output * case.tensors["grad_output"]).sum().backward()
    grads = {name.removeprefix(prefix): grad for name, grad in official_gradients(tower, "high.").items()}
    return {**seen, "output": output, **{f"grad.{name}": grad for name, grad in grads.items()}}


def siglip(case: Case) -> dict[str, Any]:
    """A `CLIPVisionTower` with a SigLIP inside: output and gradients."""
    spec = siglip_spec(case.config["params"], case.config["SigLIP_MODEL_CONFIG"])
    tower = spec.build()
    fill(tower, case.weights)
    pixels = case.tensors["pixel_values"]
    views = [normalised(view, spec.mean, spec.std) for view in pixels]
    stream = tower([ImageInput({"pixels": view}, spec.size, spec.size, TokenLayout(())) for view in views], {"image": ["final"]}).stream()
    output = stream.levels["final"].view(len(pixels), -1, spec.width)
    (output * case.tensors["grad_output"]).sum().backward()
    return {"output": output, **{f"grad.{name}": grad for name, grad in official_gradients(tower).items()}}


def hybrid(case: Case) -> dict[str, Any]:
    """A `HybridVisionTower`: both normalised views, the output, and what the constructor leaves trainable."""
    params = case.config["params"]
    spec = hybrid_spec(params, case.config)
    tower = HybridEncoder(spec)
    fill(tower, case.weights)
    views = [spec.views(pixels) for pixels in case.tensors["pixel_values"]]
    features = tower([ImageInput(view, spec.high.numbers()["image_size"], 0, TokenLayout(())) for view in views], {name: ["final"] for name in spec.streams})
    outputs = {name: stream.levels["final"].view(len(views), -1, spec.widths[name]) for name, stream in features.streams.items()}
    shown = {"output": outputs["image"]} if "image" in outputs else {f"output.{name}": tokens for name, tokens in outputs.items()}
    normed = {f"{name}_normed": torch.stack([view[name] for view in views]) for name in ("high", "low")}
    return {**shown, **normed, "trainable": trainable(case, tower, params["freeze_high"], params["freeze_low"])}


def trainable(case: Case, tower: HybridEncoder, freeze_high: bool, freeze_low: bool) -> list[str]:
    """Official names of what trains, in the expected order: our groups, and the stored tensors that ours do not have (section 8, last paragraph)."""
    groups = tower.groups()
    chosen = [*(() if freeze_high else groups["high.neck"] + groups["high.downsamples"]), *(() if freeze_low else groups["low"])]
    names = set(to_official({name: parameter for name, parameter in tower.named_parameters() if any(parameter is one for one in chosen)}))
    dropped: list[str] = []
    list(from_official(case.weights.items(), dropped))
    names |= {name for name in dropped if not (freeze_low and "attn_pool" in name)}
    expected = case.expected["trainable"]
    return [name for name in expected if name in names] + sorted(names - set(expected))


def sam_spec(params: Fields, registry: Fields, interpolate: tuple[int, int] | None) -> SAMSpec:
    """The high tower of a `high_res_cfg`. Absent fields as in section 8."""
    entry = registry[params["model_name"]]
    ignored(params, "select_layer")
    ignored(entry, "image_size", "window_size")
    numbers = {
        "hidden_size": entry["width"],
        "num_hidden_layers": entry["layers"],
        "num_attention_heads": entry["heads"],
        "mlp_dim": int(entry["width"] * entry.get("mlp_ratio", 4)),
        "image_size": params["image_size"],
        "patch_size": entry["patch_size"],
        "output_channels": entry["prompt_embed_dim"],
        "window_size": 14,
        "global_attn_indexes": list(entry["global_attn_indexes"]),
    }
    return SAMSpec(config=numbers, downsample_channels=tuple(entry.get("downsample_channels", ())), interpolate=interpolate, **statistics(params))


def siglip_spec(params: Fields, registry: Fields) -> SigLIPSpec:
    """A SigLIP tower that keeps the blocks which `select_layer` keeps."""
    entry = registry[params["model_name"]]
    ignored(entry, "image_size")
    layers, select = entry["layers"], params["select_layer"]
    numbers = {
        "hidden_size": entry["width"],
        "intermediate_size": int(entry["width"] * entry["mlp_ratio"]),
        "num_hidden_layers": min(layers, layers + select + 1 if select <= 0 else select),
        "num_attention_heads": entry["heads"],
        "image_size": params["image_size"],
        "patch_size": entry["patch_size"],
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "vision_use_head": False,
    }
    return SigLIPSpec(config=numbers, weights="random", **statistics(params))


def ignored(fields: Fields, *names: str) -> None:
    """Fields that this class has and does not look at; elsewhere a field of that name has an effect."""
    for name in names:
        fields.get(name)


def statistics(params: Fields) -> dict[str, Any]:
    """The tower normalises only where both are given."""
    mean, std = params.get("pixel_mean"), params.get("pixel_std")
    return {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)} if mean is None or std is None else {"mean": tuple(mean), "std": tuple(std)}


def hybrid_spec(params: Fields, config: Fields) -> HybridSpec:
    interpolate = config.get("interpolate_size", (96, 96))
    high = sam_spec(params["high_res_cfg"], config["SAM_MODEL_CONFIG"], None if interpolate is None else tuple(interpolate))
    return HybridSpec(high=high, low=siglip_spec(params["low_res_cfg"], config["SigLIP_MODEL_CONFIG"]), concat=params.get("concat_type", "tuple"))


# ---- aligners ------------------------------------------------------------------------------------------------------------


def aligner(case: Case) -> dict[str, Any]:
    """An `MlpProjector`: output, and gradients of inputs and parameters."""
    config = case.config
    inputs = {name: tensor.requires_grad_() for name, tensor in case.tensors.items() if name != "grad_output"}
    width: int = config["input_dim"]
    out: int = config["n_embed"]
    link = Link(dict.fromkeys(inputs, width), dict.fromkeys(inputs, 0), None if config["projector_type"] == "identity" else out)
    connector = connector_spec(config).build(None, link)
    # the official program's linear is no sequence
    place = "layers.0." if config["projector_type"] == "linear" else "layers."
    load_tensors(connector, case.weights.items(), source=case.name, key=lambda name: name.replace("layers.", place))
    rows, length = next(iter(inputs.values())).shape[:2]
    streams = {name: Stream({level: tensor.flatten(0, 1) for level in (0, "out")}, (length,) * rows, ((1, length),) * rows) for name, tensor in inputs.items()}
    output = connector(Features(streams)).tokens.view(rows, length, -1)
    (output * case.tensors["grad_output"]).sum().backward()
    leaves: Mapping[str, Tensor] = {**inputs, **{name.replace(place, "layers."): parameter for name, parameter in connector.named_parameters()}}
    return {"output": output, **{f"grad.{name}": leaf.grad for name, leaf in leaves.items()}}


def connector_spec(config: Fields) -> ConnectorSpec:
    """The connector of an aligner's configuration."""
    return projector(config["projector_type"], config.get("depth", 1))


# ---- pictures ------------------------------------------------------------------------------------------------------------


def pixels(case: Case) -> dict[str, Any]:
    """Picture files -> pixel values of an image processor, and the sizes before padding."""
    config = case.config
    pictures = [open_picture(case.bytes_of(name), where=name) for name in case.inputs["images"]]
    if config["class"] == "DeepseekVLHybridImageProcessorPil":
        return hybrid_pixels(config, pictures)
    if config["class"] == "VLMImageProcessor":
        config.expect(rounding="truncate", rescale_factor=1 / 255)
        size, normalise = config["image_size"], config["do_normalize"]
    else:
        config.expect(rounding="round", backend="pil", resample=3)
        size, normalise = config["size"]["height"], True
        config["size"].expect(width=size)
    rounding = "trunc" if config["rounding"] == "truncate" else "round"
    mean, std = config["image_mean"], config["image_std"]
    color = (127, 127, 127) if mean is None else mean_color(mean)
    values = [unit(fit_square(picture, size, color, rounding, config["min_size"])) for picture in pictures]
    if normalise:
        values = [normalised(value, cast(Any, mean), std) for value in values]
    sizes = [list(reversed(inner_size(*picture.size, size, rounding, config["min_size"]))) for picture in pictures]
    return {"pixel_values": torch.stack(values), "resized_hw": sizes, "background_color": list(color)}


def hybrid_pixels(config: Fields, pictures: list[Image.Image]) -> dict[str, Any]:
    """The two views of transformers' hybrid processor, by the encoder's own `preprocess`."""
    config.expect(rounding="round", backend="pil", high_res_resample=3)
    side, low = config["high_res_size"]["height"], config["size"]["height"]
    config["high_res_size"].expect(width=side)
    config["size"].expect(width=low)
    spec = HybridSpec(
        high=SAMSpec(config={"image_size": side}, mean=tuple(config["high_res_image_mean"]), std=tuple(config["high_res_image_std"])),
        low=FixedSizeSpec(size=low, patch=low, mean=tuple(config["image_mean"]), std=tuple(config["image_std"])),
        rounding="round",
        min_size=config["min_size"],
        resample={2: "bilinear", 3: "bicubic"}[config["resample"]],  # type: ignore[arg-type]
    )
    views = [spec.preprocess(picture, "infer") for picture in pictures]
    sizes = [list(reversed(inner_size(*picture.size, side, "round", config["min_size"]))) for picture in pictures]
    return {"high_res_pixel_values": torch.stack([view["high"] for view in views]), "pixel_values": torch.stack([view["low"] for view in views]), "resized_hw": sizes}


# ---- weights and gradients by official names -------------------------------------------------------------------------------


def fill(tower: nn.Module, weights: Mapping[str, Tensor], ours: str = "") -> None:
    """Official weights into a tower of ours, every tensor once. ours: the tower's place in the names of the table."""
    load_tensors(tower, from_official(weights.items(), []), source="the case", key=lambda name: name.removeprefix(ours))


def official_gradients(tower: nn.Module, ours: str = "") -> dict[str, Tensor]:
    return to_official({f"{ours}{name}": parameter.grad for name, parameter in tower.named_parameters() if parameter.grad is not None})


def keep(seen: dict[str, Tensor], modules: Mapping[str, nn.Module]) -> None:
    """Put every module's output into `seen` when it runs."""

    def write(name: str) -> Any:
        return lambda _, __, output: seen.update({name: output})

    for name, module in modules.items():
        module.register_forward_hook(write(name))
