"""Questions of a sample, and what counts as right. Pure: no model, no files."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vlm.data.sample import Picture, Sample, Turn
from vlm.processor import pictures_in_front

__all__ = ["MATCHER", "WITHOUT_KIND", "Question", "matches", "normal", "questions", "shares", "spread"]

MATCHER = "exact, lower-cased and stripped"
WITHOUT_KIND = "all"


@dataclass(frozen=True)
class Question:
    """One question, asked alone. sample: ends in it. text: its words. truth: the answer in the data. kind: WITHOUT_KIND where the data name none."""

    sample: Sample
    text: str
    truth: str
    kind: str


def questions(sample: Sample) -> list[Question]:
    """Every question of a sample that has an answer, alone: behind the system turn, with the pictures shown up to it, as training writes independent questions."""
    head = tuple(turn for turn in sample.turns if turn.role == "system")
    talk = [turn for turn in sample.turns if turn.role != "system"]
    shared = pictures_in_front(talk[0]) if talk else ()
    found: list[Question] = []
    seen: tuple[Picture, ...] = ()
    for asked, answer in zip(talk, [*talk[1:], None], strict=True):
        if asked.role == "user" and answer is not None and answer.role == "assistant":
            alone = Sample(f"{sample.id}#{len(found)}", (*head, Turn("user", _with(seen, shared, asked))), sample.source, sample.where)
            found.append(Question(alone, asked.text.strip(), answer.text, answer.kind or asked.kind or WITHOUT_KIND))
        seen += tuple(part for part in asked.parts if isinstance(part, Picture))
    return found


def _with(seen: tuple[Picture, ...], shared: tuple[str | Picture, ...], asked: Turn) -> tuple[str | Picture, ...]:
    """The question behind the pictures seen before: as the first question begins with them, others behind."""
    if not seen:
        return asked.parts
    front = (*shared, *seen[sum(isinstance(part, Picture) for part in shared) :])
    head, *rest = asked.parts
    return (*front, head.lstrip("\n") if isinstance(head, str) else head, *rest)


def spread(size: int, count: int | None) -> list[int]:
    """Of `size` things the numbers of at most `count`, evenly spread; of all where it is None."""
    count = size if count is None else min(count, size)
    return [place * size // count for place in range(count)]


def normal(answer: str) -> str:
    """An answer as it is compared."""
    return answer.strip().lower()


def matches(answer: str, truth: str) -> bool:
    return normal(answer) == normal(truth)


def shares(kinds: Sequence[str], right: Iterable[bool]) -> dict[str, float]:
    """Kind -> share of its questions that are right, kinds in order of appearance."""
    found: dict[str, list[bool]] = {}
    for kind, one in zip(kinds, right, strict=True):
        found.setdefault(kind, []).append(one)
    return {kind: sum(ones) / len(ones) for kind, ones in found.items()}
