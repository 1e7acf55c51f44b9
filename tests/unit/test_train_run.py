"""Whole runs in one process on a model of a few thousand parameters: what is interrupted, accumulated or split must not change a bit, or a digit."""

import json
import random
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from interrupted import Stop, kept, records, stopped_at
from safetensors.torch import load_file

import vlm
from vlm.errors import CheckpointError, ConfigurationError, DataError, EnvironmentProblem, NumericsError, VLMError
from vlm.train import checkpoint, loop, memory, stages
from vlm.train.bad import BadSamples
from vlm.train.optim import Group


def run(root: Path, folder: Path, name: str, *more: str, resume: bool = False) -> Path:
    overrides = (f"data_root={root}", f"runs={folder}", f"name={name}", "workers=0", "model.encoder.config.attention_dropout=0.1", "model.llm.config.attention_dropout=0.1")
    return vlm.fit(vlm.compose("llava_tiny", *overrides, *more), resume=resume)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "export" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(root, tmp_path_factory.mktemp("runs"), "whole", "save.every=1")


def test_steps_behind_the_checkpoint_are_written_once(root: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = stages.Stage._save
    monkeypatch.setattr(stages.Stage, "_save", lambda *_: (_ for _ in ()).throw(Stop))
    with pytest.raises(Stop):
        run(root, tmp_path, "cut", "save.every=3")  # four steps are logged, three are saved
    monkeypatch.setattr(stages.Stage, "_save", write)
    folder = run(root, tmp_path, "cut", "save.every=3", resume=True)
    assert [kept(record) for record in records(folder)] == [kept(record) for record in records(whole)]


@pytest.mark.parametrize("total", sorted([*random.Random(0).sample(range(1, 4), 3), *(4 + k for k in random.Random(1).sample(range(1, 4), 3))]))
def test_interrupted_equals_uninterrupted(root: Path, tmp_path: Path, whole: Path, total: int) -> None:
    with stopped_at(total):
        run(root, tmp_path, "cut", "save.every=1")
    torch.manual_seed(99)
    folder = run(root, tmp_path, "cut", "save.every=1", resume=True)
    expected, got = weights(whole), weights(folder)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert [kept(record) for record in records(folder)] == [kept(record) for record in records(whole)]
    assert (folder / "export" / "generation_config.json").read_text() == (whole / "export" / "generation_config.json").read_text()


def test_the_end_mark_of_a_stage_does_not_stay(whole: Path) -> None:
    ends = [json.loads((whole / place / "generation_config.json").read_text())["eos_token_id"] for place in ("stages/align", "export")]
    tokenizer = vlm.load(whole)[1].tokenizer
    assert tokenizer.convert_ids_to_tokens(ends[0]) == ["Ċ", "<|im_end|>"]  # align's prompt is plain: a caption ends with its line
    assert tokenizer.convert_ids_to_tokens(ends[1]) == ["<|im_end|>"]


def test_a_run_that_changed_is_not_gone_on_with(root: Path, tmp_path: Path) -> None:
    folder = run(root, tmp_path, "changed")
    with pytest.raises(CheckpointError, match="another model or other stages"):
        run(root, tmp_path, "changed", "seed=5", resume=True)
    before = (root / "align.json").read_text()
    (root / "align.json").write_text(json.dumps([*json.loads(before), json.loads(before)[0] | {"id": "new"}]))
    try:
        with pytest.raises(DataError, match="data of .* changed since the run began.*captions"):
            run(root, tmp_path, "changed", resume=True)
    finally:
        (root / "align.json").write_text(before)
    assert run(root, tmp_path, "changed", resume=True) == folder


def test_the_time_that_saving_takes_is_no_waiting_for_data(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, spent, save = time.perf_counter, 0, checkpoint.save

    def long_save(*given: Any) -> Path:
        nonlocal spent
        spent += 10**6
        return save(*given)

    monkeypatch.setattr(checkpoint, "save", long_save)
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: clock() + spent))
    steps = records(run(root, tmp_path, "long", "save.every=1"))
    assert spent and max(record["seconds"] for record in steps) < 10**6


