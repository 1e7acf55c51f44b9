"""Parts of a user's own, one file and one YAML each: they compose, train, save, load. On two ranks: test_ranks.py."""

from pathlib import Path

import pytest
import torch
from interrupted import records

import vlm
from vlm.loading import first_model, saved_model
from vlm.processor import collate, load_tokenizer, placeholder_id
from vlm.train.forms import model_at

RUN = Path(__file__).parents[1] / "extension" / "run.yaml"


def compose(root: Path, *more: str) -> "vlm.RunSpec":  # type: ignore[name-defined]
    return vlm.compose(str(RUN), f"data_root={root}", *more)


def test_a_part_copies_the_encoder_and_counts_its_tokens(root: Path) -> None:
    run = compose(root)
    torch.manual_seed(0)
    model = first_model(model_at(run, 0), placeholder_id(load_tokenizer(run.model)))
    fuse, block = model.connector["fuse"], model.encoder.block(1)
    assert block is not None
    for mine, theirs in ((fuse.norm, block.norm1), (fuse.query, block.query), (fuse.key, block.key), (fuse.value, block.value)):
        assert all(torch.equal(a, b) for a, b in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True))
    assert {"encoder.high", "encoder.low", "connector.fuse"} <= model.groups().keys()


def test_it_trains_through_both_stages_and_reloads(root: Path, tmp_path: Path) -> None:
    folder = vlm.fit(compose(root, f"runs={tmp_path}"))
    steps = records(folder)
    assert [step["stage"] for step in steps] == ["align"] * 4 + ["instruct"] * 4
    assert "auxiliary" not in steps[0] and steps[4]["auxiliary"]["twin"] == pytest.approx(0.02 * 2, rel=1e-5)  # two layers, gate zero
    assert set(steps[4]["rates"]) == {"encoder.high", "encoder.low", "connector.fuse", "llm.twin.vision", "llm.twin.gate"}
    before, after = saved_model(folder / "stages" / "align"), saved_model(folder / "export")
    start = dict(before.named_parameters())
    for name, parameter in after.named_parameters():
        source = name.replace(".mlp.vision.", ".mlp.").replace(".mlp.text.", ".mlp.")
        if ".mlp.text." in name:
            assert torch.equal(parameter, start[source]), name  # frozen
        if ".layers.0.mlp.vision." in name:  # what the last layer makes of picture tokens, no answer reads
            assert not torch.equal(parameter, start[source]), name  # started from the copy, and moved
            assert (parameter - start[source]).abs().max() < 5e-3, name
    asked = ("What colour is the picture?", [root / "img" / "0.png"])
    said = vlm.answer(*vlm.load(folder), *asked, max_new_tokens=16)
    assert said and said == vlm.answer(*vlm.load(folder / "stages" / "instruct"), *asked, max_new_tokens=16)


def test_facts_reach_the_adaptation_and_nothing_changes_at_step_0(root: Path, tmp_path: Path) -> None:
    folder = vlm.fit(compose(root, f"runs={tmp_path}"))
    run = compose(root)
    plain = saved_model(folder / "stages" / "align").eval()
    from vlm.processor import VLMProcessor

    processor = VLMProcessor(plain.spec, 32, load_tokenizer(run.model), run.stages["instruct"].prompt)
    rows = [processor.row(run.data["questions"].open()[index]) for index in range(4)]
    batch = collate(rows, pad_id=processor.pad_id)
    with torch.no_grad():
        before = plain(**batch)
        plain.add("twin", run.model.adapt["twin"])
        after = plain(**batch)
    assert torch.equal(before.loss_sum, after.loss_sum)
    vision, documents = after.context.statistics["twin", 1].tolist()
    assert vision == sum(sum(row.types) for row in rows) > 0 and documents == 4
    assert after.loss.item() == pytest.approx((after.loss_sum / after.count).item() + 0.04, rel=1e-5)
