"""The arithmetic of a step is that which torch counts."""

from typing import Any

import pytest
import torch
from adapted import made, model_spec
from torch.utils.flop_counter import FlopCounterMode

from vlm.llm.mm_lora import MMLoRASpec
from vlm.train.flops import arithmetic_of, peak_of


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_step_costs_what_torch_counts(family: str, frozen: bool) -> None:
    model = made(model_spec(family, {"mm_lora": MMLoRASpec(rank={"vision": 2, "language": 6}, dropout=0.0)}))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name or not frozen)
    model.llm.set_attn_implementation("eager")
    reckoned = arithmetic_of(model)
    facts: dict[str, Any] = {"mm_token_type_ids": torch.zeros(1, 64, dtype=torch.long), "plain": True}
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=torch.randn(1, 64, 32, requires_grad=True), labels=torch.arange(64)[None], **facts).loss.backward()
    every_pair = reckoned.pair * 64 * 64 / 2  # eager attention multiplies with what it masks, too
    assert counter.get_total_flops() == pytest.approx(reckoned.step(64, 1, 63, 0) + every_pair, rel=1e-6)


def test_pictures_cost_their_encoder_and_connector() -> None:
    model = made(model_spec())
    whole = arithmetic_of(model).picture
    for parameter in model.encoder.parameters():
        parameter.requires_grad_(False)
    images = [model.spec.encoder.dummy()]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.see(images)
    assert 0 < arithmetic_of(model).picture < whole == pytest.approx(3 * counter.get_total_flops(), rel=0.05)  # the CPU kernel of attention is not counted
    assert arithmetic_of(model).step(0, 1, 0, 2) == 2 * arithmetic_of(model).picture


def test_a_peak_is_known_or_not_told() -> None:
    assert peak_of(torch.device("cpu")) is None
