"""Learning-rate factors against the schedules of transformers and torch."""

import math

import pytest
import torch
import transformers
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR, StepLR

import vlm
from vlm.errors import ConfigurationError
from vlm.train.config import ScheduleSpec
from vlm.train.schedule import factor, warmup_steps

STEPS = [(1, 0), (7, 0), (7, 3), (100, 10), (100, 100), (37, 36), (5198, 156)]


def reference(schedule: LRScheduler, steps: int) -> list[float]:
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


@pytest.mark.parametrize("steps, warm", STEPS)
@pytest.mark.parametrize("gamma", [None, 0.316])
def test_steps_against_torch(steps: int, warm: int, gamma: float | None) -> None:
    """Behind a warm-up both are multiplied."""
    rise = reference(transformers.get_constant_schedule_with_warmup(sgd(), warm), steps)
    theirs = 0.1 if gamma is None else gamma
    for every in (1, 3, 40):
        expected = [a * b for a, b in zip(rise, reference(StepLR(sgd(), every, theirs), steps), strict=True)]
        assert ours(steps, kind="step", every=every, gamma=gamma, warmup=warm) == pytest.approx(expected, rel=1e-9)
    for milestones in ([2], [1, 5, 30], [50, 4000, 5000, 9999]):
        expected = [a * b for a, b in zip(rise, reference(MultiStepLR(sgd(), milestones, theirs), steps), strict=True)]
        assert ours(steps, kind="multi_step", milestones=tuple(milestones), gamma=gamma, warmup=warm) == pytest.approx(expected, rel=1e-9)


def test_shares_are_of_the_stage() -> None:
    for share, steps, place in ((0.7, 10, 7), (0.8, 15, 12), (0.9, 96_000, 86_400), (0.55, 100, 55), (0.5, 7, 4)):
        spec = ScheduleSpec(kind="multi_step", milestones=(share,), warmup=0)
        assert (factor(spec, place - 1, steps), factor(spec, place, steps)) == (1.0, 0.1)
        spec = ScheduleSpec(kind="step", every=share, warmup=0)
        assert (factor(spec, place - 1, steps), factor(spec, place, steps)) == (1.0, 0.1)


def test_the_multi_step_stage_of_deepseek_vl() -> None:
    """Second stage of the 1.3B model: 96,000 steps, 2,000 of warm-up, x 0.316 at 80 % and x 0.1 at 90 %."""
    override = "stages.instruct.schedule={kind: multi_step, warmup: 2000, milestones: [0.8, 0.9], gamma: 0.316}"
    spec = vlm.compose("llava_tiny", override).stages["instruct"].schedule
    shares = [factor(spec, step, 96_000) for step in (1000, 2000, 76_799, 76_800, 86_399, 86_400, 95_999)]
    assert shares == pytest.approx([0.5, 1, 1, 0.316, 0.316, 0.1, 0.1], rel=2e-3)


@pytest.mark.parametrize(
    "keys, said",
    [
        ("milestones: [0.8]", "`milestones` is for multi_step, not for cosine"),
        ("kind: step, every: 10, min: 0.1", "`min` is for cosine and linear, not for step"),
        ("kind: constant, gamma: 0.5", "`gamma` is for step and multi_step, not for constant"),
        ("kind: step", "`step` needs `every`"),
        ("kind: multi_step, every: 5", "`every` is for step, not for multi_step; `multi_step` needs `milestones`"),
        ("kind: multi_step, milestones: [0.9, 0.8]", "`milestones` rise"),
        ("kind: multi_step, milestones: [0.5, 100]", "all shares or all numbers"),
        ("kind: multi_step, milestones: [10, 20.5]", "a whole number of steps, not 20.5"),
        ("kind: step, every: 0", "`every` takes a share between 0 and 1 or a whole number of steps, not 0"),
        ("warmup: -1, min: 2", "`min` is a share from 0 to 1; `warmup` takes a share between 0 and 1 or a whole number of steps, not -1"),
    ],
)
def test_what_does_not_fit_together_is_said_at_once(keys: str, said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        vlm.compose("llava_tiny", f"stages.align.schedule={{{keys}}}", "stages.instruct.schedule={kind: step}")
    assert said in str(caught.value)
    assert "stages.align.schedule" in str(caught.value) and "stages.instruct.schedule" in str(caught.value)


def test_a_schedule_survives_the_file_of_its_run() -> None:
    from vlm.composition import from_plain, to_plain

    spec = ScheduleSpec(kind="multi_step", milestones=(0.8, 0.9), warmup=0.1)
    assert from_plain(ScheduleSpec, to_plain(spec)) == spec
