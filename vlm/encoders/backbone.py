"""What the encoders of foreign libraries share (open_clip, timm): shapes surveyed without weights, hidden states read through one call, pictures prepared as the model's own data config says."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from threading import get_ident
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from vlm.encoders.base import BlockWeights, Encoder, FixedSizeSpec, Mode, Triple
from vlm.encoders.prepare import Data, Interpolation, squared
from vlm.encoders.readers import Reader
from vlm.errors import ConfigurationError, EnvironmentProblem
from vlm.features import PATCH, SUMMARY, Features, ImageInput, Layouts, Level, Stream, TokenLayout
from vlm.structure import hollow, unpartitioned

__all__ = ["BackboneEncoder", "BackboneSpec", "StreamShape", "library", "whole_depth"]


@dataclass(frozen=True)
class StreamShape:
    """One stream for one picture: `prefix` summary tokens, then `patches` of `width`, on a grid of rows x columns (0 x 0 where they have none)."""

    width: int
    depth: int
    prefix: int
    patches: int
    rows: int = 0
    columns: int = 0

    @property
    def layout(self) -> TokenLayout:
        return TokenLayout((SUMMARY,) * self.prefix + (PATCH,) * self.patches, self.rows, self.columns)


@dataclass(frozen=True, kw_only=True)
class BackboneSpec(FixedSizeSpec):
    """A backbone of another library.

    A vision transformer has the one stream `image` with all its hidden states. Anything else (convolutions, pyramids) has a stream `features`, the library's own final map, and one
    per stage, `stage1`, `stage2`, ...: widths and grids differ between stages. Such a stream holds one hidden state, and every level names it.

    name: as the library calls the model. size, mean, std, interpolation, fit, crop, fill: None means the model's own.
    """

    package: ClassVar[str]
    name: str | None = None
    size: int | None = None  # type: ignore[assignment]
    mean: Triple | None = None  # type: ignore[assignment]
    std: Triple | None = None  # type: ignore[assignment]
    fit: Literal["crop", "squash", "pad"] | None = None  # type: ignore[assignment]
    interpolation: Interpolation | None = None
    crop: float | None = None
    fill: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        library(self.package, self.use)
        config, data = self.resolve()
        object.__setattr__(self, "config", config)
        for name, value in vars(data).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        shapes = _survey(self)
        object.__setattr__(self, "_shapes", shapes)
        first = next(iter(shapes.values()))
        for name, value in (("width", first.width), ("depth", first.depth), ("prefix", first.prefix), ("patch", self.side // max(first.rows, 1))):
            object.__setattr__(self, name, value)

    def resolve(self) -> tuple[dict[str, Any], Data]:
        """The architecture as a mapping that `construct` needs nothing else for, and the model's data config. Raises ConfigurationError, CheckpointError."""
        raise NotImplementedError

    def construct(self) -> nn.Module:
        """The library's module by the library's own constructor, which draws first values."""
        raise NotImplementedError

    def build(self) -> "BackboneEncoder":
        raise NotImplementedError

    @property
    def side(self) -> int:
        """Pixels of the square that the model reads."""
        assert self.size is not None
        return self.size

    @property
    def shapes(self) -> Mapping[str, StreamShape]:
        return self._shapes  # type: ignore[attr-defined]

    @property
    def key(self) -> str:
        """What decides the shapes."""
        return json.dumps([self.use, self.config, self.size], sort_keys=True, default=str)

    @property
    def streams(self) -> tuple[str, ...]:
        return tuple(self.shapes)

    @property
    def levels(self) -> Mapping[str, int]:
        return {name: shape.depth for name, shape in self.shapes.items()}

    @property
    def widths(self) -> Mapping[str, int]:
        return {name: shape.width for name, shape in self.shapes.items()}

    def layout(self, width: int, height: int, mode: Mode) -> Layouts:
        return {name: shape.layout for name, shape in self.shapes.items()}

    def preprocess(self, image: Image.Image, mode: Mode) -> Mapping[str, Tensor]:
        assert self.mean is not None and self.std is not None and self.crop is not None and self.interpolation is not None and self.fit is not None and self.fill is not None
        return {"pixels": self.normalise(squared(image, Data(self.side, self.mean, self.std, self.interpolation, self.fit, self.crop, self.fill)))}


