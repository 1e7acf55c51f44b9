"""`vlm ablate`: the grid, the same order of data for all settings of a seed, paired differences, and what happens to runs that stop or fail."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from rich.console import Console
from typer.testing import CliRunner

from vlm.cli import app
from vlm.composition import ConfigurationProblems
from vlm.errors import ConfigurationError, EnvironmentProblem
from vlm.eval.scores import scored
from vlm.train import ablate, checkpoint, loop, stages
from vlm.train.ablate import plan, run_ablation, values
from vlm.train.comparison import Comparison, Run, interval
from vlm.train.config import RunSpec

RATES = "stages.align.train.connector=1.0e-3,1.0e-2"


def shares(accuracy: float, blind: float | None = 0.25, protocol: str = "p") -> dict[str, Any]:
    row = {"n": 6, "accuracy": accuracy, "blind": blind, "question_only": blind, "grey": None, "chance": 0.5}
    return {"heldout": {"kinds": {"colour": row}, "mean": row, "protocol": {"hash": protocol}}}


def judged(folder: Path, *, run: RunSpec) -> dict[str, Any]:
    """Stands for `vlm.evaluate`: the higher rate is better by 0.2, and seeds differ by 0.1; written as an evaluation is."""
    content = shares(0.3 + 0.2 * ("1.0e-2" in folder.name) + 0.1 * int(folder.name[-1]))["heldout"]
    (folder / "eval").mkdir(exist_ok=True)
    result: dict[str, Any] = {}
    for name, source in run.eval.items():
        result[name] = {**content, "protocol": {**content["protocol"], "scored": scored(run.data[source], run.data[source].open())}}
        (folder / "eval" / f"{name}.json").write_text(json.dumps(result[name]))
    return result


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Ids of the samples of every step that is trained."""
    steps: list[tuple[str, ...]] = []
    one_step = loop.one_step

    def noted(engine: Any, step: Any, *rest: Any, **more: Any) -> dict[str, Any]:
        steps.append(tuple(sorted(name for micro in step.micro_batches for name in micro.ids)))
        return one_step(engine, step, *rest, **more)

    monkeypatch.setattr(loop, "one_step", noted)
    return steps


# ---- the grid ------------------------------------------------------------------------------------------------------------


def test_values_are_yaml_and_stay_as_they_were_written() -> None:
    assert values('model.connector={use: mlp, depth: 2},linear,[1, 2],"x,y", 1e-3 ') == ("model.connector", ["{use: mlp, depth: 2}", "linear", "[1, 2]", '"x,y"', "1e-3"])


