"""From bytes to RGB: orientation, modes, limits, damaged files."""

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile
from PIL.PngImagePlugin import PngInfo

from vlm.data.sample import held
from vlm.errors import DataError, EnvironmentProblem
from vlm.images import Limits, open_picture, upright_size

RED, GREEN, BLUE, YELLOW = (220, 20, 20), (20, 200, 20), (20, 20, 220), (230, 220, 20)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(width: int = 40, height: int = 24) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *chunks: bytes, depth: int = 8, color: int = 2) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)) + b"".join(chunks)


def pixels(data: bytes, **options: Any) -> np.ndarray:
    picture = open_picture(data, **options)
    assert picture.mode == "RGB"
    assert type(picture) is Image.Image
    return np.asarray(picture)


# Orientation


def corners() -> Image.Image:
    image = Image.new("RGB", (48, 32))
    for color, place in ((RED, (0, 0)), (GREEN, (24, 0)), (BLUE, (0, 16)), (YELLOW, (24, 16))):
        image.paste(color, (*place, place[0] + 24, place[1] + 16))
    return image


STORED = {  # how the upright picture is stored under each EXIF orientation
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", STORED)
def test_orientation_is_applied_once(kind: str, orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}, "AVIF": {"quality": 95}}.get(kind, {})
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](np.asarray(corners()))))
    data = encoded(stored, kind, exif=exif, **options)
    (tmp_path / "photo").write_bytes(data)
    picture = open_picture(data)
    assert picture.size == upright_size(data) == upright_size(tmp_path / "photo") == (48, 32)
    for place, color in (((4, 4), RED), ((44, 4), GREEN), ((4, 28), BLUE), ((44, 28), YELLOW)):
        assert np.abs(np.subtract(np.asarray(picture)[place[::-1]], color)).max() <= 12
    assert not picture.getexif()


