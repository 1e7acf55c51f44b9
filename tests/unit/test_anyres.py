"""Any resolution in a run: the policy `anyres` from the configuration to the export, its newline, two ranks, the check."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from interrupted import records, stopped_at

import vlm
import vlm.processor
import vlm.tiles
from vlm.composition import ConfigurationProblems
from vlm.errors import ConfigurationError
from vlm.loading import saved_model
from vlm.processor import VLMProcessor
from vlm.prompt import PromptSpec
from vlm.tiles import Tiling
from vlm.weights.llava import write

RUN = ("stages.instruct.images={use: anyres, grids: [[1, 2], [2, 1]]}", "stages.align.images=pad")


def compose(root: Path, *more: str) -> Any:
    return vlm.compose("llava_tiny", f"data_root={root}", *RUN, *more)


def test_a_run_adds_the_newline_trains_resumes_and_exports_it(root: Path, tmp_path: Path) -> None:
    options = (f"runs={tmp_path}", "save.every=1", "stages.instruct.pack=512")
    folder = vlm.fit(compose(root, *options, "name=whole"))
    groups = {stage: {row["group"]: row["rate"] for row in json.loads((folder / f"ledger-{stage}.json").read_text())} for stage in ("align", "instruct")}
    assert "connector.newline" not in groups["align"] and groups["instruct"]["connector.newline"] == 1e-3
    assert "newline.weight" not in saved_model(folder / "stages" / "align").state_dict()
    model, one = vlm.load(folder)
    assert model.newline is not None and one.tiling == Tiling(grids=((1, 2), (2, 1))) and one.policy == "anyres"
    assert len(one.see(root / "img" / "9.png").views["pixels"]) == 3
    with stopped_at(6):
        vlm.fit(compose(root, *options, "name=cut"))
    again, _ = vlm.load(vlm.fit(compose(root, *options, "name=cut"), resume=True))
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ConfigurationError, match=r"model\.newline is the token that ends a row of tiles"):
        write(model, one, tmp_path / "exported")
    start = (f"start={folder}", "stages.align.images=anyres", "stages.instruct=null")
    assert not vlm.check(compose(root, *start)).problems
    report = vlm.check(compose(root, f"start={folder}"))
    assert "model.newline (there, not in the first stage here)" in str(report.problems[0])
    assert not vlm.check(compose(root, f"start={folder}", "model.newline=true")).problems
    begun = vlm.fit(compose(root, f"start={folder / 'stages' / 'align'}", f"runs={tmp_path}", "name=begun", "stages.align.images=anyres", "stages.instruct=null"))
    assert "newline.weight" in vlm.load(begun)[0].state_dict()


@pytest.mark.ranks
def test_two_ranks_at_zero_3_are_one(root: Path, tmp_path: Path) -> None:
    """Steps of text alone, one and two pictures: the ranks hold different numbers of tiles."""
    options = [f"runs={tmp_path}", "every_stage.micro_batch=1", "stages.instruct.train={encoder: 1.0e-3, connector: 1.0e-3, llm: 1.0e-3}"]
    folders = [vlm.fit(compose(root, *options, "name=one"))]
    overrides = [f"data_root={root}", *RUN, *options, "name=two", "every_stage.deepspeed=zero3"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vlm", "train", "llava_tiny", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    one, two = ([record["loss"] for record in records(folder)] for folder in [*folders, tmp_path / "two"])
    assert two == pytest.approx(one, abs=1e-4)
    ours, others = (vlm.load(folder)[0].state_dict() for folder in [*folders, tmp_path / "two"])
    assert all(torch.allclose(tensor, others[name], atol=1e-4) for name, tensor in ours.items())


def test_check_counts_by_the_headers(root: Path) -> None:
    report = vlm.check(compose(root))
    assert not report.problems
    one = VLMProcessor(compose(root).model, 32, tiny.tokenizer(), PromptSpec(use="chatml"), "anyres", tiling=compose(root).stages["instruct"].images.tiling)
    counts = [one.layout(28 + index, 28).count for index in range(12)]
    instruct = report.stages[1]
    assert not report.warnings
    cropped = vlm.check(compose(root, "model.encoder={use: timm, name: vit_tiny_patch16_224, size: 32, weights: random}"))
    assert [text for text in cropped.warnings if "stages.instruct.images: the encoder drops the edges of every tile (model.encoder.crop 0.9)" in text]
    assert instruct.picture_range == (min(counts), max(counts)) and report.impossible["llava"].startswith("model.newline")
    assert "stages.instruct.images is anyres" in vlm.check(compose(root, "stages.instruct.images={use: anyres, newline: false}")).impossible["llava"]


@pytest.mark.parametrize(
    "images, words",
    [
        ("{use: pad, max_tiles: 4}", "max_tiles set how anyres cuts a picture"),
        ("{use: anyres, max_tiles: 4, grids: [[1, 2]]}", "both grids and max_tiles are given"),
        ("{use: anyres, grids: [[336, 672]]}", r"grids are columns and rows of tiles. got \[336, 672\].*write \[1, 2\]"),
        ("{use: anyres, grids: []}", "grids are columns and rows of tiles"),
        ("{use: anyres, grids: null, max_tiles: 1}", "max_tiles is a number of tiles"),
        ("{use: anyres, shrink_to: 0}", "shrink_to is a number of tiles"),
        ("{use: anyres, grids: [[1, 2, 3]]}", "wrong type or value"),
    ],
)
def test_settings_that_do_not_fit_together(root: Path, images: str, words: str) -> None:
    with pytest.raises(ConfigurationProblems, match=words):
        compose(root, f"stages.instruct.images={images}")
