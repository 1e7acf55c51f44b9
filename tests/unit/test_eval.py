"""Evaluation: which questions are asked, what is right, the blind baselines, and the files of a run."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import yaml

from vlm.composition import compose, resolved
from vlm.data.convert import convert_data
from vlm.data.sample import Picture, Sample, Turn
from vlm.errors import CheckpointError, ConfigurationError, DataError
from vlm.eval import run as runs
from vlm.eval.blind import TrainingAnswers, grey, masked
from vlm.eval.run import evaluate, protocol
from vlm.eval.score import Question, matches, questions, shares
from vlm.generate import Answer
from vlm.images import open_picture
from vlm.loading import first_model, load
from vlm.processor import VLMProcessor, placeholder_id
from vlm.prompt import PromptSpec
from vlm.tiles import Tiling
from vlm.train.config import RunSpec

A, B = Picture("a.png"), Picture("b.png")


def user(*parts: str | Picture, kind: str | None = None) -> Turn:
    return Turn("user", parts, kind=kind)


def says(text: str, kind: str | None = None) -> Turn:
    return Turn("assistant", (text,), supervised=True, kind=kind)


# ---- questions and answers -----------------------------------------------------------------------------------------------


def test_every_question_is_asked_alone_with_its_pictures() -> None:
    turns = (
        Turn("system", ("Be brief.",)),
        user(A, "\nColour?"),
        says("red", "colour"),
        user("\nHow many?", kind="count"),
        says("two"),
        user("Which is ", B, "?"),
        says("left"),
        user("and?"),
    )
    found = questions(Sample("s", turns, "source", "file, sample 0", independent=True))
    assert [question.sample.turns[1].parts for question in found] == [(A, "\nColour?"), (A, "\n", "How many?"), (A, "\n", "Which is ", B, "?")]
    assert all([turn.role for turn in question.sample.turns] == ["system", "user"] for question in found)
    assert [(question.text, question.truth, question.kind) for question in found] == [("Colour?", "red", "colour"), ("How many?", "two", "count"), ("Which is ?", "left", "all")]
    assert [question.sample.id for question in found] == ["s#0", "s#1", "s#2"]
    assert not any(question.sample.independent for question in found)


def tiny_run(root: Path, *overrides: str) -> RunSpec:
    return compose(RunSpec, "llava_tiny", [f"data_root={root}", *overrides])


def test_a_question_is_put_as_training_puts_it(root: Path) -> None:
    spec, tokenizer = tiny_run(root), tiny.tokenizer()
    processor = VLMProcessor(spec.model, 32, tokenizer, PromptSpec(use="vicuna_v1"))
    reader = spec.data["questions"].open()
    sample = next(one for one in (reader[index] for index in range(len(reader))) if one.independent)
    row = processor.row(sample)
    for number, question in enumerate(questions(sample), 1):
        learned = [index for index, branch in zip(row.ids, row.branches, strict=True) if branch in (0, number)]
        asked = processor.row(question.sample, mode="infer", generate=True).ids
        assert learned[: len(asked)] == asked


def test_right_is_the_same_but_for_case_and_edges() -> None:
    assert matches(" Red\n", "red")
    assert not matches("red.", "red")
    assert not matches("", "red")
    assert shares(["a", "b", "a"], [True, False, False]) == {"a": 0.5, "b": 0.0}


def asked(text: str, truth: str, kind: str = "count") -> Question:
    return Question(Sample("s", (user(text),)), text, truth, kind)


def test_the_commonest_training_answer_is_looked_up_by_masked_text_then_by_kind() -> None:
    learned = TrainingAnswers()
    for text, truth in (
        ("What is at 3?", "Red"),
        ("What is at 14?", "red "),
        ("What is at 5?", "blue"),
        ("Size?", "small"),
        ("Height?", "small"),
        ("Width?", "small"),
        ("Tie?", "b"),
        ("Tie?", "a"),
    ):
        learned.add(asked(text, truth))
    assert masked(" What is at 14? ") == masked("what is at 3?")
    assert learned.guess(asked("What is at 7?", "")) == "red"
    assert learned.guess(asked("New?", "")) == "small"
    assert learned.guess(asked("Tie?", "")) == "a"
    assert learned.guess(asked("New?", "", "colour")) == ""
    assert (learned.chance("count"), learned.chance("colour")) == (1 / 5, None)


def test_a_grey_picture_has_the_size_that_is_seen(tmp_path: Path) -> None:
    image = tiny.picture(seed=1, size=(40, 30))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    (shown,) = grey(Sample("s", (user(Picture(str(tmp_path / "turned.png")), "\nColour?"),))).pictures
    pixels = np.asarray(open_picture(shown.read()))
    assert pixels.shape == (40, 30, 3)
    assert np.unique(pixels).tolist() == [128]


# ---- runs ----------------------------------------------------------------------------------------------------------------


def finished(folder: Path, spec: RunSpec) -> Path:
    """A run folder as training leaves it, with random weights."""
    tokenizer = tiny.tokenizer()
    torch.manual_seed(0)
    model = first_model(spec.model, placeholder_id(tokenizer))
    for place, prompt in (("export", "chatml"), ("stages/align", "vicuna_v1")):
        model.save_pretrained(folder / place)
        VLMProcessor(spec.model, 32, tokenizer, PromptSpec(use=prompt), "pad").save_pretrained(folder / place)
    (folder / "config.yaml").write_text(yaml.safe_dump(resolved(spec), sort_keys=False), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("run"), tiny_run(root, "eval.captions=captions"))


def seeing(model: Any, processor: Any, samples: Sequence[Sample], **settings: Any) -> list[Answer]:
    """Names the strongest colour of the first picture, "red" without one."""
    names = ("RED ", "green", "blue")
    seen = [np.asarray(open_picture(sample.pictures[0].read())).mean((0, 1)) if sample.pictures else np.zeros(3) for sample in samples]
    return [Answer(names[int(colour.argmax())], (5,), "stop") for colour in seen]


def test_scores_stand_beside_blind_and_chance(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(runs, "answer_all", seeing)
    result = evaluate(run, sources=["heldout"])["heldout"]
    assert result["kinds"] == {"colour": {"n": 6, "accuracy": 1.0, "blind": 1 / 3, "question_only": 1 / 3, "grey": 1 / 3, "chance": None}}
    assert result["mean"]["accuracy"] == 1.0
    assert json.loads((run / "eval" / "heldout.json").read_text())["answers"] == result["answers"]
    assert {key: result["answers"][1][key] for key in ("id", "kind", "question", "truth", "answer", "right", "grey_answer")} == {
        "id": "h1#0", "kind": "colour", "question": "What colour is the picture?", "truth": "green", "answer": "green", "right": True, "grey_answer": "RED ",
    }  # fmt: skip
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("heldout: 6 questions", "colour", "100.0", "33.3", "blind", "chance"))


def llava(file: Path, *records: tuple[str | None, str, str, str]) -> None:
    """Records of (picture, question, answer, kind)."""
    rows = [
        {"conversations": [{"from": "human", "value": ("<image>\n" if image else "") + text}, {"from": "gpt", "value": truth, "kind": kind}], **({"image": image} if image else {})}
        for image, text, truth, kind in records
    ]
    file.write_text(json.dumps(rows), encoding="utf-8")


def test_training_answers_come_from_the_last_stage_that_has_the_kind(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    red, green = "img/0.png", "img/1.png"
    llava(tmp_path / "first.json", (red, "Colour?", "black", "colour"), (red, "Where?", "left", "place"), (red, "Where?", "left", "place"), (red, "Where?", "right", "place"))
    llava(tmp_path / "last.json", (red, "Colour?", "green", "colour"), (red, "Colour?", "Green", "colour"), (red, "Colour?", "red", "colour"), (None, "Sum?", "red", "sum"))
    llava(tmp_path / "held.json", (red, "Colour?", "red", "colour"), (green, "Colour?", "green", "colour"), (red, "Where?", "left", "place"), (None, "Sum?", "red", "sum"))
    files = [f"data.{name}.file={tmp_path / file}.json" for name, file in (("captions", "first"), ("questions", "last"), ("heldout", "held"))]
    folder = finished(tmp_path / "run", tiny_run(root, *files))
    monkeypatch.setattr(runs, "answer_all", seeing)
    result = evaluate(folder)["heldout"]
    assert result["kinds"] == {
        "colour": {"n": 2, "accuracy": 1.0, "blind": 0.5, "question_only": 0.5, "grey": 0.5, "chance": 0.5},
        "place": {"n": 1, "accuracy": 0.0, "blind": 1.0, "question_only": 1.0, "grey": 0.0, "chance": 0.5},
        "sum": {"n": 1, "accuracy": 1.0, "blind": 1.0, "question_only": 1.0, "grey": None, "chance": 1.0},
    }
    assert result["mean"] == {"n": 4, "accuracy": 2 / 3, "blind": 2.5 / 3, "question_only": 2.5 / 3, "grey": 0.25, "chance": 2 / 3}
    assert [row["question_only_answer"] for row in result["answers"]] == ["green", "green", "left", "red"]


def test_a_run_is_scored_with_its_own_model(run: Path) -> None:
    found = evaluate(run, max_new_tokens=3)
    assert list(found) == ["heldout", "captions"]
    assert all(row["finish_reason"] in ("stop", "length") for row in found["heldout"]["answers"])
    again = evaluate(run, sources=["heldout"], batch_size=2, max_new_tokens=3)["heldout"]
    assert again == found["heldout"]


def test_the_protocol_tells_what_must_be_equal(run: Path) -> None:
    first = evaluate(run, sources=["heldout"], limit=1, max_new_tokens=2)["heldout"]["protocol"]
    other = evaluate(run, sources=["heldout"], limit=1, max_new_tokens=3)["heldout"]["protocol"]
    assert first["hash"] != other["hash"]
    assert {key for key in first if first[key] != other[key]} == {"scored", "hash"}
    assert first["prompt"]["use"] == "chatml"
    assert first["pictures"]["use"] == "pad"


def test_the_protocol_says_what_was_scored(root: Path, tmp_path: Path) -> None:
    """Other bytes under the same name, fewer of them, or another stage are another protocol."""
    data = tmp_path / "held.json"
    folder = finished(tmp_path / "run", tiny_run(root, f"data.heldout.file={data}"))

    def scored(truth: str, **settings: Any) -> dict[str, Any]:
        llava(data, ("img/0.png", "Colour?", truth, "colour"), ("img/1.png", "Colour?", "red", "colour"))
        return evaluate(folder, max_new_tokens=1, **settings)["heldout"]["protocol"]

    first = scored("red")
    assert first["scored"]["source"] == {"reader": "llava", **asdict(tiny_run(root).data["heldout"]), "file": str(data)}
    assert first["scored"]["sha256"] == hashlib.sha256(data.read_bytes().replace(b"blue", b"red")).hexdigest() and first["questions"] == 2
    others = [scored("blue"), scored("red", limit=1), scored("red", stage="align")]
    assert [{key for key in first["scored"] if first["scored"][key] != other["scored"][key]} for other in others] == [{"sha256"}, {"limit"}, {"stage"}]
    assert len({protocol["hash"] for protocol in (first, *others)}) == 4 and scored("red") == first


def test_another_grid_of_tiles_is_another_protocol(run: Path) -> None:
    model, own = load(run)
    processors = [VLMProcessor(own.model, own.width, own.tokenizer, own.prompt.spec, "anyres", tiling=Tiling(grids=grids)) for grids in (((1, 2),), ((2, 1),))]
    first, other = (protocol(model, processor, {}, 1) for processor in processors)
    assert {key for key in first if first[key] != other[key]} == {"pictures", "hash"}


def test_a_limit_spreads_over_the_source(run: Path) -> None:
    result = evaluate(run, sources=["heldout"], limit=3, max_new_tokens=1)["heldout"]
    assert [row["id"] for row in result["answers"]] == ["h0#0", "h2#0", "h4#0"]
    assert result["limit"] == 3


def test_a_stage_and_another_file_have_files_of_their_own(run: Path, root: Path) -> None:
    evaluate(run, sources=["heldout"], max_new_tokens=1)
    before = (run / "eval" / "heldout.json").read_bytes()
    assert list(evaluate(run, stage="align", file=root / "instruct.json", images=root, limit=4, max_new_tokens=1)) == ["instruct"]
    result = json.loads((run / "eval" / "files" / "instruct.align.json").read_text())
    assert (result["stage"], result["kinds"]["all"]["n"]) == ("align", 6)
    assert result["protocol"]["prompt"]["use"] == "vicuna_v1"
    evaluate(run, file=root / "heldout.json", images=root, limit=1, max_new_tokens=1)  # called as the run's own source is
    assert (run / "eval" / "files" / "heldout.json").is_file() and (run / "eval" / "heldout.json").read_bytes() == before


def test_any_format_is_scored_and_of_several_splits_none(run: Path, root: Path, tmp_path: Path) -> None:
    for form in ("messages", "parquet", "tar"):
        convert_data(root / "heldout.json", tmp_path / form, to=form)
        assert evaluate(run, file=tmp_path / form, limit=2, max_new_tokens=1)["heldout"]["mean"]["n"] == 2
    with pytest.raises(ConfigurationError, match=r"holds 3 splits, and one is scored\. got align \(.*align.json\), heldout \(.*heldout.json\), instruct"):
        evaluate(run, file=root)


def test_another_configurations_sources_are_scored(run: Path, root: Path) -> None:
    asked = tiny_run(root, "eval={pictures: captions}")
    assert evaluate(run, run=asked, limit=1, max_new_tokens=1)["pictures"]["mean"]["n"] == 1
    with pytest.raises(ConfigurationError, match="without slashes"):
        evaluate(run, run=replace(asked, eval={"files/pictures": "captions"}))


def test_a_picture_that_is_missing_is_told_before_the_model_is_loaded(run: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llava(tmp_path / "held.json", ("img/0.png", "Colour?", "red", "colour"), ("img/none.png", "Colour?", "red", "colour"))
    monkeypatch.setattr(runs, "load", pytest.fail)
    with pytest.raises(DataError, match=r"held\.json, sample 1: the picture .*none\.png is not there"):
        evaluate(run, file=tmp_path / "held.json", images=root)


def test_what_cannot_be_evaluated_is_said(run: Path, root: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no run"):
        evaluate(tmp_path)
    with pytest.raises(ConfigurationError, match="no evaluation 'held'.*one of heldout, captions"):
        evaluate(run, sources=["held"])
    with pytest.raises(ConfigurationError, match="no stage 'last'.*one of align, instruct"):
        evaluate(run, stage="last")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(resolved(replace(tiny_run(root), eval={}))), encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"nothing to evaluate on.*heldout: SOURCE"):
        evaluate(tmp_path)
