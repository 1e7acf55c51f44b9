"""Tar shards: what is found in them, how they are read, what is said about broken ones; on files of the test's own making and on the field cases."""

import bz2
import functools
import gzip
import http.server
import io
import json
import lzma
import os
import pickle
import shutil
import tarfile
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from vlm.data import readers
from vlm.data.llava import LlavaSource
from vlm.data.mixture import WINDOW, Mixture
from vlm.data.sample import Picture, Sample
from vlm.data.shards import Shard, ShardWriter
from vlm.data.tar import TarReader, TarSource
from vlm.data.tarindex import index_of, load_index
from vlm.errors import DataError

pytestmark = [pytest.mark.filterwarnings("ignore:This DataLoader will create"), pytest.mark.filterwarnings("ignore:.*no index beside it")]
STREAM = pytest.mark.parametrize("stream", [False, True])


def tar(path: Path, *members: tuple[str, bytes | tarfile.TarInfo], form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form, encoding="utf-8") as archive:
        for name, content in members:
            header = tarfile.TarInfo(name) if isinstance(content, bytes) else content
            header.name = name
            if isinstance(content, bytes):
                header.size = len(content)
            archive.addfile(header, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


def special(kind: bytes, target: str = "") -> tarfile.TarInfo:
    header = tarfile.TarInfo()
    header.type, header.linkname = kind, target
    return header


def text(words: str) -> bytes:
    return json.dumps({"text": words}).encode()


def captioned(number: int) -> list[tuple[str, bytes]]:
    return [(f"p{number}.jpg", b"picture %d" % number), (f"p{number}.json", text(f"p{number}"))]


def opened(file: Path | str, **settings: Any) -> TarReader:
    return TarSource(file=str(file), **settings).open()


def said(reader: TarReader) -> list[str]:
    return [sample.turns[-1].text for sample in reader]


def plain(sample: Sample) -> Any:
    """A sample with its pictures' bytes in the place of their addresses."""
    turns = [(turn.role, turn.supervised, turn.kind, [part.read() if isinstance(part, Picture) else part for part in turn.parts]) for turn in sample.turns]
    return sample.id, sample.independent, sample.notes, turns


def refusal(file: Path | str, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        opened(file, **settings)
    return str(caught.value)


def test_registered_with_its_name():
    assert readers.get("tar") is TarSource


# Names and groups

NAMES = [
    *(("images17/0001.jpg", b"a"), ("images17/0001.json", text("t1"))),
    *(("22.05.png", b"b"), ("22.05.json", text("x")), ("22.06.png", b"c"), ("22.06.json", text("y"))),
    *(("train.v1/0001.jpg", b"d"), ("train.v1/0001.json", text("t3")), ("train.v1/0002.JPG", b"e"), ("train.v1/0002.Json", text("t4"))),
    *(("./0003.jpg", b"f"), ("./0003.txt", b"t6\n"), ("pair/0004.left.jpg", b"g"), ("pair/0004.right.jpg", b"h"), ("pair/0004.json", text("t7"))),
    *(("noext", b"i"), (".hidden.jpg", b"j")),
]


def check_names(reader: TarReader, keys: list[str]) -> None:
    assert [sample.id for sample in reader] == keys
    assert [sample.where.rpartition(", sample ")[2] for sample in reader] == keys
    report = "\n".join(reader.warnings)
    assert all(line in report for line in ("dots in the base name: 2 samples fell together: 22 in", "no extension: noext in", "hidden file: .hidden.jpg in"))
    assert [str(error).rpartition(", sample ")[2] for error in reader.bad] == ["22: dots in the base name: 2 samples fell together"]


@STREAM
def test_names_follow_the_convention(tmp_path: Path, stream: bool):
    reader = opened(tar(tmp_path / "names.tar", *NAMES), stream=stream)
    check_names(reader, ["images17/0001", "train.v1/0001", "train.v1/0002", "0003", "pair/0004"])
    assert said(reader) == ["t1", "t3", "t4", "t6", "t7"]
    assert [[picture.read() for picture in sample.pictures] for sample in reader] == [[b"a"], [b"d"], [b"e"], [b"f"], [b"g", b"h"]]


@STREAM
def test_field_names(field_folder: Path, tmp_path: Path, stream: bool):
    case = field_folder / "data_wds_names"
    expected = json.loads((case / "expected.json").read_text())["right"]
    reader = opened(shutil.copyfile(case / "names.tar", tmp_path / "names.tar"), stream=stream)
    assert len(reader) == expected["samples"]
    check_names(reader, expected["keys"])
    assert len(reader[4].pictures) == 2


@STREAM
def test_members_of_a_sample_need_not_be_neighbours(tmp_path: Path, stream: bool):
    members = [member for number in range(20) for member in captioned(number)]
    mixed = [*members[1::2], *reversed(members[::2])]
    reader = opened(tar(tmp_path / "a.tar", *mixed), stream=stream)
    assert said(reader) == [f"p{number}" for number in range(20)]
    assert [sample.pictures[0].read() for sample in reader] == [b"picture %d" % number for number in range(20)]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(tmp_path: Path, form: int):
    folder = "/".join(["größe-图片" * 5, "x" * 90] * 3)
    path = tar(tmp_path / "a.tar", (f"{folder}/{'k' * 150}.jpg", b"one"), (f"{folder}/{'k' * 150}.json", text("long")), *captioned(1), form=form)
    with tarfile.open(path) as archive:
        places = {(member.name, member.offset_data, member.size) for member in archive}
    index, _ = load_index(str(path))
    assert {tuple(member) for sample in range(len(index)) for member in index.members(sample)} == places
    reader = opened(path)
    assert said(reader) == ["long", "p1"]
    assert reader[0].id == f"{folder}/{'k' * 150}"
    assert reader[0].pictures[0].read() == b"one"


def test_what_is_no_file_is_skipped_and_named(tmp_path: Path):
    odd = [
        ("folder", special(tarfile.DIRTYPE)),
        ("l.jpg", special(tarfile.SYMTYPE, "/etc/passwd")),
        ("h.json", special(tarfile.LNKTYPE, "p0.json")),
        ("d.json", special(tarfile.CHRTYPE)),
    ]
    reader = opened(tar(tmp_path / "a.tar", *odd, *captioned(0)))
    assert said(reader) == ["p0"]
    report = "\n".join(reader.warnings)
    assert all(line in report for line in ("1 left out, directory: folder in a.tar", "2 left out, link: l.jpg in a.tar, h.json in a.tar", "no regular file: d.json"))


def test_sparse_files_are_stepped_over(tmp_path: Path):
    """An old GNU sparse file has tables behind its header, one with a flag for the next."""
    path = tar(tmp_path / "a.tar", ("s.json", b"12345"), *captioned(0))
    raw = bytearray(path.read_bytes())
    raw[156:157], raw[257:265], raw[482] = tarfile.GNUTYPE_SPARSE, b"ustar  \0", 1
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    first, last = bytearray(512), bytearray(512)
    first[504] = 1
    path.write_bytes(raw[:512] + first + last + raw[512:])
    reader = opened(path)
    assert said(reader) == ["p0"]
    assert "sparse file: s.json" in reader.warnings[0]


def test_of_two_members_of_one_name_the_last_counts_and_both_are_reported(tmp_path: Path):
    reader = opened(tar(tmp_path / "a.tar", ("p.jpg", b"old"), ("p.json", text("old")), ("p.jpg", b"new"), ("p.json", text("new"))))
    assert said(reader) == ["new"]
    assert reader[0].pictures[0].read() == b"new"
    assert "2 left out, twice in the shard (the last one counts): p.jpg in a.tar, p.json in a.tar" in reader.warnings


def test_many_skipped_members_are_counted_and_the_first_named(tmp_path: Path):
    reader = opened(tar(tmp_path / "a.tar", *((f"._{number}.jpg", b"") for number in range(30)), *captioned(0)))
    assert reader.warnings == ("30 left out, hidden file: " + ", ".join(f"._{number}.jpg in a.tar" for number in range(5)) + " and 25 more",)


# Broken shards


@STREAM
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_cut_at_any_block_is_never_silent(tmp_path: Path, form: int, stream: bool):
    whole = tar(tmp_path / "whole.tar", ("f" * 60 + "/" + "k" * 60 + ".json", text("long")), *captioned(0), *captioned(1), form=form).read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    for length in [*range(512, len(whole) + 1, 512), 700, end - 100, end + 100]:
        path = tmp_path / f"cut-{length}.tar"
        path.write_bytes(whole[:length])
        if length >= end + 512:
            assert len(opened(path, stream=stream)) == 3, length  # the ends of archives are zeros, and one block of them is enough
        else:
            message = refusal(path, stream=stream)
            assert f"{path.name} is cut: it ends at byte {length:,}" in message
            assert "the last whole member is" in message


def test_a_cut_shard_names_its_last_whole_member(tmp_path: Path):
    path = tar(tmp_path / "a.tar", *captioned(0), *captioned(1))
    path.write_bytes(path.read_bytes()[: 7 * 512])
    assert "a.tar is cut: it ends at byte 3,584 in the middle of the archive. got the last whole member is p1.jpg" in refusal(path)


@STREAM
@pytest.mark.parametrize("content", [b"<html>404</html>" * 40, b"<html>", b"\x89PNG" + bytes(2000), b'{"a": 1}' * 100])
def test_what_is_no_tar_is_called_so(tmp_path: Path, content: bytes, stream: bool):
    (tmp_path / "a.tar").write_bytes(content)
    assert "a.tar is not a tar file" in refusal(tmp_path / "a.tar", stream=stream)


def test_a_damaged_header_and_a_hole_of_zeros_are_named_with_their_place(tmp_path: Path):
    whole = tar(tmp_path / "a.tar", *captioned(0), *captioned(1)).read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:2048] + b"x" + whole[2049:])
    assert "a.tar is damaged at byte 2,048" in refusal(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(whole[:2048] + bytes(1024) + whole[3072:])
    assert "a.tar goes on behind the end of its archive, which is at byte 2,048" in refusal(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(whole * 2)
    assert "shards that were joined are to be listed one by one" in refusal(tmp_path / "a.tar")


@pytest.mark.parametrize("records", [b"12 path=", b"-5 size=-5\n", b"999999999 path=a\n", b"0 a=b\n", b"x y=z\n", b"11 size=-51\n", b"5011 size=" + b"9" * 5000 + b"\n"])
def test_hostile_extended_headers_end(tmp_path: Path, records: bytes):
    path = tar(tmp_path / "a.tar", ("pax", records), *captioned(0))
    raw = bytearray(path.read_bytes())
    raw[156:157], raw[148:156] = tarfile.XHDTYPE, b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    path.write_bytes(raw)
    assert "a.tar is damaged at byte" in refusal(path)


def test_zeros_behind_the_records_of_a_pax_header_end_it(tmp_path: Path):
    raw = bytearray(tar(tmp_path / "a.tar", ("pax", b"16 path=b/c.txt\n" + bytes(9)), ("short.txt", b"words"), ("b/c.png", b"p")).read_bytes())
    raw[156:157], raw[148:156] = tarfile.XHDTYPE, b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    (tmp_path / "a.tar").write_bytes(raw)
    with tarfile.open(tmp_path / "a.tar") as archive:
        assert archive.getnames() == ["b/c.txt", "b/c.png"]
    assert [sample.id for sample in opened(tmp_path / "a.tar")] == ["b/c"]


class _Texts(Dataset[str]):
    def __init__(self, reader: TarReader):
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> str:
        return self.reader[index].turns[-1].text


def check_empty_shards(folder: Path, stream: bool) -> None:
    for name in ("s-000003.tar", "s-000005.tar"):
        shutil.move(folder / name, folder.parent / name)
    reader = opened(folder, stream=stream)
    assert "2 shards without members: s-000001.tar, s-000002.tar" in reader.warnings
    assert [reader[place].turns[-1].text for place in range(4)] == ["p0", "p1", "p2", "r0"]
    assert list(DataLoader(_Texts(reader), batch_size=None, num_workers=4, timeout=20)) == ["p0", "p1", "p2", "r0"]
    assert "s-000003.tar is cut: it ends at byte 5,120 in the middle of the archive. got the last whole member is q1.json" in refusal(folder.parent / "s-000003.tar", stream=stream)
    assert "s-000005.tar is not a tar file" in refusal(folder.parent / "s-000005.tar", stream=stream)


@STREAM
def test_empty_shards_are_named_and_more_workers_than_shards_do(tmp_path: Path, stream: bool):
    folder = tmp_path / "in"
    folder.mkdir()
    tar(folder / "s-000000.tar", *captioned(0), *captioned(1), *captioned(2))
    (folder / "s-000001.tar").write_bytes(b"")
    (folder / "s-000002.tar").write_bytes(bytes(10240))
    whole = tar(folder / "s-000003.tar", ("q0.jpg", bytes(600)), ("q0.json", text("q0")), ("q1.jpg", bytes(600)), ("q1.json", text("q1")), ("q2.jpg", bytes(600))).read_bytes()
    (folder / "s-000003.tar").write_bytes(whole[:5120])
    tar(folder / "s-000004.tar", ("r0.jpg", b"r"), ("r0.json", text("r0")))
    (folder / "s-000005.tar").write_bytes(b"<html>404</html>" * 40)
    check_empty_shards(folder, stream)


@STREAM
def test_field_empty_shards(field_folder: Path, tmp_path: Path, stream: bool):
    folder = tmp_path / "in"
    folder.mkdir()
    for path in (field_folder / "data_wds_empty_shards").glob("*.tar"):
        shutil.copyfile(path, folder / path.name)
    check_empty_shards(folder, stream)


def test_shards_without_any_sample_are_refused(tmp_path: Path):
    (tmp_path / "a.tar").write_bytes(b"")
    assert "a.tar holds no samples" in refusal(tmp_path / "a.tar")
    assert "dots in the base name" in refusal(tar(tmp_path / "b.tar", *NAMES[2:6]))
    assert "got 1 left out, hidden file: .a.json in c.tar; 1 left out, no extension: b in c.tar" in refusal(tar(tmp_path / "c.tar", (".a.json", b"{}"), ("b", b"")))


# The same content as JSON

CONTENT: list[tuple[dict[str, Any], list[str]]] = [
    ({"id": "a", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "größe 图片"}]}, ["0.png"]),
    ({"id": "b", "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]}, []),
    ({"id": "c", "conversations": [{"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "first"}]}, ["1.png", "0.jpg"]),
    ({"id": "d", "independent": True, "conversations": [{"from": "human", "value": "<image>q", "kind": "k"}, {"from": "gpt", "value": "a"}] * 1}, ["2.webp"]),
    ({"id": "e", "messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "bye"}]}, ["0.png"]),
]


def both(folder: Path) -> tuple[str, str]:
    """CONTENT as a LLaVA file, and as shards that name no pictures."""
    records = [record | ({"image": names} if names else {}) for record, names in CONTENT]
    for name in {name for _, names in CONTENT for name in names}:
        (folder / name).write_bytes(name.encode() * 300)
    (folder / "train.json").write_text(json.dumps(records), encoding="utf-8")
    with ShardWriter(folder / "shards", prefix="train", per_shard=2) as out:
        for number, (record, names) in enumerate(CONTENT):
            pictures = {f"{place}.{name.rpartition('.')[2]}": (folder / name).read_bytes() for place, name in enumerate(names)}
            out.write(f"{number:04d}", {"json": json.dumps(record).encode(), **pictures})
    return str(folder / "train.json"), str(folder / "shards")


@STREAM
def test_the_samples_are_those_of_the_json_reader(tmp_path: Path, stream: bool):
    file, shards = both(tmp_path)
    reader = opened(shards, stream=stream)
    assert len(reader) == len(CONTENT)
    assert [plain(sample) for sample in reader] == [plain(sample) for sample in LlavaSource(file=file).open()]


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.bz2", "tar.xz"])
def test_streamed_is_random_access(tmp_path: Path, suffix: str):
    _, shards = both(tmp_path)
    pack = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "tar": bytes}[suffix.rpartition(".")[2]]
    (tmp_path / "packed").mkdir()
    for path in sorted(Path(shards).glob("*.tar")):
        (tmp_path / "packed" / f"{path.stem}.{suffix}").write_bytes(pack(path.read_bytes()))
    reader = opened(tmp_path / "packed", stream=True)
    assert [plain(sample) for sample in reader] == [plain(sample) for sample in opened(shards)]
    assert reader.blocks == (2, 2, 1)
    assert all(picture.data is not None for sample in reader for picture in sample.pictures)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is counted a second time
        again = opened(tmp_path / "packed", stream=True)
    assert again.file_hash() == reader.file_hash()
    assert (reader.file_hash() == opened(shards).file_hash()) == (suffix == "tar")
    assert plain(pickle.loads(pickle.dumps(reader))[4]) == plain(reader[4])


def test_compressed_shards_need_streaming(tmp_path: Path):
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(tar(tmp_path / "a.tar", *captioned(0)).read_bytes()))
    message = refusal(path)
    assert "is compressed with gzip" in message
    assert "`stream: true`" in message
    (tmp_path / "a.tar").unlink()
    assert "holds compressed shards" in refusal(tmp_path)
    (tmp_path / "z.tar").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(600))
    for stream in (False, True):
        assert "is compressed with zstd" in refusal(tmp_path / "z.tar", stream=stream)


def test_a_cut_compressed_shard_is_never_silent(tmp_path: Path):
    packed = gzip.compress(tar(tmp_path / "a.tar", *(member for number in range(8) for member in captioned(number))).read_bytes())
    for length in [*range(20, len(packed) - 8, 7), len(packed) - 8, len(packed) - 1]:  # the last two lack only the sum of the content
        path = tmp_path / f"{length}.tar.gz"
        path.write_bytes(packed[:length])
        message = refusal(path, stream=True)
        assert path.name in message
        assert any(words in message for words in ("is cut", "is not a tar file")), message
    noise = [("p0.json", text("p0")), ("p1.jpg", os.urandom(30_000))]
    (tmp_path / "c.tar.gz").write_bytes(gzip.compress(tar(tmp_path / "c.tar", *noise).read_bytes())[:20_000])
    assert "the last whole member is p0.json" in refusal(tmp_path / "c.tar.gz", stream=True)
    (tmp_path / "b.tar.gz").write_bytes(packed[: len(packed) // 2] + b"\0\0\0\0" + packed[len(packed) // 2 + 4 :])
    assert "b.tar.gz" in refusal(tmp_path / "b.tar.gz", stream=True)


# Records


def record_of(tmp_path: Path, record: Any, *pictures: str, **settings: Any) -> Sample:
    content = record if isinstance(record, bytes) else json.dumps(record).encode()
    return opened(tar(tmp_path / "a.tar", ("x/k.json", content), *((f"x/k.{name}", name.encode()) for name in pictures)), **settings)[0]


ASK = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize("name", ["x/k.left.jpg", "./x/k.left.jpg", "left.jpg", "LEFT.JPG", "k.left.jpg", "coco/train/k.left.jpg"])
def test_a_record_names_pictures_by_member_extension_or_base_name(tmp_path: Path, name: str):
    for image in (name, [name], {"path": name, "bytes": None}):
        assert [picture.read() for picture in record_of(tmp_path, {"image": image, "conversations": ASK}, "right.jpg", "left.jpg").pictures] == [b"left.jpg"]
        (tmp_path / "a.tar.index").unlink()
    parts = [{"type": "image_url", "image_url": {"url": name}}, {"type": "text", "text": "?"}]
    record = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "a"}]}
    assert [picture.read() for picture in record_of(tmp_path, record, "right.jpg", "left.jpg").pictures] == [b"left.jpg"]


def test_other_pictures_come_from_the_folder_that_is_named(tmp_path: Path):
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "o.png").write_bytes(b"outside")
    record = {"image": "o.png", "conversations": ASK}
    with pytest.raises(DataError, match=r"a\.tar, sample x/k: no member is the picture 'o\.png'\. got the members k\.json, k\.jpg"):
        record_of(tmp_path, record, "jpg")
    assert record_of(tmp_path, record, "jpg", images=str(tmp_path / "img")).pictures[0].read() == b"outside"
    for name in ("../a.tar", str(tmp_path / "a.tar")):
        with pytest.raises(DataError, match="leads out of the folder"):
            record_of(tmp_path, {"image": name, "conversations": ASK}, images=str(tmp_path / "img"))
    with pytest.raises(DataError, match="is not a file"):
        record_of(tmp_path, {"image": "http://127.0.0.1/o.png", "conversations": ASK})


def test_without_a_folder_of_pictures_no_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "secret.png").write_bytes(b"secret")
    monkeypatch.chdir(tmp_path)
    for image in ("secret.png", {"path": "secret.png"}, {"path": "secret.png", "bytes": None}, {"bytes": "secret.png"}, {"bytes": "secret.png", "path": "x"}):
        with pytest.raises(DataError, match=r"no member is the picture|the `bytes` of a picture are str"):
            record_of(tmp_path, {"image": image, "conversations": ASK}, "jpg")
        (tmp_path / "a.tar.index").unlink()


def test_a_caption_of_several_pictures_is_told(tmp_path: Path):
    members = [("a.jpg", b"a"), ("a.seg.png", b"s"), ("a.txt", b"a dog"), *captioned(1), ("c.jpg", b"c"), ("c.2.jpg", b"d"), ("c.json", json.dumps({"texts": []}).encode())]
    reader = opened(tar(tmp_path / "a.tar", *members, ("d.jpg", b"d"), ("d.seg.png", b"s"), ("d.json", text("json too"))))
    assert [warning.partition(";")[0] for warning in reader.warnings] == ["1 caption is learnt of several pictures together"]
    assert reader.warnings[0].endswith(": a in a.tar")
    assert [reader[place].notes for place in (0, 1, 3)] == [("caption of several pictures",), (), ("caption of several pictures",)]


@pytest.mark.parametrize("ending", ["txt", "caption"])
@pytest.mark.parametrize("metadata", [{"url": "x", "width": 4, "question": "q"}, [1, 2]])
def test_a_json_of_no_known_form_beside_a_text_is_metadata(tmp_path: Path, ending: str, metadata: Any):
    path = tar(tmp_path / "a.tar", ("k.png", b"p"), ("k.json", json.dumps(metadata).encode()), (f"k.{ending}", b"a dog"), *captioned(1), ("p1.txt", b"another"))
    reader = opened(path)
    assert said(reader) == ["a dog", "p1"]
    assert [sample.notes for sample in reader] == [("caption beside metadata",), ()]
    path = tar(tmp_path / "a.tar", ("k.png", b"p"), ("k.json", b'{"video": "k.mp4"}'), (f"k.{ending}", b"a dog"))
    with pytest.raises(DataError, match="`video` is not taken"):
        opened(path)[0]


@pytest.mark.parametrize("ending", ["txt", "caption"])
def test_captions(tmp_path: Path, ending: str):
    reader = opened(tar(tmp_path / "a.tar", ("k.png", b"p"), (f"k.{ending}", "\ufeffgrößer \n".encode())))
    assert [turn.parts for turn in reader[0].turns][1] == ("größer",)
    assert [picture.read() for picture in reader[0].pictures] == [b"p"]
    assert reader[0].notes == ()


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (b'{"a": ', "k.json is not JSON at line 1 column 7"),
        ('{"text": "é"}'.encode("latin-1"), "k.json is not UTF-8 at byte 10"),
        (b"[1]", "k.json is not an object"),
        (b"[" * 100_000, "k.json is nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "k.json holds an integer of too many digits"),
        (b'{"image": "\\ud800.png", "question": "q", "answer": "a"}', "no member is the picture '\\ud800.png'"),
        (b'{"a": 1}', "no turns"),
        (b'{"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "a"}]}', "images 1, placeholders 0"),
    ],
)
def test_bad_records_are_named_with_shard_and_key(tmp_path: Path, content: bytes, fact: str):
    with pytest.raises(DataError) as caught:
        record_of(tmp_path, content, "jpg")
    assert fact in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'a.tar'}, sample x/k: ")


