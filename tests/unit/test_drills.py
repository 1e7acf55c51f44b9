"""What may happen to a run: it is asked to stop, the disk fills up, its frozen weights change, another number of ranks goes on with it. Nothing is lost, and what goes on equals what was never disturbed."""

import errno
import json
import signal
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from interrupted import kept, records, stopped_at
from ranks import launch
from safetensors.torch import load_file, save_file

import vlm
from vlm.errors import CheckpointError, EnvironmentProblem, Stopped, VLMError
from vlm.train import loop, space
from vlm.train.engine import Engine

WORKER = Path(__file__).with_name("resume_ranks.py")


def run(root: Path, folder: Path, name: str, *more: str, resume: bool = False) -> Path:
    overrides = (f"data_root={root}", f"runs={folder}", f"name={name}", "workers=0", "model.encoder.config.attention_dropout=0.1", "model.llm.config.attention_dropout=0.1")
    return vlm.fit(vlm.compose("llava_tiny", *overrides, "save.every=1", *more), resume=resume)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "export" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(root, tmp_path_factory.mktemp("runs"), "whole")


def goes_on(root: Path, folder: Path, whole: Path, *more: str) -> None:
    """The run called `cut` is resumed, and equals the undisturbed one."""
    cut = run(root, folder, "cut", *more, resume=True)
    assert all(torch.equal(weights(cut)[name], tensor) for name, tensor in weights(whole).items())
    assert [kept(record) for record in records(cut)] == [kept(record) for record in records(whole)]


# ---- asked to stop ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "step", "words"),
    [("SIGTERM", 2, "stopped behind step 2 of 4, and saved"), ("SIGUSR1", 1, "stopped behind step 1 of 4, and saved"), ("SIGTERM", 4, "its weights are written")],
)
def test_a_run_that_is_asked_to_stop_saves_at_the_steps_boundary(root: Path, tmp_path: Path, whole: Path, name: str, step: int, words: str) -> None:
    """Behind the last step of a stage its weights are what is saved."""
    one_step = loop.one_step

    def disturbed(engine: Engine, given: Any, *more: Any) -> Any:
        if engine.paths == ["connector.mlp"] and given.number + 1 == step:
            signal.raise_signal(getattr(signal, name))
        return one_step(engine, given, *more)

    before = signal.getsignal(signal.SIGTERM)
    with patch.object(loop, "one_step", disturbed), pytest.raises(Stopped, match=f"{name}: stage align: {words}. go on with the command that began it, and --resume") as caught:
        run(root, tmp_path, "cut", "save.every=0")
    assert caught.value.exit_code == 75 and signal.getsignal(signal.SIGTERM) == before
    assert [path.name for path in (tmp_path / "cut" / "resume").iterdir()] == ([] if step == 4 else [f"step-{step}"])
    assert (tmp_path / "cut" / "stages" / "align").exists() == (step == 4)
    goes_on(root, tmp_path, whole, "save.every=0")


# ---- a full disk -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file data/3")]
)
def test_a_disk_that_fills_up_while_saving_loses_nothing(root: Path, tmp_path: Path, whole: Path, words: Exception) -> None:
    save = Engine.save
    saved: list[str] = []

    def full(engine: Engine, folder: str, tag: str) -> None:
        save(engine, folder, tag)
        saved.append(folder)
        if len(saved) == 3:
            next(Path(folder).rglob("*.pt")).write_bytes(b"half")
            raise words

    with patch.object(Engine, "save", full), pytest.raises(EnvironmentProblem, match=r"the disk is full: a checkpoint could not be written.*--resume"):
        run(root, tmp_path, "cut")
    assert sorted(path.name for path in (tmp_path / "cut" / "resume").iterdir()) == ["step-1", "step-2"]
    goes_on(root, tmp_path, whole)


def test_a_disk_that_fills_up_under_the_stages_weights_loses_nothing(root: Path, tmp_path: Path, whole: Path) -> None:
    from vlm.model import VLM

    with (
        patch.object(VLM, "save_pretrained", side_effect=OSError(errno.ENOSPC, "No space left on device")),
        pytest.raises(EnvironmentProblem, match="the weights of stage align could not be written"),
    ):
        run(root, tmp_path, "cut")
    goes_on(root, tmp_path, whole)


@pytest.mark.ranks
@pytest.mark.parametrize("zero", [0, 1])
def test_a_disk_that_is_full_for_one_rank_stops_all(mixed_root: Path, tmp_path: Path, zero: int) -> None:
    """Rank 1, which has written what it had to, does not wait for rank 0."""
    with pytest.raises(AssertionError, match=r"the disk is full: a checkpoint could not be written[\s\S]*the disk is full: a checkpoint could not be written"):
        launch(WORKER, mixed_root, tmp_path / "full", zero, 2, "full")
    assert sorted(path.name for path in (tmp_path / "full" / "run" / "resume").iterdir()) == ["step-1", "step-2"]
    launch(WORKER, mixed_root, tmp_path / "full", zero, 2, "resume")


