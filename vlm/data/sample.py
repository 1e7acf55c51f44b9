"""What every reader gives and everything after it takes: one conversation with its pictures."""

import io
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Picture", "Sample", "Turn", "held"]


@dataclass(frozen=True)
class Picture:
    """A picture by reference: a file, `size` bytes of a file from `offset` on (a member of a tar shard), bytes in memory, or an address.

    path: the file, or the address; of `data` only what messages call it. data: the encoded bytes themselves, `size` of them. remote: `path` is an http or https address that the user has allowed,
    fetched at every `read`.
    """

    path: str
    offset: int = 0
    size: int | None = None
    data: bytes | None = field(default=None, repr=False)
    remote: bool = False

    def length(self) -> int:
        """Bytes that `read` will give, known without reading; 0 for an address, whose `read` holds the limit itself. Raises OSError."""
        if self.data is not None:
            return len(self.data)
        if self.remote:
            return 0
        return os.path.getsize(self.path) - self.offset if self.size is None else self.size

    def read(self) -> bytes:
        """The encoded bytes, as they are stored. Raises OSError; DataError for an address that gives too many."""
        if self.data is not None:
            return self.data
        if self.remote:
            from vlm.data.remote import fetch

            return fetch(self.path)
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(-1 if self.size is None else self.size)


def held(source: "bytes | Image.Image", name: str = "picture given as bytes") -> Picture:
    """A picture in memory, of a file's bytes or of a Pillow image, which goes the same way from bytes to RGB as a file does. name: what messages call it."""
    if not isinstance(source, bytes):
        buffer = io.BytesIO()
        image = source if source.mode in ("1", "L", "LA", "I;16", "P", "RGB", "RGBA") else source.convert("RGB")
        image.save(buffer, "PNG", compress_level=1, exif=source.getexif())
        source = buffer.getvalue()
    return Picture(name, size=len(source), data=source)


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
