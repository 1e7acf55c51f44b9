"""What TensorBoard shows is what metrics.jsonl says, also after a run went on from an older checkpoint."""

import importlib.util
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
from interrupted import records, stopped_at

import vlm
from vlm.train.log import Log

Curves = dict[str, list[tuple[int, float]]]
"""Tag -> (step, value) in the order in which they are drawn."""


class StandIn:
    """TensorBoard's writer and reader in one, for where it is not installed: it keeps what it is given, and hides what a later `purge_step` hides."""

    kept: dict[str, Curves] = {}

    def __init__(self, log_dir: str, purge_step: int):
        self.curves = self.kept.setdefault(log_dir, {})
        for tag, points in self.curves.items():
            self.curves[tag] = [(step, value) for step, value in points if step < purge_step]

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.curves.setdefault(tag, []).append((step, float(value)))

    def flush(self) -> None: ...

    def close(self) -> None: ...


def read_events(folder: Path) -> Curves:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[reportMissingImports]

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture(params=["tensorboard", "a stand-in"])
def curves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Curves]:
    """Reads a run's curves back."""
    if request.param == "tensorboard":
        if importlib.util.find_spec("tensorboard") is None:
            pytest.skip("TensorBoard is not installed")
        from tensorboard.summary.writer import event_file_writer  # type: ignore[reportMissingImports]

        # Files of the same second are read in the order of their names, which end with a number that the process counts: 10 would come before 9.
        monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
        return read_events
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = StandIn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(StandIn, "kept", {})
    return lambda folder: StandIn.kept[str(folder / "tensorboard")]


def record(total: int, loss: float, **more: Any) -> dict[str, Any]:
    return {
        "stage": "align", "step": total, "total": total, "loss": loss, "tokens": 20, "supervised": 5, "sources": {"captions": {"loss": loss, "samples": 4, "share": 1.0}},
        "rates": {"connector.mlp": 0.001 / total}, "gradient_norm": None, "seconds": 0.5, "wait": 0.1, "memory": 0.25, **more,
    }  # fmt: skip


def leaves(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[str, float]:
    found = {}
    for key, value in tree.items():
        found |= leaves(value, (*path, key)) if isinstance(value, dict) else {"/".join((*path, key)): value}
    return found


def same(folder: Path, drawn: Curves) -> None:
    """Every number of metrics.jsonl stands in one curve at its step, and nothing else does."""
    expected: Curves = {}
    for entry in records(folder):
        for tag, value in leaves(entry).items():
            if tag not in ("stage", "step", "total") and value is not None:
                expected.setdefault(tag, []).append((entry["total"], value))
    assert drawn.keys() == expected.keys()
    for tag, points in expected.items():
        assert [step for step, _ in drawn[tag]] == [step for step, _ in points], tag
        assert [value for _, value in drawn[tag]] == pytest.approx([value for _, value in points], rel=1e-6), tag


def test_curves_do_not_double(tmp_path: Path, curves: Callable[[Path], Curves]) -> None:
    log = Log(tmp_path, 0, 1)
    log.rewind(0)
    log.begin("align", 0, 3)
    for total in (1, 2, 3):
        log.step(record(total, 3.0 / total))
    log.rewind(3)  # the next stage of the same process
    log.begin("instruct", 0, 3)
    log.step(record(4, 9.0, gradient_norm=1.5, auxiliary={"moe": 0.25}, skipped=2, notes={"cut": 1}))
    log.close()
    again = Log(tmp_path, 0, 1)
    again.rewind(2)
    again.begin("align", 2, 3)
    for total in (3, 4):
        again.step(record(total, 7.0, skipped=total))
    again.close()
    drawn = curves(tmp_path)
    same(tmp_path, {tag: points for tag, points in drawn.items() if points})
    assert drawn["loss"] == [(1, 3.0), (2, 1.5), (3, 7.0), (4, 7.0)]
    assert drawn["rates/connector.mlp"][1] == (2, pytest.approx(0.0005))


def test_a_run_that_went_on(tmp_path: Path, curves: Callable[[Path], Curves]) -> None:
    """Stopped after step 6 of 8, which is the second of the second stage; the newest checkpoint is that of step 6, and steps 7 and 8 are drawn once."""
    root = tiny.data_root(tmp_path / "data")
    run = vlm.compose("llava_tiny", f"data_root={root}", f"runs={tmp_path}", "name=cut", "save.every=2")
    with stopped_at(6):
        vlm.fit(run)
    folder = vlm.fit(run, resume=True)
    same(folder, curves(folder))
    assert [step for step, _ in curves(folder)["loss"]] == list(range(1, 9))


def test_a_warning_is_kept_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("a", "b", "a"):  # a run that goes on warns of the same again
        log = Log(tmp_path, 0, 1)
        log.warn(text)
        log.close()
    assert capsys.readouterr().out.splitlines() == ["warning: a", "warning: b", "warning: a"]
    assert [json.loads(line) for line in (tmp_path / "warnings.jsonl").read_text().splitlines()] == [{"text": "a"}, {"text": "b"}]


def test_only_the_first_rank_writes(tmp_path: Path, curves: Callable[[Path], Curves]) -> None:
    log = Log(tmp_path, 1, 1)
    log.warn("it is late")
    log.rewind(0)
    log.begin("align", 0, 1)
    log.step(record(1, 1.0))
    log.close()
    assert not list(tmp_path.iterdir()) and not StandIn.kept


def test_without_tensorboard_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    log = Log(tmp_path, 0, 10)
    for stage in range(2):
        log.rewind(stage)
        log.begin("align", 0, 1)
        log.step(record(stage + 1, 1.0))
    log.close()
    assert len(records(tmp_path)) == 2
    assert capsys.readouterr().out.count('TensorBoard is not installed: the curves are in metrics.jsonl alone (pip install "vlm[tensorboard]")') == 1
