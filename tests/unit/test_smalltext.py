"""Small text: the same for a seed, no page in both parts, answers as drawn and told by no question, digits in their cells."""

import json
import random
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from vlm.cli import app
from vlm.data.llava import LlavaSource
from vlm.data.smalltext import Page, draw_page, paint_page, questions_about, reading, write_smalltext
from vlm.errors import ConfigurationError

PAGE: Page = ("4", None, "1", "3", "8", None, None, "5", "6")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smalltext") / "data"
    result = CliRunner().invoke(app, ["data", "smalltext", str(folder), "--count", "20", "--held-out", "10"])
    assert "'train': 20, 'test': 30, 'pictures': 30" in result.output
    return folder


def test_same_bytes_for_a_seed(root: Path, tmp_path: Path):
    for seed in (0, 1):
        write_smalltext(tmp_path / str(seed), seed=seed, pages=20, held_out=10)
    here, again, other = ({str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()} for folder in (root, tmp_path / "0", tmp_path / "1"))
    assert here == again
    assert here["train.json"] != other["train.json"]


def test_everything_is_readable_and_no_picture_in_both_parts(root: Path):
    train, test = (LlavaSource(file=str(root / f"{name}.json")).open() for name in ("train", "test"))
    asked = [Counter(turn.kind for turn in sample.turns if turn.role == "assistant") for sample in train]
    assert asked == [{"reading": 1, "digit": 5, "filled": 2}] * 20
    assert all(sample.independent for sample in train)
    assert Counter(sample.turns[1].kind for sample in test) == {"digit": 20, "filled": 10}
    assert Counter(sample.turns[1].text for sample in test if sample.turns[1].kind == "filled") == {"yes": 5, "no": 5}
    shown = [{picture.read() for sample in part for picture in sample.pictures} for part in (train, test)]
    assert (len(shown[0]), len(shown[1]), shown[0] & shown[1]) == (20, 10, set())
    assert {Image.open(picture.path).size for sample in test for picture in sample.pictures} == {(216, 216)}


def test_answers_follow_from_the_page():
    found = questions_about(PAGE)
    assert {about: len(questions) for about, questions in found.items()} == {"digit": 6, "yes": 6, "no": 3}
    asked = {question.question: question.answer for questions in found.values() for question in questions}
    assert (asked["first : which digit ?"], asked["second : a digit ?"], asked["ninth : a digit ?"], asked["ninth : which digit ?"]) == ("4", "no", "yes", "6")
    assert reading(PAGE).answer == "4 - 1 3 8 - - 5 6"


def test_a_question_does_not_tell_its_answer():
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for seed in range(3000):
        for question in questions_about(draw_page(random.Random(seed)))["digit"]:
            answers[question.question][question.answer] += 1
    assert len(answers) == 9
    assert all(len(counts) == 10 and max(counts.values()) < 0.13 * counts.total() for counts in answers.values())


def test_a_digit_lies_in_the_middle_of_its_cell():
    for seed in range(20):
        ink = np.asarray(paint_page(PAGE, random.Random(seed))) > 40
        for cell, digit in enumerate(PAGE):
            rows, columns = np.nonzero(ink[cell // 3 * 72 : cell // 3 * 72 + 72, cell % 3 * 72 : cell % 3 * 72 + 72])
            assert (len(rows) == 0) == (digit is None)
            assert all(places.min() >= 24 and places.max() < 48 for places in (rows, columns) if digit is not None)


def test_what_cannot_be_made_is_refused(root: Path, tmp_path: Path):
    with pytest.raises(ConfigurationError, match="held out 0"):
        write_smalltext(tmp_path / "data", pages=3, held_out=0)
    with pytest.raises(ConfigurationError, match="holds something already"):
        write_smalltext(root, pages=3, held_out=1)
    assert not list(tmp_path.iterdir())
    assert len(json.loads((root / "train.json").read_text(encoding="utf-8"))) == 20
