"""SigLIP's vision tower through transformers, with all levels."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from vlm.encoders import register
from vlm.encoders.tower import TowerEncoder, TowerSpec

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
        from transformers import SiglipVisionModel

        self.spec = spec
        self.tower = SiglipVisionModel(spec.whole_config())

    def weights_key(self, name: str) -> str | None:
        """A tower built with `vision_use_head: false` has none of the pooling head that released files hold."""
        if name.removeprefix("vision_model.").startswith("head.") and self._head is None:
            return None
        return super().weights_key(name)

    def never_read(self) -> list[nn.Parameter]:
        return list(self._head.parameters()) if self._head is not None else []

    @property
    def _head(self) -> nn.Module | None:
        return getattr(self.tower, "head", None)
