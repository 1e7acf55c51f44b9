"""DeepSeek-VL's aligner: a linear per stream, their outputs beside each other, then linears with GELU before each (Lu et al. 2024, section 3.1)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from vlm.connectors import register
from vlm.connectors.base import Connector, ConnectorSpec, Link
from vlm.errors import ConfigurationError
from vlm.features import OUT, SUMMARY, Features, Layouts, Level, TokenLayout

__all__ = ["HybridMLPSpec"]


@register("hybrid_mlp")
@dataclass(frozen=True, kw_only=True)
class HybridMLPSpec(ConnectorSpec):
    """Reads two streams, high first; their patches lie on one grid.

    level: which hidden state is read, of a stream that has several. depth: linears one behind the other, 1 has no activation. hidden: width of the output where another connector follows; default the decoder's.
    """

    level: Level = "final"
    high: str = "high"
    low: str = "low"
    depth: int = 2
    hidden: int | None = None

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ConfigurationError("connector hybrid_mlp needs at least one linear per stream", got=f"depth {self.depth}", expected="1 or more", cure="set depth: 2")
        if self.stream is not None:
            raise ConfigurationError("connector hybrid_mlp reads two streams", got=f"stream {self.stream}", cure="set high and low instead")

    def reads(self, link: Link) -> Mapping[str, Sequence[Level]]:
        absent = {self.high, self.low} - set(link.widths)
        if absent:
            raise ConfigurationError(
                "connector hybrid_mlp does not find its streams",
                got=f"streams {', '.join(link.widths)}",
                expected=f"{self.high} and {self.low}",
                cure="use an encoder with two streams",
            )
        behind = not any(link.levels.values())
        return {name: (OUT if behind else self.level if link.levels[name] else 0,) for name in (self.high, self.low)}

    def width(self, link: Link) -> int:
        width = self.projected(link, self.hidden)
        if width % 2:
            raise ConfigurationError("connector hybrid_mlp gives each stream half of its width", got=f"width {width}", expected="an even number", cure="set hidden: N")
        return width

    def layout(self, layouts: Layouts) -> TokenLayout:
        high, low = (layouts[name].without(SUMMARY) for name in (self.high, self.low))
        if high != low:
            got = f"{high.count} tokens on {high.rows} x {high.columns} high, {low.count} on {low.rows} x {low.columns} low"
            raise ConfigurationError("connector hybrid_mlp needs both streams on one grid", got=got, cure="set encoder.high.interpolate or encoder.high.downsample_channels")
        return high

    def build(self, encoder: object, link: Link) -> "HybridMLP":
        return HybridMLP(self, link)


class HybridMLP(Connector):
    """(N, Dh), (N, Dl) -> (N, D). Keys of the official program: `high_up_proj`, `low_up_proj`, `layers.1`, `layers.3`, ..."""

    def __init__(self, spec: HybridMLPSpec, link: Link):
        super().__init__()
        self.taps = [(name, level) for name, (level,) in spec.reads(link).items()]
        width = spec.width(link)
        self.high_up_proj = nn.Linear(link.widths[spec.high], width // 2)
        self.low_up_proj = nn.Linear(link.widths[spec.low], width // 2)
        self.layers = nn.Sequential(*(module for _ in range(spec.depth - 1) for module in (nn.GELU(), nn.Linear(width, width))))

    def forward(self, features: Features) -> Features:
        (high, lengths), (low, _) = (features.stream(name).patches(level) for name, level in self.taps)
        tokens = self.layers(torch.cat([self.high_up_proj(high), self.low_up_proj(low)], -1))
        return Features.of(tokens, lengths, features.stream(self.taps[0][0]).grids)
