"""A run of llava_tiny, two parts that nothing ships, and what a report says of them."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import vlm
from vlm import encoders, llm
from vlm.encoders.base import Encoder, EncoderSpec
from vlm.errors import VLMError
from vlm.features import TokenLayout
from vlm.llm.base import AdaptationSpec
from vlm.train.config import RunSpec
from vlm.train.findings import Report


def compose(root: Path, *overrides: str) -> RunSpec:
    """llava_tiny on a data root."""
    return vlm.compose("llava_tiny", f"data_root={root}", *overrides)


def only(report: Report) -> VLMError:
    """The one problem of a report."""
    assert len(report.problems) == 1, list(map(str, report.problems))
    return report.problems[0]


def printed(report: Any) -> str:
    """What a report, or any other answer that prints itself, writes on a plain console."""
    out = io.StringIO()
    report.print(Console(file=out, width=200))
    return out.getvalue()


@dataclass(frozen=True, kw_only=True)
class NativeSpec(EncoderSpec):
    """An encoder without a size of its own: one token per 14 x 14 pixels."""

    weights: Any = "random"

    @property
    def levels(self) -> Mapping[str, int]:
        return {"image": 1}

    @property
    def widths(self) -> Mapping[str, int]:
        return {"image": 8}

    def layout(self, width: int, height: int, mode: Any) -> Mapping[str, TokenLayout]:
        return {"image": TokenLayout.grid(height // 14, width // 14)}

    def build(self) -> Encoder:
        encoder = Encoder()
        encoder.patches = nn.Linear(14 * 14 * 3, 8)
        return encoder


@dataclass(frozen=True, kw_only=True)
class BiasSpec(AdaptationSpec):
    """One more vector in the decoder."""

    def build(self, decoder: nn.Module, scope: Any) -> None:
        decoder.more = nn.Parameter(torch.zeros(7))

    def release(self, decoder: nn.Module) -> None:
        pass

    def groups(self, decoder: nn.Module) -> Mapping[str, list[nn.Parameter]]:
        return {"bias": [decoder.more]}  # type: ignore[list-item]

    def breaks(self) -> list[str]:
        return ["cached = uncached, unless bias is 0"]


def register(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the two parts known for the length of a test: the encoder `native` and the adaptation `bias`."""
    monkeypatch.setitem(encoders.registry._specs, "native", NativeSpec)
    monkeypatch.setitem(llm.registry._specs, "bias", BiasSpec)
    monkeypatch.setattr(NativeSpec, "use", "native", raising=False)
    monkeypatch.setattr(BiasSpec, "use", "bias", raising=False)
