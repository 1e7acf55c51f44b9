"""What passes of a model give, and DESIGN rule 3's bound on how far two ways to the same may lie apart."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlm.model import VLM


@dataclass(frozen=True)
class Measured:
    """Summed loss and gradients of some passes. documents: the loss of every document, in the order of the passes."""

    loss: float
    gradients: dict[str, Tensor]
    documents: Tensor


def trained(model: VLM) -> dict[str, Tensor]:
    """Parameters by name, without those that no pass uses."""
    idle = {id(parameter) for parameter in model.unused()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in idle}


def measure(model: VLM, *batches: Mapping[str, Any]) -> Measured:
    """Forward and backward through every batch; gradients add up."""
    model.zero_grad(set_to_none=True)
    total, documents = 0.0, []
    for batch in batches:
        output = model(**batch)
        output.loss_sum.backward()
        total += output.loss_sum.item()
        documents.append(output.document_losses)
    return Measured(total, {name: parameter.grad.clone() for name, parameter in trained(model).items() if parameter.grad is not None}, torch.cat(documents))


def differences(left: Measured, right: Measured) -> list[str]:
    """Where two measurements differ by more than DESIGN rule 3 allows: in the summed loss, or in a gradient."""
    assert left.gradients.keys() == right.gradients.keys()
    found = [] if abs(left.loss - right.loss) <= 1e-6 * abs(right.loss) else [f"loss {left.loss} {right.loss}"]
    largest = max(gradient.abs().max().item() for gradient in right.gradients.values())
    for name, gradient in right.gradients.items():
        gap = (left.gradients[name] - gradient).abs().max().item()
        if not gap <= 1e-5 * gradient.abs().max().item() + 1e-6 * largest:  # which NaN is not
            found.append(f"{name} {gap}")
    return found
