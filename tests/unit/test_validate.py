"""Validation while training: it looks and changes nothing; and the warning about trained tensors that no gradient reaches."""

import json
import re
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from idle import IdleSpec
from interrupted import Stop, kept, records, stopped_at
from ranks import launch
from safetensors.torch import load_file

import vlm
from vlm import llm
from vlm.errors import ConfigurationError
from vlm.row import collate
from vlm.train import stages
from vlm.train.log import Log
from vlm.train.validate import Validation

WORKER = Path(__file__).with_name("validate_worker.py")
DROPOUT = ("model.encoder.config.attention_dropout=0.1", "model.llm.config.attention_dropout=0.1")
LOOKS = ("validate={every: 2, samples: 5}",)


def run(root: Path, folder: Path, name: str, *more: str, resume: bool = False) -> Path:
    return vlm.fit(vlm.compose("llava_tiny", f"data_root={root}", f"runs={folder}", f"name={name}", *DROPOUT, *more), resume=resume)


def looks(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def whole(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(root, tmp_path_factory.mktemp("runs"), "whole", "save.every=1", *LOOKS)


@pytest.mark.parametrize("more", [("every_stage.deepspeed=zero0",), ("every_stage.deepspeed=zero3", "workers=1")])
def test_training_is_the_same_with_and_without(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]) -> None:
    without = run(root, tmp_path, "without", *more)
    look = Validation.look

    def and_draw(self: Validation, engine: Any) -> dict[str, Any]:
        hook = engine.model.connector.mlp.register_forward_hook(lambda *_: (torch.rand(3), None)[1])  # a part that draws at inference too
        try:
            return look(self, engine)
        finally:
            hook.remove()

    monkeypatch.setattr(Validation, "look", and_draw)
    looked = run(root, tmp_path, "looked", *more, *LOOKS, "validate.every=1", "validate.keep_best=true")
    assert [kept(record) for record in records(looked)] == [kept(record) for record in records(without)]
    expected, got = weights(without / "export"), weights(looked / "export")
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert (looked / "export" / "generation_config.json").read_text() == (without / "export" / "generation_config.json").read_text()
    assert not (without / "validation.jsonl").exists() and len(looks(looked)) == 8


def test_what_is_written(root: Path, whole: Path) -> None:
    """Every two steps and at a stage's end; what stands there is the loss of the stage's model at inference, over the samples' own tokens."""
    found = looks(whole)
    assert [(record["stage"], record["step"], record["total"]) for record in found] == [("align", 2, 2), ("align", 4, 4), ("instruct", 2, 6), ("instruct", 4, 8)]
    assert not (whole / "best").exists()
    model, processor = vlm.load(whole)
    asked = [processor.row(sample) for sample in (vlm.compose(str(whole / "config.yaml")).data["heldout"].open()[index] for index in range(6))]
    losses, tokens = torch.zeros(6), torch.zeros(6)
    with torch.no_grad():
        for number, row in enumerate(asked):
            output = model(**collate([row], pad_id=processor.pad_id))
            losses[number], tokens[number] = output.loss_sum, output.count
    one_left_out = [(losses.sum() - losses[out]) / (tokens.sum() - tokens[out]) for out in range(6)]  # five of the six, the seed says which
    assert min(abs(float(loss) - found[-1]["loss"]) for loss in one_left_out) < 1e-6
    assert found[-1]["sources"] == {"heldout": found[-1]["loss"]} and found[-1]["supervised"] in {int(tokens.sum() - tokens[out]) for out in range(6)}


def test_the_end_of_a_stage_is_looked_at_once(root: Path, tmp_path: Path) -> None:
    folder = run(root, tmp_path, "ends", "validate={every: 3, samples: 2}")
    assert [record["total"] for record in looks(folder)] == [3, 4, 7, 8]


@pytest.mark.parametrize("total", [3, 6])
def test_interrupted_equals_uninterrupted(root: Path, tmp_path: Path, whole: Path, total: int) -> None:
    with stopped_at(total):
        run(root, tmp_path, "cut", "save.every=1", *LOOKS)
    assert looks(run(root, tmp_path, "cut", "save.every=1", *LOOKS, resume=True)) == looks(whole)


def test_looks_behind_the_checkpoint_are_written_once(root: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = stages.Stage._save
    monkeypatch.setattr(stages.Stage, "_save", lambda *_: (_ for _ in ()).throw(Stop))
    with pytest.raises(Stop):
        run(root, tmp_path, "cut", "save.every=3", *LOOKS)  # step 4 is looked at, step 3 is saved
    monkeypatch.setattr(stages.Stage, "_save", save)
    assert len(looks(tmp_path / "cut")) == 2
    assert looks(run(root, tmp_path, "cut", "save.every=3", *LOOKS, resume=True)) == looks(whole)


@pytest.mark.parametrize("cut", [None, 2, 3, 6])
def test_the_best_model_of_a_stage_is_kept(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int | None) -> None:
    """Losses are given: the second look of the first stage and the third of the second are the smallest."""
    given = {1: 3.0, 2: 1.0, 3: 2.0, 4: 1.0, 5: 9.0, 6: 8.0, 7: 7.0, 8: 7.5}
    seen: dict[int, dict[str, torch.Tensor]] = {}
    totals = count(1)

    def look(self: Validation, engine: Any) -> dict[str, Any]:
        total = next(totals)
        seen[total] = {name: tensor.detach().clone() for name, tensor in engine.model.state_dict().items()}
        return {"loss": given[total], "supervised": 1, "sources": {"heldout": given[total]}}

    monkeypatch.setattr(Validation, "look", look)
    more = ("save.every=1", "validate={every: 1, keep_best: true}")
    if cut is not None:
        with stopped_at(cut):
            run(root, tmp_path, "best", *more)
        totals = count(cut + 1)
    folder = run(root, tmp_path, "best", *more, resume=cut is not None)
    for stage, total in (("align", 2), ("instruct", 7)):
        assert json.loads((folder / "best" / stage / "best.json").read_text())["total"] == total
        kept_weights = weights(folder / "best" / stage)
        assert all(torch.equal(seen[total][name], tensor) for name, tensor in kept_weights.items())
        assert any(not torch.equal(tensor, kept_weights[name]) for name, tensor in weights(folder / "stages" / stage).items())
    assert sorted(entry.name for entry in (folder / "best").iterdir()) == ["align", "instruct"]
    assert torch.equal(vlm.load(folder / "best" / "instruct")[0].state_dict()["llm.lm_head.weight"], seen[7]["llm.lm_head.weight"])


def test_tensorboard_and_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Board:
        def __init__(self) -> None:
            self.scalars: list[tuple[str, float, int]] = []

        def add_scalar(self, *scalar: Any) -> None:
            self.scalars.append(scalar)

        def flush(self) -> None: ...

        def close(self) -> None: ...

    log = Log(tmp_path, 0, 1)
    log._board = board = Board()
    log.validation({"stage": "align", "step": 3, "total": 7, "loss": 2.5, "supervised": 9, "sources": {"held": 2.5}}, best=True)
    log.close()
    assert board.scalars == [("validation/loss", 2.5, 7), ("validation/sources/held", 2.5, 7)]
    assert "align 3  validation loss 2.5000 (held 2.5000), the smallest so far" in capsys.readouterr().out


# ---- what `vlm check` says ---------------------------------------------------------------------------------------------------


def test_check_names_what_is_looked_at(root: Path) -> None:
    report = vlm.check(tiny_run.compose(root, "validate={every: 2, samples: 5, data: {held: heldout, again: captions}}"))
    assert report.ok
    said = tiny_run.printed(report)
    assert "validation: held: 5 of 6 samples of heldout, every 2 steps and at a stage's end" in said
    assert "warning: validate: again looks at captions, which stage align trains on" in said
    assert "validation" not in tiny_run.printed(vlm.check(tiny_run.compose(root)))


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ("validate={every: 2, data: {held: heldot}}", "validate.data.held: no data source is called 'heldot'.*did you mean 'heldout'"),
        ("validate={every: -1}", "validate.every: is out of range"),
        ("validate={every: 1, samples: 0}", "validate.samples: is out of range"),
        ("validate={every: 2, data: {mixed: questions}}", "prompt 'plain' puts answers right behind the picture"),
    ],
)
def test_check_finds_what_would_stop_it(root: Path, more: str, text: str) -> None:
    report = vlm.check(tiny_run.compose(root, more))
    assert any(re.search(text, str(problem)) for problem in report.problems), list(map(str, report.problems))


