"""`vlm replay`: a step done again has the samples, pictures, labels and losses that it had, to the last bit, and the run's folder stays as it was."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from interrupted import records
from PIL import Image
from typer.testing import CliRunner

import vlm
from vlm.cli import app
from vlm.data.sample import Picture
from vlm.errors import CheckpointError, ConfigurationError, DataError
from vlm.images import open_picture
from vlm.train.replay import replay_step

DROPOUT = ("model.encoder.config.attention_dropout=0.1", "model.llm.config.attention_dropout=0.1")
PACKED = ("every_stage.pack=120", "every_stage.max_length=120", "every_stage.batch=6", "every_stage.micro_batch=1")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.mixed_root(tmp_path_factory.mktemp("data"))


def run(root: Path, folder: Path, name: str, *more: str) -> Path:
    return vlm.fit(vlm.compose("llava_tiny", f"data_root={root}", f"runs={folder}", f"name={name}", "save={every: 2, keep: 9}", *DROPOUT, *more))


@pytest.fixture(scope="module")
def made(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(root, tmp_path_factory.mktemp("runs"), "made")


def state(folder: Path) -> dict[str, tuple[str, int]]:
    """Content and time of every file."""
    return {str(file.relative_to(folder)): (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns) for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("zero", [0, 2])
def test_three_steps_with_and_without_a_checkpoint_before_them(root: Path, tmp_path: Path, zero: int, packed: bool) -> None:
    folder = run(root, tmp_path, "run", f"every_stage.deepspeed=zero{zero}", *(PACKED if packed else ()))
    written = {record["total"]: record for record in records(folder)}
    draw = random.Random(10 * zero + packed)
    steps = [draw.choice([3, 4]), draw.choice([7, 8]), draw.choice([1, 2, 5, 6])]
    before, begun = state(folder), []
    for kept in (True, False):
        if not kept:
            (folder / "resume").rename(tmp_path / "resume")
            before = {name: found for name, found in before.items() if not name.startswith("resume/")}
        for step in steps:
            torch.manual_seed(99)
            again = replay_step(folder, step)
            assert again.loss == written[step]["loss"] and again.exact
            assert (again.stage, again.step, len(again.documents)) == (written[step]["stage"], written[step]["step"], written[step]["samples"])
            counted = sum(one.supervised for one in again.documents), sum(one.tokens for one in again.documents)
            assert counted == (written[step]["supervised"], written[step]["tokens"])
            assert sum(one.loss for one in again.documents) / counted[0] == pytest.approx(again.loss, rel=1e-12)
            assert again.largest.mean == max(one.loss / one.supervised for one in again.documents)
            begun.append(again.begun.split()[0])
        assert state(folder) == before
    assert begun[:2] == ["checkpoint"] * 2 and begun[3:] == ["the"] * 3


def test_a_stage_counts_its_own_steps(made: Path) -> None:
    assert replay_step(made, 2, stage="instruct").total == 6
    with pytest.raises(CheckpointError, match=r"has no step 9\. expected 1 to 8 \(with --stage: align 1 to 4, instruct 1 to 4\)"):
        replay_step(made, 9)
    with pytest.raises(CheckpointError, match="has no step 5 of stage align"):
        replay_step(made, 5, stage="align")
    with pytest.raises(CheckpointError, match="has no stage 'tune'. expected one of align, instruct"):
        replay_step(made, 1, stage="tune")
    with pytest.raises(CheckpointError, match="holds no run"):
        replay_step(made / "export", 1)


def test_what_out_holds(root: Path, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    again = replay_step(made, 6, out=out)
    held = json.loads((out / "replay.json").read_text())
    assert held["exact"] and [one["id"] for one in held["documents"]] == [one.id for one in again.documents]
    assert {file.name for file in out.glob("*.png")} == {name for one in again.documents for name in one.seen}
    encoder: Any = vlm.compose(str(made / "config.yaml")).model.encoder
    pictured = [one for one in again.documents if one.pictures]
    assert pictured and all(one.modality == "vision" for one in pictured)
    for one in pictured:
        for place, name in zip(one.pictures, one.seen, strict=True):
            square = encoder._square(open_picture(Picture(place).read()))
            assert np.array_equal(np.asarray(square), np.asarray(Image.open(out / name)))
    tokenizer = vlm.load(made)[1].tokenizer
    for one in again.documents:
        assert len(one.ids) == len(one.labels) == one.tokens
        learned = "".join(part.split("]]")[0] for part in one.text.split("[[")[1:])
        assert learned == tokenizer.decode([label for label in one.labels if label != -100])
        assert f"=== {one.id} (questions, {root}/instruct.json, sample " in (out / "samples.txt").read_text()
    with pytest.raises(ConfigurationError, match="out holds something already"):
        replay_step(made, 6, out=out)


def test_replaced_samples_and_pictures_inside_of_shards(root: Path, tmp_path: Path) -> None:
    """Packed, so that a broken picture is found only when its row is filled."""
    rows = json.loads((root / "align.json").read_text())
    (root / "img" / "half.png").write_bytes((root / "img" / "0.png").read_bytes()[:-30])
    rows[3]["image"] = "img/half.png"
    (root / "half.json").write_text(json.dumps(rows))
    broken = (f"data.captions.file={root}/half.json", "data.captions.on_bad=skip", "bad_budget=0.5", "stages.align.steps=null", "stages.align.epochs=1")
    folder = run(root, tmp_path, "broken", "every_stage.pack=60", "every_stage.max_length=60", *broken)
    step = next(record["total"] for record in records(folder) if record.get("notes", {}).get("replacement"))
    again = replay_step(folder, step)
    replaced = [one for one in again.documents if "replacement" in one.notes]
    assert again.exact and len(replaced) == 1 and "a3" not in {one.id for one in again.documents}
    assert replaced[0].pictures == (str(root / rows[int(replaced[0].id[1:])]["image"]),)
    shards = run(root, tmp_path, "shards", *tiny.MIXED)
    again = replay_step(shards, 2)
    assert again.exact and all(".tar, " in picture and "from byte" in picture for one in again.documents for picture in one.pictures)


def test_a_changed_checkpoint_is_passed_over_and_other_data_are_not(root: Path, made: Path) -> None:
    victim = next((made / "resume" / "step-6").glob("random-0.pt"))
    held, captions = victim.read_bytes(), (root / "align.json").read_bytes()
    victim.write_bytes(held[:-1] + b"!")
    try:
        again = replay_step(made, 8)
        assert again.exact and again.begun == "the beginning of stage instruct"
        (root / "align.json").write_bytes(captions + b"\n")
        with pytest.raises(DataError, match="data of .* changed since the run began.*captions"):
            replay_step(made, 8)
    finally:
        victim.write_bytes(held)
        (root / "align.json").write_bytes(captions)


def test_other_ranks_are_refused_with_what_to_do(made: Path) -> None:
    file = made / "metrics.jsonl"
    held = file.read_text()
    file.write_text(held.replace('"ranks": 1', '"ranks": 2', 1))
    try:
        with pytest.raises(CheckpointError, match=r"got 1; expected 2\. torchrun --standalone --nproc-per-node 2 --no-python vlm replay"):
            replay_step(made, 1)
    finally:
        file.write_text(held)


def test_the_command_says_whether_the_loss_is_what_it_was(made: Path) -> None:
    done = CliRunner().invoke(app, ["replay", str(made), "--step", "8"])
    largest = replay_step(made, 8).largest
    assert done.exit_code == 0 and "bit for bit" in done.output and f"the largest loss has sample {largest.id} of questions" in done.output
    metrics = made / "metrics.jsonl"
    held = metrics.read_text()
    metrics.write_text(held.replace(f'"loss": {records(made)[7]["loss"]!r}', '"loss": 6.5'))
    try:
        done = CliRunner().invoke(app, ["replay", str(made), "--step", "8"])
        assert done.exit_code == 1 and "metrics.jsonl holds 6.5; another machine" in done.output
    finally:
        metrics.write_text(held)
