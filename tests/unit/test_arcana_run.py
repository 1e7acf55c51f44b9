"""A small Arcana from the configuration to the export: both stages, resume, evaluation, chat, official keys; and one rank = two ranks at ZeRO 0 to 3."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from interrupted import kept, records, stopped_at
from ranks import assert_equal_steps, assert_resumed, launch
from safetensors.torch import load_file

import vlm
from vlm.eval.run import evaluate
from vlm.weights.export import export_run
from vlm.weights.imports import import_model

WORKER = Path(__file__).with_name("arcana_ranks.py")


def run(root: Path, folder: Path, name: str, *more: str, resume: bool = False) -> Path:
    return vlm.fit(vlm.compose("arcana_tiny", f"data_root={root}", f"runs={folder}", f"name={name}", "save.every=1", *more), resume=resume)


@pytest.fixture(scope="module")
def whole(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(root, tmp_path_factory.mktemp("runs"), "whole")


def trained(folder: Path, stage: str) -> set[str]:
    return {row["group"] for row in json.loads((folder / f"ledger-{stage}.json").read_text()) if row["rate"] is not None}


def test_stages_train_what_arcana_trains(whole: Path, root: Path, tmp_path: Path) -> None:
    """systems/arcana.md, section 4: ladder and projector, then MM-LoRA as well; Arcana* with it from the first stage on."""
    ladder, sides = {"connector.qladder", "connector.mlp_1"}, {"llm.mm_lora.vision", "llm.mm_lora.language"}
    assert (trained(whole, "align"), trained(whole, "instruct")) == (ladder, ladder | sides)
    star = run(root, tmp_path, "star", "model.adapt.mm_lora.since=align", "stages.align.train={connector: 1.0e-3, llm: {mm_lora: 2.0e-3}}")
    assert trained(star, "align") == trained(star, "instruct") == ladder | sides
    before, after = (load_file(whole / place / "model.safetensors") for place in ("stages/align", "export"))
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before.get(name, before.get(name.replace(".base_layer", ""), torch.zeros(()))))}
    assert moved == {name for name in after if name.startswith("connector.") or ".lora_" in name}


@pytest.mark.parametrize("total", [2, 6])
def test_interrupted_equals_uninterrupted(root: Path, tmp_path: Path, whole: Path, total: int) -> None:
    with stopped_at(total):
        run(root, tmp_path, "cut")
    torch.manual_seed(99)
    folder = run(root, tmp_path, "cut", resume=True)
    expected, got = (load_file(place / "export" / "model.safetensors") for place in (whole, folder))
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)
    assert [kept(record) for record in records(folder)] == [kept(record) for record in records(whole)]


def test_it_is_scored_talked_to_and_exported(root: Path, whole: Path, tmp_path: Path) -> None:
    asked = ("What colour is the picture?", [str(root / "img" / "0.png")])
    said = vlm.answer(*vlm.load(whole), *asked, max_new_tokens=32)
    assert said and said == vlm.answer(*vlm.load(whole / "stages" / "instruct"), *asked, max_new_tokens=32)
    (scores,) = evaluate(whole).values()
    assert {kind: values["n"] for kind, values in scores["kinds"].items()} == {"colour": 6} and scores["answers"][0]["answer"] == said
    report = export_run(whole, tmp_path / "official", to="arcana")
    assert report.max_logit_difference == 0.0 and report.prompts
    names = load_file(tmp_path / "official" / "model.safetensors").keys()
    assert {"model.vision_tower.vision_tower.LadderAdapters.1.layer_norm0.weight", "model.layers.0.mlp.up_proj.V_Slora_A.weight"} <= names
    import_model(str(tmp_path / "official"), tmp_path / "back", "arcana")
    assert vlm.answer(*vlm.load(tmp_path / "back"), *asked, max_new_tokens=32) == said


# ---- ranks -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one(mixed_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(WORKER, mixed_root, tmp_path_factory.mktemp("one"), 0, 1)


@pytest.mark.ranks
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_one_rank_equals_two(mixed_root: Path, one: Path, tmp_path: Path, zero: int) -> None:
    """After one SGD step of rate 1, in every family; the first values of the ladder are in it."""
    two = launch(WORKER, mixed_root, tmp_path / "two", zero, 2)
    for family in tiny.FAMILIES:
        assert_equal_steps(one / family, two / family)
    assert_resumed(two)
