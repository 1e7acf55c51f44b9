"""Shards: which ones a name means, how they are streamed, packed or over the network, and the writer."""

import bz2
import functools
import gzip
import http.server
import lzma
import os
import pickle
import tarfile
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from archives import both, captioned, opened, plain, refusal, said, tar, text

from vlm.data.shards import ShardWriter
from vlm.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore:.*no index beside it")


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


# Streamed and packed


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
