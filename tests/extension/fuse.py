"""A connector of one's own: reads two levels, copies weights of the encoder's block, and adds query tokens. Dropped in as one file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from vlm.connectors import register
from vlm.connectors.base import Connector, ConnectorSpec, Link
from vlm.encoders.base import Encoder
from vlm.features import EXTRA, Features, Layouts, Level, TokenLayout
from vlm.initial import draw

QUERIES = 3


@register("fuse")
@dataclass(frozen=True, kw_only=True)
class FuseSpec(ConnectorSpec):
    """first, second: "stream/level" that are read; the second one's pictures get query tokens behind their patches."""

    first: str
    second: str

    def taps(self) -> list[tuple[str, Level]]:
        return [(tap.split("/")[0], int(tap.split("/")[1])) for tap in (self.first, self.second)]

    def reads(self, link: Link) -> Mapping[str, Sequence[Level]]:
        found: dict[str, list[Level]] = {}
        for stream, level in self.taps():
            found.setdefault(stream, []).append(level)
        return found

    def width(self, link: Link) -> int:
        assert link.out is not None
        return link.out

    def layout(self, layouts: Layouts) -> TokenLayout:
        parts = [layouts[stream].without("summary") for stream, _ in self.taps()]
        return TokenLayout(parts[0].roles + parts[1].roles + (EXTRA,) * QUERIES, parts[1].rows, parts[1].columns)

    def build(self, encoder: object, link: Link) -> "Fuse":
        return Fuse(self, link)


class Fuse(Connector):
    def __init__(self, spec: FuseSpec, link: Link):
        super().__init__()
        self.taps = spec.taps()
        width = link.widths[self.taps[1][0]]
        self.queries = nn.Parameter(torch.empty(QUERIES, width))
        self.norm, self.query, self.key, self.value = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.out = nn.Linear(width, spec.width(link))

    def initialise(self, encoder: Encoder) -> None:  # type: ignore[override]
        draw(self)
        source = encoder.block(1)
        assert source is not None
        for mine, theirs in ((self.norm, source.norm1), (self.query, source.query), (self.key, source.key), (self.value, source.value)):
            mine.load_state_dict(theirs.state_dict())
        nn.init.normal_(self.queries)

    def forward(self, features: Features) -> Features:
        (first, low_lengths), (second, lengths) = (features.stream(stream).patches(level) for stream, level in self.taps)
        query, keys, values = (
            self.query(self.queries),
            self.key(second),
            self.value(second),
        )  # each module once, whatever the number of pictures: the loop below holds no parameters
        fused = []
        for fine, coarse, key, value in zip(first.split(low_lengths), second.split(lengths), keys.split(lengths), values.split(lengths), strict=True):
            fused += [fine, coarse, torch.softmax(query @ key.T, -1) @ value]
        tokens = self.out(self.norm(torch.cat(fused)))
        counts = tuple(a + b + QUERIES for a, b in zip(low_lengths, lengths, strict=True))
        return Features.of(tokens, counts, features.stream(self.taps[1][0]).grids)
