"""What is found in a shard: members and their grouping, what is said about damage, and the index kept beside it; on files of the test's own making and on the field cases."""

import json
import os
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from archives import STREAM, captioned, opened, refusal, said, tar, text

from vlm.data.tar import TarReader
from vlm.data.tarindex import index_of, load_index
from vlm.errors import DataError

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


def special(kind: bytes, target: str = "") -> tarfile.TarInfo:
    header = tarfile.TarInfo()
    header.type, header.linkname = kind, target
    return header


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