def test_bad_samples_are_left_out_and_listed(tmp_path: Path):
    path = tar(tmp_path / "a.tar", *captioned(0), ("b.json", b"{"), *captioned(1), ("c.json", text("no picture")), ("d.json", text("x")), ("d.jpg", b""))
    reader = opened(path, on_bad="skip")
    assert said(reader) == ["p0", "p1"]
    assert [str(error).partition(":")[0].rpartition(" ")[2] for error in reader.bad] == ["b", "c", "d"]
    assert opened(path)[3 - 1].id == "p1"


def test_a_prepended_placeholder_is_counted(tmp_path: Path):
    record = {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "a"}]}
    assert record_of(tmp_path, record, "jpg", missing_placeholder="prepend").notes == ("placeholder prepended",)


# Which shards


def test_shards_are_named_by_path_folder_pattern_and_range(tmp_path: Path):
    for number in range(8, 12):
        tar(tmp_path / f"s-{number:03d}.tar", *captioned(number))
    tar(tmp_path / ".s-000.tar", *captioned(99))
    everything = ["p8", "p9", "p10", "p11"]
    assert said(opened(tmp_path)) == said(opened(tmp_path / "*.tar")) == said(opened(tmp_path / "s-{008..011}.tar")) == everything
    assert said(opened(tmp_path / "s-{011,009}.tar")) == ["p11", "p9"]
    assert said(opened(tmp_path / "s-{00{8,9},010}.tar".replace("{00{8,9},010}", "0{08..10}"))) == everything[:3]
    assert "2 of 6 are missing, the first:" in refusal(tmp_path / "s-{008..013}.tar")
    assert "s-012.tar" in refusal(tmp_path / "s-{008..013}.tar")
    assert "no file fits" in refusal(tmp_path / "t-*.tar")
    assert "makes no sense" in refusal(tmp_path / "s-{9..1}.tar")
    (tmp_path / "none").mkdir()
    assert "holds no shards" in refusal(tmp_path / "none")
    literal = tar(tmp_path / "s-[1]{1,2}.tar", *captioned(7))
    assert said(opened(literal)) == ["p7"]


