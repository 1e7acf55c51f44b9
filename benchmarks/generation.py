"""Generation: tokens per second of our class against transformers' own with the same weights; the greedy tokens are the same."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from _corpus import corpus
from _paired import Block, Result, compare, noise, run
from _sides import NARROW, Ours, Theirs, Width

from vlm.generate import prepare


@dataclass(frozen=True)
class Sizes:
    """batches: rows per call. tokens: generated per row; nobody stops earlier."""

    batches: tuple[int, ...] = (1, 8)
    tokens: int = 32
    pairs: int = 15
    width: Width = field(default_factory=Width)


TINY = Sizes(batches=(1, 2), tokens=4, pairs=1, width=NARROW)


def measure(sizes: Sizes) -> Iterator[Result]:
    import torch

    with tempfile.TemporaryDirectory() as scratch:
        samples = corpus(Path(scratch), 4)
        ours = Ours(samples, sizes.width, 1, 1)
        torch.manual_seed(0)
        for parameter in ours.model.llm.parameters():  # wider than first values are, so that the likeliest token wins by more than rounding
            parameter.data += 0.02 * torch.randn_like(parameter)
        theirs = Theirs(ours.export(samples.root / "llava"), samples)
        prepare(ours.model, ours.processor)
        ours.model.eval()
        theirs.model.eval()
        for batch in sizes.batches:
            mine, other = sides(ours, theirs, batch, sizes.tokens)
            if batch == sizes.batches[0]:
                yield noise(mine, pairs=sizes.pairs)
            yield compare(
                f"generation, {batch} at a time, against transformers' class", mine, other, pairs=sizes.pairs, wanted=(">=", 1.0), per=batch * sizes.tokens, unit="tokens/s"
            )


def sides(ours: Ours, theirs: Theirs, batch: int, tokens: int) -> tuple[Block, Block]:
    """Both ways to generate answers to the same questions, from inputs that are made, pictures to be encoded. They are proven to give the same tokens."""
    settings = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens}
    reader = ours.data.readers["samples"]
    asked = [replace(sample, turns=sample.turns[:-1]) for sample in (reader[index] for index in range(batch))]
    rows = [ours.processor.row(sample, mode="infer", generate=True) for sample in asked]
    inputs = ours.processor.inputs(rows)
    others = theirs.questions(range(batch))
    got, expected = ours.model.generate(**inputs, **settings), theirs.model.generate(**others, **settings)[:, others["input_ids"].shape[1] :]
    assert got.tolist() == expected.tolist(), f"greedy tokens differ: {got.tolist()} and {expected.tolist()}"
    assert got.shape == (batch, tokens), got.shape

    def mine(number: int) -> None:
        ours.model.generate(**inputs, **settings)

    def other(number: int) -> None:
        theirs.model.generate(**others, **settings)

    return mine, other


if __name__ == "__main__":
    run(measure, Sizes(), TINY)
