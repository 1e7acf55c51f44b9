"""Facts of the tokens of one call, and how they become visible inside the decoder. The only maker of attention masks.

transformers checkpoints a decoder layer CLASS's forward: only what happens inside of it is seen again by the recomputation. So the context travels as a keyword of `model.forward` to the
adapted layer (layer.py), whose forward, and nothing else, shows it to inner modules through a `Scope`.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["TEXT", "VISION", "Auxiliary", "Keys", "Scope", "TokenContext", "Unit"]

TEXT, VISION = 0, 1


class Scope(threading.local):
    """What the layer that is running now sees. One per decoder, referenced by every adapted inner module."""

    context: "TokenContext | None" = None

    @contextmanager
    def use(self, context: "TokenContext | None") -> Iterator[None]:
        before, self.context = self.context, context
        try:  # finally: non-reentrant checkpointing leaves the recomputed layer by an exception (early stop)
            yield
        finally:
            self.context = before

    def __deepcopy__(self, memo: dict[int, Any]) -> "Scope":
        return self  # a copied module looks at the same scope as its original

    def __reduce__(self) -> tuple[type["Scope"], tuple[()]]:
        return Scope, ()


Unit = Literal["token", "vision_token", "document"]


@dataclass(eq=False)
class Auxiliary:
    """An auxiliary loss: a sum over the `unit`s of this call. The trainer divides by their number over all ranks and micro-batches of the step, so that 1 rank = N ranks."""

    sum: Tensor
    unit: Unit
    coefficient: float


@dataclass(eq=False)
class Keys:
    """Facts of all keys of a row, cached tokens first: (B, P + S) each."""

    document: Tensor
    branch: Tensor
    position: Tensor


@dataclass(eq=False)
class TokenContext:
    """Facts of the tokens of one call, (B, S) int64 each.

    type: TEXT or VISION. document: which document of the micro-batch a token belongs to, -1 = padding. picture: which picture of the micro-batch, -1 = none.
    branch: 0 is the trunk of a document; tokens of a branch see the trunk and their own branch only (independent questions about one picture). order: index in the row's key table.
    position: original position in the document. plain: every row is one document without branches and without past, padded on the right or not at all, so that is_causal serves. has_vision: known on the host.
    additive: eager attention adds its mask, so it needs 0 / min instead of booleans. varlen: flash attention takes no such mask, but where documents begin. losses, statistics: (name, layer) -> what adaptations leave; written, never appended to, since recomputation writes again.
    """

    type: Tensor
    document: Tensor
    picture: Tensor
    branch: Tensor
    order: Tensor
    position: Tensor
    keys: Keys
    plain: bool = False
    has_vision: bool = True
    additive: bool = False
    varlen: bool = False
    dtype: torch.dtype = torch.float32
    losses: dict[tuple[str, int], "Auxiliary"] = field(default_factory=dict)
    statistics: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    memo: dict[Any, Any] = field(default_factory=dict)

    @property
    def vision(self) -> Tensor:
        """(B, S) bool: picture tokens."""
        return self.type == VISION

    def units(self) -> dict[Unit, Tensor]:
        """How many of each unit this call holds."""
        tokens = self.real.sum()
        return {"token": tokens, "vision_token": (self.vision & self.real).sum(), "document": self.document.unique().ge(0).sum()}

    @property
    def real(self) -> Tensor:
        """(B, S) bool: not padding."""
        return self.document >= 0

    def mask(self, window: int | None = None, first_key: int = 0) -> Tensor:
        """(B, 1, S, K) attention mask of this call's tokens against the keys from `first_key` on; window: sliding window of the layer, None = full attention."""
        memo = (window, first_key)
        if memo not in self.memo:
            allowed = self._allowed(window, first_key)[:, None]
            if self.additive:
                allowed = torch.zeros(allowed.shape, dtype=self.dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(self.dtype).min)
            self.memo[memo] = allowed
        return self.memo[memo]

    def attention(self, window: int | None, first_key: int = 0) -> dict[str, Any]:
        """What a layer's attention is called with: the mask against the keys from `first_key` on, or with flash attention what stands for it (the window is then the family's own argument)."""
        if not self.varlen:
            causal = self.plain and not self.additive and (window is None or self.order.shape[1] <= window)  # eager attention without a mask would not be causal
            return {"attention_mask": None if causal else self.mask(window, first_key)}
        if self.keys.document.shape[1] > self.order.shape[1]:  # behind a cache a row is one document; flash leaves padding out by a (B, K) mask
            return {"attention_mask": (self.keys.document[:, first_key:] >= 0).to(torch.int64)}
        return {"attention_mask": None} if self.plain else {"attention_mask": None, **self.segments()}

    def segments(self) -> dict[str, Any]:
        """The documents of this call as flash attention takes them: all rows one behind the other, cut where the document changes (padding is cut off like a document).

        cu_seq_lens_q, cu_seq_lens_k: (segments + 1,) int32, where each begins, and the end; max_length_q, max_length_k: tokens of the longest.
        """
        if "segments" not in self.memo:
            begins = torch.ones_like(self.document, dtype=torch.bool)
            begins[:, 1:] = self.document[:, 1:] != self.document[:, :-1]
            ends = torch.tensor([begins.numel()], device=begins.device)
            cut = torch.cat([begins.flatten().nonzero()[:, 0], ends]).to(torch.int32)
            longest = int(cut.diff().max())
            self.memo["segments"] = {"cu_seq_lens_q": cut, "cu_seq_lens_k": cut, "max_length_q": longest, "max_length_k": longest}
        return self.memo["segments"]

    def _allowed(self, window: int | None, first_key: int) -> Tensor:
        document, branch, position = (keys[:, None, first_key:] for keys in (self.keys.document, self.keys.branch, self.keys.position))
        key_order = torch.arange(first_key, self.keys.document.shape[1], device=self.order.device)
        allowed = (self.document[:, :, None] == document) & (self.order[:, :, None] >= key_order)  # padding (-1) sees padding: no row of the mask is empty
        allowed &= (branch == 0) | (branch == self.branch[:, :, None])
        if window is not None:
            allowed &= self.position[:, :, None] - position < window
        return allowed