def test_orientation_behind_the_pixels_of_a_png() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = encoded(noise(), "PNG")
    data = whole[:-12] + chunk(b"eXIf", exif.tobytes()[6:]) + whole[-12:]
    assert open_picture(data).size == upright_size(data) == (24, 40)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("block", [b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0", b"Exif\0\0"])
def test_unreadable_exif_is_no_orientation(block: bytes) -> None:
    data = encoded(noise(), "JPEG", exif=block)
    assert open_picture(data).size == upright_size(data) == (40, 24)


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_unknown_orientation_is_none(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert open_picture(encoded(noise(), "JPEG", exif=exif)).size == (40, 24)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_an_orientation_in_xmp_alone_counts_for_nothing(kind: str) -> None:
    """Viewers do not look there; Pillow does, but not for the size that it declares of a TIFF."""
    words = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    text = PngInfo()
    text.add_itxt("XML:com.adobe.xmp", words)
    options: dict[str, Any] = {"TIFF": {"tiffinfo": {700: words.encode()}}, "PNG": {"pnginfo": text}}.get(kind, {"xmp": words.encode()})
    data = encoded(noise(), kind, **options)
    shown = held(Image.open(io.BytesIO(data))).read() if kind != "TIFF" else data  # a TIFF in memory was turned by Pillow
    assert open_picture(data).size == upright_size(data) == open_picture(shown).size == (40, 24)


# Modes


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_opaque_modes_keep_their_colours(mode: str, kind: str) -> None:
    image = noise().convert(mode)
    assert np.array_equal(pixels(encoded(image, kind)), np.asarray(image.convert("RGB")))


def test_transparency_lies_on_white_or_is_dropped_as_released() -> None:
    image = Image.new("RGBA", (4, 2), (100, 0, 0, 0))
    image.putpixel((1, 0), (100, 0, 0, 255))
    image.putpixel((2, 0), (100, 0, 0, 51))
    data = encoded(image, "PNG")
    assert pixels(data)[0, :3].tolist() == [[255, 255, 255], [100, 0, 0], [224, 204, 204]]
    assert (pixels(data, official=True) == (100, 0, 0)).all()
    grey = encoded(image.convert("LA"), "PNG")
    assert pixels(grey)[0, 0].tolist() == [255] * 3
    assert pixels(grey, official=True)[0, 0].tolist() == [30] * 3


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "1"])
def test_transparent_colour_lies_on_white(mode: str) -> None:
    image = Image.new("RGB", (4, 2), "white").convert(mode)
    image.putpixel((0, 0), {"P": 7, "L": 9, "RGB": (1, 2, 3), "1": 0}[mode])
    data = encoded(image, "PNG", transparency={"P": 7, "L": 9, "RGB": (1, 2, 3), "1": 0}[mode])
    assert pixels(data)[0, 0].tolist() == [255] * 3
    assert pixels(data, official=True)[0, 0].tolist() != [255] * 3


def test_transparent_values_of_other_depths_lie_on_white() -> None:
    """A PNG says them in its own bits, Pillow gives 8."""

    def shown(depth: int, color: int, row: bytes, key: tuple[int, ...], width: int) -> list[Any]:
        data = png(width, 1, chunk(b"tRNS", struct.pack(f">{len(key)}H", *key)), chunk(b"IDAT", zlib.compress(b"\0" + row)), chunk(b"IEND", b""), depth=depth, color=color)
        return pixels(data)[0].tolist()

    grey = lambda *values: [[value] * 3 for value in values]  # noqa: E731
    assert shown(4, 0, b"\x03", (3,), 2) == grey(0, 255)
    assert shown(2, 0, b"\x1b", (1,), 4) == grey(0, 255, 170, 255)
    assert shown(1, 0, b"\x0f", (0,), 8) == grey(*[255] * 8)
    assert shown(16, 2, struct.pack(">6H", 1000, 1000, 1000, 65535, 0, 0), (1000, 1000, 1000), 2) == [[255, 255, 255], [255, 0, 0]]
    assert shown(16, 0, struct.pack(">2H", 1000, 5140), (1000,), 2) == grey(255, 20)


RAMP = np.linspace(0, 65535, 64).round().astype(np.uint16)[None].repeat(3, 0)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_divided_by_257(kind: str) -> None:
    got = pixels(encoded(Image.fromarray(RAMP), kind))
    assert np.abs(got[:, :, 0].astype(int) - RAMP / 257).max() <= 0.5
    assert len(np.unique(got)) == 64
    dark = pixels(encoded(Image.fromarray(RAMP // 16), kind))
    assert dark.max() == 16, "the brightest value of a picture is not white"


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_official_colours_are_those_of_pillow(kind: str) -> None:
    """16 bits, of which Pillow shows all above 255 as white."""
    data = encoded(Image.fromarray(RAMP // 128), kind)
    got = pixels(data, official=True)
    assert np.array_equal(got, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert got[0, :, 0].tolist() == (RAMP[0] // 128).clip(max=255).tolist()


def tiff(order: str, bits: int, strip: bytes) -> bytes:
    """A grey TIFF of 64 x 3 pixels, uncompressed; order: "<" or ">"."""
    entries = {256: 64, 257: 3, 258: bits, 259: 1, 262: 1, 273: 110, 278: 3, 279: len(strip)}
    directory = b"".join(struct.pack(f"{order}HHI", tag, 3, 1) + struct.pack(f"{order}HH", value, 0) for tag, value in entries.items())
    return {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HIH", 42, 8, len(entries)) + directory + b"\0" * 4 + strip


def test_tiff_of_other_orders_and_depths() -> None:
    big = pixels(tiff(">", 16, RAMP.astype(">u2").tobytes()))
    assert np.abs(big[:, :, 0].astype(int) - RAMP / 257).max() <= 0.5
    values = (RAMP // 16).reshape(-1, 2).astype(np.uint32)
    packed = b"".join(int(first << 12 | second).to_bytes(3, "big") for first, second in values)
    twelve = pixels(tiff("<", 12, packed))
    assert np.abs(twelve[:, :, 0].astype(int) - (RAMP // 16) * (255 / 4095)).max() <= 0.5


def test_white_is_zero_of_16_bits() -> None:
    image = Image.fromarray(RAMP)
    got = pixels(encoded(image, "TIFF", tiffinfo={262: 0}))
    assert (got[0, 0].tolist(), got[0, -1].tolist()) == ([255] * 3, [0] * 3)


def test_16_bit_png_with_alpha_and_colour_key() -> None:
    rows = b"".join(b"\0" + struct.pack(">HHHH", 65535, 0, 32896, 65535) + struct.pack(">HHHH", 65535, 0, 0, 0) for _ in range(2))
    data = png(2, 2, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""), depth=16, color=6)
    assert pixels(data)[0].tolist() == [[255, 0, 128], [255, 255, 255]]
    rows = b"".join(b"\0" + struct.pack(">HH", 300, 0) for _ in range(2))
    data = png(2, 2, chunk(b"tRNS", struct.pack(">H", 300)), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""), depth=16, color=0)
    assert pixels(data)[0].tolist() == [[255] * 3, [0] * 3]


@pytest.mark.parametrize("values", [np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8), np.arange(64, dtype=np.int32).reshape(8, 8)], ids=["float", "int32"])
def test_modes_without_a_white_are_refused_with_their_range(values: np.ndarray) -> None:
    with pytest.raises(DataError, match=rf"scan\.tif.*got (floating-point|signed or 32-bit integer) pixels from 0 to {values.max():g}.*16 bit"):
        open_picture(encoded(Image.fromarray(values), "TIFF"), where="scan.tif")


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind: str) -> None:
    bars = Image.new("RGB", (64, 16))
    for place, color in enumerate(((220, 30, 30), (255, 255, 255), (0, 0, 0), (30, 30, 220))):
        bars.paste(color, (16 * place, 0, 16 * place + 16, 16))
    got = pixels(encoded(bars.convert("CMYK"), kind))
    assert np.abs(got[8, 8::16].astype(int) - np.asarray(bars)[8, 8::16]).max() <= 40


def test_animations_give_their_first_frame() -> None:
    frames = [noise(), Image.new("RGB", (40, 24), "red")]
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert np.array_equal(pixels(data), np.asarray(frames[0])), kind
        assert upright_size(data) == (40, 24)
    assert open_picture(encoded(frames[0].convert("P"), "GIF", save_all=True, append_images=frames[1:])).size == (40, 24)


# Damaged files

FORMATS = [
    ("JPEG", {}),
    ("JPEG", {"progressive": True}),
    ("PNG", {}),
    ("WEBP", {}),
    ("WEBP", {"lossless": True}),
    ("GIF", {}),
    ("BMP", {}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("PPM", {}),
    ("AVIF", {}),
    ("JPEG2000", {}),
]


@pytest.mark.parametrize("kind, options", FORMATS, ids=lambda value: str(value))
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_cut_files(kind: str, options: dict[str, Any]) -> None:
    whole = encoded(noise(96, 64), kind, **options)
    assert open_picture(whole).size == (96, 64)
    for share in (0.02, 0.3, 0.6, 0.9, 0.99):
        with pytest.raises(DataError, match=r"^row 7, cut: the .*(truncated or corrupt|not a picture)") as raised:
            open_picture(whole[: int(len(whole) * share)], where="row 7, cut")
        assert raised.value.cure
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_cut_pngs_are_found_by_their_header_alone(tmp_path: Path) -> None:
    whole = encoded(noise(), "PNG")
    (tmp_path / "cut.png").write_bytes(whole[:-40])
    with pytest.raises(DataError, match=r"cut\.png: the picture is truncated"):
        upright_size(tmp_path / "cut.png")


@pytest.mark.parametrize("kind, options", FORMATS, ids=lambda value: str(value))
def test_trailing_garbage_changes_nothing(kind: str, options: dict[str, Any]) -> None:
    whole = encoded(noise(), kind, **options)
    assert np.array_equal(pixels(whole + b"\0garbage" * 20), pixels(whole))


@pytest.mark.parametrize("place", ["checksum", "pixels", "header", "metadata"])
def test_damaged_png(place: str) -> None:
    body = zlib.compress(b"".join(b"\0" + bytes(range(30)) for _ in range(10)))
    data = bytearray(png(10, 10, chunk(b"tEXt", b"a\0b"), chunk(b"IDAT", body), chunk(b"IEND", b"")))
    at = {"checksum": len(data) - 13, "pixels": len(data) - 20, "header": 17, "metadata": 43}[place]
    data[at] ^= 0x01
    with pytest.raises(DataError, match=r"bad\.png: the picture is truncated or corrupt"):
        open_picture(bytes(data), where="bad.png")


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "the picture file is empty. got 0 bytes"),
        (b"<html>not found</html>", r"not a picture. got a file that starts with b'<html>no'; expected one of JPEG, PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        (b"\xff\xd8\xff", "truncated or corrupt"),
        (b"\x89PNG\r\n\x1a\n", "truncated"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "truncated or corrupt"),
        (png(0, 5, chunk(b"IDAT", b""), chunk(b"IEND", b"")), "empty|corrupt"),
    ],
    ids=["empty", "html", "eps", "jpeg start", "png start", "webp start", "no width"],
)
def test_no_pictures(data: bytes, message: str) -> None:
    for read in (open_picture, upright_size):
        with pytest.raises(DataError, match=message) as raised:
            read(data, where="row 3")
        assert str(raised.value).startswith("row 3: ")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jpg: there is no such picture file"):
        upright_size(tmp_path / "gone.jpg")


def test_switched_on_truncation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(EnvironmentProblem, match="LOAD_TRUNCATED_IMAGES"):
        open_picture(encoded(noise(), "PNG"))


# Limits


def bombs() -> dict[str, bytes]:
    """Few bytes that declare 60000 x 50000 pixels."""
    jpeg = encoded(noise(), "JPEG")
    frame = jpeg.index(b"\xff\xc0") + 5
    return {
        "png": png(60000, 50000, chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b"")),
        "jpeg": jpeg[:frame] + struct.pack(">HH", 50000, 60000) + jpeg[frame + 4 :],
        "gif": encoded(noise().convert("P"), "GIF")[:6] + struct.pack("<HH", 60000, 50000) + encoded(noise().convert("P"), "GIF")[10:],
        "bmp": encoded(noise(), "BMP")[:18] + struct.pack("<ii", 60000, 50000) + encoded(noise(), "BMP")[26:],
        "ppm": b"P6 60000 50000 255\n\0\0\0",
    }


@pytest.mark.parametrize("kind", bombs())
def test_declared_size_is_checked_before_decoding(kind: str, tmp_path: Path) -> None:
    (tmp_path / "bomb").write_bytes(bombs()[kind])
    for read in (lambda: open_picture(bombs()[kind], where="bomb"), lambda: upright_size(tmp_path / "bomb", where="bomb")):
        with pytest.raises(DataError, match=r"^bomb: .*got 60000 x 50000 = 3,000,000,000 pixels; expected at most 89,478,485.*raise the limit `max_pixels`"):
            read()
    assert Image.MAX_IMAGE_PIXELS == 89_478_485


def test_refusing_takes_no_memory() -> None:
    code = (
        "import resource, sys; from vlm.images import open_picture; from vlm.errors import DataError\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "data = sys.stdin.buffer.read()\n"
        "before = peak()\n"
        "try: open_picture(data)\n"
        "except DataError: print(peak() - before)\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], input=bombs()["png"], capture_output=True, check=True, cwd=Path(__file__).resolve().parents[2])
    assert int(answer.stdout) < 64


def test_limits_are_settings() -> None:
    data = encoded(noise(40, 24), "PNG")
    with pytest.raises(DataError, match=r"got 40 x 24 = 960 pixels; expected at most 959"):
        open_picture(data, limits=Limits(max_pixels=959))
    assert open_picture(data, limits=Limits(max_pixels=960)).size == (40, 24)
    with pytest.raises(DataError, match=rf"got {len(data):,} bytes; expected at most {len(data) - 1:,}.*make it smaller"):
        open_picture(data, limits=Limits(max_bytes=len(data) - 1))
    assert open_picture(data, limits=Limits(max_bytes=len(data))).size == (40, 24)


@pytest.mark.filterwarnings("error")
def test_a_raised_limit_does_not_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow would refuse 960 pixels
    assert open_picture(encoded(noise(40, 24), "PNG")).size == (40, 24)


# The field folder itself


def field(folder: Path, case: str) -> tuple[Path, dict[str, Any]]:
    if not (folder / case).is_dir():
        pytest.skip(f"{folder} has no {case}")
    return folder / case, json.loads((folder / case / "expected.json").read_text())


def test_field_orientation(field_folder: Path) -> None:
    folder, expected = field(field_folder, "image_exif_orientation")
    wanted = expected["corners_after_orientation"]
    for name, (_, upright) in expected["stored_then_upright_size"].items():
        picture = open_picture((folder / name).read_bytes(), where=name)
        assert list(picture.size) == list(upright_size(folder / name)) == upright
        right, low = picture.width - 4, picture.height - 4
        for place, key in (((4, 4), "tl"), ((right, 4), "tr"), ((4, low), "bl"), ((right, low), "br")):
            assert np.abs(np.subtract(np.asarray(picture)[place[::-1]], wanted[key])).max() <= expected["corner_pixel_tolerance"], (name, key)


def test_field_truncated(field_folder: Path) -> None:
    folder, expected = field(field_folder, "image_truncated")
    for name in expected["fine"]:
        open_picture((folder / name).read_bytes())
    for name in expected["bad"]:
        with pytest.raises(DataError, match=f"^{name}: "):
            open_picture((folder / name).read_bytes(), where=name)
    for one, other in expected["equal_pixels"]:
        assert np.array_equal(pixels((folder / one).read_bytes()), pixels((folder / other).read_bytes()))
    assert ImageFile.LOAD_TRUNCATED_IMAGES is expected["ImageFile.LOAD_TRUNCATED_IMAGES"]


def test_field_16bit(field_folder: Path) -> None:
    folder, expected = field(field_folder, "image_16bit")
    grey = pixels((folder / "gray16.png").read_bytes())[0, :, 0].astype(int)
    wanted = expected["gray16.png"]
    assert np.abs(grey[[0, 32, -1]] - [wanted["first"], wanted["middle_col_32"], wanted["last"]]).max() <= wanted["tolerance"]
    assert len(np.unique(grey)) == wanted["distinct_values"]
    assert abs(int(pixels((folder / "gray12_in_16.png").read_bytes())[0, -1, 0]) - expected["gray12_in_16.png"]["last"]) <= expected["gray12_in_16.png"]["tolerance"]
    colour = pixels((folder / "rgb16.png").read_bytes())[0].astype(int)
    assert np.abs(colour[[0, -1]] - [expected["rgb16.png"]["first"], expected["rgb16.png"]["last"]]).max() <= expected["rgb16.png"]["tolerance"]
    for name in ("float.tif", "int32.tif"):
        with pytest.raises(DataError, match=name):
            open_picture((folder / name).read_bytes(), where=name)


def test_field_cmyk(field_folder: Path) -> None:
    folder, expected = field(field_folder, "image_cmyk")
    for name in expected["files_that_must_match"]:
        picture = open_picture((folder / name).read_bytes())
        assert list(picture.size) == expected["size"]
        for place, color in zip(expected["centres"], expected["colours"], strict=True):
            assert np.abs(np.subtract(np.asarray(picture)[tuple(place[::-1])], color)).max() <= expected["tolerance"], name


def test_field_bomb(field_folder: Path) -> None:
    folder, expected = field(field_folder, "image_bomb")
    assert Limits().max_pixels == expected["default_limit_pixels"]
    for name, count in expected["declared_pixels"].items():
        with pytest.raises(DataError, match=rf"{name}: .* = {count:,} pixels; expected at most 89,478,485.*`max_pixels`"):
            open_picture((folder / name).read_bytes(), where=name)
    wide = Limits(max_pixels=200_000_000)
    with pytest.raises(DataError, match="60000 x 60000"):
        open_picture((folder / "declares_60000x60000.png").read_bytes(), limits=wide)
    with pytest.raises(DataError, match="truncated"):
        open_picture((folder / "declares_13817x8511.png").read_bytes(), limits=wide)
    if os.environ.get("VLM_FIELD"):  # 350 MiB: only where the folder is asked for
        honest = open_picture((folder / "honest_13816x8511_1bit.png").read_bytes(), limits=wide)
        assert (honest.size, honest.getextrema()) == ((13816, 8511), ((0, 0), (0, 0), (0, 0)))
