"""One linear from the encoder's width to the decoder's (LLaVA-1)."""

from dataclasses import dataclass

from vlm.connectors import register
from vlm.connectors.base import ConnectorSpec, Link
from vlm.connectors.mlp import Projector
from vlm.errors import ConfigurationError

__all__ = ["LinearSpec"]


@register("linear")
@dataclass(frozen=True, kw_only=True)
class LinearSpec(ConnectorSpec):
    """hidden: width of the output where another connector follows; default the decoder's."""

    hidden: int | None = None

    def width(self, link: Link) -> int:
        width = link.out or self.hidden
        if width is None:
            raise ConfigurationError("connector linear is followed by another connector, so its width is not the decoder's", cure="set hidden: N")
        return width

    def build(self, encoder: object, link: Link) -> Projector:
        return Projector(self, link, [self.width(link)])
