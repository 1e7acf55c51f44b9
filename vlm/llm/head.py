"""The language-model head that turns hidden states of supervised positions into a loss without whole logits."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["LossHead", "adapt_head", "finish_logits"]

CHUNK = 2**25
"""Logits held at once, in elements: 1,048 rows at a vocabulary of 32,000."""


class LossHead(nn.Module):
    """Mixed in front of the class of a decoder's output embedding.

    With labels it is called once per micro-batch, however many rows there are: under ZeRO 3 the number of calls of a module must not depend on the data. The loop over chunks is inside.
    """

    decoder_config: Any

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """hidden (..., D) -> logits (..., V); with hidden (N, D) and labels (N,) -> the cross entropy of each, (N,) float32."""
        if labels is None:
            return super().forward(hidden)
        hidden = self.prepare(hidden)
        rows = max(1, CHUNK // self.decoder_config.vocab_size)
        if len(labels) <= rows:
            return self._loss(hidden, labels)
        parts = [checkpoint(self._loss, part, target, use_reentrant=False) for part, target in zip(hidden.split(rows), labels.split(rows), strict=True)]
        return torch.cat(parts)

    def prepare(self, hidden: Tensor) -> Tensor:
        """(N, D) -> (N, D'): what inner modules have to do with all rows. Called once per micro-batch."""
        return hidden

    def project(self, prepared: Tensor) -> Tensor:
        """(n, D') -> (n, V) for one chunk; calls no inner module."""
        return super().forward(prepared)

    def _loss(self, prepared: Tensor, labels: Tensor) -> Tensor:
        logits = finish_logits(self.project(prepared), self.decoder_config)
        return F.cross_entropy(logits.float(), labels, reduction="none")


def adapt_head(head: nn.Module, config: Any, kind: type[LossHead] = LossHead) -> None:
    """Turn a decoder's output embedding into a LossHead in place; parameter names stay. kind: for a head with modules inside."""
    base = type(head)
    head.__class__ = type("Loss" + base.__name__, (kind, base), {})
    head.decoder_config = config  # type: ignore[assignment]


def finish_logits(logits: Tensor, config: Any) -> Tensor:
    """What some families do between head and softmax: Gemma caps, Cohere multiplies, Granite divides."""
    if scale := getattr(config, "logit_scale", None):
        logits = logits * scale
    if scaling := getattr(config, "logits_scaling", None):
        logits = logits / scaling
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    return logits