# The index


def test_the_index_is_kept_used_and_made_anew_when_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tar(tmp_path / "a.tar", *captioned(0))
    first = opened(path)
    kept = (tmp_path / "a.tar.index").read_bytes()
    made: list[str] = []

    def counted(file: Any, length: int, shard: str) -> Any:
        made.append(shard)
        return index_of(file, length, shard)

    monkeypatch.setattr("vlm.data.tarindex.index_of", counted)
    assert said(opened(path)) == ["p0"]
    assert made == []
    for damaged in (b"", b"x", kept[: len(kept) // 2], kept.replace(b'"format": 1', b'"format": 0'), kept[:200] + b"\xff" + kept[201:]):
        (tmp_path / "a.tar.index").write_bytes(damaged)
        assert said(opened(path)) == ["p0"]
        assert (tmp_path / "a.tar.index").read_bytes() == kept
    assert len(made) == 5
    tar(path, *captioned(1), *captioned(2))
    assert said(opened(path)) == ["p1", "p2"]
    assert len(made) == 6
    with pytest.raises(DataError, match="was changed after it had been opened"):
        first[0]
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "a.tar.index"]


def test_several_may_make_the_index_at_once(tmp_path: Path):
    path = tar(tmp_path / "a.tar", *(member for number in range(200) for member in captioned(number)))
    with ThreadPoolExecutor(8) as pool:
        hashes = list(pool.map(lambda _: opened(path).file_hash(), range(16)))
    assert len(set(hashes)) == 1
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "a.tar.index"]


