"""LLaVA-1.5's projector: linears with GELU between them."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from vlm.connectors import register
from vlm.connectors.base import Connector, ConnectorSpec, Link
from vlm.errors import ConfigurationError
from vlm.features import Features

__all__ = ["MLPSpec", "Projector"]


@register("mlp")
@dataclass(frozen=True, kw_only=True)
class MLPSpec(ConnectorSpec):
    """depth: number of linears (`mlp2x_gelu` is 2). hidden: width between them and out of the last, where no decoder follows; default the decoder's."""

    depth: int = 2
    hidden: int | None = None

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ConfigurationError("connector mlp needs at least one linear", got=f"depth {self.depth}", expected="1 or more", cure="set depth: 2")

    def width(self, link: Link) -> int:
        return self.projected(link, self.hidden)

    def build(self, encoder: object, link: Link) -> "Projector":
        width = self.width(link)
        return Projector(self, link, [*[self.hidden or width] * (self.depth - 1), width])


class Projector(Connector):
    """Patch tokens (N, D) -> (N, widths[-1]) through linears with exact GELU between them; the summary tokens are dropped. Keys `layers.0, layers.2, ...` as in LLaVA's `mm_projector`."""

    def __init__(self, spec: ConnectorSpec, link: Link, widths: Sequence[int]):
        super().__init__()
        self.stream_name = spec.stream
        self.level = spec.level_in(link)
        modules: list[nn.Module] = []
        for into, out in zip([link.widths[spec.stream_in(link)], *widths[:-1]], widths, strict=True):
            modules += [nn.GELU(), nn.Linear(into, out)] if modules else [nn.Linear(into, out)]
        self.layers = nn.Sequential(*modules)

    def forward(self, features: Features) -> Features:
        stream = features.stream(self.stream_name)
        tokens, lengths = stream.patches(self.level)
        return Features.of(self.layers(tokens), lengths, stream.grids)
