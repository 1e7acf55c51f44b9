"""Any visual tower of open_clip: its own vision transformers (CoCa's pooler included) and ResNets, and timm trunks (SigLIP, ConvNeXt, EVA, ...)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from vlm.encoders import register
from vlm.encoders.backbone import BackboneEncoder, BackboneSpec, library, whole_depth
from vlm.encoders.base import BlockWeights
from vlm.encoders.beside import config_beside, own_encoder
from vlm.encoders.prepare import Data
from vlm.encoders.readers import Reader, TimmReader, activation_name, part_of_linear
from vlm.errors import ConfigurationError

__all__ = ["OpenCLIPEncoder", "OpenCLIPSpec"]

FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
"""What open_clip calls its weights in a hub repository, beside which transformers' form of the same model may lie as `model.safetensors`."""


@register("open_clip")
@dataclass(frozen=True, kw_only=True)
class OpenCLIPSpec(BackboneSpec):
    """The visual tower of an open_clip model (Ilharco et al. 2021) by `name` (`ViT-B-16-SigLIP`), whose numbers the package carries.

    config: fields of open_clip's own model configuration instead of a name: embed_dim, vision_cfg, quick_gelu. tag: a release of `name`, which decides how pictures are prepared;
    without one, what all releases share, else open_clip's own defaults. path: a weights file, or a folder with one and, where neither name nor config is given, open_clip_config.json.
    CoCa's towers have a second stream `pooled`: the tokens that its queries draw, on no grid.
    """

    package: ClassVar[str] = "open_clip"
    tag: str | None = None

    def resolve(self) -> tuple[dict[str, Any], Data]:
        if self.config is not None:
            model, pictures = dict(self.config), {}
        elif self.name is not None:
            model, pictures = _known(self.name), _pictures(self.name, self.tag)
        else:
            model, pictures = self._beside()
        if "vision_cfg" not in model or "embed_dim" not in model:
            raise ConfigurationError("the tower of open_clip lacks numbers", got=", ".join(model), expected="embed_dim and vision_cfg", cure="mend encoder.config")
        size = self.size or model["vision_cfg"].get("image_size", 224)
        if not isinstance(size, int):
            raise ConfigurationError("the tower reads pictures that are no squares", got=size, expected="a square", cure="set encoder.size")
        # Dropped patches would change the number of tokens, and pretrained trunks would be fetched.
        vision = {**model["vision_cfg"], "image_size": size, "patch_dropout": 0.0, "timm_model_pretrained": False, "output_tokens": False}
        return {"embed_dim": model["embed_dim"], "vision_cfg": vision, "quick_gelu": bool(model.get("quick_gelu"))}, _data(pictures, size)

    def _beside(self) -> tuple[dict[str, Any], dict[str, Any]]:
        ours = config_beside(self.path, "config.json") if self.path is not None else None
        if ours is not None and (own := own_encoder(ours)) is not None:
            return own["config"], {}
        found = config_beside(self.path, "open_clip_config.json") if self.path is not None else None
        if found is None:
            cure = "set encoder.name, encoder.config, or encoder.path to a folder with open_clip_config.json"
            raise ConfigurationError("nothing says which tower of open_clip is meant", cure=cure)
        return found.get("model_cfg", found), found.get("preprocess_cfg", {})

    def construct(self) -> nn.Module:
        from open_clip.model import _build_vision_tower  # the public constructors build the text tower too, some of them from the network

        assert self.config is not None
        tower: Any = _build_vision_tower(self.config["embed_dim"], dict(self.config["vision_cfg"]), self.config["quick_gelu"])  # type: ignore[arg-type]
        trunk = getattr(tower, "trunk", None)
        if trunk is not None and trunk.pretrained_cfg.get("fixed_input_size") and trunk.pretrained_cfg["input_size"][-1] != self.size:
            tower.set_input_size(self.size)
        return tower if self.config["vision_cfg"].get("timm_drop_path") else whole_depth(tower)

    def build(self) -> "OpenCLIPEncoder":
        return OpenCLIPEncoder(self)


class OpenCLIPEncoder(BackboneEncoder):
    spec: OpenCLIPSpec

    def read_by(self) -> Reader:
        from open_clip.modified_resnet import ModifiedResNet
        from open_clip.timm_model import TimmModel

        if isinstance(self.tower, TimmModel):
            return TimmReader(self.tower.trunk)
        return ResNetReader(self.tower) if isinstance(self.tower, ModifiedResNet) else TransformerReader(self.tower)

    def tensors(self, place: Path) -> Iterator[tuple[str, Tensor]]:
        """Of a folder the file in open_clip's form; a file of the tower alone (names without `visual.`) reads as one of the whole model."""
        from vlm.weights.files import read_shapes, read_tensors

        place = next((place / name for name in FILES if (place / name).is_file()), place)
        alone = not any(name.startswith("visual.") for name in read_shapes(place))
        for name, tensor in read_tensors(place):
            yield f"visual.{name}" if alone else name, tensor

    def weights_key(self, name: str) -> str | None:
        """Everything outside of `visual.` is text tower and temperature."""
        return f"tower.{name.removeprefix('visual.')}" if name.startswith("visual.") else None