def test_where_the_folder_is_read_only_the_index_is_not_kept_and_that_is_said(tmp_path: Path):
    path = tar(tmp_path / "a.tar", *captioned(0))
    tmp_path.chmod(0o555)
    try:
        reader = opened(path)
        assert said(reader) == ["p0"]
        assert "1 index could not be kept beside the shards and will be made at every start: a.tar (the folder is read-only)" in reader.warnings
        assert os.listdir(tmp_path) == ["a.tar"]
    finally:
        tmp_path.chmod(0o755)


def test_the_hash_tells_content_and_not_time_or_place(tmp_path: Path):
    members = [*captioned(0), *captioned(1)]
    (tmp_path / "other").mkdir()
    path, copy = tar(tmp_path / "a.tar", *members), tmp_path / "other" / "a.tar"
    shutil.copyfile(path, copy)
    os.utime(copy, (1, 1))
    before = opened(path).file_hash()
    assert opened(copy).file_hash() == before
    assert opened(path, stream=True).file_hash() == before
    for place, name in ((0, "picture 9"), (1, '{"text": "p9"}')):
        changed = [*members[:place], (members[place][0], name.encode()), *members[place + 1 :]]
        assert opened(tar(copy, *changed)).file_hash() != before
    assert opened(tar(copy, *members[2:], *members[:2])).file_hash() != before
    long = {word: opened(tar(copy, ("a.jpg", b"a"), ("a.json", text(word + "x" * 2000)))).file_hash() for word in ("yes", "not")}
    assert long["yes"] != long["not"]


