"""The one way from bytes to RGB, used by data, chat and server: limits, EXIF orientation, modes; and the picture policies of a stage.

Nothing global of Pillow is changed: limits are checked here from the header, and a cut file is an error.
"""

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from io import BytesIO
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import Image, ImageFile

from vlm.errors import ConfigurationError, DataError, EnvironmentProblem, VLMError

__all__ = [
    "LIMITS",
    "POLICIES",
    "Limits",
    "apply_policy",
    "check_made",
    "crop_to",
    "exif_orientation",
    "mean_color",
    "open_picture",
    "pad",
    "policy_size",
    "resize",
    "too_large",
    "upright_size",
]

T = TypeVar("T")

POLICIES = ("native", "crop", "pad", "squash", "anyres")

# Raster formats that decode from memory alone; MPO (two-lens photos) comes in through JPEG. EPS is left out: Pillow starts Ghostscript for it.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
_ORIENTATION = 0x0112
_UNNAMED = "picture given as bytes"
_LARGEST_MADE = 2**29  # pixels of a padded or enlarged picture, 1.5 GiB: a strip of 1 x 60,000 pixels may not become a square
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Limits:
    """What a picture file may cost.

    max_bytes: size of the file. max_pixels: width x height that its header declares, checked before anything is decoded; the default is the level
    at which Pillow starts to warn (256 MiB as RGB). Above 178,956,970 pixels Pillow itself refuses TIFF and WebP, whatever stands here.
    """

    max_bytes: int = 64 * 2**20
    max_pixels: int = 89_478_485


LIMITS = Limits()


def too_large(what: str, got: str, limits: Limits = LIMITS) -> DataError:
    """The error of a picture file of more bytes than `limits.max_bytes`. what: the file, as the message calls it. got: its size in words."""
    return DataError(f"{what} is too large", kind="too large", got=got, expected=f"at most {limits.max_bytes:,}", cure="make it smaller")


def open_picture(data: bytes, *, where: str = "", limits: Limits = LIMITS, official: bool = False) -> Image.Image:
    """Bytes of a picture file -> RGB picture, upright, fully decoded, without metadata; of an animation the first frame.

    Every mode becomes what a viewer shows: 16-bit values are divided by 257, CMYK and palettes are converted, transparency is laid over white.
    An EXIF block that cannot be read, or an orientation outside 1..8, counts as no orientation.

    Args:
        where: the file (and record) as messages call it.
        official: colours are those of Pillow's `convert("RGB")`, as in the released LLaVA code: the alpha channel is dropped without blending, 16-bit values above 255 become white.
            Limits, refusals and the way up stay as above: layouts and what `upright_size` says count on it.

    Raises:
        DataError: empty, no picture, truncated, corrupt, above `limits`, or of a mode without a known white (32-bit, float).
    """
    where = where or _UNNAMED
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise EnvironmentProblem(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES was switched on, so cut pictures would pass as grey halves", cure="leave it False: no code of this process may set it"
        )
    with _reported(where):
        _check_bytes(len(data), where, limits)
        image = _header(BytesIO(data), where, limits)
        if image.format == "PNG":
            _check_png(data)
        image.load()
        if image.format == "PNG":
            _scale_transparent(image, depth=data[24])
        turn = _TURNS.get(exif_orientation(image))
        rgb = _to_rgb(image, where, official)
    rgb = rgb.copy() if turn is None else rgb.transpose(turn)
    rgb.info.clear()  # nobody may find the orientation and turn it again
    return rgb


def upright_size(source: bytes | str | os.PathLike[str], *, where: str = "", limits: Limits = LIMITS) -> tuple[int, int]:
    """Bytes or path of a picture file -> the (width, height) that `open_picture` gives, from the header alone.

    Raises:
        DataError: what is wrong already in the header, and PNG files that are cut.
    """
    if isinstance(source, bytes):
        with BytesIO(source) as file:
            return _upright_size(file, len(source), where or _UNNAMED, limits)
    where = where or os.fspath(source)
    with _reported(where), open(source, "rb") as file:
        return _upright_size(file, os.fstat(file.fileno()).st_size, where, limits)


