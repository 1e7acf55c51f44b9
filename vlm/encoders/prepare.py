"""Pictures as the data configs of timm and open_clip ask for them, in Pillow alone and to the pixel."""

import math
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from vlm.encoders.base import Triple
from vlm.images import check_made

__all__ = ["Data", "Interpolation", "squared"]

Interpolation = Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]


@dataclass(frozen=True)
class Data:
    """How a model wants its pictures. crop: the part of the resized edge that stays. fill: colour of borders (fit="pad")."""

    size: int
    mean: Triple
    std: Triple
    interpolation: Interpolation = "bicubic"
    fit: Literal["crop", "squash", "pad"] = "crop"
    crop: float = 1.0
    fill: tuple[int, int, int] = (0, 0, 0)


def squared(image: Image.Image, data: Data) -> Image.Image:
    """RGB picture -> size x size pixels: resized so that `crop` of an edge remains, then its centre.

    fit: crop takes the shortest edge (timm's center, open_clip's shortest), squash both, pad the longest and adds borders (border, longest). Raises DataError for strips that would not fit memory.
    """
    edge = math.floor(data.size / data.crop)
    width, height = _scaled(image.size, edge, data.fit)
    check_made(image.size, width, height)
    return _centred(image.resize((width, height), Image.Resampling[data.interpolation.upper()]), data.size, data.fill)


def _scaled(size: tuple[int, int], edge: int, fit: str) -> tuple[int, int]:
    """Width and height after resizing, rounded as torchvision (crop) and timm (pad) do."""
    short, long = min(size), max(size)
    if fit == "squash":
        return edge, edge
    if fit == "pad":
        width, height = (max(1, round(side / (long / edge))) for side in size)
        return width, height
    other = int(edge * long / short)
    return (edge, other) if size[0] <= size[1] else (other, edge)


def _centred(image: Image.Image, size: int, fill: tuple[int, int, int]) -> Image.Image:
    """The centre size x size, with borders of `fill` where the picture is smaller."""
    if image.width < size or image.height < size:
        bordered = Image.new("RGB", (max(size, image.width), max(size, image.height)), fill)
        bordered.paste(image, (max(0, size - image.width) // 2, max(0, size - image.height) // 2))
        image = bordered
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))
