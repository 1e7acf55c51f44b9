"""Any resolution (LLaVA-NeXT, Liu et al. 2024): a picture becomes a thumbnail and tiles of the encoder's own size, their tokens become one map with its rows ended by a learned token.

The picture's size alone says how (`Tiling.plan`): placeholders, length budget and packing count by the plan, `tiled` cuts by it, `assemble` puts together by it. The plan travels with
the picture (`ImageInput.cut`), so a model computes the same whatever stage or policy made its pictures; all it owns is the newline, in a `Newline` where `ModelSpec.newline` says so.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vlm.encoders.base import EncoderSpec, Mode
from vlm.errors import CheckpointError, ConfigurationError
from vlm.features import PATCH, Cut, Features, TokenLayout
from vlm.images import resize

__all__ = ["GRIDS", "Newline", "Tiling", "assemble", "cut_up", "fitted", "tiled"]

GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""LLaVA-NeXT's own, (columns, rows): for tiles of 336 pixels 336 x 672, 672 x 336, 672 x 672, 1008 x 336 and 336 x 1008."""
_MOST = 100
"""Tiles of a grid. More is somebody's pixels."""


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """What the picture policy `anyres` says.

    grids: (columns, rows) of tiles to choose from; of equally good ones the first is taken. max_tiles: instead of a list every grid of two to so many tiles. Default: LLaVA-NeXT's five.
    thumbnail: the whole picture as one tile in front. unpad: tokens that show nothing but the border are dropped; of a picture however thin at least one row and one column stay.
    newline: a learned token ends each row. shrink_to: a map of more tokens than so many tiles have is shrunk to as many, bilinearly (LLaVA-OneVision's `anyres_max_N`).
    official: the border is counted as the released code counts it (transformers rounds the last digits away, which changes a count once in 20,000 sizes), and a picture that is too thin
    keeps no token of its tiles, as there.

    Raises ConfigurationError for what is no grid or no number of tiles.
    """

    grids: tuple[tuple[int, int], ...] | None = None
    max_tiles: int | None = None
    thumbnail: bool = True
    unpad: bool = True
    newline: bool = True
    shrink_to: int | None = None
    official: bool = False

    def __post_init__(self) -> None:
        if self.grids is not None and self.max_tiles is not None:
            raise ConfigurationError("both grids and max_tiles are given", expected="one of them", cure="set the other to null")
        wrong = [grid for grid in self.grids or () if min(grid) < 1 or grid[0] * grid[1] > _MOST]
        if wrong or self.grids == ():
            got = ", ".join(map(str, map(list, wrong))) or "no grid"
            raise ConfigurationError("grids are columns and rows of tiles", got=got, expected=f"1 to {_MOST} tiles", cure="write [1, 2] for 336 x 672 pixels of an encoder of 336")
        for name, value, least in (("max_tiles", self.max_tiles, 2), ("shrink_to", self.shrink_to, 1)):
            if value is not None and not least <= value <= _MOST:
                raise ConfigurationError(f"{name} is a number of tiles", got=value, expected=f"{least} to {_MOST}", cure=f"set {name}: {max(4, least)}")

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> "Tiling":
        """From what `asdict` and JSON made of one."""
        grids = plain["grids"]
        return cls(**{**plain, "grids": None if grids is None else tuple((columns, rows) for columns, rows in grids)})

    @property
    def choices(self) -> tuple[tuple[int, int], ...]:
        """The grids, in the order in which they are tried."""
        if self.max_tiles is None:
            return self.grids or GRIDS
        sides = range(1, self.max_tiles + 1)
        return tuple((columns, rows) for columns in sides for rows in sides if 1 < columns * rows <= self.max_tiles)

    def plan(self, width: int, height: int, size: int, tile: TokenLayout) -> Cut:
        """How a picture of width x height pixels is cut for an encoder of `size` pixels, a tile of which becomes `tile` (after the connectors).

        Raises ConfigurationError where a tile's tokens are no plain grid.
        """
        if not tile.count or set(tile.roles) != {PATCH} or tile.count != tile.rows * tile.columns:
            raise ConfigurationError(
                "tiles are put together token by token, but a tile's tokens are no plain grid",
                got=f"{tile.count} tokens of a grid of {tile.rows} x {tile.columns}",
                expected="a connector that gives one token per place",
                cure="set connector.use: mlp, or images: pad",
            )
        columns, rows = max(self.choices, key=lambda grid: _fit(width, height, grid[0] * size, grid[1] * size))
        whole = rows * tile.rows, columns * tile.columns
        trim = self._trim(width, height, *whole) if self.unpad else (0, 0)
        left = whole[0] - 2 * trim[0], whole[1] - 2 * trim[1]
        return Cut(size, (rows, columns), (tile.rows, tile.columns), trim, self._shrunk(*left, tile.count), self.thumbnail, self.newline)

    def _trim(self, width: int, height: int, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of a map that lie on the border, half of them on either side."""
        if width / height > columns / rows:
            return (rows - self._inner(height, columns / width)) // 2, 0
        return 0, (columns - self._inner(width, rows / height)) // 2

    def _inner(self, pixels: int, scale: float) -> int:
        return int(pixels * scale) if self.official else max(1, int(round(pixels * scale, 7)))

    def _shrunk(self, rows: int, columns: int, tile: int) -> tuple[int, int]:
        times = math.sqrt(rows * columns / (self.shrink_to * tile)) if self.shrink_to is not None else 1.0
        return (max(1, int(rows // times)), max(1, int(columns // times))) if times > 1.01 else (rows, columns)


def _fit(width: int, height: int, canvas_width: int, canvas_height: int) -> tuple[int, int]:
    """How good a canvas is for a picture: the more of the picture's own pixels it holds the better, then the less of it is border."""
    scale = min(canvas_width / width, canvas_height / height)
    held = min(int(width * scale) * int(height * scale), width * height)
    return held, held - canvas_width * canvas_height


# ---- before the encoder ----------------------------------------------------------------------------------------------------


def fitted(image: Image.Image, cut: Cut) -> Image.Image:
    """The picture on the canvas that its tiles share: as large as fits, in the middle, the border black."""
    height, width = cut.tiles[0] * cut.size, cut.tiles[1] * cut.size
    across, down = width / image.width, height / image.height
    if across < down:
        inner = width, min(math.ceil(image.height * across), height)
    else:
        inner = min(math.ceil(image.width * down), width), height
    canvas = Image.new("RGB", (width, height))
    canvas.paste(resize(image, *inner), ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return canvas


def cut_up(image: Image.Image, cut: Cut) -> Iterator[Image.Image]:
    """RGB picture -> size x size pieces: the thumbnail, its shape lost; the tiles, row by row."""
    if cut.thumbnail:
        yield resize(image, cut.size, cut.size)
    canvas = fitted(image, cut)
    for top in range(0, canvas.height, cut.size):
        for left in range(0, canvas.width, cut.size):
            yield canvas.crop((left, top, left + cut.size, top + cut.size))


def tiled(encoder: EncoderSpec, image: Image.Image, cut: Cut, mode: Mode) -> Mapping[str, Tensor]:
    """RGB picture -> the encoder's views of all its pieces, (pieces, C, H, W) each."""
    pieces = [encoder.preprocess(piece, mode) for piece in cut_up(image, cut)]
    return {name: torch.stack([piece[name] for piece in pieces]) for name in pieces[0]}


# ---- behind the connectors -------------------------------------------------------------------------------------------------


class Newline(nn.Module):
    """The learned token (D,) that ends a row of tiles, and the assembly that reads it. Called in every micro-batch, whether or not a picture is cut: where none is, its gradient is zero."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def reset_parameters(self) -> None:
        """Normal with the standard deviation of a table of embeddings, 1 / sqrt(D), as LLaVA-NeXT draws it."""
        nn.init.normal_(self.weight, std=len(self.weight) ** -0.5)

    def forward(self, features: Features, cuts: Sequence[Cut | None]) -> Features:
        return assemble(features, cuts, self.weight)


def assemble(features: Features, cuts: Sequence[Cut | None], newline: Tensor | None = None) -> Features:
    """Packed tokens of all pieces -> packed tokens of the pictures, thumbnail first, then the map row by row.

    One look-up into a table of tokens, newline and shrunk maps; embedding, because its gradient is summed in a fixed order and not in bfloat16.

    Args:
        features: what the last connector gives, the pieces of a picture next to one another. cuts: per picture, None for one that is whole. newline: (D,).

    Raises CheckpointError where pictures want a newline and there is none.
    """
    if newline is None and not any(cuts):
        return features
    if newline is None and any(cut is not None and cut.newline for cut in cuts):
        raise CheckpointError(
            "the pictures' rows of tiles end in a newline, and the model has none", cure="set model.newline: true and train it, or newline: false in the picture policy"
        )
    tokens = features.tokens
    table = [tokens] if newline is None else [tokens, newline.to(tokens.dtype)[None]]
    line, held, start, piece = len(tokens), len(tokens) + len(table) - 1, 0, 0
    places: list[Tensor] = []
    grids: list[tuple[int, int]] = []
    for cut in cuts:
        count = sum(features.lengths[piece : piece + (cut.pieces if cut else 1)])
        here = torch.arange(start, start + count)
        grids.append(cut.grid if cut else features.stream().grids[piece])
        start, piece = start + count, piece + (cut.pieces if cut else 1)
        if cut is None:
            places.append(here)
            continue
        thumbnail, grid = _unfolded(here, cut)
        if grid.shape != cut.grid:
            table.append(_shrunken(tokens, grid, cut.grid))
            grid = torch.arange(held, held + len(table[-1])).view(cut.grid)
            held += len(table[-1])
        rows = torch.cat([grid, torch.full((len(grid), int(cut.newline)), line)], 1)
        places.append(torch.cat([thumbnail, rows.flatten()]))
    index = torch.cat(places).to(tokens.device, non_blocking=True)
    return Features.of(F.embedding(index, torch.cat(table)), [len(part) for part in places], grids)


def _unfolded(places: Tensor, cut: Cut) -> tuple[Tensor, Tensor]:
    """Places of a picture's tokens, piece by piece -> those of the thumbnail (N,), and those of the tiles as one map (rows, columns) without its border."""
    (rows, columns), (down, across) = cut.tiles, cut.tile
    first = down * across * cut.thumbnail
    whole = places[first:].view(rows, columns, down, across).transpose(1, 2).reshape(rows * down, columns * across)
    top, left = cut.trim
    return places[:first], whole[top : len(whole) - top, left : whole.shape[1] - left]


def _shrunken(tokens: Tensor, grid: Tensor, size: tuple[int, int]) -> Tensor:
    """(rows * columns, D): the tokens (N, D) of a map of places, interpolated bilinearly to `size`."""
    channels = F.embedding(grid.to(tokens.device), tokens).permute(2, 0, 1)[None]
    return F.interpolate(channels, size=size, mode="bilinear", align_corners=False)[0].flatten(1).T
