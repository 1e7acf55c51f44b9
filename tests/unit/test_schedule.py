"""Learning-rate factors against transformers' own schedules."""

import math

import pytest
import torch
import transformers
from torch.optim.lr_scheduler import LambdaLR

from vlm.train.config import ScheduleSpec
from vlm.train.schedule import factor, warmup_steps

STEPS = [(1, 0), (7, 0), (7, 3), (100, 10), (100, 100), (37, 36), (5198, 156)]


def reference(schedule: LambdaLR, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    return found


def ours(steps: int, **numbers: object) -> list[float]:
    return [factor(ScheduleSpec(**numbers), step, steps) for step in range(steps)]  # type: ignore[arg-type]


def sgd() -> torch.optim.SGD:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


@pytest.mark.parametrize("steps, warm", STEPS)
def test_against_transformers(steps: int, warm: int) -> None:
    for kind, theirs in (
        ("cosine", transformers.get_cosine_schedule_with_warmup(sgd(), warm, steps)),
        ("linear", transformers.get_linear_schedule_with_warmup(sgd(), warm, steps)),
        ("constant", transformers.get_constant_schedule_with_warmup(sgd(), warm)),
    ):
        numbers = {"kind": kind, "warmup": 0 if not warm else float(warm)}
        assert ours(steps, **numbers) == pytest.approx(reference(theirs, steps), rel=0, abs=1e-12), kind


@pytest.mark.parametrize("steps, warm", STEPS)
def test_min_is_where_it_ends(steps: int, warm: int) -> None:
    theirs = transformers.get_cosine_with_min_lr_schedule_with_warmup(sgd(), warm, steps, min_lr_rate=0.1)
    assert ours(steps, kind="cosine", warmup=float(warm), min=0.1) == pytest.approx(reference(theirs, steps), rel=0, abs=1e-12)
    lowered, plain = ours(steps, kind="linear", warmup=float(warm), min=0.25), ours(steps, kind="linear", warmup=float(warm))
    assert lowered[:warm] == plain[:warm]
    assert lowered[warm:] == pytest.approx([0.25 + 0.75 * value for value in plain[warm:]], rel=0, abs=1e-12)
    for kind in ("cosine", "linear"):
        assert factor(ScheduleSpec(kind=kind, warmup=0, min=0.25), steps, steps) == pytest.approx(0.25, abs=1e-12)


@pytest.mark.parametrize("share, steps", [(0.03, 2181), (0.03, 5198), (0.5, 7), (0.0, 9), (0.07, 100), (0.999, 3)])
def test_a_share_of_the_stage_is_rounded_up_as_transformers_does(share: float, steps: int) -> None:
    assert warmup_steps(ScheduleSpec(warmup=share), steps) == math.ceil(steps * share)


@pytest.mark.parametrize("number", [1, 1.0, 12, 500])
def test_a_number_from_one_on_is_steps(number: float) -> None:
    assert warmup_steps(ScheduleSpec(warmup=number), 40) == number
