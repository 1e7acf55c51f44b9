"""Any backbone of timm: vision transformers with all their hidden states, convolutions and pyramids by stage."""

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, ClassVar

import torch
from torch import nn

from vlm.encoders import register
from vlm.encoders.backbone import BackboneEncoder, BackboneSpec, library, whole_depth
from vlm.encoders.beside import config_beside, own_encoder
from vlm.encoders.prepare import Data
from vlm.encoders.readers import Reader, TimmReader
from vlm.errors import ConfigurationError

__all__ = ["TimmEncoder", "TimmSpec"]


@register("timm")
@dataclass(frozen=True, kw_only=True)
class TimmSpec(BackboneSpec):
    """A backbone of timm (Wightman) by `name`, with or without a tag (`convnext_tiny.fb_in22k`: the tag decides the data config).

    config: fields of timm's own config.json: architecture (the name), model_args (constructor arguments; `drop_path_rate` there is the only way to stochastic depth), pretrained_cfg
    (data config). path: a folder with model.safetensors and, where neither name nor config is given, config.json; or the weights file.
    """

    package: ClassVar[str] = "timm"

    def resolve(self) -> tuple[dict[str, Any], Data]:
        named = {"architecture": self.name} if self.name is not None else {}
        written: dict[str, Any] = {**named, **(self.config or {})} or self._beside()
        name, _, tag = str(written.get("architecture")).partition(".")
        if "pretrained_cfg" not in written and "mean" in written:  # the flat form of older files
            written = {**written, "pretrained_cfg": written}
        arguments = dict(written.get("model_args") or {})
        if arguments.get("in_chans", 3) != 3 or arguments.get("patch_drop_rate"):
            raise ConfigurationError("an encoder reads RGB and keeps every patch", got=f"model_args {arguments}", cure="leave in_chans and patch_drop_rate out of encoder.config")
        known = _known(name, tag)
        from timm.data.config import resolve_data_config

        data = resolve_data_config(pretrained_cfg={**known, **(written.get("pretrained_cfg") or {})})
        height, width = data["input_size"][1:]
        if self.size is None and height != width:
            raise ConfigurationError(f"{name} reads pictures of {width} x {height}", expected="a square", cure="set encoder.size")
        return {"architecture": name, "model_args": arguments}, _data(data, self.size)

    def _beside(self) -> dict[str, Any]:
        found = config_beside(self.path, "config.json") if self.path is not None else None
        if found is None:
            raise ConfigurationError("nothing says which model of timm is meant", cure="set encoder.name, encoder.config, or encoder.path to a folder with timm's config.json")
        own = own_encoder(found)
        return found if own is None else own["config"]

    def construct(self) -> nn.Module:
        return self.classifier(0)

    def classifier(self, classes: int) -> nn.Module:
        """The model with a head of so many classes, as released files hold it; 0: without."""
        import timm

        assert self.config is not None
        name, arguments = self.config["architecture"], dict(self.config["model_args"])
        if "img_size" in arguments or _known(name, "").get("fixed_input_size"):
            arguments["img_size"] = self.size
        model = timm.create_model(name, pretrained=False, **{**arguments, "num_classes": classes})
        return model if "drop_path_rate" in arguments else whole_depth(model)

    def build(self) -> "TimmEncoder":
        return TimmEncoder(self)


class TimmEncoder(BackboneEncoder):
    spec: TimmSpec

    def read_by(self) -> Reader:
        return TimmReader(self.tower)

    def weights_key(self, name: str) -> str | None:
        """Released files hold the backbone under our names, and a classifier."""
        return None if name not in self._keys and name in self._classifier_keys else f"tower.{name}"

    @property
    def _classifier_keys(self) -> set[str]:
        if not hasattr(self, "_with_head"):
            with torch.device("meta"):
                self._with_head = set(self.spec.classifier(1000).state_dict())
        return self._with_head


def _known(name: str, tag: str) -> dict[str, Any]:
    """timm's data config for an architecture and tag; raises ConfigurationError with near names."""
    timm = library("timm", "timm")
    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(), 3)
        raise ConfigurationError(f"timm has no model {name!r}", cure=f"did you mean {' or '.join(near)}?" if near else "set encoder.name to one of timm.list_models()")
    tags = [one.partition(".")[2] for one in timm.list_pretrained(f"{name}.*")]
    if tag and tag not in tags:
        raise ConfigurationError(f"timm's {name} has no tag {tag!r}", expected=f"one of {', '.join(tags)}" if tags else "no tag", cure="mend encoder.name")
    found = timm.get_pretrained_cfg(f"{name}.{tag}" if tag else name)
    return found.to_dict() if found is not None else {}


def _data(found: dict[str, Any], size: int | None) -> Data:
    """timm's resolved data config in our words (timm.data.transforms_imagenet_eval)."""
    mean, std = tuple(found["mean"]), tuple(found["std"])
    fit = {"center": "crop", "squash": "squash", "border": "pad"}[found["crop_mode"]]
    red, green, blue = (round(255 * value) for value in mean)
    return Data(size or found["input_size"][-1], mean, std, found["interpolation"], fit, found["crop_pct"], (red, green, blue))  # type: ignore[arg-type]