def mean_color(mean: Sequence[float]) -> tuple[int, int, int]:
    """An encoder's mean in 0..1 -> the colour LLaVA pads with: int(255 * mean), truncated."""
    red, green, blue = (int(255 * value) for value in mean)
    return red, green, blue


def pad(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """RGB picture -> centred on a square of `color` with the long side's length; an odd remainder goes below or right.

    The released LLaVA code calls it expand2square. Raises DataError for strips whose square would not fit memory.
    """
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    check_made(image.size, side, side)
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """Bicubic resize to width x height pixels, with Pillow's antialiasing, on 8-bit values."""
    return image.resize((width, height), Image.Resampling.BICUBIC)


def crop_to(image: Image.Image, size: int, official: bool = False, *, edge: int | None = None) -> Image.Image:
    """What CLIP's own processor does: shortest edge to `edge` (default: `size`), the long one truncated, then the centre size x size.

    official: transformers 4.37 takes a picture 3 pixels high for channels-first (systems/arcana.md, quirk 17) and fails on one 1 pixel high.

    Raises:
        DataError: a strip so thin that enlarging its short edge would not fit memory.
    """
    if official:
        image = _released_axes(image)
    edge = edge or size
    short, long = min(image.size), max(image.size)
    scaled = int(edge * long / short)
    check_made(image.size, edge, scaled)
    image = resize(image, edge, scaled) if image.width <= image.height else resize(image, scaled, edge)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def apply_policy(name: str, image: Image.Image, mean: Sequence[float] | None, size: int | None, official: bool = False) -> Image.Image:
    """A stage's `images:` policy, before the encoder's own preprocessing. RGB -> RGB.

    native: untouched, the encoder does what it does. crop: shortest edge to `size`, centre size x size (the sides are lost; LLaVA's stage 1).
    pad: to a square with the encoder's mean colour (LLaVA's stage 2 and inference). squash: size x size, the shape is lost.
    anyres: untouched here, tiles.py cuts it into several of the encoder's size.

    Args:
        mean, size: the encoder's; None where it has none. official: see `crop_to`.

    Raises:
        ConfigurationError: unknown name, or a policy that needs what the encoder does not have.
    """
    match name:
        case "native":
            return image
        case "crop":
            return crop_to(image, _needed(name, "size", size), official)
        case "pad":
            return pad(image, mean_color(_needed(name, "mean", mean)))
        case "squash":
            side = _needed(name, "size", size)
            return resize(image, side, side)
        case "anyres":
            _needed(name, "size", size)
            return image
    near = get_close_matches(name, POLICIES, 1)
    raise ConfigurationError(f"no picture policy is called {name!r}", expected=f"one of {', '.join(POLICIES)}", cure=f"did you mean {near[0]!r}?" if near else None)


def policy_size(name: str, width: int, height: int, side: int) -> tuple[int, int]:
    """Width and height of what `apply_policy` makes of a picture of width x height pixels. side: the encoder's `size`. Raises DataError where `apply_policy` does for its size."""
    long, short = max(width, height), min(width, height)
    if name == "pad":
        check_made((width, height), long, long)
        return long, long
    if name == "crop":
        check_made((width, height), side, int(side * long / short))
    return (side, side) if name in ("crop", "squash") else (width, height)


def _needed(policy: str, what: str, value: T | None) -> T:
    if value is None:
        raise ConfigurationError(f"picture policy {policy!r} needs an encoder with a `{what}`", cure="set `images: native`")
    return value


def check_made(size: tuple[int, int], width: int, height: int) -> None:
    """Raises DataError where a picture of width x height pixels, which is to be made of one of this `size`, would not fit memory."""
    if width * height > _LARGEST_MADE:
        raise DataError(
            "the picture is too thin for its length",
            kind="too large",
            got=f"{size[0]} x {size[1]}, to become {width} x {height}",
            expected=f"at most {_LARGEST_MADE:,} pixels",
            cure="cut it into pieces, or use `images: squash`",
        )


def _released_axes(image: Image.Image) -> Image.Image:
    if image.height == 1:
        raise DataError("the released processor fails on a picture 1 pixel high", got=f"{image.width} x 1", cure="set `official: false` for the encoder")
    if image.height != 3:
        return image
    return Image.fromarray(np.ascontiguousarray(np.asarray(image).transpose(1, 2, 0)))


@contextmanager
def _reported(where: str) -> Iterator[None]:
    """Any fault of foreign bytes becomes a DataError: Pillow's decoders raise nearly every built-in kind."""
    try:
        yield
    except (VLMError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise DataError(f"{where}: there is no such picture file", kind="missing picture", cure="check the path and the data source's `images` folder") from error
    except Exception as error:
        raise DataError(
            f"{where}: the picture is truncated or corrupt: {error}", kind="unreadable picture", cure="fetch or write the file again, or take the record out"
        ) from error


def _check_bytes(size: int, where: str, limits: Limits) -> None:
    if size == 0:
        raise DataError(f"{where}: the picture file is empty", kind="empty", got="0 bytes", cure="fetch the file again, or take the record out")
    if size > limits.max_bytes:
        raise too_large(f"{where}: the picture file", f"{size:,} bytes", limits)


def _header(file: BinaryIO, where: str, limits: Limits) -> ImageFile.ImageFile:
    """The opened, undecoded picture, its declared size checked. Not Image.open: its own limit is global and warns where ours allows."""
    if "AVIF" not in Image.OPEN:
        Image.init()
    start = file.read(16)
    for name in _FORMATS:
        factory, accept = Image.OPEN.get(name, (None, None))
        if factory is None or accept is None or accept(start) is not True:
            continue
        file.seek(0)
        image = factory(file, "")
        if name == "TIFF":
            image.info.pop("xmp", None)  # by which Pillow would turn it, after it has declared the size without
        _check_size(image.size, where, limits)
        return image
    raise DataError(
        f"{where}: the file is not a picture",
        kind="unreadable picture",
        got=f"a file that starts with {start[:8]!r}",
        expected=f"one of {', '.join(_FORMATS)}",
        cure="convert it, or take the record out",
    )


def _check_size(size: tuple[int, int], where: str, limits: Limits) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise DataError(f"{where}: the picture is empty", kind="empty", got=f"{width} x {height} pixels", cure="take the record out")
    if width * height > limits.max_pixels:
        raise DataError(
            f"{where}: the picture is too large",
            kind="too large",
            got=f"{width} x {height} = {width * height:,} pixels",
            expected=f"at most {limits.max_pixels:,}",
            cure="shrink it, or raise the limit `max_pixels` if you trust the file",
        )


def _upright_size(file: BinaryIO, size: int, where: str, limits: Limits) -> tuple[int, int]:
    with _reported(where):
        _check_bytes(size, where, limits)
        image = _header(file, where, limits)
        if image.format == "PNG":
            image = _header(_png_without_pixels(file), where, limits)
        width, height = image.size
        return (height, width) if exif_orientation(image) >= 5 else (width, height)


def exif_orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8 of the metadata read so far. TIFF: 1, Pillow turns it while loading and declares the upright size."""
    if image.format == "TIFF":
        return 1
    try:
        value = _exif(image).get(_ORIENTATION)
    except (SyntaxError, ValueError, KeyError, IndexError, TypeError, struct.error, OSError):
        return 1
    return value if value in _TURNS else 1


def _exif(image: Image.Image) -> Image.Exif:
    """Without the orientation that Pillow takes from XMP where EXIF says none: viewers do not look there."""
    if not image.info.keys() & {"xmp", "XML:com.adobe.xmp"}:
        return Image.Image.getexif(image)  # PngImageFile's own getexif decodes the pixels
    bare = Image.new("1", (1, 1))
    bare.info = {key: image.info[key] for key in ("exif", "Raw profile type exif") if key in image.info}
    return bare.getexif()


def _scale_transparent(image: Image.Image, depth: int) -> None:
    """The one transparent grey or colour of a PNG in the values that Pillow gives; it keeps the file's own. depth: bits per channel of the file; of 16-bit colour the upper 8 are all there is."""
    key = image.info.get("transparency")
    if image.mode == "L" and isinstance(key, int) and depth < 8:
        white = 2**depth - 1
        image.info["transparency"] = (key & white) * 255 // white
    elif image.mode == "RGB" and isinstance(key, tuple) and depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in key)


def _png_chunks(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """Type, start and length of each chunk's body, up to IEND."""
    at = 8
    while True:
        file.seek(at)
        head = file.read(8)
        if len(head) < 8:
            raise EOFError("the file is truncated, it ends before the IEND chunk")
        kind, length = head[4:], int.from_bytes(head[:4], "big")
        yield kind, at + 8, length
        if kind == b"IEND":
            return
        at += length + 12


def _check_png(data: bytes) -> None:
    """Checksums of all chunks: Pillow skips those of the pixels."""
    view = memoryview(data)
    for kind, start, length in _png_chunks(BytesIO(data)):
        stored = view[start + length : start + length + 4]
        if len(stored) < 4:
            raise EOFError("the file is truncated in its last chunk")
        if zlib.crc32(view[start - 4 : start + length]) != int.from_bytes(stored, "big"):
            raise ValueError(f"wrong checksum in the {kind!r} chunk at byte {start - 8}")


def _png_without_pixels(file: BinaryIO) -> BinaryIO:
    """The PNG with its metadata in front of an empty IDAT: the orientation may stand behind the pixels."""
    kept = [b"\x89PNG\r\n\x1a\n"]
    for kind, start, length in _png_chunks(file):
        if kind in (b"IHDR", b"eXIf", b"iTXt", b"zTXt", b"tEXt"):
            file.seek(start - 8)
            kept.append(file.read(length + 12))
    kept += [struct.pack(">I", 0) + kind + struct.pack(">I", zlib.crc32(kind)) for kind in (b"IDAT", b"IEND")]
    return BytesIO(b"".join(kept))


def _to_rgb(image: ImageFile.ImageFile, where: str, official: bool) -> Image.Image:
    grey_16 = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")  # Pillow scales PPM of more than 8 bits to 0..65535
    if image.mode in ("I", "F") and not grey_16:
        kind = "floating-point" if image.mode == "F" else "signed or 32-bit integer"
        raise DataError(
            f"{where}: nothing says which of its values is white",
            kind="unreadable picture",
            got=f"{kind} pixels from {_extremes(image)}",
            expected="8 or 16 bits per channel",
            cure="scale the picture and save it as 8 or 16 bit",
        )
    if official:
        return image.convert("RGB")
    if grey_16:
        return _from_16_bit(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _from_16_bit(image: ImageFile.ImageFile) -> Image.Image:
    """Grey of 9 to 16 bits -> RGB by the format's own white, never by the picture's brightest value."""
    values = np.asarray(image).astype(np.uint32)
    tags = getattr(image, "tag_v2", {})
    white = 2 ** min(tags.get(258, (16,))[0], 16) - 1
    grey = ((values * 255 + white // 2) // white).clip(0, 255).astype(np.uint8)
    if tags.get(262) == 0:  # TIFF: white is zero, which Pillow undoes for 1 and 8 bits only
        grey = 255 - grey
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey).convert("RGB")


def _extremes(image: Image.Image) -> str:
    values = np.asarray(image)
    return f"{values.min():g} to {values.max():g}"
