"""An adaptation that no gradient reaches."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from vlm.llm.base import AdaptationSpec

__all__ = ["IdleSpec"]


@dataclass(frozen=True, kw_only=True)
class IdleSpec(AdaptationSpec):
    """A vector in the decoder that nothing reads."""

    use: ClassVar[str] = "idle"

    def build(self, decoder: nn.Module, scope: Any) -> None:
        decoder.more = nn.Parameter(torch.zeros(7))

    def initialise(self, decoder: nn.Module) -> None:
        nn.init.zeros_(decoder.more)  # type: ignore[arg-type]

    def groups(self, decoder: nn.Module) -> Mapping[str, list[nn.Parameter]]:
        return {"idle": [decoder.more]}  # type: ignore[list-item]
