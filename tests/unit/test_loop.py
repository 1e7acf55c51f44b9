"""The loop over steps: what a step divides by, and what stops it."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from vlm.errors import DataError
from vlm.llm.head import adapt_head
from vlm.model import VLM, VLMOutput
from vlm.prompt import PromptSpec
from vlm.train.config import ScheduleSpec, StageSpec
from vlm.train.engine import Engine, connect, deepspeed_config
from vlm.train.loop import one_step
from vlm.train.steps import MicroBatch, Step

IGNORE = -100
STAGE = StageSpec(train={}, data="fixed", prompt=PromptSpec(use="plain"), schedule=ScheduleSpec(kind="constant", warmup=0))


class HeadOnly(nn.Module):
    """Stands for a model: its hidden states are given, its head and its loss are VLM's."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.head.weight.data.copy_(weight)
        adapt_head(self.head, SimpleNamespace(vocab_size=len(weight)))

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, hidden: Tensor, labels: Tensor) -> VLMOutput:
        result = VLMOutput(context=SimpleNamespace(losses={}, document=torch.arange(len(labels))[:, None].expand_as(labels)))  # type: ignore[arg-type]
        VLM._add_loss(self, result, hidden, labels, len(labels))  # type: ignore[arg-type]
        return result


def engine_of(model: nn.Module, rate: float = 0.5, stage: StageSpec = STAGE) -> Engine:
    *_, device = connect()
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "lr": rate, "peak": rate, "path": "head"}])
    return Engine(model, optimizer, deepspeed_config(stage, torch.float32) | {"gradient_clipping": 0.0}, device)


def micro_batch(hidden: Tensor, labels: Tensor) -> MicroBatch:
    """hidden (B, S, D), labels (B, S)."""
    supervised = int((labels[:, 1:] != IGNORE).sum())
    names = [str(index) for index in range(len(labels))] if supervised else []
    return MicroBatch(
        {"hidden": hidden, "labels": labels}, supervised, {"token": labels.numel(), "vision_token": 0, "document": len(names)}, names, ["fixed"] * len(names), ["text"] * len(names)
    )


def classified(x: Tensor, y: Tensor) -> MicroBatch:
    """One row per example (n, D) with target (n,): its state predicts the second token."""
    return micro_batch(torch.stack([x, x], 1), torch.stack([torch.full_like(y, IGNORE), y], 1))


def steps_of(engine: Engine, groups: Sequence[list[MicroBatch]]) -> list[dict[str, Any]]:
    return [one_step(engine, Step(number, group), STAGE, len(groups), ("fixed",)) for number, group in enumerate(groups)]


# ---- what a step divides by: train_accumulation_tail -----------------------------------------------------------------------


def tail_case(w: Tensor, x: Tensor, y: Tensor, counts: list[int]) -> tuple[list[dict[str, Any]], Tensor]:
    """Five micro-batches, accumulation two: the third step's second micro-batch is empty, as StepData gives it."""
    micros = [classified(a, b) for a, b in zip(x.split(counts), y.split(counts), strict=True)]
    micros.append(classified(torch.zeros(1, x.shape[1]), torch.full((1,), IGNORE)))
    model = HeadOnly(w)
    records = steps_of(engine_of(model), [micros[0:2], micros[2:4], micros[4:6]])
    return records, model.head.weight.detach()


def test_an_incomplete_accumulation_group_divides_by_what_it_holds() -> None:
    w, x, y, counts = torch.randn(6, 3), torch.randn(17, 3), torch.randint(6, (17,)), [3, 1, 6, 2, 5]
    records, got = tail_case(w, x, y, counts)
    reference = w.double().requires_grad_(True)
    for record, start, end in zip(records, (0, 4, 12), (4, 12, 17), strict=True):
        loss = F.cross_entropy(x[start:end].double() @ reference.T, y[start:end])  # the mean over the group's own targets
        (gradient,) = torch.autograd.grad(loss, reference)
        assert record["loss"] == pytest.approx(loss.item(), abs=1e-6) and record["supervised"] == end - start
        reference = (reference - 0.5 * gradient).detach().requires_grad_(True)
    assert torch.allclose(got.double(), reference, atol=1e-6)


