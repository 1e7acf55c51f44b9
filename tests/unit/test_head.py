"""The head: the loss is the cross entropy of whole logits, in chunks too, and holds supervised positions only."""

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from conversations import batch_of, drawn, rows_of
from equal import differences, measure, trained
from models import FAMILY, made
from torch import Tensor

from vlm.data.sample import Picture
from vlm.llm import head as heads
from vlm.row import IGNORE


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Picture]:
    return drawn(tmp_path_factory.mktemp("pictures"))


@FAMILY
def test_the_loss_is_cross_entropy_of_the_logits(pictures: list[Picture], family: str, attention: str) -> None:
    model, rows = made(family, attention), rows_of(pictures)
    batch = batch_of(*rows.values())
    output = model(**batch)
    asked = model(**batch, logits_to_keep=0)
    unlabelled = model(**{name: value for name, value in batch.items() if name != "labels"})
    assert output.logits is None and torch.equal(asked.logits, unlabelled.logits) and asked.logits.shape == (*batch["input_ids"].shape, 400)
    assert torch.allclose(model(**batch, logits_to_keep=3).logits, asked.logits[:, -3:], rtol=0, atol=1e-6)
    losses = F.cross_entropy(asked.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORE, reduction="none").view(len(rows), -1)
    assert output.loss_sum.item() == pytest.approx(losses.sum().item(), rel=1e-6)
    assert output.count.item() == sum(row.supervised for row in rows.values())
    assert output.loss.item() == pytest.approx((output.loss_sum / output.count).item(), rel=1e-7)
    assert torch.allclose(output.document_losses, losses.sum(1), rtol=1e-5) and output.document_counts.tolist() == [row.supervised for row in rows.values()]
    assert not output.document_losses.requires_grad


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_head_in_chunks_is_the_head(pictures: list[Picture], monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    model, batch = made(family), batch_of(*rows_of(pictures).values())
    whole = measure(model, batch)
    shapes: list[int] = []
    loss = heads.LossHead._loss

    def watched(self: Any, hidden: Tensor, labels: Tensor) -> Tensor:
        shapes.append(len(hidden))
        return loss(self, hidden, labels)

    monkeypatch.setattr(heads, "CHUNK", 3 * 400 + 1)
    monkeypatch.setattr(heads.LossHead, "_loss", watched)
    with torch.no_grad():
        model(**batch)
    supervised = int(model(**batch).count)
    assert max(shapes) == 3 and sum(shapes[: len(shapes) // 2]) == supervised and supervised % 3
    assert not differences(measure(model, batch), whole)


def test_unsupervised_positions_never_reach_the_head(pictures: list[Picture]) -> None:
    model, rows = made(), rows_of(pictures)
    seen: list[tuple[int, ...]] = []
    model.llm.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    model(**batch_of(*rows.values()))
    model(**batch_of(replace(rows["text"], labels=[IGNORE] * len(rows["text"]))))
    assert seen == [(sum(row.supervised for row in rows.values()), 32), (0, 32)]


def test_gemma2_caps_its_logits(pictures: list[Picture]) -> None:
    model, batch = made("gemma2", "eager", final_logit_softcapping=2.0), batch_of(rows_of(pictures)["text"])
    model.llm.lm_head.weight.data.mul_(20)
    logits = model(**batch, logits_to_keep=0)
    assert 1.9 < logits.logits.abs().max() <= 2
    expected = F.cross_entropy(logits.logits[0, :-1], batch["labels"][0, 1:], ignore_index=IGNORE, reduction="sum")
    assert logits.loss_sum.item() == pytest.approx(expected.item(), rel=1e-6)


def test_without_a_target_the_loss_is_zero_and_finite(pictures: list[Picture]) -> None:
    model, rows = made(), rows_of(pictures)
    output = model(**batch_of(replace(rows["vision"], labels=[IGNORE] * len(rows["vision"]))))
    assert output.loss.item() == 0 and output.count.item() == 0
    output.loss.backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in trained(model).values())
