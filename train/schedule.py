"""Learning-rate factor over the steps of a stage."""

import math
from fractions import Fraction

from vlm.train.config import ScheduleSpec

__all__ = ["factor", "warmup_steps"]

GAMMA = 0.1
"""torch's default of StepLR and MultiStepLR."""


def warmup_steps(spec: ScheduleSpec, steps: int) -> int:
    """Steps of linear warm-up: a share below 1 is taken of the stage and rounded up, as in the released recipes."""
    return math.ceil(spec.warmup * steps) if spec.warmup < 1 else int(spec.warmup)


def factor(spec: ScheduleSpec, step: int, steps: int) -> float:
    """Share of the peak rate at `step` of 0..steps-1.

    The first step of a warm-up has rate 0, as in transformers' schedules, which the published systems used. step and multi_step are torch's StepLR and MultiStepLR, counted from the
    stage's first step; a drop within the warm-up lowers what it rises to.
    """
    warm = warmup_steps(spec, steps)
    rise = step / warm if step < warm else 1.0
    if spec.kind in ("step", "multi_step"):
        return rise * (GAMMA if spec.gamma is None else spec.gamma) ** _drops(spec, step, steps)
    if step < warm or spec.kind == "constant":
        return rise
    done = (step - warm) / max(1, steps - warm)
    shape = 0.5 * (1 + math.cos(math.pi * done)) if spec.kind == "cosine" else 1 - done
    return spec.min + (1 - spec.min) * shape


def _drops(spec: ScheduleSpec, step: int, steps: int) -> int:
    """How often the rate has been lowered before `step` is taken."""
    if spec.every is not None:
        return step // _position(spec.every, steps)
    return sum(step >= _position(milestone, steps) for milestone in spec.milestones)


def _position(place: float, steps: int) -> int:
    """A share of the stage or a number of steps as a number of steps."""
    # str: 0.55 of 100 steps is meant as 55, not as the double above it.
    return math.ceil(Fraction(str(place)) * steps) if place < 1 else int(place)
