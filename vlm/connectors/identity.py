"""No projection: the encoder's tokens are of the decoder's width already."""

from dataclasses import dataclass

from vlm.connectors import register
from vlm.connectors.base import Connector, ConnectorSpec, Link
from vlm.errors import ConfigurationError
from vlm.features import Features

__all__ = ["IdentitySpec"]


@register("identity")
@dataclass(frozen=True, kw_only=True)
class IdentitySpec(ConnectorSpec):
    """Hands the patches of one level on; the summary tokens are dropped."""

    def width(self, link: Link) -> int:
        width = link.widths[self.stream_in(link)]
        if link.out not in (None, width):
            raise ConfigurationError("connector identity does not change widths", got=f"tokens of {width}, a decoder of {link.out}", cure="set connector.use: linear or mlp")
        return width

    def build(self, encoder: object, link: Link) -> "Identity":
        self.width(link)
        return Identity(self, link)


class Identity(Connector):
    """Patch tokens (N, D) as they come."""

    def __init__(self, spec: ConnectorSpec, link: Link):
        super().__init__()
        self.stream_name = spec.stream
        self.level = spec.level_in(link)

    def forward(self, features: Features) -> Features:
        stream = features.stream(self.stream_name)
        tokens, lengths = stream.patches(self.level)
        return Features.of(tokens, lengths, stream.grids)