def test_random_access_to_twenty_thousand_samples_does_not_read_the_shard(tmp_path: Path):
    with ShardWriter(tmp_path, prefix="a", per_shard=20_000) as out:
        for number in range(20_000):
            out.write(f"{number:06d}", {"json": text(f"t{number}"), "png": b"%d" % number})
    size = (tmp_path / "a-000000.tar").stat().st_size

    def read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = read()
    reader = opened(tmp_path)
    opening = read() - before
    order = torch.randperm(20_000).tolist()[:2000]
    before = read()
    assert [reader[number].turns[-1].text for number in order] == [f"t{number}" for number in order]
    accessing = read() - before
    assert len(reader) == 20_000
    assert opening < size / 15  # the index
    assert accessing < 2000 * 60
    assert [reader[number].pictures[0].read() for number in order[:50]] == [b"%d" % number for number in order[:50]]
    assert len(pickle.dumps(reader)) < size / 15


# Order and workers


class _Steps(Dataset[list[str]]):
    def __init__(self, reader: TarReader, mixture: Mixture):
        self.reader, self.mixture = reader, mixture

    def __len__(self) -> int:
        return self.mixture.steps

    def __getitem__(self, step: int) -> list[str]:
        return [self.reader[index].turns[-1].text for _, index in self.mixture.step(step)]


