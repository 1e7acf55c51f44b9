"""An encoder of one's own, with two streams of different token counts. Dropped in as one file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn

from vlm.encoders import register
from vlm.encoders.base import BlockWeights, Encoder, FixedSizeSpec, Mode
from vlm.features import Features, ImageInput, Layouts, Level, Stream, TokenLayout

PATCHES = {"high": 7, "low": 14}


@register("two_streams")
@dataclass(frozen=True, kw_only=True)
class TwoStreamsSpec(FixedSizeSpec):
    """A fine and a coarse view of the same 28 x 28 picture."""

    size: int = 28
    width: int = 16
    depth: int = 2

    @property
    def streams(self) -> tuple[str, ...]:
        return tuple(PATCHES)

    @property
    def levels(self) -> Mapping[str, int]:
        return dict.fromkeys(PATCHES, self.depth)

    @property
    def widths(self) -> Mapping[str, int]:
        return dict.fromkeys(PATCHES, self.width)

    def preprocess(self, image: Image.Image, mode: Mode) -> Mapping[str, Tensor]:
        pixels = super().preprocess(image, mode)["pixels"]
        return {"high": pixels, "low": pixels}

    def layout(self, width: int, height: int, mode: Mode) -> Layouts:
        return {name: TokenLayout.grid(self.size // patch, self.size // patch) for name, patch in PATCHES.items()}

    def build(self) -> "TwoStreams":
        return TwoStreams(self)


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.out(nn.functional.scaled_dot_product_attention(self.query(y), self.key(y), self.value(y)))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


class TwoStreams(Encoder):
    def __init__(self, spec: TwoStreamsSpec):
        super().__init__()
        self.spec = spec
        self.patch = nn.ModuleDict({name: nn.Conv2d(3, spec.width, patch, patch) for name, patch in PATCHES.items()})
        self.blocks = nn.ModuleDict({name: nn.ModuleList(Block(spec.width) for _ in range(spec.depth)) for name in PATCHES})

    def forward(self, images: Sequence[ImageInput], levels: Mapping[str, Sequence[Level]]) -> Features:
        streams = {}
        for name in PATCHES:
            x = self.patch[name](torch.stack([image.views[name] for image in images])).flatten(2).transpose(1, 2)
            hidden = [x]
            for block in self.blocks[name]:  # type: ignore[attr-defined]
                hidden.append(block(hidden[-1]))
            side = self.spec.size // PATCHES[name]
            found = {level: hidden[int(level)].flatten(0, 1) for level in levels.get(name, ())}
            streams[name] = Stream(found, (side * side,) * len(images), ((side, side),) * len(images))
        return Features(streams)

    def block(self, index: int) -> BlockWeights:
        block = self.blocks["low"][index]  # type: ignore[index]
        width = self.spec.width
        return BlockWeights(width, 1, 2 * width, "gelu", 1e-5, block.query, block.key, block.value, block.out, block.norm1, block.norm2, block.fc1, block.fc2)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return {name: [*self.patch[name].parameters(), *self.blocks[name].parameters()] for name in PATCHES}