def test_room_is_looked_at_before_a_checkpoint_is_written(root: Path, tmp_path: Path, whole: Path) -> None:
    free = space.room
    with (
        patch.object(space, "room", lambda folder: 1000 if folder.name == "resume" and list(folder.glob("step-2")) else free(folder)),
        pytest.raises(EnvironmentProblem, match=r"there is no room for a checkpoint"),
    ):
        run(root, tmp_path, "cut")
    assert sorted(path.name for path in (tmp_path / "cut" / "resume").iterdir()) == ["step-1", "step-2"]
    goes_on(root, tmp_path, whole)


def test_room_is_looked_at_before_the_run(root: Path, tmp_path: Path) -> None:
    from vlm.train import check

    with patch.object(check, "room", lambda folder: 100_000), pytest.raises(VLMError, match="there is no room for the run"):
        run(root, tmp_path, "small")
    assert not (tmp_path / "small").exists()
    plan = vlm.compose("llava_tiny", f"data_root={root}")
    with patch.object(check, "room", lambda folder: 100_000):
        report = vlm.check(plan)
    assert report.ok and any("the run writes" in warning for warning in report.warnings)
    assert report.stages[0].disk and "per checkpoint, 2 stay" in report.stages[0].disk


def test_what_a_checkpoint_takes_is_reckoned() -> None:
    """feasibility: full tuning of 7 B in bf16 takes about 98 GB."""

    class Line:
        count, rate = 7_000_000_000, 1e-5

    class Frozen:
        count, rate = 5_000_000_000, None

    groups: Any = [Line(), Frozen()]
    assert [space.checkpoint_bytes(groups, width, zero) for width, zero in ((2, 1), (4, 0), (4, 2))] == [98_000_000_000, 84_000_000_000, 112_000_000_000]
    assert space.stage_bytes(groups, 2) == 24_000_000_000


# ---- frozen weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_frozen_weights_stay_out_and_must_be_what_they_were(root: Path, tmp_path: Path, zero: int) -> None:
    more = (f"every_stage.deepspeed=zero{zero}", "stages.instruct.train.llm=frozen")
    undisturbed = run(root, tmp_path, "undisturbed", *more)
    with stopped_at(6):
        run(root, tmp_path, "cut", *more)
    found = tmp_path / "cut" / "resume" / "step-6"
    assert sum(file.stat().st_size for file in found.rglob("*.pt")) < 4 * 100_000  # of 100,000 parameters 2,112 are trained
    assert len(set(json.loads((found / "position.json").read_text())["frozen"])) == 1
    file = tmp_path / "cut" / "stages" / "align" / "model.safetensors"
    sound = load_file(file)
    save_file(sound | {"llm.model.norm.weight": sound["llm.model.norm.weight"] + 1e-3}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="the frozen weights are not those"):
        run(root, tmp_path, "cut", *more, resume=True)
    save_file(sound, file, metadata={"format": "pt"})
    cut = run(root, tmp_path, "cut", *more, resume=True)
    assert all(torch.equal(weights(cut)[name], tensor) for name, tensor in weights(undisturbed).items())


# ---- another number of ranks -----------------------------------------------------------------------------------------------


@pytest.mark.ranks
@pytest.mark.parametrize("zero", [0, 1, 2])
@pytest.mark.parametrize("ranks", [(2, 1), (1, 2)])
def test_another_number_of_ranks_goes_on(mixed_root: Path, tmp_path: Path, zero: int, ranks: tuple[int, int]) -> None:
    whole = launch(WORKER, mixed_root, tmp_path / "whole", zero, ranks[0], "whole") / "run"
    cut = launch(WORKER, mixed_root, tmp_path / "cut", zero, ranks[0], "cut") / "run"
    launch(WORKER, mixed_root, tmp_path / "cut", zero, ranks[1], "resume")
    assert not (cut / ".universal").exists()
    for one, two in zip(records(whole), records(cut), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)
        assert {key: one[key] for key in ("stage", "step", "samples", "supervised", "rates")} == {key: two[key] for key in ("stage", "step", "samples", "supervised", "rates")}
    assert all(torch.allclose(weights(cut)[name], tensor, atol=1e-5) for name, tensor in weights(whole).items())


@pytest.mark.ranks
def test_zero_3_keeps_its_ranks(mixed_root: Path, tmp_path: Path) -> None:
    launch(WORKER, mixed_root, tmp_path / "cut", 3, 2, "cut")
    with pytest.raises(AssertionError, match=r"cannot be resumed in this form: at ZeRO 3 .* got 1 rank; expected 2 ranks"):
        launch(WORKER, mixed_root, tmp_path / "cut", 3, 1, "resume")


def test_another_zero_stage_is_another_run(root: Path, tmp_path: Path) -> None:
    with stopped_at(2):
        run(root, tmp_path, "cut")
    with pytest.raises(CheckpointError, match="another model or other stages"):
        run(root, tmp_path, "cut", "every_stage.deepspeed=zero1", resume=True)
