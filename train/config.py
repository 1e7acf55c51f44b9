"""Schema of a run. Keys and defaults of DESIGN section 4; composition fills it."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from vlm.config import ModelSpec
from vlm.errors import ConfigurationError
from vlm.prompt import PromptSpec
from vlm.tiles import Tiling

__all__ = ["OptimizerSpec", "PolicySpec", "RunSpec", "SaveSpec", "ScheduleSpec", "StageSpec", "ValidateSpec"]


@dataclass(frozen=True, kw_only=True)
class ScheduleSpec:
    """Learning rate over a stage; what counts steps takes a share of the stage's steps (below 1) or a number of them, both from the stage's first step.

    warmup: steps of the linear rise. min: share of the peak at the end (cosine, linear). step: the rate is multiplied by gamma (0.1) after every `every` steps; multi_step: at each of
    the milestones. Raises ConfigurationError with everything that does not fit together.
    """

    kind: Literal["cosine", "linear", "constant", "step", "multi_step"] = "cosine"
    warmup: float = 0.03
    min: float = 0.0
    every: float | None = None
    milestones: tuple[float, ...] = ()
    gamma: float | None = None

    def __post_init__(self) -> None:
        if wrong := list(_schedule_problems(self)):
            raise ConfigurationError("; ".join(wrong), got=", ".join(f"{key} {value}" for key, value in asdict(self).items() if value not in (None, ())))


def _schedule_problems(spec: ScheduleSpec) -> Iterator[str]:
    """What is wrong with a schedule, one phrase each."""
    kinds = {"min": ("cosine", "linear"), "every": ("step",), "milestones": ("multi_step",), "gamma": ("step", "multi_step")}
    for key, value in (("min", spec.min), ("every", spec.every), ("milestones", spec.milestones), ("gamma", spec.gamma)):
        if value and spec.kind not in kinds[key]:
            yield f"`{key}` is for {' and '.join(kinds[key])}, not for {spec.kind}"
    if not 0 <= spec.min <= 1:
        yield "`min` is a share from 0 to 1"
    if spec.gamma is not None and not 0 < spec.gamma < math.inf:
        yield "`gamma` is a factor above 0"
    if spec.kind == "step" and spec.every is None:
        yield "`step` needs `every`, such as every: 0.25"
    if spec.kind == "multi_step" and not spec.milestones:
        yield "`multi_step` needs `milestones`, such as milestones: [0.8, 0.9]"
    places = [("warmup", spec.warmup or None), ("every", spec.every), *(("milestones", value) for value in spec.milestones)]
    for key, value in places:
        if value is not None and not (0 < value < 1 or (value >= 1 and value % 1 == 0)):
            yield f"`{key}` takes a share between 0 and 1 or a whole number of steps, not {value:g}"
    if len({value < 1 for value in spec.milestones}) == 2:
        yield "`milestones` are all shares or all numbers of steps"
    elif any(later <= earlier for earlier, later in pairwise(spec.milestones)):
        yield "`milestones` rise from one to the next"


@dataclass(frozen=True, kw_only=True)
class OptimizerSpec:
    """AdamW. weight_decay: matrices only. clip: largest global gradient norm, 0 for none."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0


@dataclass(frozen=True, kw_only=True)
class PolicySpec(Tiling):
    """What happens to a picture before the encoder's own preprocessing: native, crop, pad, squash (images.py), or anyres, which has the settings of a Tiling (tiles.py)."""

    use: Literal["native", "crop", "pad", "squash", "anyres"] = "native"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use != "anyres" and (changed := [field.name for field in fields(Tiling) if field.name != "official" and getattr(self, field.name) != field.default]):
            raise ConfigurationError(f"{' and '.join(changed)} set how anyres cuts a picture", got=f"use: {self.use}", cure="set use: anyres, or leave them out")

    @property
    def tiling(self) -> Tiling | None:
        """How pictures are cut; None where they stay whole."""
        return Tiling(**{field.name: getattr(self, field.name) for field in fields(Tiling)}) if self.use == "anyres" else None