def test_what_a_run_leaves(whole: Path) -> None:
    for name in ("config.yaml", "environment.json", "manifest.json", "metrics.jsonl", "pictures/loss.png", "stages/align/config.json", "export/model.safetensors"):
        assert (whole / name).is_file(), name
    assert len(list((whole / "resume").glob("step-*"))) == 2
    last = records(whole)[-1]
    assert last["step"] == 4 and last["total"] == 8 and last["modality"]["vision"] + last["modality"]["text"] == last["samples"] == 4
    assert abs(sum(source["share"] for source in last["sources"].values()) - 1) < 1e-9
    again = vlm.compose(str(whole / "config.yaml"))
    assert again.stages.keys() == {"align", "instruct"} and again.name == "whole"


def test_accumulation_does_not_change_the_step(root: Path, tmp_path: Path) -> None:
    plain = ("model.encoder.config.attention_dropout=0", "model.llm.config.attention_dropout=0", "stages.instruct.train={encoder: 1.0e-3, connector: 1.0e-3, llm: 1.0e-3}")
    sizes = ("every_stage.batch=8",)
    one = run(root, tmp_path, "one", *plain, *sizes, "every_stage.micro_batch=8")
    many = run(root, tmp_path, "many", *plain, *sizes, "every_stage.micro_batch=1")
    for left, right in zip(records(one), records(many), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)
        assert left["supervised"] == right["supervised"]


def test_an_existing_folder_is_not_overwritten(root: Path, whole: Path) -> None:
    with pytest.raises(ConfigurationError, match="exists already.*--resume"):
        run(root, whole.parent, "whole")


def test_another_tokenizer_is_refused(root: Path, tmp_path: Path) -> None:
    words = tmp_path / "words"
    tiny.tokenizer().save_pretrained(words)
    with stopped_at(2):
        run(root, tmp_path, "cut", "save.every=1", f"model.llm.tokenizer={words}")
    changed = tiny.tokenizer()
    changed.add_tokens(["another"])
    changed.save_pretrained(words)
    with pytest.raises(CheckpointError, match="the tokenizer of .* changed since the run began"):
        run(root, tmp_path, "cut", "save.every=1", f"model.llm.tokenizer={words}", resume=True)


def test_resume_into_another_model_is_refused(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "write_export", lambda *_: (_ for _ in ()).throw(Stop))
    with pytest.raises(Stop):
        run(root, tmp_path, "other", "save.every=1")
    (tmp_path / "other" / "stages" / "instruct").rename(tmp_path / "other" / "stages" / "gone")
    with pytest.raises(CheckpointError, match="another model or other stages"):
        run(root, tmp_path, "other", "save.every=1", "model.llm.config.intermediate_size=96", resume=True)


def test_a_changed_checkpoint_is_refused(root: Path, tmp_path: Path, whole: Path) -> None:
    found = checkpoint.latest(whole / "resume")
    assert found is not None
    fingerprint = json.loads((found / "position.json").read_text())["fingerprint"]
    for name, junk, said in (("random-0.pt", b"!", "is not what was saved"), ("position.json", b"{", "is damaged: Expecting"), ("position.json", b"{}", "is damaged: KeyError")):
        victim = found / name
        before = victim.read_bytes()
        victim.write_bytes(junk)
        try:
            with pytest.raises(CheckpointError, match=rf"{name} {said}.*remove {found.name}; the run then resumes"):
                checkpoint.read_position(found, fingerprint)
        finally:
            victim.write_bytes(before)


