"""The contract of a connector: what turns the encoder's features into tokens of the decoder's width. Connectors chain through `then`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import nn

from vlm.errors import ConfigurationError
from vlm.features import OUT, SUMMARY, Features, Layouts, Level, TokenLayout
from vlm.figures import Figure, Seen
from vlm.initial import draw

__all__ = ["Connector", "ConnectorSpec", "Link"]


@dataclass(frozen=True)
class Link:
    """What a connector is built on: the streams and levels of an encoder, or the output of the connector before.

    widths: stream -> token width. levels: stream -> number of blocks (0 behind another connector). out: the decoder's width for the last link of a chain, else None.
    """

    widths: Mapping[str, int]
    levels: Mapping[str, int]
    out: int | None


class Connector(nn.Module):
    """What `ConnectorSpec.build` returns."""

    def forward(self, features: Features) -> Features:
        """Features of the encoder or of the link before -> streams of the one level OUT, packed (N, D); the last link gives one."""
        raise NotImplementedError

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameter groups by path below `connector.NAME`; "" holds what has no name of its own."""
        return {"": list(self.parameters())}

    def unused(self) -> list[nn.Parameter]:
        """Parameters kept for a checkpoint's sake, which no gradient reaches."""
        return []

    def initialise(self, encoder: nn.Module) -> None:
        """First values, drawn or copied from the encoder. Called once, with all parameters of both gathered.

        The default draws.
        """
        draw(self)


@dataclass(frozen=True, kw_only=True)
class ConnectorSpec:
    """Configuration of one connector.

    path: file with first weights, such as a released `mm_projector.bin`; default: drawn. level: which hidden state of the tower is read. stream: which stream, None for the only one. then: the next link of the chain.
    """

    use: ClassVar[str]
    path: str | None = None
    level: Level = -2
    stream: str | None = None
    official: bool = False
    then: Any = None

    def form(self) -> Self:
        """What a checkpoint says of it: all but where first weights came from."""
        return replace(self, path=None, then=None if self.then is None else self.then.form())

    def trimmed(self) -> Self:
        """What computes the same without the parameters that are kept for a checkpoint's sake (`Connector.unused`), in one spelling."""
        return replace(self, then=None if self.then is None else self.then.trimmed())

    def reads(self, link: Link) -> Mapping[str, Sequence[Level]]:
        """Levels by stream that `forward` reads of the encoder (first link only)."""
        return {self.stream_in(link): (self.level,)}

    def width(self, link: Link) -> int:
        """Width of the tokens that come out."""
        raise NotImplementedError

    def widths(self, link: Link) -> Mapping[str, int]:
        """Width by stream, for one that hands several on."""
        return {"image": self.width(link)}

    def layout(self, layouts: Layouts) -> TokenLayout:
        """Tokens of a picture after this connector; the default drops the summary tokens."""
        layout = layouts[self.stream] if self.stream else next(iter(layouts.values()))
        return layout.without(SUMMARY)

    def layouts(self, layouts: Layouts) -> Layouts:
        """The same by stream, for one that hands several on."""
        return {"image": self.layout(layouts)}

    def build(self, encoder: Any, link: Link) -> Connector:
        """The module: structure only. encoder: the encoder's Spec."""
        raise NotImplementedError

    def figures(self, module: nn.Module, seen: Seen) -> Iterable[Figure]:
        """What a run's report shows of it. module: the trained one, in evaluation mode, without gradients."""
        return ()

    # ---- for connectors that read one stream, or project -------------------------------------------------------------------

    def stream_in(self, link: Link) -> str:
        """The stream that is read: the first one, where none is named."""
        return self.stream or next(iter(link.widths))

    def level_in(self, link: Link) -> Level:
        """The level of it; behind another connector there is only one."""
        return self.level if any(link.levels.values()) else OUT

    def projected(self, link: Link, hidden: int | None) -> int:
        """Width of the tokens that a projection gives: the decoder's, and `hidden` where another connector follows; raises ConfigurationError where that is None."""
        width = link.out or hidden
        if width is None:
            raise ConfigurationError(f"connector {self.use} is followed by another connector, so its width is not the decoder's", cure="set hidden: N")
        return width