class BackboneEncoder(Encoder):
    """Runs a foreign backbone. BatchNorm always uses its stored statistics, trained or not: a picture's features do not depend on its neighbours, nor on the number of ranks."""

    reader: Reader

    def __init__(self, spec: BackboneSpec):
        super().__init__()
        self.spec = spec
        with unpartitioned() as partition:
            self.tower = spec.construct()
        self.reader = self.read_by()
        self.reader.trunk.forward = self._read
        self._hollow = any(value.is_meta for module in self.tower.modules() for _, value in _computed(module))
        partition(self.tower)

    def read_by(self) -> Reader:
        """The reader of `self.tower`."""
        raise NotImplementedError

    # ---- forward -------------------------------------------------------------------------------------------------------

    def forward(self, images: Sequence[ImageInput], levels: Mapping[str, Sequence[Level]]) -> Features:
        pixels = torch.stack([image.views["pixels"] for image in images])
        if self._hollow and not pixels.is_meta:
            self._fill()
        found = self.reader.trunk(pixels, {name: tuple(wanted) for name, wanted in levels.items() if wanted})
        streams = {}
        for name, tensors in found.items():
            shape = self.spec.shapes[name]
            count = len(images)
            packed = {level: tokens.reshape(-1, shape.width) for level, tokens in tensors.items()}
            streams[name] = Stream(packed, (shape.prefix + shape.patches,) * count, ((shape.rows, shape.columns),) * count, shape.prefix)
        return Features(streams)

    def _read(self, pixels: Tensor, levels: Mapping[str, Sequence[Level]]) -> dict[str, dict[Level, Tensor]]:
        """Tokens (n, T, D) by stream and level. Stands in the place of the trunk's own forward."""
        if "image" not in self.spec.shapes:
            return self._read_stages(pixels, levels)
        hidden, final = self._walk(pixels)
        found: dict[str, dict[Level, Tensor]] = {}
        for name, wanted in levels.items():
            pooled = self.reader.pool(hidden[-1]) if name == "pooled" else None
            found[name] = {level: pooled if pooled is not None else final if level == "final" else hidden[int(level)] for level in wanted}
        return found

    def _walk(self, pixels: Tensor) -> tuple[list[Tensor], Tensor]:
        """What goes into each block and comes out of the last one, and the final tokens."""
        hidden: list[Any] = []
        blocks, caller = self.reader.blocks(), get_ident()

        def keep(tokens: Any) -> None:
            if get_ident() == caller:  # a server may answer in another thread at the same time
                hidden.append(tokens)

        hooks = [block.register_forward_pre_hook(lambda _, args: keep(args[0])) for block in blocks]
        hooks.append(blocks[-1].register_forward_hook(lambda _, args, out: keep(out)))
        try:
            final = self.reader.final(pixels)
        finally:
            for hook in hooks:
                hook.remove()
        return hidden, final

    def _read_stages(self, pixels: Tensor, levels: Mapping[str, Sequence[Level]]) -> dict[str, dict[Level, Tensor]]:
        numbers = [int(name.removeprefix("stage")) - 1 for name in levels if name != "features"]
        final, maps = self.reader.stages(pixels, sorted(numbers), "features" in levels)
        tokens = {f"stage{number + 1}": _tokens(found) for number, found in zip(sorted(numbers), maps, strict=True)}
        if final is not None:
            tokens["features"] = _tokens(final, self.reader.channels_last())
        return {name: dict.fromkeys(wanted, tokens[name]) for name, wanted in levels.items()}

    def survey(self) -> dict[str, StreamShape]:
        """The streams for one picture of the spec's size, found by running the structure on the meta device. Raises ConfigurationError."""
        pixels = torch.empty(2, 3, self.spec.side, self.spec.side, device="meta")
        if self.reader.blocks():
            hidden, final = self._walk(pixels)
            shapes = {tuple(tokens.shape) if isinstance(tokens, Tensor) else None for tokens in (*hidden, final)}
            if isinstance(final, Tensor) and len(hidden) == len(self.reader.blocks()) + 1 and len(shapes) == 1 and final.ndim == 3 and len(final) == 2:
                rows, columns = self.reader.grid(pixels)
                found = {"image": StreamShape(final.shape[-1], len(hidden) - 1, final.shape[1] - rows * columns, rows * columns, rows, columns)}
                if (pooled := self.reader.pool(hidden[-1])) is not None:
                    prefix = self.reader.pooled_prefix()
                    found["pooled"] = StreamShape(pooled.shape[-1], 1, prefix, pooled.shape[1] - prefix)
                return found
        final, maps = self.reader.stages(pixels, None, True)
        found = {f"stage{number}": StreamShape(one.shape[1], 1, 0, one.shape[2] * one.shape[3], *one.shape[2:]) for number, one in enumerate(maps, 1)}
        last = list(found.values())[-1]
        if isinstance(final, Tensor) and final.ndim == 4:
            rows, columns, width = final.shape[1:] if self.reader.channels_last() else (*final.shape[2:], final.shape[1])
            return {"features": StreamShape(width, 1, 0, rows * columns, rows, columns), **found}
        if isinstance(final, Tensor) and final.ndim == 3 and final.shape[1] >= last.patches:
            return {"features": StreamShape(final.shape[-1], 1, final.shape[1] - last.patches, last.patches, last.rows, last.columns), **found}
        return dict(reversed(found.items()))  # no one final map: the last stage stands first

    # ---- parameters ----------------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> "BackboneEncoder":
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train(False)
        return self

    def block(self, index: int) -> BlockWeights | None:
        return self.reader.block(index) if "image" in self.spec.shapes else None

    def unused(self, levels: Mapping[str, Sequence[Level]]) -> list[nn.Parameter]:
        """Found by the gradients of the bare structure on the meta device, for any architecture. What an adaptation added shares the fate of the module that it stands in."""
        idle, modules = _idle(self.spec, {name: tuple(wanted) for name, wanted in levels.items()})
        found = []
        for name, parameter in self.named_parameters():
            place = name
            while place not in idle and place not in modules:
                place = place.rpartition(".")[0]
            if place in idle or modules.get(place, False):
                found.append(parameter)
        return found

    @torch.no_grad()
    def initialise(self) -> None:
        """The library's own first values: those of a freshly constructed tower."""
        with unpartitioned(), torch.device("cpu"):
            fresh = self.spec.construct()
        own = self.tower.state_dict(keep_vars=True)
        for name, value in fresh.state_dict().items():
            if own[name].numel() or not value.numel():  # under ZeRO 3 only the gathering rank holds it whole
                own[name].copy_(value)

    def _fill(self) -> None:
        """Give tensors that no file holds (index tables, rotary angles) their values, where the structure was made on the meta device."""
        with unpartitioned(), torch.device("cpu"), torch.random.fork_rng(devices=[]):
            fresh = self.spec.construct()
        for path, module in fresh.named_modules():
            own = self.tower.get_submodule(path)
            for name, value in _computed(module):
                held = getattr(own, name)
                setattr(own, name, value.to(self._device, held.dtype))
        self._hollow = False

    @cached_property
    def _keys(self) -> set[str]:
        return set(self.tower.state_dict())

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device