@pytest.mark.parametrize(
    "text, said",
    [
        ("depth", "KEY=VALUE,VALUE"),
        ("a=", "needs values that differ"),
        ("a=1,1", "needs values that differ"),
        ("a={b,c", "cannot be read"),
        ("seed=1,2", "give --seeds N"),
        ("runs=a,b", "the ablation's own"),
    ],
)
def test_values_that_cannot_be_varied(text: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        values(text)


def test_the_grid_runs_all_settings_of_a_seed_first(root: Path, tmp_path: Path) -> None:
    varied = [RATES, "stages.instruct.images={use: native},squash"]
    folder, trials = plan("llava_tiny", [f"data_root={root}", f"runs={tmp_path}", "seed=4"], varied, 2)
    assert folder == tmp_path / "llava_tiny-ablation"
    assert [trial.seed for trial in trials] == [4] * 4 + [5] * 4
    assert [trial.setting for trial in trials[:2]] == [
        "stages.align.train.connector=1.0e-3, stages.instruct.images={use: native}",
        "stages.align.train.connector=1.0e-3, stages.instruct.images=squash",
    ]
    assert trials[1].name == "llava_tiny-stages.align.train.connector=1.0e-3-stages.instruct.images=squash-seed4"
    assert all(set(trial.name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._=+-") for trial in trials)
    assert len({trial.folder for trial in trials}) == 8 and {trial.folder.parent for trial in trials} == {folder}
    assert trials[2].run.stages["align"].train["connector"] == 0.01 and trials[7].run.seed == 5
    longer = plan("llava_tiny", [f"data_root={root}", f"runs={tmp_path}", "seed=4"], [RATES + ",1", varied[1]], 1)[1]
    assert {trial.name for trial in trials[:4]} < {trial.name for trial in longer}


def test_problems_of_all_settings_come_before_the_first_run(root: Path, tmp_path: Path) -> None:
    def problems(*vary: str, more: str = "workers=0") -> str:
        with pytest.raises(ConfigurationProblems) as caught:
            run_ablation("llava_tiny", [f"data_root={root}", f"runs={tmp_path}", more], vary, seeds=1, evaluate=judged)
        return str(caught.value)

    assert "did you mean 'stages.align.batch'" in problems("stages.align.bacth=4,8")
    said = problems("stages.align.batch=four,4", "stages.align.schedule.gamma=1,2")
    assert "'four'" in said and "`gamma` is for" in said
    said = problems("stages.instruct.prompt=chatml,chatm", "stages.align.batch=4,0")  # found by `vlm check`
    assert said.startswith("2 problems") and "with stages.instruct.prompt=chatm, stages.align.batch=4 / stages.instruct.prompt=chatm, stages.align.batch=0: " in said
    assert "stages.align.batch=0: stages.align.batch: must be at least 1" in said
    assert "varied twice" in problems("seed=1,2", "workers=0,1", "workers=2,3") and "give --seeds" in problems("seed=1,2", "workers=0,1")
    assert "names nothing to evaluate on" in problems("workers=0,1", more="eval=null")
    assert not list(tmp_path.iterdir())


def test_a_launcher_of_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(EnvironmentProblem, match="one process"):
        run_ablation("llava_tiny", [], [RATES], seeds=1, evaluate=judged)


# ---- runs ----------------------------------------------------------------------------------------------------------------


def test_two_settings_with_two_seeds(root: Path, tmp_path: Path, seen: list[tuple[str, ...]]) -> None:
    command = ["ablate", "llava_tiny", f"data_root={root}", "--vary", RATES, "--seeds", "2", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert [run["state"] for run in told["runs"]] == ["finished"] * 4
    first, other = told["sources"]["heldout"]["colour"]
    assert first["setting"] == "stages.align.train.connector=1.0e-3" and first["difference"] is None
    assert set(other["difference"]["by_seed"]) == {"0", "1"} and first["blind"] is not None
    assert "2 seeds are too few for an interval" in done.output and "2 seeds are too few" in (tmp_path / "out" / "ablation.md").read_text()
    assert "stages.align.train.connector=1.0e-2" in done.output and "4 of 4 runs are finished" in done.output

    assert len(seen) == 4 * 8
    runs = [seen[number : number + 8] for number in range(0, 32, 8)]
    assert runs[0] == runs[1] and runs[2] == runs[3] and runs[0] != runs[2]
    manifests = [json.loads((tmp_path / "out" / run["name"] / "manifest.json").read_text()) for run in told["runs"]]
    assert [manifest["seed"] for manifest in manifests] == [0, 0, 1, 1]
    assert all(manifest["sources"] == manifests[0]["sources"] for manifest in manifests)

    done = CliRunner().invoke(app, command)
    assert len(seen) == 32 and done.output.count("(finished before)") == 4
    assert json.loads((tmp_path / "out" / "ablation.json").read_text()) == told


def test_what_stops_goes_on_and_what_fails_is_told(root: Path, tmp_path: Path, seen: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(fail: Callable[[str, int], None]) -> Comparison:
        save = checkpoint.save

        def saved(folder: Path, engine: Any, position: checkpoint.Position, *more: int) -> Path:
            made = save(folder, engine, position, *more)
            fail(folder.parent.name, position.total)
            return made

        with monkeypatch.context() as patch:
            patch.setattr(stages.checkpoint, "save", saved)
            return run_ablation("llava_tiny", [f"data_root={root}", f"runs={tmp_path}", "save.every=2"], [RATES], seeds=2, evaluate=judged)

    def kill(name: str, total: int) -> None:
        if name.endswith("1.0e-2-seed0") and total == 6:
            raise KeyboardInterrupt

    def burst(name: str, total: int) -> None:
        if name.endswith("1.0e-3-seed1"):
            raise RuntimeError("out of memory")

    with pytest.raises(KeyboardInterrupt):
        begin(kill)
    assert len(seen) == 8 + 6
    found = begin(burst)
    assert len(seen) == 8 + 6 + 2 + 2 + 8  # the rest of the second run, two steps of the third, the fourth
    assert found.failed == {"llava_tiny-stages.align.train.connector=1.0e-3-seed1": "RuntimeError: out of memory"}
    written = json.loads((tmp_path / "llava_tiny-ablation" / "ablation.json").read_text())
    assert [run["state"] for run in written["runs"]] == ["finished", "finished", "failed", "finished"]
    first, other = found.sources()["heldout"]["colour"]
    assert (list(first["accuracy"]["by_seed"]), list(other["accuracy"]["by_seed"]), list(other["difference"]["by_seed"])) == ([0], [0, 1], [0])
    found = begin(lambda *_: None)
    assert len(seen) == 8 + 6 + 2 + 2 + 8 + 6 and not found.failed
    assert found.sources()["heldout"]["colour"][1]["difference"]["mean"] == pytest.approx(0.2)

    with pytest.raises(ConfigurationProblems, match=r"another model or other stages"):
        run_ablation("llava_tiny", [f"data_root={root}", f"runs={tmp_path}", "stages.align.batch=8"], [RATES], seeds=2, evaluate=judged)


def test_scores_of_anything_else_are_made_anew(tmp_path: Path, seen: list[tuple[str, ...]]) -> None:
    """Finished runs are scored again, and not trained again, by the evaluation that is asked for now."""
    root = tiny.data_root(tmp_path / "data")
    told: list[str] = []

    def evaluate(folder: Path, *, run: RunSpec) -> dict[str, Any]:
        told.append(run.eval["heldout"])
        return judged(folder, run=run)

    def begin(source: str) -> list[str]:
        told.clear()
        run_ablation("llava_tiny", [f"data_root={root}", f"runs={tmp_path}", f"eval.heldout={source}"], [], seeds=1, evaluate=evaluate)
        return list(told)

    assert begin("heldout") == ["heldout"] and begin("heldout") == []
    assert begin("captions") == ["captions"] and begin("captions") == []
    assert begin("heldout") == ["heldout"]
    rows = json.loads((root / "heldout.json").read_text())
    (root / "heldout.json").write_text(json.dumps(rows[1:]))
    assert begin("heldout") == ["heldout"] and begin("heldout") == []

    report = tmp_path / "llava_tiny-ablation" / "llava_tiny-seed0" / "eval" / "heldout.json"
    for key, value in (("limit", 3), ("max_new_tokens", 8), ("version", "0")):  # as `vlm eval --limit 3`, another length and an older vlm leave it
        result = json.loads(report.read_text())
        result["protocol"]["scored"][key] = value
        report.write_text(json.dumps(result))
        assert begin("heldout") == ["heldout"]
    assert len(seen) == 8


# ---- numbers -------------------------------------------------------------------------------------------------------------


def test_the_interval_is_students() -> None:
    assert interval([0.1, 0.2]) is None
    for count, quantile in ((3, 4.302653), (4, 3.182446), (5, 2.776445), (11, 2.228139), (101, 1.983972)):
        numbers = [0.5 + 0.01 * (-1) ** index * index for index in range(count)]
        middle = sum(numbers) / count
        half = quantile * (sum((number - middle) ** 2 for number in numbers) / (count - 1) / count) ** 0.5
        assert interval(numbers) == pytest.approx((middle - half, middle + half), abs=1e-7)


def test_differences_are_paired(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Seeds scatter far more than settings differ: only seed by seed the difference is clear."""
    right = {"base": [0.30, 0.50, 0.70], "new": [0.33, 0.52, 0.74]}
    found = Comparison("mine", tmp_path, [Run(f"{setting}{seed}", setting, seed) for seed in range(3) for setting in right])
    found.scores = {f"{setting}{seed}": shares(values[seed], None if setting == "new" else 0.25) for setting, values in right.items() for seed in range(3)}
    base, new = found.sources()["heldout"]["colour"]
    assert base["accuracy"] == {"by_seed": {0: 0.30, 1: 0.50, 2: 0.70}, "mean": pytest.approx(0.5), "spread": pytest.approx(0.2)}
    assert new["difference"]["mean"] == pytest.approx(0.03) and new["difference"]["spread"] == pytest.approx(0.01)
    assert new["difference"]["interval"] == pytest.approx((0.03 - 4.302653 * 0.01 / 3**0.5, 0.03 + 4.302653 * 0.01 / 3**0.5), abs=1e-6)
    assert (base["blind"], new["blind"], new["chance"]) == (0.25, None, 0.5)
    assert found.notes == [] and set(found.sources()["heldout"]) == {"colour"}
    found.write()
    assert "| colour | new | 3 | 53.0 ± 20.5 | +3.0 ± 1.0 | +0.5 to +5.5 | - | 50.0 |" in (tmp_path / "ablation.md").read_text()
    assert "| colour | base | 3 | 50.0 ± 20.0 | first | - | 25.0 | 50.0 |" in (tmp_path / "ablation.md").read_text()
    found.print(Console(width=160))
    assert "+0.5 to +5.5" in capsys.readouterr().out


def test_what_makes_settings_hard_to_compare_is_said(root: Path, tmp_path: Path) -> None:
    trials = plan("llava_tiny", [f"data_root={root}"], ["stages.align.batch=4,8"], 1)[1]
    (remark,) = ablate._remarks(trials)
    assert "do not see the same samples" in remark
    assert ablate._remarks(plan("llava_tiny", [f"data_root={root}"], [RATES, "stages.instruct.steps=4,6"], 1)[1]) == []
    found = Comparison("mine", tmp_path, [Run("a", "a", 0), Run("b", "b", 0)], scores={"a": shares(0.1), "b": shares(0.1, protocol="q")})
    assert [note.split()[0] for note in found.notes] == ["one", "the"] and "asked in the same way" in found.notes[1]
    found.scores = {name: {**shares(0.1), "other": shares(0.1, protocol="q")["heldout"]} for name in "ab"}  # sources have protocols of their own
    assert [note.split()[0] for note in found.notes] == ["one"]


def test_settings_that_are_one_run_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="are the same run"):
        plan("llava_tiny", [f"data_root={root}", f"runs={tmp_path}"], ["stages.align.steps=4,0x4"], 1)