@STREAM
def test_four_workers_over_two_shards_give_what_none_gives(tmp_path: Path, stream: bool):
    with ShardWriter(tmp_path, prefix="a", per_shard=30) as out:
        for number in range(50):
            out.write(str(number), {"json": text(f"t{number}"), "png": b"x"})
    reader = opened(tmp_path, stream=stream)
    blocks = {"a": reader.blocks} if reader.blocks else None
    steps = _Steps(reader, Mixture({"a": len(reader)}, None, 8, 0, 0, epochs=2, blocks=blocks))
    alone = list(DataLoader(steps, batch_size=None))
    assert list(DataLoader(steps, batch_size=None, num_workers=4)) == alone
    assert list(DataLoader(steps, batch_size=None, num_workers=2, sampler=range(5, len(steps)))) == alone[5:]
    assert Counter(one for step in alone for one in step) == {f"t{number}": 2 for number in range(50)}


def test_a_streamed_epoch_reads_each_shard_once_and_holds_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with ShardWriter(tmp_path, prefix="a", per_shard=20) as out:
        for number in range(400):
            out.write(str(number), {"json": text(f"t{number}"), "png": b"x"})
    reader = opened(tmp_path, stream=True)
    length = (tmp_path / "a-000000.tar").stat().st_size
    monkeypatch.setattr("vlm.data.tar.KEPT", (WINDOW + 1) * length + 1)
    read: list[str] = []
    whole = Shard.whole
    monkeypatch.setattr(Shard, "whole", lambda shard, index: (read.append(shard.path), whole(shard, index))[1])
    mixture = Mixture({"a": 400}, None, 4, 0, 0, epochs=1, blocks={"a": reader.blocks or ()})
    for step in range(mixture.steps):
        for _, index in mixture.step(step):
            assert reader[index].turns[-1].text == f"t{index}"
            assert len(reader._held) <= WINDOW + 1
    assert len(read) == len(set(read)) == 20


