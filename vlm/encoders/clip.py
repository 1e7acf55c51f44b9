"""CLIP's vision tower through transformers, with all levels."""

from dataclasses import dataclass
from typing import Any

from vlm.encoders import register
from vlm.encoders.base import Triple
from vlm.encoders.tower import CLIP_MEAN, CLIP_STD, TowerEncoder, TowerSpec

__all__ = ["CLIPEncoder", "CLIPSpec"]


@register("clip")
@dataclass(frozen=True, kw_only=True)
class CLIPSpec(TowerSpec):
    """OpenAI's CLIP tower (Radford et al. 2021): class token in front, shortest edge and centre crop. config: fields of transformers' CLIPVisionConfig."""

    prefix: int = 1
    mean: Triple = CLIP_MEAN
    std: Triple = CLIP_STD
    fit: str = "crop"  # type: ignore[assignment]

    def config_class(self) -> Any:
        from transformers import CLIPVisionConfig

        return CLIPVisionConfig

    def build(self) -> "CLIPEncoder":
        return CLIPEncoder(self)


class CLIPEncoder(TowerEncoder):
    def __init__(self, spec: CLIPSpec):
        super().__init__()
        from transformers import CLIPVisionModel

        self.spec = spec
        self.tower = CLIPVisionModel(spec.whole_config())
