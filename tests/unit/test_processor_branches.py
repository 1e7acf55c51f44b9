"""Independent questions of one sample: branches of a row, each of which is its question alone."""

from pathlib import Path

import pytest
import tiny
from conversations import batch_of, drawn, facts, processor, sample, says, user
from models import model_spec

from vlm.data.sample import Picture, Sample, Turn
from vlm.errors import DataError
from vlm.loading import first_model
from vlm.processor import placeholder_id
from vlm.row import IGNORE, Row


@pytest.fixture
def pictures(tmp_path: Path) -> list[Picture]:
    return drawn(tmp_path, ((40, 30), (28, 28), (13, 90), (100, 15)))


FRONT = {"text": (), "one": (0,), "three": (0, 2, 3)}
QUESTIONS = {
    "different": (("What colour?", "red"), ("How many?", "two objects"), ("Where?", "left")),
    "long beginning": (("What colour is the picture?", "red"), ("What colour is the picture! Say.", "red"), ("What colour is the", "two objects")),
    "identical": (("What colour?", "red"), ("What colour?", "red square"), ("What colour?", "red")),
}


def independent(pictures: list[Picture], front: str, questions: str, head: tuple[Turn, ...] = ()) -> tuple[Sample, list[Sample]]:
    """A sample of independent questions, and the same questions each as a sample of its own."""
    shown = tuple(pictures[number] for number in FRONT[front])
    pairs = QUESTIONS[questions]
    blank = "\n" if shown else ""
    alone = [sample(*head, user(*shown, blank + question), says(answer)) for question, answer in pairs]
    later = [turn for question, answer in pairs[1:] for turn in (user(question), says(answer))]
    return sample(*alone[0].turns, *later, independent=True), alone


def learned_up_to(row: Row) -> int:
    """Length of a row up to its last learned token; a branch ends there."""
    return len(row) - next(place for place, label in enumerate(reversed(row.labels)) if label != IGNORE)


@pytest.mark.parametrize("head", [(), (Turn("system", ("Be brief.",)),)], ids=["no system", "system"])
@pytest.mark.parametrize("questions", QUESTIONS)
@pytest.mark.parametrize("front", FRONT)
@pytest.mark.parametrize("prompt", ["chatml", "vicuna_v1"])
def test_every_branch_behind_the_trunk_is_its_question_alone(prompt: str, front: str, questions: str, head: tuple[Turn, ...], pictures: list[Picture]) -> None:
    one = processor(prompt)
    together, alone = independent(pictures, front, questions, head)
    row, rows = one.row(together), [one.row(single) for single in alone]
    assert sorted(set(row.branches)) == [0, 1, 2, 3]
    trunk = row.branches.count(0)
    assert row.ids[:trunk] == rows[0].ids[:trunk]
    assert set(row.labels[:trunk]) <= {IGNORE}
    assert row.pictures.count(-1) == len(row) - 4 * len(FRONT[front])
    for branch, single in enumerate(rows, 1):
        places = [place for place, of in enumerate(row.branches) if of in (0, branch)]
        for name in ("ids", "labels", "types", "pictures", "positions"):
            assert [getattr(row, name)[place] for place in places] == getattr(single, name)[: learned_up_to(single)], name
        begin = row.branches.index(branch)
        assert row.labels[begin] == IGNORE, "what stands before a branch in the row does not predict it"
        assert row.positions[begin] == trunk
    assert row.supervised == sum(single.supervised for single in rows)


