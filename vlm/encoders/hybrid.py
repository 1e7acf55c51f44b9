"""DeepSeek-VL's pair: SAM at high resolution beside a SigLIP or CLIP tower at low, from one picture (Lu et al. 2024, section 3.1)."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate

from vlm.encoders import register
from vlm.encoders.base import BlockWeights, Encoder, EncoderSpec, FixedSizeSpec, Mode, Triple
from vlm.encoders.tower import CLIP_MEAN, CLIP_STD, Described
from vlm.errors import CheckpointError, ConfigurationError, listed
from vlm.features import PATCH, Features, ImageInput, Layouts, Level, Stream, TokenLayout
from vlm.images import mean_color
from vlm.letterbox import Rounding, fit_square
from vlm.weights.files import find_folder, read_tensors
from vlm.weights.strict import DERIVED, load_tensors

if TYPE_CHECKING:
    from vlm.encoders.sam import SAMTower

__all__ = ["HybridEncoder", "HybridSpec", "SAMSpec"]


@dataclass(frozen=True, kw_only=True)
class SAMSpec(Described):
    """The high-resolution tower. config: fields of transformers' SamVisionConfig. downsample_channels: of the convolutions behind the neck, each halving the grid.

    path: folder of a SAM in its own or transformers' names, or of this tower in DeepSeek-VL's. interpolate: rows and columns that the neck's map is resized to; default 4 x the low tower's grid.
    """

    path: str | None = None
    weights: Literal["path", "random"] = "path"
    config: Mapping[str, Any] | None = None
    downsample_channels: tuple[int, ...] = (512, 1024)
    interpolate: tuple[int, int] | None = None
    mean: Triple = CLIP_MEAN
    std: Triple = CLIP_STD

    def config_class(self) -> Any:
        from transformers import SamVisionConfig

        return SamVisionConfig

    def build(self, grid: tuple[int, int]) -> "SAMTower":
        from vlm.encoders.sam import SAMTower

        return SAMTower(self.whole_config(), self.downsample_channels, grid)


@register("hybrid")
@dataclass(frozen=True, kw_only=True)
class HybridSpec(EncoderSpec):
    """Two towers; `path`, `weights` and `config` stand in each of them, not here.

    concat: tuple gives the streams `high` and `low`, for a connector that reads both. feature, sequence and add give one stream, `image`: the widths beside each other, the tokens one behind
    the other (high first), or the sum. Its levels are the low tower's; the high tower has one output whatever level is asked for.
    official: from a plain SAM the second neck is not copied, as the official program leaves it (quirk 1).
    rounding: how the picture is brought to the high tower's size, and whether the low one sees it before 8-bit rounding (trunc: the official program) or after (round: transformers).
    resample: the low view's filter under `round`; the other rule is bilinear always. min_size: pixels that no side of a picture falls below, however thin it is.
    """

    weights: Literal["path", "random"] = "random"
    high: SAMSpec = field(default_factory=SAMSpec)
    low: EncoderSpec = field(metadata={"group": "encoder", "registry": "vlm.encoders"})
    concat: Literal["tuple", "feature", "sequence", "add"] = "tuple"
    rounding: Rounding = "trunc"
    resample: Literal["bilinear", "bicubic"] = "bilinear"
    min_size: int = 14

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", "random")  # no file of both: `initialise` loads or draws each tower
        for name in ("path", "config"):
            if getattr(self, name) is not None:
                raise ConfigurationError(f"encoder hybrid has no {name} of its own", got=getattr(self, name), cure=f"set high.{name} and low.{name}")
        if not isinstance(self.low, FixedSizeSpec):
            raise ConfigurationError("encoder hybrid needs a low tower of one fixed size", got=self.low.use, cure="set low.use to siglip or clip")
        if not isinstance(self.size, int) or self.size < self.min_size:
            raise ConfigurationError(
                "encoder hybrid needs square pictures", got=f"high image_size {self.size}", expected=f"one number of {self.min_size} or more", cure="set high.config.image_size"
            )
        self._check_fusion()

    def _check_fusion(self) -> None:
        high, low = self.high_layout(), self.low_layout()
        widths = self.high_width, self.low_tower.width
        if self.concat in ("feature", "add") and (high.rows, high.columns) != (low.rows, low.columns):
            got = f"{high.rows} x {high.columns} high, {low.rows} x {low.columns} low"
            raise ConfigurationError(f"concat {self.concat} needs both towers to give one grid", got=got, cure="set high.interpolate or high.downsample_channels")
        if self.concat in ("sequence", "add") and len(set(widths)) > 1:
            got = f"{widths[0]} high, {widths[1]} low"
            raise ConfigurationError(f"concat {self.concat} needs both towers to give one width", got=got, cure="set high.downsample_channels, or use concat tuple")

    @property
    def towers(self) -> Mapping[str, Any]:
        return {"high": self.high, "low": self.low}

    def with_towers(self, change: Callable[[Any], Any]) -> Self:
        return replace(self, **{name: change(tower) for name, tower in self.towers.items()})

    # ---- what comes out ----------------------------------------------------------------------------------------------------

    @cached_property
    def size(self) -> int:
        """Pixels of the high tower's square, to which a stage's `images:` policy goes, too."""
        return self.high.numbers()["image_size"]

    @property
    def mean(self) -> Triple:
        """Colour of the padding, in 0..1."""
        return self.high.mean

    @property
    def low_tower(self) -> FixedSizeSpec:
        return cast(FixedSizeSpec, self.low)

    @property
    def high_width(self) -> int:
        return self.high.downsample_channels[-1] if self.high.downsample_channels else self.high.numbers()["output_channels"]

    @property
    def streams(self) -> tuple[str, ...]:
        return ("high", "low") if self.concat == "tuple" else ("image",)

    @property
    def levels(self) -> Mapping[str, int]:
        depth = self.low_tower.depth
        return {"high": 0, "low": depth} if self.concat == "tuple" else {"image": depth}

    @property
    def widths(self) -> Mapping[str, int]:
        high, low = self.high_width, self.low_tower.width
        return {"high": high, "low": low} if self.concat == "tuple" else {"image": high + low if self.concat == "feature" else high}

    def interpolated(self) -> tuple[int, int]:
        """Rows and columns of the neck's map before the convolutions."""
        low = self.low_layout()
        return self.high.interpolate or (4 * low.rows, 4 * low.columns)

    def high_layout(self) -> TokenLayout:
        parts = 2 ** len(self.high.downsample_channels)
        rows, columns = self.interpolated()
        return TokenLayout.grid(-(-rows // parts), -(-columns // parts))

    def low_layout(self) -> TokenLayout:
        return next(iter(self.low.layout(self.low_tower.size, self.low_tower.size, "infer").values()))

    def layout(self, width: int, height: int, mode: Mode) -> Layouts:
        high, low = self.high_layout(), self.low_layout()
        match self.concat:
            case "tuple":
                return {"high": high, "low": low}
            case "sequence":
                return {"image": TokenLayout((PATCH,) * (high.count + low.rows * low.columns))}  # two grids are none
        return {"image": high}

    # ---- what goes in ------------------------------------------------------------------------------------------------------

    def preprocess(self, image: Image.Image, mode: Mode) -> Mapping[str, Tensor]:
        square = fit_square(image, self.size, mean_color(self.mean), self.rounding, self.min_size)
        pixels = unit(square)
        if self.rounding == "trunc":
            return self.views(pixels)
        side = self.low_tower.size
        small = square.resize((side, side), Image.Resampling[self.resample.upper()])
        return self._normalised(pixels, unit(small))

    def views(self, pixels: Tensor) -> Mapping[str, Tensor]:
        """(3, S, S) in 0..1 -> both normalised views; the low one is made from the float picture, as the official towers do it."""
        side = self.low_tower.size
        return self._normalised(pixels, interpolate(pixels[None], (side, side), mode="bilinear", align_corners=False, antialias=True)[0])

    def _normalised(self, high: Tensor, low: Tensor) -> Mapping[str, Tensor]:
        return {"high": normalised(high, self.high.mean, self.high.std), "low": normalised(low, self.low_tower.mean, self.low_tower.std)}

    def build(self) -> "HybridEncoder":
        return HybridEncoder(self)


def unit(image: Image.Image) -> Tensor:
    """RGB picture -> (3, H, W) float32 in 0..1."""
    return torch.from_numpy((np.asarray(image).transpose(2, 0, 1) * (1 / 255)).astype(np.float32))


def normalised(pixels: Tensor, mean: Triple, std: Triple) -> Tensor:
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


class HybridEncoder(Encoder):
    """`high`: SAM's tower; `low`: another encoder, as a whole."""

    def __init__(self, spec: HybridSpec):
        super().__init__()
        self.spec = spec
        self.high = spec.high.build(spec.interpolated())
        self.low = spec.low.build()
        (self.inner,) = spec.low.streams

    def forward(self, images: Sequence[ImageInput], levels: Mapping[str, Sequence[Level]]) -> Features:
        if self.spec.concat != "tuple":
            return Features({"image": self._fused(self._high(images), self._low(images, levels["image"]), levels["image"])})
        streams = {}
        if "high" in levels:
            tokens = self._high(images)
            layout = self.spec.high_layout()
            streams["high"] = Stream(dict.fromkeys(levels["high"], tokens.flatten(0, 1)), (layout.count,) * len(images), ((layout.rows, layout.columns),) * len(images))
        if "low" in levels:
            streams["low"] = self._low(images, levels["low"])
        return Features(streams)

    def _high(self, images: Sequence[ImageInput]) -> Tensor:
        """(n, T, C)"""
        return self.high(torch.stack([image.views["high"] for image in images])).flatten(2).transpose(1, 2)

    def _low(self, images: Sequence[ImageInput], levels: Sequence[Level]) -> Stream:
        views = [replace(image, views={"pixels": image.views["low"]}) for image in images]
        return self.low(views, {self.inner: levels}).streams[self.inner]

    def _fused(self, high: Tensor, low: Stream, levels: Sequence[Level]) -> Stream:
        count = len(high)
        found = {level: self._fuse(high, low.patches(level)[0].view(count, -1, self.spec.low_tower.width)).flatten(0, 1) for level in levels}
        layout = next(iter(self.spec.layout(0, 0, "infer").values()))
        return Stream(cast("dict[Level, Tensor]", found), (layout.count,) * count, ((layout.rows, layout.columns),) * count)

    def _fuse(self, high: Tensor, low: Tensor) -> Tensor:
        match self.spec.concat:
            case "feature":
                return torch.cat([high, low], -1)
            case "sequence":
                return torch.cat([high, low], 1)
        return high + low

    def block(self, index: int) -> BlockWeights | None:
        """The low tower's, where its tokens come out as they are."""
        return self.low.block(index) if self.spec.concat == "tuple" else None

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return {f"{tower}.{path}".rstrip("."): found for tower, part in (("high", self.high), ("low", self.low)) for path, found in part.groups().items()}

    def unused(self, levels: Mapping[str, Sequence[Level]]) -> list[nn.Parameter]:
        one = levels.get("image")
        high, low = levels.get("high", one), levels.get("low", one)
        return [*(() if high else self.high.parameters()), *(self.low.unused({self.inner: low}) if low else self.low.parameters())]

    def initialise(self) -> None:
        """Draw each tower, then load what its Spec names a path for. Raises CheckpointError for keys that are missing, left over or of another shape."""
        for name, tower, spec, read in (("high", self.high, self.spec.high, read_tensors), ("low", self.low, self.spec.low, self.low.tensors)):
            tower.initialise()
            if spec.weights != "path":
                continue
            if spec.path is None:
                raise ConfigurationError(f"first weights of the {name} tower are wanted, but no path is given", cure=f"set encoder.{name}.path, or encoder.{name}.weights: random")
            tensors = used(tower, read(find_folder(spec.path)), spec.path)
            if tower is self.high:
                tensors = self.high.completed(tensors, copy_neck=not self.spec.official)
            load_tensors(tower, tensors.items(), source=spec.path, what=type(tower).__name__, whole=True)


def used(tower: Any, tensors: Iterable[tuple[str, Tensor]], source: str) -> dict[str, Tensor]:
    """A file's tensors by the tower's names, without those that are never used here: they are counted and named in a warning. Raises CheckpointError."""
    targets = tower.state_dict().keys()
    found, dropped = {}, []
    for name, tensor in tensors:
        key = tower.weights_key(name)
        if key is None or (key not in targets and DERIVED.search(key)):
            dropped.append(name)
        elif key in found:
            raise CheckpointError(f"{source} holds a tensor twice", got=f"{key}, once as {name}", cure="give a folder of one model")
        else:
            found[key] = tensor
    if dropped:
        warnings.warn(f"{source}: {len(dropped)} tensors are never used by the {type(tower).__name__} and were left out ({listed(sorted(dropped))})", stacklevel=2)
    return found
