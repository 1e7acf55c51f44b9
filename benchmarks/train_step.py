"""Training: samples per second of our step against transformers' LlavaForConditionalGeneration in a plain loop and in its Trainer. Same weights, same samples, same supervised tokens, fp32."""

import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _corpus import Corpus, corpus
from _paired import Block, Result, compare, noise, run
from _sides import NARROW, Ours, Theirs, Width, check_equal


@dataclass(frozen=True)
class Sizes:
    """batch: samples per step. micro_batch: rows per forward where every row is one sample. pack, packed_rows: tokens of a packed row, rows per forward."""

    per_set: int = 48
    batch: int = 16
    micro_batch: int = 8
    pack: int = 512
    packed_rows: int = 2
    pairs: int = 7
    noise_pairs: int = 5
    width: Width = field(default_factory=Width)

    @property
    def packed(self) -> dict[str, Any]:
        """Keys of a stage that packs."""
        return {"pack": self.pack, "max_length": self.pack, "micro_batch": self.packed_rows}


TINY = Sizes(per_set=4, batch=8, micro_batch=4, pack=256, packed_rows=2, pairs=1, noise_pairs=1, width=NARROW)


def measure(sizes: Sizes) -> Iterator[Result]:
    with tempfile.TemporaryDirectory() as scratch:
        samples = corpus(Path(scratch), sizes.per_set)
        folder = Ours(samples, sizes.width, sizes.batch, 1).export(samples.root / "llava")
        theirs = Theirs(folder, samples)
        lengths = [theirs.length(index) for index in range(len(samples.records))]
        low, middle, high = statistics.quantiles(lengths, n=4)
        print(
            f"   {len(lengths)} samples of {min(lengths)} to {max(lengths)} text tokens (quartiles {low:.0f}, {middle:.0f}, {high:.0f}) and a picture of {theirs.picture_tokens}",
            flush=True,
        )
        yield from equal_lengths(samples, lengths, folder, sizes)
        yield from length_mix(samples, folder, sizes)
        yield from independent_questions(samples, folder, sizes)


def sides(ours: Corpus, theirs: Corpus, folder: Path, sizes: Sizes, batch: int, settings: dict[str, Any]) -> tuple[Ours, Theirs, Callable[[int], list[int]]]:
    """Both sides, ready to train, and the samples of theirs that are those of our step. They are proven to mean the same by the first step."""
    mine, other = Ours(ours, sizes.width, batch, 1000, settings), Theirs(folder, theirs)
    rows: dict[str, list[int]] = {}
    for index, record in enumerate(theirs.records):
        rows.setdefault(record["id"].partition(":")[0], []).append(index)

    def step(number: int) -> list[int]:
        return [row for index in mine.indices(number) for row in rows[ours.records[index]["id"]]]

    check_equal(mine.loss(0), other.loss(step(0)))
    mine.start()
    other.start()
    return mine, other, step


def in_trainer(theirs: Theirs, step: Callable[[int], list[int]], sizes: Sizes, sampling: str = "sequential") -> Block:
    """A step in transformers' Trainer."""
    train = theirs.trainer(sizes.batch, sizes.micro_batch, sampling)
    return lambda number: train(step(number))


def equal_lengths(samples: Corpus, lengths: list[int], folder: Path, sizes: Sizes) -> Iterator[Result]:
    """Of the mix, the length that most samples share."""
    counted = Counter(lengths)
    length = max(counted, key=lambda length: (counted[length], length))
    alike = [record for record, its in zip(samples.records, lengths, strict=True) if its == length]
    chosen = samples.holding("equal", [record | {"id": f"{record['id']}/{copy}"} for copy in range(-(-sizes.batch // len(alike))) for record in alike])
    ours, theirs, step = sides(chosen, chosen, folder, sizes, sizes.batch, {"micro_batch": sizes.micro_batch})
    print(f"   equal lengths: {length + theirs.picture_tokens} tokens, {len(alike)} different samples", flush=True)
    yield noise(ours.train, pairs=sizes.noise_pairs)
    others: dict[str, Block] = {"a plain loop": lambda number: theirs.train(step(number), sizes.micro_batch), "its Trainer": in_trainer(theirs, step, sizes)}
    for name, other in others.items():
        yield compare(f"equal lengths, against transformers' class in {name}", ours.train, other, pairs=sizes.pairs, wanted=(">=", 1.1), per=sizes.batch, unit="samples/s")


def length_mix(samples: Corpus, folder: Path, sizes: Sizes) -> Iterator[Result]:
    """Packed against padded. Grouped: theirs sorts the step's samples by length before it cuts them into micro-batches."""
    padded = sides(samples, samples, folder, sizes, sizes.batch, {"micro_batch": sizes.micro_batch})[0]
    ours, theirs, step = sides(samples, samples, folder, sizes, sizes.batch, sizes.packed)
    others: dict[str, Block] = {
        "a plain loop": lambda number: theirs.train(step(number), sizes.micro_batch),
        "its Trainer": in_trainer(theirs, step, sizes),
        "a plain loop, grouped by length": lambda number: theirs.train(sorted(step(number), key=theirs.length), sizes.micro_batch),
        "its Trainer, grouped by length": in_trainer(theirs, step, sizes, "group_by_length"),
    }
    for name, other in others.items():
        wanted = None if "grouped" in name else (">=", 1.5)
        yield compare(f"length mix, packed, against transformers' class in {name}", ours.train, other, pairs=sizes.pairs, wanted=wanted, per=sizes.batch, unit="samples/s")
    yield compare("length mix, packed, against our padded rows", ours.train, padded.train, pairs=sizes.pairs)


def independent_questions(samples: Corpus, folder: Path, sizes: Sizes) -> Iterator[Result]:
    """Questions about a picture that do not see one another: ours shares the picture among them, theirs needs a row for each."""
    talks = Corpus(samples.root, samples.name, [record for record in samples.records if len(record["conversations"]) > 2])
    ours, theirs, step = sides(talks.independent(), talks.separate(), folder, sizes, sizes.batch // 4, sizes.packed)
    questions = statistics.mean(len(step(number)) for number in range(sizes.pairs))
    yield compare(
        "independent questions about shared pictures, packed, against separate rows in a plain loop",
        ours.train, lambda number: theirs.train(step(number), sizes.micro_batch), pairs=sizes.pairs, per=questions, unit="questions/s",
    )  # fmt: skip


if __name__ == "__main__":
    run(measure, Sizes(), TINY)
