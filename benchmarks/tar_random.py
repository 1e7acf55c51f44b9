"""Samples of tar shards, 20,000 of them, record and picture bytes: by random access through our index against reading in order, by our reader, by our streamed reader and by webdataset."""

import io
import itertools
import json
import os
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _paired import Result, compare, noise, run
from PIL import Image

from vlm.data import readers
from vlm.data.scenes import Question, llava_record
from vlm.data.shards import ShardWriter


@dataclass(frozen=True)
class Sizes:
    """block: samples that are read per timed block. side: pixels of a picture, which holds noise so that its file has the size of a photograph's thumbnail."""

    samples: int = 20_000
    per_shard: int = 2_000
    block: int = 4_000
    side: int = 64
    pairs: int = 9


TINY = Sizes(samples=60, per_shard=20, block=10, side=8, pairs=1)


def measure(sizes: Sizes) -> Iterator[Result]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        size = write(folder, sizes)
        print(
            f"   {sizes.samples:,} samples in {sizes.samples // sizes.per_shard} shards, {size / 1e6:.0f} MB, in the memory of the operating system: no disk is measured",
            flush=True,
        )
        opened = readers.get("tar")(file=str(folder)).open()
        streamed = readers.get("tar")(file=str(folder), stream=True).open()
        order = random.Random(0).sample(range(sizes.samples), sizes.samples)
        per_block = sizes.samples // sizes.block
        expected = [content(opened, index) for index in range(sizes.per_shard)]
        assert expected == list(itertools.islice(by_webdataset(folder), sizes.per_shard)) == [content(streamed, index) for index in range(sizes.per_shard)], "the ways differ"

        def at(number: int) -> range:
            return range(number % per_block * sizes.block, (number % per_block + 1) * sizes.block)

        def by_index(number: int) -> None:
            for place in at(number):
                content(opened, order[place])

        def in_order(number: int) -> None:
            for index in at(number):
                content(opened, index)

        def by_stream(number: int) -> None:
            for index in at(number):
                content(streamed, index)

        webdataset = itertools.chain.from_iterable(by_webdataset(folder) for _ in itertools.count())

        def by_others(number: int) -> None:
            for _ in itertools.islice(webdataset, sizes.block):
                pass

        yield noise(by_index, pairs=sizes.pairs)
        ways = {"reading in order by the same reader": in_order, "reading in order, streamed": by_stream, "webdataset's reading in order": by_others}
        for name, way in ways.items():
            wanted = (">=", 0.9) if way is in_order else None
            yield compare(f"random access against {name}", by_index, way, pairs=sizes.pairs, wanted=wanted, per=sizes.block, unit="samples/s")


def content(reader: Any, index: int) -> tuple[str, bytes]:
    """A sample as far as training reads it before anything is decoded: its answer and the bytes of its picture."""
    sample = reader[index]
    return sample.turns[-1].text, sample.pictures[0].read()


def by_webdataset(folder: Path) -> Iterator[tuple[str, bytes]]:
    import webdataset

    shards = sorted(str(path) for path in folder.glob("*.tar"))
    for sample in webdataset.WebDataset(shards, shardshuffle=False, empty_check=False):  # type: ignore[reportAttributeAccessIssue]
        yield json.loads(sample["json"])["conversations"][-1]["value"], sample["0.png"]


def write(folder: Path, sizes: Sizes) -> int:
    """The shards; their bytes."""
    pictures = []
    for seed in range(32):
        buffer = io.BytesIO()
        noise_of = random.Random(seed).randbytes(sizes.side * sizes.side * 3 // 4)
        Image.frombytes("RGB", (sizes.side // 2, sizes.side // 2), noise_of).save(buffer, "PNG")
        pictures.append(buffer.getvalue())
    with ShardWriter(folder, prefix="train", per_shard=sizes.per_shard) as out:
        for index in range(sizes.samples):
            record = llava_record(f"{index:06d}", "0.png", [Question(f"Which number has this picture of {sizes.samples}?", str(index))])
            out.write(f"{index:06d}", {"json": json.dumps(record).encode(), "0.png": pictures[index % len(pictures)]})
    return sum(os.path.getsize(path) for path in folder.glob("*.tar"))


if __name__ == "__main__":
    run(measure, Sizes(), TINY)
