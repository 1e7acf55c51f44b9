"""What is right without seeing: the commonest training answer to the same question text, the model before grey pictures, and chance."""

import io
import re
from collections import Counter, defaultdict
from dataclasses import replace
from functools import lru_cache

from PIL import Image

from vlm.data.sample import Picture, Sample, held
from vlm.eval.score import Question, normal
from vlm.images import upright_size
from vlm.processor import naming

__all__ = ["TrainingAnswers", "grey", "masked"]

GREY = (128, 128, 128)


def masked(text: str) -> str:
    """A question's text with every number as one mark, so that "What is in row 3?" and "What is in row 14?" count as the same question."""
    return re.sub(r"\d+", "#", text.strip().lower())


class TrainingAnswers:
    """How often training answered what. Answers are counted as they are compared; of equally frequent ones the first of the alphabet counts."""

    def __init__(self) -> None:
        self._by_text: dict[str, Counter[str]] = defaultdict(Counter)
        self._by_kind: dict[str, Counter[str]] = defaultdict(Counter)

    @property
    def kinds(self) -> set[str]:
        return set(self._by_kind)

    def add(self, question: Question) -> None:
        answer = normal(question.truth)
        self._by_text[masked(question.text)][answer] += 1
        self._by_kind[question.kind][answer] += 1

    def guess(self, question: Question) -> str:
        """The most frequent answer to the question's text, else of its kind, else nothing."""
        counts = self._by_text.get(masked(question.text)) or self._by_kind.get(question.kind)
        return min(counts, key=lambda answer: (-counts[answer], answer)) if counts else ""

    def chance(self, kind: str) -> float | None:
        """1 / number of distinct answers of the kind; None where training has no such kind."""
        return 1 / len(self._by_kind[kind]) if kind in self._by_kind else None


def grey(sample: Sample) -> Sample:
    """The sample with every picture grey (RGB 128), each in its size."""
    turns = tuple(replace(turn, parts=tuple(_grey(part, sample.where) if isinstance(part, Picture) else part for part in turn.parts)) for turn in sample.turns)
    return replace(sample, turns=turns)


def _grey(picture: Picture, where: str) -> Picture:
    with naming(picture, where):
        width, height = upright_size(picture.read(), where=where)
    return held(_grey_file(width, height), f"grey {width} x {height}")


@lru_cache(maxsize=64)
def _grey_file(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), GREY).save(buffer, "PNG")
    return buffer.getvalue()
