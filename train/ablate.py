"""`vlm ablate`: the same run under several settings and seeds, one after another, compared seed by seed."""

import gc
import itertools
import json
import os
import re
import traceback
import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.text import Text

from vlm.composition import ConfigurationProblems, compose, resolved
from vlm.errors import ConfigurationError, EnvironmentProblem, VLMError
from vlm.eval.scores import scored, scores_file
from vlm.train.comparison import Comparison, Run, Scores
from vlm.train.config import RunSpec
from vlm.train.folder import absolute, open_folder
from vlm.weights.files import read_json

__all__ = ["Trial", "plan", "run_ablation", "values"]

OWN = ("name", "runs", "seed")
"""Keys that an ablation sets by itself."""


@dataclass(frozen=True)
class Trial:
    """One run of the grid. setting: its words, KEY=VALUE of every varied key."""

    setting: str
    seed: int
    run: RunSpec

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def folder(self) -> Path:
        return self.run.folder

    @property
    def begun(self) -> bool:
        return (self.folder / "config.yaml").is_file()


def run_ablation(config: str | Path, overrides: Sequence[str], vary: Sequence[str], *, seeds: int, evaluate: Callable[..., Scores], out: str | Path | None = None) -> Comparison:
    """Train and score every setting with every seed, in one process, and write what came out after each run.

    Finished runs are not trained again, interrupted ones go on; scores of anything but what would be scored now are made anew. Of one seed all settings have the same first values where shapes agree, and the same order of samples where data and batch do.
    A run that fails is written down, and the rest go on.

    Args:
        vary: KEY=VALUE,VALUE,... each; together they span a grid, of which the first setting is what the others are compared with. None: the configuration alone, with its spread over seeds.
        seeds: how many, from the configuration's own on. evaluate: scores a finished run's folder by the `eval` of `run=` (`vlm.evaluate`, which training knows nothing of but its reports). out: the folder of all runs; default RUNS/NAME-ablation.

    Raises ConfigurationProblems with everything that `vlm check` finds wrong with any setting, before the first run; EnvironmentProblem under a launcher of several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise EnvironmentProblem("an ablation trains in one process", got=f"WORLD_SIZE {os.environ['WORLD_SIZE']}", cure="start it without torchrun")
    folder, trials = plan(config, overrides, vary, seeds, out)
    found = Comparison(str(config), folder, [Run(trial.name, trial.setting, trial.seed) for trial in trials], _remarks(trials))
    found.scores |= {trial.name: scores for trial in trials if (scores := _scored_before(trial))}
    _check(str(config), trials, found.scores)
    console = Console()
    for number, trial in enumerate(trials, 1):
        finished = trial.name in found.scores
        console.print(Text(f"run {number} of {len(trials)}: {trial.name}{' (finished before)' if finished else ''}"), soft_wrap=True)
        if not finished:
            try:
                found.scores[trial.name] = _run(trial, evaluate)
            except Exception as error:  # whatever a run dies of, the others go on
                if not isinstance(error, VLMError):
                    traceback.print_exc()
                found.failed[trial.name] = f"{type(error).__name__}: {error}"
            _release()
        found.write()
    return found


# ---- the grid ------------------------------------------------------------------------------------------------------------


def plan(config: str | Path, overrides: Sequence[str], vary: Sequence[str], seeds: int, out: str | Path | None = None) -> tuple[Path, list[Trial]]:
    """The folder of an ablation, and its runs in their order: all settings of a seed, then the next seed. Raises ConfigurationProblems with the problems of all settings."""
    problems: dict[str, VLMError] = {}
    if seeds < 1:
        problems["seeds"] = ConfigurationError("an ablation needs a seed", got=f"--seeds {seeds}", expected="1 or more")
    grid: dict[str, list[str]] = {}
    for text in vary:
        try:
            key, found = values(text)
            if key in grid:
                raise ConfigurationError(f"{key} is varied twice", cure="give all its values in one --vary")
            grid[key] = found
        except ConfigurationError as error:
            problems[text] = error
    if problems:
        raise ConfigurationProblems(list(problems.values()), "--vary")
    settings = [tuple(f"{key}={value}" for key, value in zip(grid, chosen, strict=True)) for chosen in itertools.product(*grid.values())]
    composed: list[RunSpec] = []
    for setting in settings:
        try:
            composed.append(compose(RunSpec, config, [*overrides, *setting]))
            if not composed[-1].eval:
                raise ConfigurationError(f"run {composed[-1].name} names nothing to evaluate on", cure="write `eval: {heldout: SOURCE}` into the configuration")
        except ConfigurationError as error:
            problems |= {str(one): one for one in _each(error)}
    if problems:
        raise ConfigurationProblems(list(problems.values()), str(config))
    _check_differ(composed, settings)
    first = composed[0]
    folder = Path(out) if out is not None else Path(first.runs) / f"{first.name}-ablation"
    trials = []
    for seed, (setting, run) in itertools.product(range(first.seed, first.seed + seeds), zip(settings, composed, strict=True)):
        own = (f"name={json.dumps(_name(run.name, setting, seed))}", f"runs={json.dumps(str(folder), ensure_ascii=False)}", f"seed={seed}")
        trials.append(Trial(", ".join(setting) or "as configured", seed, compose(RunSpec, config, [*overrides, *setting, *own])))
    return folder, trials


def _check_differ(runs: Sequence[RunSpec], settings: Sequence[Sequence[str]]) -> None:
    """Raise ConfigurationError where two settings are one run: a difference of 0 would then say nothing."""
    seen: dict[str, Sequence[str]] = {}
    for run, setting in zip(runs, settings, strict=True):
        twin = seen.setdefault(json.dumps(resolved(run), sort_keys=True), setting)
        if twin is not setting:
            raise ConfigurationError(f"{', '.join(twin)} and {', '.join(setting)} are the same run", cure="vary a key that is used: a stage's own value wins over `every_stage`")


def values(text: str) -> tuple[str, list[str]]:
    """Key and values of `KEY=a,b`, each value as it was written. A value is YAML, so commas in brackets or quotes are its own. Raises ConfigurationError."""
    key, equals, listed = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigurationError(f"--vary {text!r} cannot be read", expected="KEY=VALUE,VALUE,...")
    if key in OWN:
        cure = "give --seeds N" if key == "seed" else f"give {key} as an override or --out, for all runs"
        raise ConfigurationError(f"{key} is the ablation's own", cure=cure)
    try:
        node = yaml.compose(f"[{listed}]", Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"the values of --vary {text!r} cannot be read: {' '.join(str(error).split())}", cure="quote a value that is no plain YAML") from error
    assert isinstance(node, yaml.SequenceNode)
    found = [f"[{listed}]"[item.start_mark.index : item.end_mark.index].strip() for item in node.value]
    if not found or len(set(found)) < len(found):
        raise ConfigurationError(f"--vary {text!r} needs values that differ", got=", ".join(found) or "none")
    return key, found


def _name(base: str, setting: Sequence[str], seed: int) -> str:
    """A file name that stays the same when the grid grows; a hash where the words had to be changed."""
    words = "-".join(setting)
    safe = re.sub(r"[^A-Za-z0-9._=+-]+", "_", words)[:120]
    changed = "" if safe == words else f"{zlib.crc32(words.encode()):08x}"
    return "-".join(part for part in (base, safe, changed, f"seed{seed}") if part)


def _each(error: VLMError) -> Sequence[VLMError]:
    return error.problems if isinstance(error, ConfigurationProblems) else [error]


def _check(config: str, trials: Sequence[Trial], finished: Collection[str]) -> None:
    """Everything that is wrong with a setting, or with a folder that is there; each problem once, with the settings that have it."""
    from vlm.train.check import check_run

    found: dict[str, tuple[VLMError, list[str]]] = {}
    checked: set[str] = set()
    for trial in trials:
        problems: list[VLMError] = []
        try:
            if trial.begun:
                open_folder(absolute(trial.run), trial.folder, resume=True)
            if trial.name not in finished and trial.setting not in checked:
                checked.add(trial.setting)
                check_run(trial.run, quick=True)
        except VLMError as error:
            problems += _each(error)
        for problem in problems:
            found.setdefault(str(problem), (problem, []))[1].append(trial.setting)
    if not found:
        return
    everywhere = len(checked)
    told = [problem if len(where) == everywhere else problem.changed(what=f"with {' / '.join(where)}: {problem.what}") for problem, where in found.values()]
    raise ConfigurationProblems(told, f"the ablation of {config}")


def _remarks(trials: Sequence[Trial]) -> list[str]:
    if any(_order(trial.run) != _order(trials[0].run) for trial in trials):
        return ["the settings differ in data or batch, so those of one seed do not see the same samples in the same steps"]
    return []


def _order(run: RunSpec) -> list[Any]:
    """What the order of samples depends on, beside the seed."""
    return [(stage.data if isinstance(stage.data, str) else list(stage.data.items()), stage.batch, [run.data[name] for name in stage.sources]) for stage in run.stages.values()]


# ---- one run -------------------------------------------------------------------------------------------------------------


def _run(trial: Trial, evaluate: Callable[..., Scores]) -> Scores:
    from vlm.train.stages import fit

    return _needed(evaluate(fit(trial.run, resume=trial.begun), run=trial.run))  # the folder's own config.yaml keeps the `eval` of its first day


def _needed(scores: Scores) -> Scores:
    """Without the single answers."""
    return {source: {key: result[key] for key in ("kinds", "mean", "protocol")} for source, result in scores.items()}


def _scored_before(trial: Trial) -> Scores | None:
    """The scores of a finished run; None where one is missing, or is about anything but what would be scored now. Raises DataError for a source that cannot be opened."""
    files = {name: scores_file(trial.folder, name) for name in trial.run.eval}
    if not (trial.folder / "export").is_dir() or not all(file.is_file() for file in files.values()):
        return None
    found = {name: read_json(file, "remove it, and it is made again") for name, file in files.items()}
    sources = {name: trial.run.data[source] for name, source in trial.run.eval.items()}
    same = all(found[name]["protocol"].get("scored") == scored(source, source.open()) for name, source in sources.items())
    return _needed(found) if same else None


def _release() -> None:
    """What a run held, so that the next one has the whole device, and a peak of its own."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