def test_a_ledger_that_does_not_balance_stops(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adamw = stages.adamw

    def and_one_more(groups: list[Group], spec: Any) -> torch.optim.AdamW:
        optimizer = adamw(groups, spec)
        next(p for group in groups if group.path == "llm.head" for p in group.parameters).requires_grad_(True)
        return optimizer

    monkeypatch.setattr(stages, "adamw", and_one_more)
    with pytest.raises(ConfigurationError, match=r"does not balance: llm\.lm_head\.weight is trained, but nobody named it"):
        run(root, tmp_path, "ledger")


def test_a_loss_that_is_not_finite_stops_with_its_samples(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm.llm import head

    loss = head.LossHead._loss
    monkeypatch.setattr(head.LossHead, "_loss", lambda self, hidden, labels: loss(self, hidden, labels) / 0)
    with pytest.raises(NumericsError, match=r"not finite on rank 0 at step 1.*samples a\d+"):
        run(root, tmp_path, "nan")


def test_a_missing_picture_is_named(root: Path, tmp_path: Path) -> None:
    rows = json.loads((root / "align.json").read_text())
    rows[3]["image"] = "img/none.png"
    (root / "broken.json").write_text(json.dumps(rows))
    with pytest.raises(VLMError, match=r"broken\.json.*none\.png"):
        run(root, tmp_path, "missing", f"data.captions.file={root}/broken.json", "every_stage.steps=null", "every_stage.epochs=1")


def test_bad_samples_are_replaced_counted_and_listed_within_the_budget(root: Path, tmp_path: Path) -> None:
    rows = json.loads((root / "align.json").read_text())
    (root / "img" / "cut.png").write_bytes((root / "img" / "0.png").read_bytes()[:40])
    rows[3]["image"] = rows[5]["image"] = "img/cut.png"
    (root / "cut.json").write_text(json.dumps(rows))
    more = (f"data.captions.file={root}/cut.json", "data.captions.on_bad=skip", "every_stage.steps=null", "every_stage.epochs=1")
    with pytest.raises(DataError, match=r"too many bad samples in stage align at step \d\. got 2 \(2 [a-z ]+\); expected at most 1 \(bad_budget 0\.01 of 12 samples\)"):
        run(root, tmp_path, "over", *more)
    folder = run(root, tmp_path, "skip", *more, "bad_budget=0.3")
    listed = [json.loads(line) for line in (folder / "bad_samples.jsonl").read_text().splitlines()]
    assert {entry["index"] for entry in listed} == {3, 5} and all("cut.png" in entry["reason"] or "cut.json" in entry["reason"] for entry in listed)
    align = [record for record in records(folder) if record["stage"] == "align"]
    assert sum(record["samples"] for record in align) == 12 and sum(record.get("skipped", 0) for record in align) == len(listed) >= 2
    assert sum(record.get("notes", {}).get("replacement", 0) for record in align) == 2


def test_bad_samples_behind_a_checkpoint_are_forgotten(tmp_path: Path) -> None:
    other = BadSamples(tmp_path, "align", 0, 0.1, 30)
    bad = BadSamples(tmp_path, "instruct", 0, 0.1, 30)
    entry = {"source": "one", "kind": "other", "reason": "broken"}
    other.add(9, [entry])
    for step in (0, 2, 5):
        bad.add(step, [entry])
    bad.rewind(2)
    lines = [json.loads(line) for line in bad.file.read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [("align", 9), ("instruct", 2)] and bad.count == 1
    bad.check(3, 2)
    with pytest.raises(DataError, match="got 4 "):
        bad.check(4, 1)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_the_gradient_norm_is_that_of_zero_0(root: Path, tmp_path: Path, whole: Path, zero: int) -> None:
    """Before clipping, which at 1.0 changes some of these."""
    norms = [[record["gradient_norm"] for record in records(folder)] for folder in (whole, run(root, tmp_path, "zero", f"every_stage.deepspeed=zero{zero}"))]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4) and max(norms[0]) > 1.0


def test_a_start_that_failed_leaves_its_name_free(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "load_tokenizer", lambda model: (_ for _ in ()).throw(CheckpointError("no tokenizer")))
    with pytest.raises(CheckpointError, match="no tokenizer"):
        run(root, tmp_path, "again")
    monkeypatch.undo()
    folder = run(root, tmp_path, "again", "seed=5")
    assert json.loads((folder / "manifest.json").read_text())["seed"] == 5
    with pytest.raises(ConfigurationError, match="exists already"):
        run(root, tmp_path, "again")


def test_a_damaged_picture_in_a_worker_is_a_sentence(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "check_run", lambda *_, **__: SimpleNamespace(warnings=[], exports={}))  # the check reads the first 1,000 pictures and would find it
    rows = json.loads((root / "align.json").read_text())
    (root / "img" / "half.png").write_bytes((root / "img" / "0.png").read_bytes()[:-30])
    rows[3]["image"] = "img/half.png"
    (root / "half.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"half\.json, sample 3") as caught:
        run(root, tmp_path, "half", f"data.captions.file={root}/half.json", "every_stage.steps=null", "every_stage.epochs=1", "workers=2")
    assert "Traceback" not in str(caught.value) and "worker" not in str(caught.value)


# ---- packing and the size of micro-batches ---------------------------------------------------------------------------------

PACKED = ("every_stage.pack=120", "every_stage.max_length=120", "every_stage.batch=8")
STILL = ("model.encoder.config.attention_dropout=0.0", "model.llm.config.attention_dropout=0.0")


def test_packed_equals_unpacked_step_by_step(root: Path, tmp_path: Path) -> None:
    unpacked, packed = run(root, tmp_path, "unpacked", "every_stage.max_length=120", "every_stage.batch=8", *STILL), run(root, tmp_path, "packed", *PACKED, *STILL)
    for one, two in zip(records(unpacked), records(packed), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-4)
        assert {key: one[key] for key in ("tokens", "vision_tokens", "supervised", "samples", "modality")} == {
            key: two[key] for key in ("tokens", "vision_tokens", "supervised", "samples", "modality")
        }
        assert one["sources"].keys() == two["sources"].keys() and all(one["sources"][name]["samples"] == two["sources"][name]["samples"] for name in one["sources"])


def test_a_packed_run_resumes_bit_for_bit(root: Path, tmp_path: Path) -> None:
    whole = run(root, tmp_path, "whole", *PACKED, "save.every=1")
    with stopped_at(6):
        run(root, tmp_path, "cut", *PACKED, "save.every=1")
    cut = run(root, tmp_path, "cut", *PACKED, "save.every=1", resume=True)
    assert all(torch.equal(weights(whole)[name], tensor) for name, tensor in weights(cut).items())
    assert [kept(record) for record in records(whole)] == [kept(record) for record in records(cut)]


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_trying_out_the_micro_batch_changes_nothing(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zero: int) -> None:
    """What auto finds, written into the configuration, gives the same run bit for bit; a resumed run takes what it began with."""
    monkeypatch.setattr(memory, "_free", lambda device: 2**40)
    costs = iter([9, 100, 2**39] * 2)
    peak = memory._peak
    monkeypatch.setattr(memory, "_peak", lambda device, run: (peak(device, run), next(costs))[1])
    more = (f"every_stage.deepspeed=zero{zero}", "every_stage.batch=8", "save.every=1")
    auto = run(root, tmp_path, "auto", *more, "every_stage.micro_batch=auto")
    assert [json.loads((auto / f"micro_batch-{name}.json").read_text())["micro_batch"] for name in ("align", "instruct")] == [2, 2]  # 0.85 of 2 TiB / 1 holds one row more
    fixed = run(root, tmp_path, "fixed", *more, "every_stage.micro_batch=2")
    with stopped_at(3):  # costs are used up: one who tries again fails
        costs = iter([9, 100, 2**39])
        run(root, tmp_path, "cut", *more, "every_stage.micro_batch=auto")
    costs = iter([9, 100, 2**39])  # of the second stage alone
    cut = run(root, tmp_path, "cut", *more, "every_stage.micro_batch=auto", resume=True)
    assert [kept(record) for record in records(auto)] == [kept(record) for record in records(cut)]
    assert [kept(record) for record in records(auto)] == [kept(record) for record in records(fixed)]
    assert all(torch.equal(weights(auto)[name], tensor) for name, tensor in weights(fixed).items())


def test_a_row_that_does_not_fit_is_an_error(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_free", lambda device: 1)
    monkeypatch.setattr(memory, "_peak", lambda device, run: 2)
    with pytest.raises(EnvironmentProblem, match=r"one row does not fit into memory\. got \d+ tokens, .* lower max_length or pack"):
        run(root, tmp_path, "full", "every_stage.micro_batch=auto")
