"""What every reader gives and everything after it takes: one conversation with its pictures."""

import os
from dataclasses import dataclass, field

__all__ = ["Picture", "Sample", "Turn"]


@dataclass(frozen=True)
class Picture:
    """A picture by reference: a file, or `size` bytes of a file from `offset` on (a member of a tar shard)."""

    path: str
    offset: int = 0
    size: int | None = None

    def length(self) -> int:
        """Bytes that `read` will give, known without reading. Raises OSError."""
        return os.path.getsize(self.path) - self.offset if self.size is None else self.size

    def read(self) -> bytes:
        """The encoded bytes, as they are stored."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(-1 if self.size is None else self.size)


@dataclass(frozen=True)
class Turn:
    """One message. `parts` are texts and pictures in the order in which they are read.

    role: "system", "user" or "assistant". supervised: the model learns to say this turn (assistant turns only).
    kind: what is asked, for scoring ("colour"); None where the data do not say.
    """

    role: str
    parts: tuple["str | Picture", ...]
    supervised: bool = False
    kind: str | None = None

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True)
class Sample:
    """One conversation. `independent`: its question-answer pairs share the pictures and do not see one another."""

    id: str
    turns: tuple[Turn, ...]
    source: str = ""
    where: str = ""  # file and record, for messages: "train.json, sample 7"
    independent: bool = False
    notes: tuple[str, ...] = field(default=(), compare=False)  # what the reader did that should be counted: "unsupervised trailing turn"

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """All pictures in reading order; a picture named twice stands twice."""
        return tuple(part for turn in self.turns for part in turn.parts if isinstance(part, Picture))

    @property
    def modality(self) -> str:
        return "vision" if self.pictures else "text"