class TransformerReader(Reader):
    """open_clip.transformer.VisionTransformer."""

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.trunk.transformer.resblocks)

    def grid(self, pixels: Tensor) -> tuple[int, int]:
        return self.trunk.grid_size

    def final(self, pixels: Tensor) -> Tensor:
        tokens = self.trunk.transformer(self.trunk._embeds(pixels))
        normed = self.trunk.attn_pool is None and not self.trunk.final_ln_after_pool
        return self.trunk.ln_post(tokens) if normed else tokens

    def pool(self, tokens: Tensor) -> Tensor | None:
        if self.trunk.attn_pool is None:
            return None
        if self.trunk.attn_pool_contrastive is not None:
            return self.trunk.attn_pool(self.trunk.ln_post(tokens))
        return self.trunk.ln_post(self.trunk.attn_pool(tokens))

    def pooled_prefix(self) -> int:
        return int(self.trunk.attn_pool_contrastive is None and self.trunk.pool_type == "tok")

    def block(self, index: int) -> BlockWeights | None:
        from open_clip.transformer import ResidualAttentionBlock

        block: Any = self.blocks()[index]
        attention: Any = block.attn
        mlp: Any = block.mlp
        if type(block) is not ResidualAttentionBlock or (activation := activation_name(mlp.gelu)) is None:
            return None
        query, key, value = (part_of_linear(attention.in_proj_weight, attention.in_proj_bias, part) for part in range(3))
        return BlockWeights(
            attention.embed_dim, attention.num_heads, mlp.c_fc.out_features, activation, block.ln_1.eps,
            query, key, value, attention.out_proj, block.ln_1, block.ln_2, mlp.c_fc, mlp.c_proj,
        )  # fmt: skip


class ResNetReader(Reader):
    """open_clip.modified_resnet.ModifiedResNet: the stem and four stages, without the attention pool."""

    def stages(self, pixels: Tensor, numbers: Sequence[int] | None, final: bool) -> tuple[Tensor | None, list[Tensor]]:
        wanted = list(range(5)) if numbers is None else list(numbers)
        indices = sorted({*wanted, 4}) if final else wanted
        found = self.trunk.forward_intermediates(pixels, indices=indices, intermediates_only=True, stop_early=True)["image_intermediates"]
        return found[-1] if final else None, found[: len(wanted)]


def _known(name: str) -> dict[str, Any]:
    """The bundled numbers of a model; raises ConfigurationError with near names."""
    open_clip = library("open_clip", "open_clip")
    if name not in open_clip.list_models():
        near = get_close_matches(name, open_clip.list_models(), 3)
        raise ConfigurationError(
            f"open_clip has no model {name!r}",
            cure=f"did you mean {' or '.join(near)}?" if near else "give encoder.path a local folder, or encoder.name one of open_clip.list_models()",
        )
    return open_clip.get_model_config(name)


def _pictures(name: str, tag: str | None) -> dict[str, Any]:
    """How the releases of a model want their pictures, or one of them; raises ConfigurationError for an unknown tag."""
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    tags = list_pretrained_tags_by_model(name)
    if tag is not None and tag not in tags:
        raise ConfigurationError(f"open_clip's {name} has no release {tag!r}", expected=f"one of {', '.join(tags)}" if tags else "none", cure="mend encoder.tag")
    found = [{key: value for key, value in get_pretrained_cfg(name, one).items() if key in PICTURES} for one in ([tag] if tag else tags)]
    return found[0] if found and all(one == found[0] for one in found) else {}


PICTURES = ("mean", "std", "interpolation", "resize_mode", "fill_color")


def _data(found: Mapping[str, Any], size: int) -> Data:
    """open_clip's preprocess_cfg in our words (open_clip.transform.image_transform)."""
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    fit = {"shortest": "crop", "squash": "squash", "longest": "pad"}[found.get("resize_mode") or "shortest"]
    fill = int(found.get("fill_color") or 0)
    interpolation = "bilinear" if found.get("interpolation") == "bilinear" else "bicubic"
    mean, std = tuple(found.get("mean") or OPENAI_DATASET_MEAN), tuple(found.get("std") or OPENAI_DATASET_STD)
    return Data(size, mean, std, interpolation, fit, 1.0, (fill,) * 3)  # type: ignore[arg-type]
