"""DeepSeek-VL's picture geometry: the long side to a size, centred on a square of one colour, under both rules for the short side (systems/deepseek_vl.md, sections 3.1 and 3.2)."""

from typing import Literal

from PIL import Image

from vlm.images import pad, resize

__all__ = ["Rounding", "fit_square", "inner_size"]

Rounding = Literal["trunc", "round"]


def inner_size(width: int, height: int, size: int, rounding: Rounding, min_size: int = 14) -> tuple[int, int]:
    """Width and height in pixels before padding. trunc: the official program's rule; round: transformers' (ties to even). Neither side gets below `min_size`."""
    long = max(width, height)
    if rounding == "trunc":
        # in this order, or a long side of 49 pixels becomes 1023 of 1024
        return max(int(width / long * size), min_size), max(int(height / long * size), min_size)
    scale = size / long
    return max(round(width * scale), min_size), max(round(height * scale), min_size)


def fit_square(image: Image.Image, size: int, color: tuple[int, int, int], rounding: Rounding = "trunc", min_size: int = 14) -> Image.Image:
    """RGB picture -> size x size pixels: bicubic, centred on `color`; an odd remainder goes below or right. With a `size` below `min_size` the square is larger."""
    return pad(resize(image, *inner_size(*image.size, size, rounding, min_size)), color)
