"""An adaptation of one's own: a second FFN for picture tokens, copied from the first. Dropped in as one file."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vlm.llm import register
from vlm.llm.base import AdaptationSpec
from vlm.llm.context import Auxiliary, Scope
from vlm.llm.decoder import layers


@register("twin")
@dataclass(frozen=True, kw_only=True)
class TwinSpec(AdaptationSpec):
    """coefficient: of the auxiliary loss, the mean square of the gate over real tokens."""

    place: ClassVar[int] = 2
    coefficient: float = 0.01

    def build(self, decoder: nn.Module, scope: Scope) -> None:
        for index, layer in enumerate(layers(decoder)):
            layer.mlp = Twin(layer.mlp, decoder.config, scope, index, self.coefficient)  # type: ignore[assignment,arg-type]

    def initialise(self, decoder: nn.Module) -> None:
        for layer in layers(decoder):
            layer.mlp.vision.load_state_dict(layer.mlp.text.state_dict())  # type: ignore[union-attr]
            nn.init.zeros_(layer.mlp.gate.weight)  # type: ignore[union-attr,arg-type]

    def groups(self, decoder: nn.Module) -> Mapping[str, list[nn.Parameter]]:
        return {
            "twin.vision": [p for layer in layers(decoder) for p in layer.mlp.vision.parameters()],  # type: ignore[union-attr]
            "twin.gate": [p for layer in layers(decoder) for p in layer.mlp.gate.parameters()],  # type: ignore[union-attr]
        }


class Twin(nn.Module):
    def __init__(self, source: nn.Module, config: object, scope: Scope, index: int, coefficient: float):
        super().__init__()
        self.text, self.vision = source, type(source)(config)
        self.gate = nn.Linear(config.hidden_size, 1, bias=False)  # type: ignore[attr-defined]
        self.scope, self.index, self.coefficient = scope, index, coefficient

    def forward(self, x: Tensor) -> Tensor:
        context = self.scope.context
        if context is None:
            return self.text(x)
        gate = self.gate(x)
        context.losses["twin", self.index] = Auxiliary(((gate - 1) ** 2)[context.real].sum(), "token", self.coefficient)
        context.statistics["twin", self.index] = torch.stack([context.vision.sum(), context.document.max() + 1])
        vision = context.vision[..., None]
        return torch.where(vision, self.vision(x) * (1 + gate), self.text(x))
