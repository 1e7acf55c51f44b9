"""One linear from the encoder's width to the decoder's (LLaVA-1)."""

from dataclasses import dataclass

from vlm.connectors import register
from vlm.connectors.base import ConnectorSpec, Link
from vlm.connectors.mlp import Projector

__all__ = ["LinearSpec"]


@register("linear")
@dataclass(frozen=True, kw_only=True)
class LinearSpec(ConnectorSpec):
    """hidden: width of the output where another connector follows; default the decoder's."""

    hidden: int | None = None

    def width(self, link: Link) -> int:
        return self.projected(link, self.hidden)

    def build(self, encoder: object, link: Link) -> Projector:
        return Projector(self, link, [self.width(link)])
