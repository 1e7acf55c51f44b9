"""Tar shards made in code, and what a reader of them says."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from vlm.data.sample import Picture, Sample
from vlm.data.shards import ShardWriter
from vlm.data.tar import TarReader, TarSource
from vlm.errors import DataError

STREAM = pytest.mark.parametrize("stream", [False, True])

CONTENT: list[tuple[dict[str, Any], list[str]]] = [
    ({"id": "a", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "größe 图片"}]}, ["0.png"]),
    ({"id": "b", "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]}, []),
    ({"id": "c", "conversations": [{"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "first"}]}, ["1.png", "0.jpg"]),
    ({"id": "d", "independent": True, "conversations": [{"from": "human", "value": "<image>q", "kind": "k"}, {"from": "gpt", "value": "a"}] * 1}, ["2.webp"]),
    ({"id": "e", "messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "bye"}]}, ["0.png"]),
]
"""Records, and the pictures of each."""


def tar(path: Path, *members: tuple[str, bytes | tarfile.TarInfo], form: int = tarfile.USTAR_FORMAT) -> Path:
    """A tar file at `path`. members: name and bytes, or name and the header of what is no file."""
    with tarfile.open(path, "w", format=form, encoding="utf-8") as archive:
        for name, content in members:
            header = tarfile.TarInfo(name) if isinstance(content, bytes) else content
            header.name = name
            if isinstance(content, bytes):
                header.size = len(content)
            archive.addfile(header, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


def text(words: str) -> bytes:
    """The json of a sample that is a caption."""
    return json.dumps({"text": words}).encode()


def captioned(number: int) -> list[tuple[str, bytes]]:
    """Members of the sample p<number>: a picture and its caption."""
    return [(f"p{number}.jpg", b"picture %d" % number), (f"p{number}.json", text(f"p{number}"))]


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


def opened(file: Path | str, **settings: Any) -> TarReader:
    return TarSource(file=str(file), **settings).open()


def said(reader: TarReader) -> list[str]:
    """The last turn of every sample."""
    return [sample.turns[-1].text for sample in reader]


def plain(sample: Sample) -> Any:
    """A sample with its pictures' bytes in the place of their addresses."""
    turns = [(turn.role, turn.supervised, turn.kind, [part.read() if isinstance(part, Picture) else part for part in turn.parts]) for turn in sample.turns]
    return sample.id, sample.independent, sample.notes, turns


def refusal(file: Path | str, **settings: Any) -> str:
    """The message with which the shards cannot be opened."""
    with pytest.raises(DataError) as caught:
        opened(file, **settings)
    return str(caught.value)
