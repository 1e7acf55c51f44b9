"""What travels between encoder and decoder: packed features of pictures of any size, and the layouts that count them before they exist."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["EXTRA", "OUT", "PATCH", "SEPARATOR", "SUMMARY", "Cut", "Features", "ImageInput", "Layouts", "Level", "Stream", "TokenLayout"]

SUMMARY, PATCH, SEPARATOR, EXTRA = "summary", "patch", "separator", "extra"

Level = int | str
"""A hidden state of a tower: for 0 <= i < L the input of block i, L the output of the last block (never normed), negative numbers from L + 1, "final" after the final norm."""


@dataclass(frozen=True)
class TokenLayout:
    """The tokens of one picture in one stream, known from its size alone.

    roles: one of SUMMARY, PATCH, SEPARATOR, EXTRA per token, in order. rows, columns: the grid of the PATCH tokens, (0, 0) where there is none.
    """

    roles: tuple[str, ...]
    rows: int = 0
    columns: int = 0

    @classmethod
    def grid(cls, rows: int, columns: int, prefix: int = 0) -> "TokenLayout":
        """`prefix` summary tokens before rows x columns patches."""
        return cls((SUMMARY,) * prefix + (PATCH,) * (rows * columns), rows, columns)

    @property
    def count(self) -> int:
        return len(self.roles)

    def without(self, role: str) -> "TokenLayout":
        return TokenLayout(tuple(r for r in self.roles if r != role), self.rows, self.columns)


Layouts = Mapping[str, TokenLayout]
"""Layouts of one picture by stream."""


@dataclass(frozen=True)
class Cut:
    """How a picture is cut into square tiles, and which of their tokens it becomes; pairs are (rows, columns). `Tiling.plan` of tiles.py makes it from the picture's size.

    size: pixels of a tile's side. tiles: how many. tile: tokens of one. trim: tokens dropped at top and at bottom, at left and at right. grid: tokens that stay; fewer than the trimming
    leaves, where the map is shrunk. thumbnail: the whole picture, squashed to one tile, comes first. newline: a learned token ends each row of the grid.
    """

    size: int
    tiles: tuple[int, int]
    tile: tuple[int, int]
    trim: tuple[int, int]
    grid: tuple[int, int]
    thumbnail: bool
    newline: bool

    @property
    def pieces(self) -> int:
        """Pictures that the encoder reads: the thumbnail and the tiles."""
        return self.tiles[0] * self.tiles[1] + self.thumbnail

    @property
    def layout(self) -> TokenLayout:
        """The thumbnail's tokens are the picture's summary, the rows and columns those of the tiles."""
        rows, columns = self.grid
        summary = (SUMMARY,) * (self.tile[0] * self.tile[1] * self.thumbnail)
        return TokenLayout(summary + ((PATCH,) * columns + (SEPARATOR,) * self.newline) * rows, rows, columns)


@dataclass(frozen=True)
class ImageInput:
    """One preprocessed picture: named views (C, H, W) float32 as its encoder reads them, and the layout of the tokens that will come of it (after the connectors).

    cut: of a picture that is read in pieces; its views hold one after another, (pieces, C, H, W).
    """

    views: Mapping[str, Tensor]
    width: int
    height: int
    layout: TokenLayout
    cut: Cut | None = None

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "ImageInput":
        return replace(self, views={name: view.to(device, dtype, non_blocking=True) for name, view in self.views.items()})

    def pin_memory(self) -> "ImageInput":
        return replace(self, views={name: view.pin_memory() for name, view in self.views.items()})

    def pieces(self) -> list["ImageInput"]:
        """The pictures that the encoder reads: itself, or the pieces that it was cut into."""
        if self.cut is None:
            return [self]
        layout = TokenLayout.grid(*self.cut.tile)
        return [ImageInput({name: view[index] for name, view in self.views.items()}, self.cut.size, self.cut.size, layout) for index in range(self.cut.pieces)]


class Stream(NamedTuple):
    """Packed features of one stream of an encoder, or of a connector's output.

    levels: level -> (N, D), the tokens of all pictures one after another, prefix tokens included. lengths: tokens per picture, summing to N.
    grids: (rows, columns) of each picture's patches. prefix: summary tokens in front of each picture's patches.
    """

    levels: dict[Level, Tensor]
    lengths: tuple[int, ...]
    grids: tuple[tuple[int, int], ...]
    prefix: int = 0

    def patches(self, level: Level) -> tuple[Tensor, tuple[int, ...]]:
        """Tokens (M, D) of a level without the summary tokens, and their number per picture."""
        tokens = self.levels[level]
        if not self.prefix:
            return tokens, self.lengths
        kept = [part[self.prefix :] for part in tokens.split(self.lengths)]
        return torch.cat(kept), tuple(len(part) for part in kept)


OUT: Level = "out"


class Features(NamedTuple):
    """Features by stream. An encoder has one stream ("image") or several; a connector gives one, with the one level "out".

    Named tuples and dicts, because modules return them: ZeRO 3 looks for tensors inside tuples and dicts only, and a module whose tensors it does not find loses its own parameters in backward.
    """

    streams: dict[str, Stream]

    @classmethod
    def of(cls, tokens: Tensor, lengths: Sequence[int], grids: Sequence[tuple[int, int]]) -> "Features":
        """What a connector returns: tokens (N, D), their number per picture, the grids."""
        return cls({"image": Stream({OUT: tokens}, tuple(lengths), tuple(grids))})

    def stream(self, name: str | None = None) -> Stream:
        """The stream called `name`; without a name the only one."""
        return self.streams[name] if name is not None else next(iter(self.streams.values()))

    @property
    def tokens(self) -> Tensor:
        """(N, D): the output of a connector."""
        return self.stream().levels[OUT]

    @property
    def lengths(self) -> tuple[int, ...]:
        return self.stream().lengths