def test_shards_too_large_to_be_kept_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tar(tmp_path / "a.tar", *captioned(0))
    monkeypatch.setattr("vlm.data.tar.KEPT", 1000)
    assert "write smaller ones" in opened(tmp_path / "a.tar", stream=True).warnings[0]
    monkeypatch.setattr("vlm.data.shards.LARGEST", 1000)
    reader = opened(tmp_path / "a.tar", stream=True)
    with pytest.raises(DataError, match="too large to be streamed"):
        reader[0]


def test_a_streamed_shard_that_changed_is_refused(tmp_path: Path):
    reader = opened(tar(tmp_path / "a.tar", *captioned(0)), stream=True)
    tar(tmp_path / "a.tar", *captioned(1))
    with pytest.raises(DataError, match="was changed after it had been opened"):
        reader[0]


# Over the network


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        if not self.path.startswith("/to?"):
            return super().do_GET()
        self.send_response(302)
        self.send_header("Location", self.path[4:])
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_remote_shards(tmp_path: Path, served: str):
    _, shards = both(tmp_path)
    files = f"{served}/shards/train-{{000000..000002}}.tar"
    assert "`remote: true` and `stream: true`" in refusal(files)
    assert "are not files" in refusal(files, stream=True)
    local = opened(shards)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reader = opened(files, stream=True, remote=True)
    assert [plain(sample) for sample in reader] == [plain(sample) for sample in local]
    assert reader.file_hash() == local.file_hash()
    (tmp_path / "shards" / "train-000001.tar.index").unlink()
    with pytest.warns(UserWarning, match=r"train-000001\.tar has no index beside it, so all of it is read"):
        reader = opened(files, stream=True, remote=True)
    assert reader.blocks == (2, 2, 1)
    assert "train-000001.tar (remote)" in reader.warnings[0]
    assert "cannot be read" in refusal(f"{served}/nothing.tar", stream=True, remote=True)
    assert "unknown url type: ftp" in refusal(f"{served}/to?ftp://127.0.0.1:9/a.tar", stream=True, remote=True)
    assert "cannot be read" in refusal(f"{served}/to?http://[", stream=True, remote=True)