def test_check_asks_for_something_to_look_at(root: Path) -> None:
    assert "nothing is named to look at" in str(tiny_run.only(vlm.check(tiny_run.compose(root, "validate.every=2", "eval=null"))))


def test_a_bad_sample_is_a_problem_or_replaced_and_counted(root: Path, tmp_path: Path) -> None:
    rows = json.loads((root / "heldout.json").read_text())
    (root / "img" / "half.png").write_bytes((root / "img" / "0.png").read_bytes()[:-30])
    rows[2]["image"] = "img/half.png"
    (root / "half.json").write_text(json.dumps(rows))
    broken = (f"data.heldout.file={root}/half.json", "validate={every: 4, samples: 6}")
    with pytest.raises(ConfigurationError, match=r"half\.json, sample 2"):
        run(root, tmp_path, "stops", *broken)
    folder = run(root, tmp_path, "skips", *broken, "data.heldout.on_bad=skip")
    assert [record["skipped"] for record in looks(folder)] == [1, 1]


# ---- gradients -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_trained_tensors_without_a_gradient_are_named(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], zero: int) -> None:
    monkeypatch.setitem(llm.registry._specs, "idle", IdleSpec)
    idle = ("model.adapt={idle: {since: instruct}}", "stages.instruct.train={connector: 1.0e-3, llm: 1.0e-3}")
    folder = run(root, tmp_path, "idle", f"every_stage.deepspeed=zero{zero}", *idle, "every_stage.micro_batch=1")
    said = [line for line in capsys.readouterr().out.splitlines() if "no gradient" in line and "warning" in line]
    assert said == [
        "warning: stage instruct: no gradient reaches a trained tensor of llm.idle (llm.more); freeze the group, or let the part's unused() name what is kept for a checkpoint's sake"
    ]
    assert [f"warning: {record['text']}" for record in map(json.loads, (folder / "warnings.jsonl").read_text().splitlines())] == said
    plain = run(root, tmp_path, "plain", f"every_stage.deepspeed=zero{zero}")
    assert "warning" not in capsys.readouterr().out and not (plain / "warnings.jsonl").exists()
    assert len(records(folder)) == 8


# ---- ranks ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(WORKER, root, tmp_path_factory.mktemp("one"), 0, 1) / "still"


@pytest.mark.ranks
@pytest.mark.parametrize("zero", [0, 3])
def test_two_ranks_see_what_one_sees(root: Path, tmp_path: Path, one: Path, zero: int) -> None:
    """Rows with and without pictures one by one, five on two ranks: in every pass one rank may have no picture, and in the last one no sample. The best model is gathered from both."""
    two = launch(WORKER, root, tmp_path / "two", zero, 2) / "still"
    for left, right in zip(looks(one), looks(two), strict=True):
        assert left["supervised"] == right["supervised"] and left["sources"].keys() == right["sources"].keys() == {"held", "mixed"}
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-6)
        assert left["sources"] == pytest.approx(right["sources"], rel=1e-6)
    assert weights(two / "best" / "instruct").keys() == weights(two / "export").keys()
