"""Peak memory of one whole training step on long rows, all text supervised: ours, ours with next to nothing for the head to do, and transformers' class. Whole logits would show."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _corpus import Corpus, corpus
from _memory import peak
from _paired import Result, run
from _sides import NARROW, Ours, Theirs, Width


@dataclass(frozen=True)
class Sizes:
    rows: int = 4
    tokens: int = 2048
    width: Width = field(default_factory=Width)


TINY = Sizes(rows=2, tokens=256, width=NARROW)
LIMIT = 0.5
"""What the head may add to the peak of a step, in whole logits. A chunk of 1,048 rows, its softmax and its gradient are 0.38 of the 8,192."""
BEGINNING = 128
"""Tokens of the rows of the step before, which makes what stays: gradients and the optimizer's moments."""


def measure(sizes: Sizes) -> Iterator[Result]:
    with tempfile.TemporaryDirectory() as scratch:
        samples = long_samples(Path(scratch), sizes)
        settings = {"micro_batch": sizes.rows, "max_length": sizes.tokens}
        ours = Ours(samples, sizes.width, sizes.rows, 1, settings)
        theirs = Theirs(ours.export(samples.root / "llava"), samples)
        ours.start()
        theirs.start()
        step = ours.data[0]
        [micro] = step.micro_batches
        whole = micro.inputs
        assert whole["input_ids"].shape == (sizes.rows, sizes.tokens), whole["input_ids"].shape

        def mine(inputs: dict[str, Any]) -> None:
            micro.inputs, micro.supervised = inputs, _supervised(inputs)
            ours.take(step)

        batch = theirs.collate(ours.indices(0))
        batch = batch | {name: batch[name][:, : sizes.tokens] for name in ("input_ids", "attention_mask", "labels")}
        assert _supervised(batch) == _supervised(whole)
        mine(_beginning(whole))
        theirs.update([_beginning(batch)])
        full, bare, other = peak(lambda: mine(whole)), peak(lambda: mine(_one_each(whole))), peak(lambda: theirs.update([batch]))
    logits = 4 * sizes.rows * sizes.tokens * sizes.width.vocabulary
    facts = {
        "tokens": f"{sizes.rows} rows of {sizes.tokens:,}, {_supervised(whole):,} supervised",
        "whole logits": _size(logits),
        "a step of ours, above the model, gradients and optimizer": _size(full),
        "of ours with one supervised token per row": _size(bare),
        "of transformers' class": _size(other),
    }
    yield Result("what the head adds to the peak of our step, in whole logits", (full - bare) / logits, wanted=("<=", LIMIT), facts=facts)
    yield Result("peak of a step of ours against transformers' class", full / other, wanted=("<=", 1.0))


def long_samples(root: Path, sizes: Sizes) -> Corpus:
    """Samples of one picture and an answer that is cut at the row's end."""
    samples = corpus(root, sizes.rows)
    answers = " ".join(turn["value"] for record in samples.records for turn in record["conversations"] if turn["from"] == "gpt")
    long = (answers + " ") * (12 * sizes.tokens // len(answers) + 1)
    turns = [[record["conversations"][0], {"from": "gpt", "value": long}] for record in samples.records[: sizes.rows]]
    return samples.holding("long", [record | {"conversations": talk} for record, talk in zip(samples.records, turns, strict=False)])


def _supervised(inputs: dict[str, Any]) -> int:
    return int((inputs["labels"][:, 1:] != -100).sum())


def _beginning(inputs: dict[str, Any]) -> dict[str, Any]:
    shape = inputs["input_ids"].shape
    return {name: value[:, :BEGINNING] if getattr(value, "shape", None) == shape else value for name, value in inputs.items()}


def _one_each(inputs: dict[str, Any]) -> dict[str, Any]:
    labels = inputs["labels"].clone()
    labels[:, :-1] = -100
    return inputs | {"labels": labels}


def _size(size: int) -> str:
    return f"{size / 1e9:.3g} GB"


if __name__ == "__main__":
    run(measure, Sizes(), TINY)