def test_field_accumulation_tail(field_folder: Path) -> None:
    folder = field_folder / "train_accumulation_tail"
    given, expected = load_file(folder / "linear.safetensors"), json.loads((folder / "expected.json").read_text())
    records, got = tail_case(given["w0"], given["x"], given["y"], given["counts"].tolist())
    assert len(records) == expected["steps"]
    assert [record["loss"] for record in records] == pytest.approx(expected["losses"], abs=expected["tolerance"])
    assert torch.allclose(got, torch.tensor(expected["final_w"]), rtol=0, atol=expected["tolerance"])


# ---- nothing to learn from: train_zero_supervised --------------------------------------------------------------------------


def halves(logits: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """Rows 0-1 and 2-3 as two micro-batches of a step; logits (4, S, V) through an identity head. Returns the loss and the head's gradient."""
    model = HeadOnly(torch.eye(logits.shape[-1]))
    engine = engine_of(model, rate=1.0)
    record = steps_of(engine, [[micro_batch(logits[:2], labels[:2]), micro_batch(logits[2:], labels[2:])]])[0]
    return record["loss"], torch.eye(logits.shape[-1]) - model.head.weight.detach()


def check_halves(logits: Tensor, labels: Tensor) -> float:
    loss, gradient = halves(logits, labels)
    weight = torch.eye(logits.shape[-1], requires_grad=True)
    whole = F.cross_entropy((logits[:, :-1] @ weight.T).flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)
    whole.backward()
    assert weight.grad is not None and torch.isfinite(gradient).all()
    assert loss == pytest.approx(whole.item(), abs=1e-6) and torch.allclose(gradient, weight.grad, atol=1e-6)
    return loss


@pytest.mark.parametrize("empty", [(0, 1), (2, 3), (1, 2)])
def test_an_empty_half_contributes_nothing(empty: tuple[int, int]) -> None:
    labels = torch.randint(9, (4, 5))
    labels[:, :3] = IGNORE
    labels[list(empty)] = IGNORE
    check_halves(torch.randn(4, 5, 9), labels)


def test_field_zero_supervised(field_folder: Path) -> None:
    folder = field_folder / "train_zero_supervised"
    given, expected = load_file(folder / "micro_batches.safetensors"), json.loads((folder / "expected.json").read_text())["tensors"]
    assert check_halves(given["logits"], given["labels"]) == pytest.approx(expected["loss_global_mean"], abs=expected["tolerance"])


def test_a_step_without_any_target_stops() -> None:
    nothing = torch.full((2, 4), IGNORE)
    engine = engine_of(HeadOnly(torch.eye(3)))
    with pytest.raises(DataError, match=r"step 1 has no supervised token on any rank.*max_length"):
        steps_of(engine, [[micro_batch(torch.randn(2, 4, 3), nothing)]])


# ---- ranks that differ -----------------------------------------------------------------------------------------------------


def test_ranks_with_other_plans_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(HeadOnly(torch.eye(3)))
    monkeypatch.setattr(engine, "ranks", 2)
    monkeypatch.setattr(engine, "sum", lambda values: values | {"plan": values["plan"] + 8, "plan_squared": values["plan_squared"] + 64})
    step = Step(0, [classified(torch.randn(2, 3), torch.tensor([0, 1]))], plan=7)
    with pytest.raises(DataError, match="the ranks do not see the same samples at step 1"):
        one_step(engine, step, STAGE, 1, ("fixed",))


# ---- memory ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize(("asked", "got"), [({}, 15), ({"reduce_bucket_size": 7}, 7)])
def test_the_buffer_of_gradients_is_no_larger_than_what_is_trained(zero: int, asked: dict[str, int], got: int) -> None:
    """DeepSpeed's own is half a milliard elements, allocated anew in every backward pass."""
    stage = replace(STAGE, deepspeed={"zero_optimization": {"stage": zero, **asked}})
    assert engine_of(HeadOnly(torch.ones(5, 3)), stage=stage).inner.optimizer.reduce_bucket_size == got
