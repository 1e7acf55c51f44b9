"""Learning-rate factor over the steps of a stage."""

import math

from vlm.train.config import ScheduleSpec

__all__ = ["factor", "warmup_steps"]


def warmup_steps(spec: ScheduleSpec, steps: int) -> int:
    """Steps of linear warm-up: a share below 1 is taken of the stage and rounded up, as in the released recipes."""
    return math.ceil(spec.warmup * steps) if spec.warmup < 1 else int(spec.warmup)


def factor(spec: ScheduleSpec, step: int, steps: int) -> float:
    """Share of the peak rate at `step` of 0..steps-1. The first step of a warm-up has rate 0, as in transformers' schedules, which the published systems used."""
    warm = warmup_steps(spec, steps)
    if step < warm:
        return step / warm
    if spec.kind == "constant":
        return 1.0
    done = (step - warm) / max(1, steps - warm)
    shape = 0.5 * (1 + math.cos(math.pi * done)) if spec.kind == "cosine" else 1 - done
    return spec.min + (1 - spec.min) * shape
