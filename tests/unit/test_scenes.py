"""The demo's data: the same for a seed, balanced, with layouts held out, readable by our reader and by AutoTokenizer."""

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm.data import scenes
from vlm.data.llava import LlavaSource
from vlm.data.sample import Sample
from vlm.data.scenes import COLOURS, PLACES, SHAPES, Scene, Thing, caption, draw_scene, paint, questions_about, write_scenes
from vlm.data.tar import TarSource
from vlm.errors import ConfigurationError

SMALL: dict[str, Any] = {"scenes": 30, "held_out": 40, "per_kind": 10}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "data"
    assert write_scenes(folder, **SMALL, processes=1) == {"align": 30, "instruct": 30, "heldout": 40, "pictures": 70}
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_same_bytes_for_a_seed_whatever_the_processes(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scenes, "CHUNK", 7)
    write_scenes(tmp_path / "again", **SMALL, processes=2)
    write_scenes(tmp_path / "other", **SMALL, processes=1, seed=1)
    assert files(tmp_path / "again") == files(root)
    assert files(tmp_path / "other")["align.json"] != files(root)["align.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "other"]


def test_everything_is_readable(root: Path):
    align, instruct, heldout = (LlavaSource(file=str(root / f"{name}.json"), on_bad="skip").open() for name in ("align", "instruct", "heldout"))
    assert (len(align), len(instruct), len(heldout)) == (30, 30, 40)
    assert all(Image.open(picture.path).size == (60, 60) for reader in (align, instruct, heldout) for sample in reader for picture in sample.pictures)
    for sample in instruct:
        asked = [turn.text for turn in sample.turns if turn.role == "user"]
        captions = sum("describe" in text for text in asked)
        assert sample.independent
        assert len(set(asked)) == len(asked) == 6 + captions
        assert captions <= 1
    assert all(len(sample.turns) == 2 and sample.turns[0].text.startswith("\n") and sample.turns[1].kind for sample in heldout)
    assert {sample.turns[1].kind for sample in align} == {"caption"}
    assert Counter(sample.turns[1].kind for sample in heldout) == dict.fromkeys(scenes.KINDS, 10)
    assert Image.open(root / "examples.png").width >= 480


def test_shards_hold_the_same_samples(root: Path, tmp_path: Path):
    assert write_scenes(tmp_path / "tar", to="tar", **SMALL, processes=1) == {"align": 30, "instruct": 30, "heldout": 40, "pictures": 70}
    assert {path.name for path in (tmp_path / "tar").iterdir()} - {"tokenizer", "examples.png"} == {
        f"{name}-000000.tar{end}" for name in ("align", "instruct", "heldout") for end in ("", ".index")
    }
    for name in ("align", "instruct", "heldout"):
        there, here = LlavaSource(file=str(root / f"{name}.json")).open(), TarSource(file=str(tmp_path / "tar" / f"{name}-*.tar")).open()
        assert [_said(sample) for sample in there] == [_said(sample) for sample in here]
    with pytest.raises(ConfigurationError, match="llava or tar"):
        write_scenes(tmp_path / "other", to="parquet", **SMALL)


def _said(sample: Sample) -> tuple[Any, ...]:
    parts = [[part if isinstance(part, str) else part.read() for part in turn.parts] for turn in sample.turns]
    return sample.id, sample.independent, [(turn.role, turn.kind) for turn in sample.turns], parts


def test_answers_follow_from_the_scene():
    scene: Scene = (Thing(0, "red", "ring"), Thing(4, "blue", "star"), Thing(8, "green", "ring"))
    asked = {question.question: question.answer for pool in questions_about(scene).values() for question in pool}
    assert asked["what colour is the object middle center ?"] == "blue"
    assert asked["where is the star ?"] == "middle center"
    assert asked["what shape is the green object ?"] == "ring"
    assert asked["how many objects are there ?"] == "three"
    assert not any("the ring ?" in question for question in asked)
    captions = {told.question: told.answer for told in (caption(scene, random.Random(seed)) for seed in range(9))}
    assert captions == {
        "describe the picture .": "three objects : a red ring top left , a blue star middle center , a green ring bottom right .",
        "describe the picture by place .": "three objects : top left a red ring , middle center a blue star , bottom right a green ring .",
    }


def test_held_out_layouts_are_never_trained_on():
    trained, unseen = ({draw_scene(random.Random(seed), held_out) for seed in range(3000)} for held_out in (False, True))
    assert not trained & unseen
    assert len(unseen) > 1500
    assert all(len({thing.cell for thing in scene}) == len({thing.colour for thing in scene}) == len(scene) for scene in unseen)


def test_training_answers_are_even_and_kinds_by_weight():
    drawn = [draw_scene(random.Random(seed), False) for seed in range(4000)]
    _, records = scenes._training_records(drawn, 0, 6)
    turns = [turn for record in records for turn in record["conversations"]]
    answers = Counter((asked["kind"], given["value"]) for asked, given in zip(turns[::2], turns[1::2], strict=True))
    for kind, values in (("colour", list(COLOURS)), ("position", PLACES), ("shape", list(SHAPES)), ("count", scenes.NUMBERS)):
        share = 1 / len(values)
        total = sum(count for (of, _), count in answers.items() if of == kind)
        assert sum(answers[kind, value] for value in values) == total
        assert all(abs(answers[kind, value] / total - share) < 4.5 * (share * (1 - share) / total) ** 0.5 + 0.02 * share for value in values), kind
    assert 0.17 < sum(record["conversations"][0]["kind"] == "caption" for record in records) / 4000 < 0.23
    assert 0.22 < sum(count for (of, _), count in answers.items() if of == "count") / 4000 < 0.27  # 6 x 0.5 / 11, less what a scene without further questions of its kind leaves


def test_held_out_answers_are_even(root: Path):
    turns = [record["conversations"] for record in json.loads((root / "heldout.json").read_text(encoding="utf-8"))]
    for kind, number in (("colour", 6), ("position", 9), ("shape", 8), ("count", 4)):
        counts = Counter(given["value"] for asked, given in turns if asked["kind"] == kind)
        assert len(counts) == number
        assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("shape", list(SHAPES))
def test_things_are_painted_where_and_as_they_are(shape: str):
    for cell in range(9):
        scene: Scene = (Thing(cell, "white", shape),)
        pixels = np.asarray(paint(scene, random.Random(cell)).convert("L")) > 140
        inside = np.zeros((60, 60), bool)
        inside[cell // 3 * 20 : cell // 3 * 20 + 20, cell % 3 * 20 : cell % 3 * 20 + 20] = True
        assert 30 < pixels.sum() < 300
        assert not pixels[~inside].any()
        rows, columns = np.nonzero(pixels)
        middle = pixels[round(rows.mean()), round(columns.mean())]
        assert middle == (SHAPES[shape].hole == 0)


def test_tokenizer_loads_and_round_trips(root: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(root / "tokenizer")
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|im_end|>", "<|endoftext|>", None)
    assert 256 < len(tokenizer) <= 512
    text = tokenizer.apply_chat_template([{"role": "user", "content": "<image>\nwhere is the Ring ? é"}, {"role": "assistant", "content": "top left"}], tokenize=False)
    assert text == "<|im_start|>user\n<image>\nwhere is the Ring ? é<|im_end|>\n<|im_start|>assistant\ntop left<|im_end|>\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    control = tokenizer.convert_tokens_to_ids(["<image>", "<|im_start|>", "<|im_end|>"])
    assert [ids.count(index) for index in control] == [1, 2, 2]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\n\nwhere is the Ring ? é\nassistant\ntop left\n"
    parts = [{"type": "image"}, {"type": "text", "text": "\nq"}]
    asked = [[{"role": "user", "content": content}] for content in (parts, "<image>\nq")]
    assert len({tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) for messages in asked}) == 1


@pytest.mark.parametrize(
    ("changed", "fact"),
    [({"held_out": 2}, "too few held-out scenes"), ({"held_out": 0}, "too few held-out scenes"), ({"questions": 7}, "questions 7"), ({"scenes": 0}, "scenes 0")],
)
def test_impossible_sizes_are_refused_and_leave_nothing(tmp_path: Path, changed: dict[str, int], fact: str):
    with pytest.raises(ConfigurationError, match=fact):
        write_scenes(tmp_path / "data", **{**SMALL, **changed}, processes=1)
    assert not list(tmp_path.iterdir())


def test_too_few_held_out_scenes_say_how_many_are_enough(tmp_path: Path):
    with pytest.raises(ConfigurationError, match="--held-out") as caught:
        write_scenes(tmp_path / "data", **{**SMALL, "held_out": 2}, processes=1)
    enough = int(re.findall(r"--held-out (\d+)", str(caught.value))[0])
    assert write_scenes(tmp_path / "data", **{**SMALL, "held_out": enough}, processes=1)["heldout"] == 40
    with pytest.raises(ConfigurationError, match=f"--held-out {enough} is enough"):
        write_scenes(tmp_path / "fewer", **{**SMALL, "held_out": enough // 2}, processes=1)


def test_a_folder_that_holds_something_is_left_alone(root: Path):
    with pytest.raises(ConfigurationError, match="holds something already"):
        write_scenes(root, **SMALL)
