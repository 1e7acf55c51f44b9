"""Schema of a run. Keys and defaults of DESIGN section 4; composition fills it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from vlm.config import ModelSpec
from vlm.prompt import PromptSpec

__all__ = ["OptimizerSpec", "PolicySpec", "RunSpec", "SaveSpec", "ScheduleSpec", "StageSpec"]


@dataclass(frozen=True, kw_only=True)
class ScheduleSpec:
    """Learning rate over a stage. warmup: share of the stage's steps (below 1) or a number of steps. min: share of the peak at the end (cosine, linear)."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.03
    min: float = 0.0


@dataclass(frozen=True, kw_only=True)
class OptimizerSpec:
    """AdamW. weight_decay: matrices only. clip: largest global gradient norm, 0 for none."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0


@dataclass(frozen=True, kw_only=True)
class PolicySpec:
    """What happens to a picture before the encoder's own preprocessing: native, crop, pad, squash (images.py)."""

    use: Literal["native", "crop", "pad", "squash"] = "native"
    official: bool = False


@dataclass(frozen=True, kw_only=True)
class SaveSpec:
    """every: steps between two `resume/` checkpoints, 0 for stage ends only. keep: how many stay."""

    every: int = 500
    keep: int = 2


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """One training stage.

    train: tree of parameter-group paths to rates; what nobody names is frozen. data: a source's name, or names with weights. batch: samples per step over all ranks.
    micro_batch: rows per forward and rank; accumulation follows. too_long: what happens to a row above max_length: cut at the end (never inside a picture, counted), or an error.
    epochs or steps: one of them (default: one epoch).
    """

    train: Mapping[str, Any]
    data: str | Mapping[str, float]
    prompt: PromptSpec = field(metadata={"bare": "use"})
    images: PolicySpec = field(default_factory=PolicySpec, metadata={"bare": "use"})
    batch: int = 32
    micro_batch: int = 8
    max_length: int = 2048
    too_long: Literal["cut", "error"] = "cut"
    epochs: float | None = None
    steps: int | None = None
    schedule: ScheduleSpec = field(default_factory=ScheduleSpec)
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    checkpointing: bool = False
    deepspeed: Mapping[str, Any] = field(default_factory=lambda: {"zero_optimization": {"stage": 0}}, metadata={"group": "deepspeed"})


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """A run: model x data x stages. eval: name -> data source scored by `vlm eval`."""

    name: str
    model: ModelSpec
    data: Mapping[str, Any] = field(metadata={"group": "data", "registry": "vlm.data", "key": "reader"})
    stages: Mapping[str, StageSpec]
    eval: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    data_root: str | None = None
    runs: str = "runs"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    workers: int = 2
    save: SaveSpec = field(default_factory=SaveSpec)
    log_every: int = 10