# The writer


def test_the_writer_gives_the_same_bytes_and_an_index(tmp_path: Path):
    def write(folder: str) -> list[bytes]:
        with ShardWriter(tmp_path / folder, prefix="train", per_shard=3) as out:
            for number in range(7):
                out.write(f"é/{number}" + "x" * 120, {"json": text(f"t{number}"), "0.jpg": b"x" * number})
        assert out.paths == [tmp_path / folder / f"train-{shard:06d}.tar" for shard in range(3)]
        assert sorted(os.listdir(tmp_path / folder)) == sorted(name for path in out.paths for name in (path.name, f"{path.name}.index"))
        return [path.read_bytes() for path in out.paths]

    assert write("one") == write("two")
    assert said(opened(tmp_path / "one")) == [f"t{number}" for number in range(7)]
    with tarfile.open(tmp_path / "one" / "train-000000.tar") as archive:
        assert {(member.mtime, member.uid, member.gid, member.uname, member.mode) for member in archive} == {(0, 0, 0, "", 0o644)}


def test_the_writer_ends_a_shard_by_bytes(tmp_path: Path):
    with ShardWriter(tmp_path, prefix="a", per_shard_bytes=10_000) as out:
        for number in range(10):
            out.write(str(number), {"json": text("t"), "png": bytes(3000)})
    assert len(out.paths) == 5
    assert len(opened(tmp_path)) == 10


def test_an_error_leaves_no_half_shard(tmp_path: Path):
    def write() -> None:
        with ShardWriter(tmp_path, prefix="a", per_shard=2) as out:
            for number in range(4):
                out.write(str(number), {"json": text("t" * (1 // (3 - number)))})

    with pytest.raises(ZeroDivisionError):
        write()
    assert sorted(os.listdir(tmp_path)) == ["a-000000.tar", "a-000000.tar.index"]


@pytest.mark.parametrize(("key", "members"), [("a.b", {"json": b""}), ("", {"json": b""}), ("/a", {"json": b""}), ("../a", {"json": b""}), ("a/", {"json": b""}), (".a", {"json": b""}), ("a", {}), ("a", {"": b""}), ("a", {"JSON": b""}), ("a", {"x/y": b""}), ("a\n", {"json": b""})])  # fmt: skip
def test_the_writer_refuses_what_would_not_come_back(tmp_path: Path, key: str, members: Mapping[str, bytes]):
    with pytest.raises(DataError, match=r"the sample '"), ShardWriter(tmp_path, prefix="a") as out:
        out.write(key, members)


def test_the_writer_refuses_a_second_key_and_a_shard_that_is_there(tmp_path: Path):
    with ShardWriter(tmp_path, prefix="a") as out:
        out.write("k", {"json": text("t")})
        with pytest.raises(DataError, match="two samples of .* are called 'k'"):
            out.write("k", {"json": text("t")})
    with pytest.raises(DataError, match=r"a-000000\.tar is there already"), ShardWriter(tmp_path, prefix="a") as out:
        out.write("k", {"json": text("t")})
