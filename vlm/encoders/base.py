"""The contract of a vision encoder: a Spec that knows everything without weights, and a Module that computes.

A Spec is a frozen, picklable dataclass. Processor, data workers, `vlm check` and cost see Specs only.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vlm.features import Features, ImageInput, Layouts, Level, TokenLayout
from vlm.figures import Figure, Seen
from vlm.initial import draw

__all__ = ["BlockWeights", "Encoder", "EncoderSpec", "FixedSizeSpec", "Mode", "Triple"]

Mode = Literal["train", "infer"]
Triple = tuple[float, float, float]
"""A number per channel: red, green, blue."""


@dataclass(frozen=True)
class BlockWeights:
    """A transformer block of a tower as a ladder needs it: sizes and the modules to copy from. Linears (out, in), a bias may be missing; norms are LayerNorms; a layer scale is left out.

    activation: as transformers calls it. eps: of the norms. dropout: of the attention's weights.
    """

    width: int
    heads: int
    mlp_width: int
    activation: str
    eps: float
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    out: nn.Linear
    norm1: nn.LayerNorm
    norm2: nn.LayerNorm
    fc1: nn.Linear
    fc2: nn.Linear
    dropout: float = 0.0


class Encoder(nn.Module):
    """What `EncoderSpec.build` returns: structure only, safe on the meta device and under ZeRO 3."""

    def forward(self, images: Sequence[ImageInput], levels: Mapping[str, Sequence[Level]]) -> Features:
        """Features of all pictures, `levels` by stream. Called once per micro-batch, with at least one picture."""
        raise NotImplementedError

    def block(self, index: int) -> BlockWeights | None:
        """Block `index` for a ladder to copy, None where the tower has no such blocks."""
        return None

    def tensors(self, place: Path) -> Iterable[tuple[str, Tensor]]:
        """The tensors of a released folder or file; an encoder whose library calls its files otherwise overrides it."""
        from vlm.weights.files import read_tensors

        return read_tensors(place)

    def weights_key(self, name: str) -> str | None:
        """Name of a tensor in a released file -> name in this module; None: the file carries it, and it is never used here."""
        return name

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameter groups by path below `encoder`; "" holds what has no name of its own."""
        return {"": list(self.parameters())}

    def unused(self, levels: Mapping[str, Sequence[Level]]) -> list[nn.Parameter]:
        """Parameters that no gradient reaches when only `levels` are read: kept for the checkpoint's sake, never trained."""
        return []

    def initialise(self) -> None:
        """Draw first values. Called once, with all parameters gathered, where no weights are loaded."""
        draw(self)


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """Configuration of an encoder and everything that can be known of it without weights.

    path: local folder or cached hub snapshot with first weights. weights: "path" loads them, "random" draws.
    """

    use: ClassVar[str]
    path: str | None = None
    weights: Literal["path", "random"] = "path"
    config: Mapping[str, Any] | None = None
    official: bool = False

    @property
    def towers(self) -> Mapping[str, Any]:
        """The Specs whose `path` names first weights, by their place below `encoder`: this one, as "", unless it is made of others."""
        return {"": self}

    def with_towers(self, change: Callable[[Any], Any]) -> Self:
        """This Spec with every one of `towers` changed."""
        return change(self)

    def form(self) -> Self:
        """What a checkpoint says of it: all but where first weights came from."""
        return self.with_towers(lambda tower: replace(tower, path=None))

    @property
    def streams(self) -> tuple[str, ...]:
        return ("image",)

    @property
    def levels(self) -> Mapping[str, int]:
        """Stream -> L, the number of blocks: levels 0..L exist."""
        raise NotImplementedError

    @property
    def widths(self) -> Mapping[str, int]:
        """Stream -> width of its tokens."""
        raise NotImplementedError

    def preprocess(self, image: Image.Image, mode: Mode) -> Mapping[str, Tensor]:
        """RGB picture -> named views (C, H, W) float32; deterministic."""
        raise NotImplementedError

    def layout(self, width: int, height: int, mode: Mode) -> Layouts:
        """Tokens per stream for a picture of width x height pixels, equal to what `forward` gives for it."""
        raise NotImplementedError

    def dummy(self) -> ImageInput:
        """A valid picture for a micro-batch that has none."""
        blank = Image.new("RGB", (16, 16))
        return ImageInput(self.preprocess(blank, "train"), 16, 16, TokenLayout(()))

    def build(self) -> Encoder:
        """The module: structure only."""
        raise NotImplementedError

    def figures(self, module: nn.Module, seen: Seen) -> Iterable[Figure]:
        """What a run's report shows of it. module: the trained one, in evaluation mode, without gradients."""
        return ()


@dataclass(frozen=True, kw_only=True)
class FixedSizeSpec(EncoderSpec):
    """An encoder that sees every picture at size x size: gives preprocess, layout and dummy.

    A subclass sets size, patch, width, depth, and overrides `build`. prefix: summary tokens (CLS) in front of the patches.
    fit: shortest edge to `size`, centre crop ("crop"); squashed to the square ("squash"); or longest edge to `size`, in the middle of the mean's colour, as DeepSeek-VL does it ("letterbox").
    """

    size: int = 224
    patch: int = 16
    width: int = 384
    depth: int = 12
    prefix: int = 0
    mean: Triple = (0.5, 0.5, 0.5)
    std: Triple = (0.5, 0.5, 0.5)
    fit: Literal["crop", "squash", "letterbox"] = "squash"

    @property
    def levels(self) -> Mapping[str, int]:
        return {"image": self.depth}

    @property
    def widths(self) -> Mapping[str, int]:
        return {"image": self.width}

    def layout(self, width: int, height: int, mode: Mode) -> Layouts:
        side = self.size // self.patch
        return {"image": TokenLayout.grid(side, side, self.prefix)}

    def preprocess(self, image: Image.Image, mode: Mode) -> Mapping[str, Tensor]:
        return {"pixels": self.normalise(self._square(image))}

    def _square(self, image: Image.Image) -> Image.Image:
        from vlm.images import crop_to, mean_color, resize
        from vlm.letterbox import fit_square

        if self.fit == "letterbox":
            return fit_square(image, self.size, mean_color(self.mean), "trunc" if self.official else "round")
        return crop_to(image, self.size, official=self.official) if self.fit == "crop" else resize(image, self.size, self.size)

    def normalise(self, image: Image.Image) -> Tensor:
        """RGB picture -> (3, H, W) float32, (x / 255 - mean) / std."""
        pixels = np.asarray(image, dtype=np.float32) * np.float32(1 / 255)
        pixels = (pixels - np.asarray(self.mean, dtype=np.float32)) / np.asarray(self.std, dtype=np.float32)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
