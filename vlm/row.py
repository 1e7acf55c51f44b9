"""A row: the facts of its tokens, of one document or of several packed; and rows as a batch of tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from vlm.features import ImageInput
from vlm.llm.context import TEXT, VISION

__all__ = ["IGNORE", "Row", "collate"]

IGNORE = -100
"""Label of a token that is not supervised."""


@dataclass
class Row:
    """One document, or several packed, ready for a batch; lists over its tokens.

    ids: placeholder expanded. labels: IGNORE where not supervised. types: TEXT or VISION. pictures: index of the row's picture, -1 = none. branches: 0 trunk. positions: restart behind the trunk.
    notes: what should be counted. documents: index of the row's document; only a packed row has several.
    """

    id: str
    source: str
    ids: list[int]
    labels: list[int]
    types: list[int]
    pictures: list[int]
    branches: list[int]
    positions: list[int]
    images: list[ImageInput]
    notes: tuple[str, ...] = ()
    documents: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.documents = self.documents or [0] * len(self.ids)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def vision(self) -> int:
        """Tokens of pictures."""
        return self.types.count(VISION)

    @classmethod
    def packed(cls, rows: Sequence["Row"]) -> "Row":
        """Documents one after another in one row. Nothing predicts the first token of a document, whatever stands before it."""
        whole = cls("", "", [], [], [], [], [], [], [])
        for number, row in enumerate(rows):
            whole.pictures += [picture if picture < 0 else picture + len(whole.images) for picture in row.pictures]
            whole.labels += [IGNORE, *row.labels[1:]]
            whole.documents += [number] * len(row)
            for name in ("ids", "types", "branches", "positions", "images"):
                getattr(whole, name).extend(getattr(row, name))
        return whole

    @property
    def supervised(self) -> int:
        return sum(label != IGNORE for label in self.labels[1:])


def collate(rows: Sequence[Row], *, pad_id: int, left: bool = False) -> dict[str, Any]:
    """Rows -> a batch of tensors (B, S), padded on the right (or left), and the pictures in reading order. Keys are the arguments of `VLM.forward`; branch_ids only where a row has branches."""
    length = max(len(row) for row in rows)

    def padded(values: Sequence[int], fill: int) -> list[int]:
        gap = [fill] * (length - len(values))
        return [*gap, *values] if left else [*values, *gap]

    def table(columns: Sequence[Sequence[int]], fill: int) -> Tensor:
        return torch.tensor([padded(values, fill) for values in columns], dtype=torch.int64)

    pictures = list(accumulate((len(row.images) for row in rows), initial=0))
    documents = list(accumulate((max(row.documents) + 1 for row in rows), initial=0))
    branched = any(any(row.branches) for row in rows)
    batch: dict[str, Any] = {
        "input_ids": table([row.ids for row in rows], pad_id),
        "labels": table([row.labels for row in rows], IGNORE),
        "mm_token_type_ids": table([row.types for row in rows], TEXT),
        "document_ids": table([[document + start for document in row.documents] for row, start in zip(rows, documents, strict=False)], -1),
        "documents": documents[-1],
        "plain": not left and not branched and documents[-1] == len(rows),
        "picture_ids": table([[p if p < 0 else p + start for p in row.pictures] for row, start in zip(rows, pictures, strict=False)], -1),
        "position_ids": table([row.positions for row in rows], 0),
        "images": [image for row in rows for image in row.images],
    }
    if branched:
        batch["branch_ids"] = table([row.branches for row in rows], 0)
    return batch