@pytest.mark.parametrize("questions", QUESTIONS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_branched_equals_separate(family: str, questions: str, pictures: list[Picture]) -> None:
    """Gemma 2's window (12) is shorter than the rows: a branch's window reaches back into the trunk by position."""
    model = first_model(model_spec(family), placeholder_id(tiny.tokenizer())).train()
    one = processor("chatml", "pad")
    together, alone = independent(pictures, "three", questions, (Turn("system", ("Be brief.",)),))
    row, rows = one.row(together), [one.row(single) for single in alone]
    assert min(len(single) for single in rows) > 24
    branched = model(**batch_of(row))
    separate = model(**batch_of(*rows))
    assert branched.count == separate.count
    assert abs(branched.loss_sum - separate.loss_sum) <= 1e-6 * separate.loss_sum
    mixed = model(**batch_of(rows[0], row, one.row(sample(user("Hello!"), says("Hello!")))))
    assert mixed.document_losses is not None
    assert abs(mixed.document_losses[1] - branched.loss_sum) <= 1e-6 * branched.loss_sum


def test_one_independent_question_is_an_ordinary_row(pictures: list[Picture]) -> None:
    one = processor()
    turns = (user(pictures[0], "\nWhat?"), says("red"))
    assert facts(one.row(sample(*turns, independent=True))) == facts(one.row(sample(*turns)))


@pytest.mark.parametrize("between", [("", "\n"), ("\n", "\n"), ("\n", "\n\n"), ("  ", "")])
def test_blanks_between_pictures_are_shared(between: tuple[str, str], pictures: list[Picture]) -> None:
    one = processor()
    turns = (user(pictures[0], between[0], pictures[1], between[1] + "What?"), says("red"), user("\nWhy?"), says("so"))
    row = one.row(sample(*turns, independent=True))
    alone = one.row(sample(user(pictures[0], between[0], pictures[1], between[1] + "Why?"), says("so")))
    assert [index for index, branch in zip(row.ids, row.branches, strict=True) if branch in (0, 2)] == alone.ids[: learned_up_to(alone)]


def test_independent_questions_that_share_no_pictures_are_refused(pictures: list[Picture]) -> None:
    one = processor()
    own = sample(user("What?"), says("red"), user(pictures[0], "Why?"), says("so"), independent=True)
    later = sample(user(pictures[0], "What?"), says("red"), user(pictures[1], "Why?"), says("so"), independent=True)
    inside = sample(user("What is in ", pictures[0], "?"), says("red"), user("Why?"), says("so"), independent=True)
    behind = sample(user(pictures[0], "What? ", pictures[1]), says("red"), user("Why?"), says("so"), independent=True)
    for wrong in (own, later, inside, behind):
        with pytest.raises(DataError, match=r"^train.json, sample 7: independent questions must share the pictures, which stand in the first question\. leave `independent` away"):
            one.row(wrong)


def test_independent_turns_that_are_no_pairs_are_refused() -> None:
    for turns in ((user("q"), says("a"), user("r")), (user("q"), user("r"), says("a")), ()):
        with pytest.raises(DataError, match="^train.json, sample 7: independent turns must be pairs of a question and its answer. got (user|none)"):
            processor().row(sample(*turns, independent=True))


def test_a_branch_that_shares_nothing_does_not_learn_its_first_token() -> None:
    """Nothing of its own stands before it, as in a row of its own."""
    one = processor("plain")
    row = one.row(sample(user("q"), says("red dog"), user("r"), says("two"), independent=True))
    alone = [one.row(sample(user("q"), says(text))) for text in ("red dog", "two")]
    assert row.branches[0] == 1
    assert row.supervised == sum(single.supervised for single in alone)


def test_answers_right_behind_a_picture_cannot_branch(pictures: list[Picture]) -> None:
    with pytest.raises(DataError, match=r"^train.json, sample 7: prompt 'plain' puts answers right behind the picture.*leave `independent` away, or choose another prompt"):
        processor("plain").row(sample(user(pictures[0]), says("red"), user("r"), says("two"), independent=True))


def test_what_happened_to_any_branch_is_counted() -> None:
    drops = tiny.CHATML.replace("in messages", "in messages if m['role'] != 'system'")
    row = processor("tokenizer", tokenizer=tiny.tokenizer(chat=drops)).row(sample(Turn("system", ("s",)), user("q"), says("a"), user("r"), says("b"), independent=True))
    assert row.notes == ("system text folded into the first question",)