# ---- without weights -----------------------------------------------------------------------------------------------------


_SURVEYED: dict[str, dict[str, StreamShape]] = {}
_IDLE: dict[str, tuple[set[str], dict[str, bool]]] = {}


def _survey(spec: BackboneSpec) -> dict[str, StreamShape]:
    if spec.key not in _SURVEYED:
        try:
            with hollow(), torch.no_grad():
                _SURVEYED[spec.key] = spec.build().eval().survey()
        except (TypeError, ValueError, AssertionError, RuntimeError, AttributeError, KeyError) as problem:  # what foreign constructors raise for numbers they do not accept
            raise ConfigurationError(f"{spec.package} does not accept the encoder's numbers: {problem}", cure="mend encoder.name, encoder.size or encoder.config") from problem
    return _SURVEYED[spec.key]


def _idle(spec: BackboneSpec, levels: dict[str, tuple[Level, ...]]) -> tuple[set[str], dict[str, bool]]:
    """Names of parameters that no gradient of `levels` reaches; and of every module: whether it has parameters and all of them are such."""
    key = json.dumps([spec.key, sorted((name, sorted(map(str, wanted))) for name, wanted in levels.items())])
    if key not in _IDLE:
        with hollow(), torch.enable_grad():
            ghost = spec.build().eval()
            picture = ImageInput({"pixels": torch.empty(3, spec.side, spec.side)}, spec.side, spec.side, TokenLayout(()))
            read = [tokens.sum() for stream in ghost([picture], levels).streams.values() for tokens in stream.levels.values()]
            trained = {name: parameter for name, parameter in ghost.named_parameters() if parameter.requires_grad}
            gradients = torch.autograd.grad(torch.stack(read).sum(), list(trained.values()), allow_unused=True)
        reached = {name for name, gradient in zip(trained, gradients, strict=True) if gradient is not None}
        names = [name for name, _ in ghost.named_parameters()]
        inside = {path: [name for name in names if name.startswith(f"{path}.") or not path] for path, _ in ghost.named_modules()}
        _IDLE[key] = set(names) - reached, {path: bool(own) and not reached.intersection(own) for path, own in inside.items()}
    return _IDLE[key]


def _computed(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors of one module that it computes by itself and no file holds."""
    for name, value in module._buffers.items():
        if name in module._non_persistent_buffers_set and value is not None:
            yield name, value
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield name, value


def _tokens(found: Tensor, channels_last: bool = False) -> Tensor:
    """A map, or tokens already, -> (n, T, D)."""
    if found.ndim == 3:
        return found
    return found.flatten(1, 2) if channels_last else found.flatten(2).transpose(1, 2)


# ---- libraries -----------------------------------------------------------------------------------------------------------


def library(package: str, use: str) -> Any:
    """The package; raises EnvironmentProblem that says how to get it."""
    try:
        return import_module(package)
    except ModuleNotFoundError as problem:
        if problem.name not in (package, "timm", "torchvision"):
            raise
        raise EnvironmentProblem(f"encoder {use} needs the package {problem.name}, which is not installed", cure="pip install 'vlm[openclip]'") from problem


def whole_depth(model: nn.Module) -> nn.Module:
    """The model without stochastic depth, which some of timm's have by default: two ranks would draw otherwise than one."""
    from timm.layers.drop import DropPath

    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    return model
