"""The reader of tar shards: its samples are those of the JSON reader, records and their pictures, access in any order and by several workers."""

import json
import pickle
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from archives import CONTENT, STREAM, both, captioned, opened, plain, refusal, said, tar, text
from conversations import processor
from torch.utils.data import DataLoader, Dataset

from vlm.data import readers
from vlm.data.llava import LlavaSource
from vlm.data.mixture import WINDOW, Mixture
from vlm.data.sample import Sample
from vlm.data.shards import Shard, ShardWriter
from vlm.data.tar import TarReader, TarSource
from vlm.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def test_registered_with_its_name():
    assert readers.get("tar") is TarSource


@STREAM
def test_the_samples_are_those_of_the_json_reader(tmp_path: Path, stream: bool):
    file, shards = both(tmp_path)
    reader = opened(shards, stream=stream)
    assert len(reader) == len(CONTENT)
    assert [plain(sample) for sample in reader] == [plain(sample) for sample in LlavaSource(file=file).open()]


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


@STREAM
def test_a_picture_is_named_by_its_shard_and_member(tmp_path: Path, stream: bool):
    reader = opened(tar(tmp_path / "a.tar", *captioned(7)), stream=stream)
    with pytest.raises(DataError, match=rf"^{tmp_path}/a.tar, sample p7: the file is not a picture. got {tmp_path}/a.tar, p7.jpg, a file that"):
        processor("plain").row(reader[0])


def test_bad_samples_are_left_out_and_listed(tmp_path: Path):
    path = tar(tmp_path / "a.tar", *captioned(0), ("b.json", b"{"), *captioned(1), ("c.json", text("no picture")), ("d.json", text("x")), ("d.jpg", b""))
    reader = opened(path, on_bad="skip")
    assert said(reader) == ["p0", "p1"]
    assert [str(error).partition(":")[0].rpartition(" ")[2] for error in reader.bad] == ["b", "c", "d"]
    assert opened(path)[3 - 1].id == "p1"


def test_a_prepended_placeholder_is_counted(tmp_path: Path):
    record = {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "a"}]}
    assert record_of(tmp_path, record, "jpg", missing_placeholder="prepend").notes == ("placeholder prepended",)


# Shards without samples


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
    assert "dots in the base name" in refusal(tar(tmp_path / "b.tar", ("22.05.png", b"b"), ("22.05.json", text("x")), ("22.06.png", b"c"), ("22.06.json", text("y"))))
    assert "got 1 left out, hidden file: .a.json in c.tar; 1 left out, no extension: b in c.tar" in refusal(tar(tmp_path / "c.tar", (".a.json", b"{}"), ("b", b"")))


# Order and workers


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
