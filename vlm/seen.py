"""Pictures as an encoder saw them: its views, turned back into 8-bit RGB."""

from collections.abc import Iterator

import torch
from PIL import Image
from torch import Tensor

from vlm.encoders.base import EncoderSpec
from vlm.features import ImageInput

__all__ = ["as_seen"]


def as_seen(encoder: EncoderSpec, image: ImageInput) -> Iterator[tuple[str, Image.Image]]:
    """Every view and piece of a picture with a name of its own, "" where it is the only one.

    Mean and standard deviation are those of the view's tower. A view of an encoder that has none is stretched from its least to its largest value; one that has no 1 or 3 channels is left out.
    """
    for view, pixels in image.views.items():
        pieces = pixels if image.cut is not None else pixels[None]
        if pieces.ndim != 4 or pieces.shape[1] not in (1, 3):
            continue
        tower = encoder.towers.get(view, encoder)
        for number, piece in enumerate(pieces):
            words = [view] * (len(image.views) > 1) + [str(number)] * (len(pieces) > 1)
            yield "-".join(words), _picture(piece, getattr(tower, "mean", None), getattr(tower, "std", None))


def _picture(pixels: Tensor, mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> Image.Image:
    """(C, H, W) -> RGB."""
    if mean is None or std is None:
        low, high = pixels.min(), pixels.max()
        whole = (pixels - low) / (high - low).clamp(min=1e-6)
    else:
        whole = pixels * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    return Image.fromarray((whole * 255).round().clamp(0, 255).to(torch.uint8).expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
