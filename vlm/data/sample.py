"""What every reader gives and everything after it takes: one conversation with its pictures."""

import io
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from vlm.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Picture", "Sample", "Turn", "held"]

ORIENTATION = 0x0112  # EXIF
FILES = {"1": "PNG", "L": "PNG", "LA": "PNG", "I;16": "PNG", "P": "PNG", "RGB": "PNG", "RGBA": "PNG", "I": "TIFF", "F": "TIFF"}
"""Mode of Pillow -> the kind of file that holds it as it is."""
SAME = {"RGBa": "RGBA", "La": "LA", "PA": "RGBA"}
"""Modes without such a file -> those that say the same."""


@dataclass(frozen=True)
class Picture:
    """A picture by reference: a file, `size` bytes of a file from `offset` on (a member of a tar shard), bytes in memory, or an address.

    path: the file, or the address; of `data` only what messages call it. data: the encoded bytes themselves, `size` of them. remote: `path` is an http or https address that the user has allowed,
    fetched at every `read`. member: the name of those bytes in their tar shard.
    """

    path: str
    offset: int = 0
    size: int | None = None
    data: bytes | None = field(default=None, repr=False)
    remote: bool = False
    member: str = ""

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.path}, {self.member}" if self.member else self.path

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
    """A picture in memory, of a file's bytes or of a Pillow image, which goes the same way from bytes to RGB as a file does. name: what messages call it.

    Raises DataError for a Pillow image that cannot be decoded or has no pixels, and for one of a TIFF file whose white only the file tells.
    """
    data = source if isinstance(source, bytes) else _as_file(source, name)
    return Picture(name, size=len(data), data=data)


def _as_file(image: "Image.Image", name: str) -> bytes:
    """The bytes of a file that `open_picture` reads as it would read the one that the image came from."""
    from PIL import Image

    from vlm.images import exif_orientation

    buffer = io.BytesIO()
    try:
        image.load()  # Pillow turns a TIFF while it loads, and only then forgets its orientation
        _check_white(image, name)
        exif = Image.Exif()
        if (orientation := exif_orientation(image)) > 1:
            exif[ORIENTATION] = orientation
        image = _same(image)
        image.save(buffer, FILES[image.mode], compress_level=1, exif=exif)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise nearly every built-in kind
        raise DataError(
            f"{name}: the picture is truncated or corrupt: {error}", kind="unreadable picture", cure="look into the image; or give the path or the bytes of its file"
        ) from error
    return buffer.getvalue()


def _same(image: "Image.Image") -> "Image.Image":
    """The image in a mode that a file holds."""
    from PIL import Image

    if image.mode in ("I;16B", "I;16L", "I;16N") or (image.mode == "I" and image.format == "PPM"):  # Pillow scales PPM of more than 8 bits to 0..65535
        return Image.fromarray(np.asarray(image).astype(np.uint16))  # Pillow's own conversion between orders of bytes clips at 255
    return image if image.mode in FILES else image.convert(SAME.get(image.mode, "RGB"))


def _check_white(image: "Image.Image", name: str) -> None:
    """An image of Pillow keeps 9 to 15 bits, and a white of zero, as 16-bit values that do not say so."""
    tags = getattr(image, "tag_v2", {})
    bits, zero = tags.get(258, (16,))[0], tags.get(262)
    if image.mode.startswith("I;16") and (bits < 16 or zero == 0):
        got = f"a TIFF of {bits} bits" + (" whose white is 0" if zero == 0 else "")
        raise DataError(
            f"{name}: nothing says which of its values is white",
            kind="unreadable picture",
            got=got,
            expected="16 bits, white the largest",
            cure="give the path or the bytes of the file",
        )


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
