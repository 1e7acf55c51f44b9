"""SigLIP's vision tower through transformers, with all levels."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from vlm.encoders import register
from vlm.encoders.clip import TowerEncoder, TowerSpec

__all__ = ["SigLIPEncoder", "SigLIPSpec"]


@register("siglip")
@dataclass(frozen=True, kw_only=True)
class SigLIPSpec(TowerSpec):
    """Google's SigLIP tower (Zhai et al. 2023): no class token, pictures squashed to the square. config: fields of transformers' SiglipVisionConfig."""

    def config_class(self) -> Any:
        from transformers import SiglipVisionConfig

        return SiglipVisionConfig

    def build(self) -> "SigLIPEncoder":
        return SigLIPEncoder(self)


class SigLIPEncoder(TowerEncoder):
    def __init__(self, spec: SigLIPSpec):
        super().__init__()
        from transformers import SiglipVisionConfig, SiglipVisionModel

        self.spec = spec
        self.tower = SiglipVisionModel(SiglipVisionConfig(**dict(spec.config or {})))

    @property
    def final_norm(self) -> nn.Module:
        return self.tower.post_layernorm  # type: ignore[return-value]

    def blocks(self) -> nn.ModuleList:
        return self.tower.encoder.layers  # type: ignore[return-value,union-attr]

    def never_read(self) -> list[nn.Parameter]:
        head: Any = getattr(self.tower, "head", None)
        return list(head.parameters()) if head is not None else []
