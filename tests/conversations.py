"""Conversations in few words, the processor that reads them, and one row of every kind."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tiny
from models import model_spec
from transformers import PreTrainedTokenizerBase

from vlm.config import ModelSpec
from vlm.connectors.mlp import MLPSpec
from vlm.data.sample import Picture, Sample, Turn
from vlm.processor import VLMProcessor
from vlm.prompt import PromptSpec
from vlm.row import Row, collate


def user(*parts: str | Picture) -> Turn:
    """A question."""
    return Turn("user", parts)


def says(text: str, supervised: bool = True) -> Turn:
    """An answer, by default one that is learned."""
    return Turn("assistant", (text,), supervised)


def sample(*turns: Turn, **options: Any) -> Sample:
    """Sample id7 of train.json."""
    return Sample("id7", turns, where="train.json, sample 7", **options)


def drawn(folder: Path, sizes: Sequence[tuple[int, int]] = ((30, 28), (37, 28), (44, 28))) -> list[Picture]:
    """A picture of noise for each width and height."""
    paths = [folder / f"{number}.png" for number in range(len(sizes))]
    for number, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        tiny.picture(size=size, seed=number).save(path)
    return [Picture(str(path)) for path in paths]


def processor(prompt: str = "chatml", policy: str = "native", tokenizer: PreTrainedTokenizerBase | None = None, encoder: Any = None, **options: Any) -> VLMProcessor:
    """For a small CLIP tower, or another encoder. options: of the prompt."""
    spec = model_spec()
    return VLMProcessor(ModelSpec(encoder=encoder or spec.encoder, connector=MLPSpec(), llm=spec.llm), 32, tokenizer or tiny.tokenizer(), PromptSpec(use=prompt, **options), policy)


def rows_of(pictures: Sequence[Picture], tower: str = "clip") -> dict[str, Row]:
    """One row of every kind, of three pictures; all are longer than 12 tokens, the windows of the small decoders."""
    one, two, three = pictures
    samples = {
        "vision": Sample("vision", (user(one, "\nWhat colour?"), says("red and green"))),
        "text": Sample("text", (user("Hello"), says("Hello!"), user("How many objects?"), says("two of them"))),
        "several": Sample("several", (user(two, " and ", three, " which one?"), says("the left"), user("Why?"), says("it is blue"))),
        "branches": Sample("branches", (user(two, "\nWhat colour?"), says("red"), user("How many?"), says("two objects"), user("Where?"), says("left")), independent=True),
    }
    reader = processor(policy="pad", encoder=model_spec(tower=tower).encoder)
    return {name: reader.row(talk) for name, talk in samples.items()}


def facts(row: Row) -> dict[str, Any]:
    """All of a row but its pictures."""
    return {name: value for name, value in vars(row).items() if name != "images"}


def batch_of(*rows: Row) -> dict[str, Any]:
    """Rows under one another."""
    return collate(rows, pad_id=0)


def packed(*rows: Row) -> dict[str, Any]:
    """These rows as documents of one row."""
    return collate([Row.packed(rows)], pad_id=0)
