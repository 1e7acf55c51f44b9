"""Whatever stands in a record for a picture -> a Picture: paths below a folder, bytes, `data:` addresses, and addresses of the web where they are allowed."""

import base64
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vlm.data.record import check_text
from vlm.data.sample import Picture, Sample, held
from vlm.errors import DataError

__all__ = ["ADDRESS", "check_pictures", "is_address", "picture_below"]

ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://|data:", re.IGNORECASE)
DATA = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)


def is_address(name: str) -> bool:
    """Whether a name is an address of the web: of http or https, the only ones that can be fetched."""
    return name.lower().startswith(("http://", "https://"))


def picture_below(root: str, *, remote: bool = False) -> Callable[[Any, str], Picture]:
    """What turns whatever stands in a record for a picture into a `Picture`: (value, where) -> Picture. It can be pickled.

    Taken are paths below `root` (symbolic links are followed, and may not lead out), bytes of a picture file, {"bytes": ..., "path": ...} with one of the two, Pillow images, base64 `data:` addresses, and,
    only where `remote` is set, http and https addresses. Whether a file is there shows when it is read, or by `check_pictures`. Raises DataError for anything else, and for no bytes or too many.
    """
    return _Below(root, remote, os.path.realpath(root))


@dataclass(frozen=True)
class _Below:
    root: str
    remote: bool
    inside: str

    def __call__(self, value: Any, where: str) -> Picture:
        if isinstance(value, Picture):
            return value
        name = ""
        if isinstance(value, Mapping):
            name, data = value.get("path") or "", value.get("bytes")
            if not isinstance(data, bytes | None):
                raise DataError(
                    f"{where}: the `bytes` of a picture are {type(data).__name__}", kind="unreadable picture", got=repr(data)[:80], expected="bytes", cure="name a file by `path`"
                )
            value = value.get("path") if data is None else data
        if isinstance(value, bytes):
            return _embedded(value, str(name) or "in the record", where)
        if isinstance(value, str):
            if value and "\0" not in value:
                return self._named(value, where)
        elif hasattr(value, "getexif"):
            return held(value, "picture given as an image")
        raise DataError(f"{where}: a picture is not a path", kind="unreadable picture", got=repr(value)[:80], expected="a path, or a list of paths; or the bytes of a picture file")

    def _named(self, name: str, where: str) -> Picture:
        check_text(name, f"{where}: the name of a picture")
        if DATA.match(name):
            return _embedded(_decoded(name, where), f"{name[:30]}...", where)
        if self.remote and is_address(name):
            return Picture(name, remote=True)
        if ADDRESS.match(name):
            cure = "fetch the pictures before training and name them by path" + (", or allow them with `remote: true`" if is_address(name) else "")
            raise DataError(f"{where}: the picture {name[:80]} is not a file", kind="remote", expected=f"a path below {self.root}", cure=cure)
        path = os.path.join(self.root, name)
        real = os.path.realpath(path)
        if os.path.commonpath((self.inside, real)) != self.inside:
            raise DataError(
                f"{where}: the picture {name} leads out of the folder of pictures",
                kind="outside of the root",
                got=real if os.path.exists(real) else f"{real}, which is not there",
                expected=f"a path below {self.root}",
                cure="set `images` to the folder that holds all",
            )
        return Picture(path)


def _embedded(data: bytes, name: str, where: str) -> Picture:
    from vlm.images import LIMITS, too_large

    if not data:
        raise DataError(f"{where}: the picture {name} holds 0 bytes", kind="empty", expected="the bytes of a picture file", cure="take the record out, or `on_bad: skip`")
    if len(data) > LIMITS.max_bytes:
        raise too_large(f"{where}: the picture {name}", f"{len(data):,} bytes")
    return held(data, name)


def _decoded(address: str, where: str) -> bytes:
    try:
        return base64.b64decode(address[address.index(",") + 1 :], validate=True)
    except ValueError as error:  # also of letters that are not ASCII
        raise DataError(f"{where}: the picture {address[:30]}... is not base64", kind="unreadable picture", got=error, cure="mend it, or take the record out") from None


def check_pictures(sample: Sample) -> None:
    """Raises DataError where a picture's file is not there or holds 0 bytes. Pictures in memory were looked at when the record was read; addresses are not asked."""
    for picture in sample.pictures:
        if picture.data is not None or picture.remote:
            continue
        if not os.path.isfile(picture.path):
            raise DataError(
                f"{sample.where}: the picture {picture.path} is not there", kind="missing picture", cure="check the path and the source's `images` folder, or `on_bad: skip`"
            )
        if picture.length() < 1:
            raise DataError(f"{sample.where}: the picture {picture.path} holds 0 bytes", kind="empty", cure="fetch it again, or `on_bad: skip`")