@dataclass(frozen=True, kw_only=True)
class SaveSpec:
    """every: steps between two `resume/` checkpoints, 0 for stage ends only. keep: how many stay."""

    every: int = 500
    keep: int = 2


@dataclass(frozen=True, kw_only=True)
class ValidateSpec:
    """The loss on samples that are not trained on. every: steps between two looks, and one at a stage's end; 0 for none. samples: of each source, at most. data: name -> data source, by default the run's `eval`. keep_best: the model with a stage's smallest loss stays in `best/STAGE`."""

    every: int = 0
    samples: int = 256
    data: Mapping[str, str] = field(default_factory=dict)
    keep_best: bool = False


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """One training stage.

    train: tree of parameter-group paths to rates; what nobody names is frozen. data: a source's name, or names with weights. batch: samples per step over all ranks.
    micro_batch: rows per forward and rank; accumulation follows. auto: as many as fit into memory, tried out with the longest rows before the first step.
    pack: tokens per row; the step's samples are packed into as few rows as hold them. Default: a row per sample. too_long: what happens to a row above max_length: cut at the end (never inside a picture, counted), or an error.
    epochs or steps: one of them (default: one epoch).
    """

    train: Mapping[str, Any]
    data: str | Mapping[str, float]
    prompt: PromptSpec = field(metadata={"bare": "use"})
    images: PolicySpec = field(default_factory=PolicySpec, metadata={"bare": "use"})
    batch: int = 32
    micro_batch: int | Literal["auto"] = 8
    pack: int | None = None
    max_length: int = 2048
    too_long: Literal["cut", "error"] = "cut"
    epochs: float | None = None
    steps: int | None = None
    schedule: ScheduleSpec = field(default_factory=ScheduleSpec)
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    checkpointing: bool = False
    deepspeed: Mapping[str, Any] = field(default_factory=lambda: {"zero_optimization": {"stage": 0}}, metadata={"group": "deepspeed"})

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the data sources."""
        return (self.data,) if isinstance(self.data, str) else tuple(self.data)

    @property
    def zero(self) -> int:
        """The ZeRO stage that `deepspeed` says, 0 where it says nothing of it. Raises ConfigurationError for anything but 0 to 3."""
        zero = self.deepspeed.get("zero_optimization", {"stage": 0})
        level = zero.get("stage") if isinstance(zero, Mapping) else None
        if level not in (0, 1, 2, 3):
            raise ConfigurationError("no ZeRO stage is given", got=f"zero_optimization {zero!r}", expected="stage 0, 1, 2 or 3", cure="name a file of configs/deepspeed")
        return int(level)


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """A run: model x data x stages. start: folder of a finished model from which the first stage goes on (default: from the weights that `model` names). eval: name -> data source scored by `vlm eval`. bad_budget: share of a stage's samples that may be bad where a source says `on_bad: skip`.

    Raises ConfigurationError for a name, of the run or of a stage, that would lead out of the run's folder.
    """

    name: str
    model: ModelSpec
    start: str | None = None
    data: Mapping[str, Any] = field(metadata={"group": "data", "registry": "vlm.data", "key": "reader"})
    stages: Mapping[str, StageSpec]
    eval: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    data_root: str | None = None
    runs: str = "runs"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    workers: int = 2
    bad_budget: float = 0.01
    save: SaveSpec = field(default_factory=SaveSpec)
    validate: ValidateSpec = field(default_factory=ValidateSpec)
    log_every: int = 10

    def __post_init__(self) -> None:
        for what, name in (("name", self.name), *(("stage", stage) for stage in self.stages)):
            if not name or name == ".." or Path(name).name != name:
                cure = "set runs=FOLDER to where run folders go" if what == "name" else "rename the stage"
                raise ConfigurationError(f"the {what} {name!r} is not the name of a folder", expected="a name without slashes", cure=cure)

    @property
    def folder(self) -> Path:
        """Where the run lies."""
        return Path(self.runs) / self.name

    @property
    def validated(self) -> Mapping[str, str]:
        """Name -> data source on which the loss is looked at while training; empty where it is not."""
        return (self.validate.data or self.eval) if self.validate.every else {}
