"""Scores a finished run on held-out questions: each asked alone, exact match per kind, beside what is right without seeing and by chance."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vlm.composition import compose
from vlm.data.base import Reader
from vlm.data.pictures import check_pictures
from vlm.data.sample import Sample
from vlm.data.sources import sources_at
from vlm.errors import CheckpointError, ConfigurationError
from vlm.eval.blind import TrainingAnswers, grey
from vlm.eval.score import MATCHER, Question, matches, questions, shares, spread
from vlm.eval.scores import MAX_NEW_TOKENS, scored, scores_file
from vlm.generate import SORTED_TOGETHER, Answer, answer_all, stop_ids
from vlm.loading import load
from vlm.train.config import RunSpec
from vlm.whole import write_whole

if TYPE_CHECKING:
    from vlm.model import VLM
    from vlm.processor import VLMProcessor

__all__ = ["evaluate", "protocol", "table"]

COLUMNS = ("accuracy", "blind", "question_only", "grey", "chance")


def evaluate(
    run_folder: str | Path,
    *,
    sources: Sequence[str] | None = None,
    stage: str | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    max_new_tokens: int = MAX_NEW_TOKENS,
    run: RunSpec | None = None,
    file: str | Path | None = None,
    images: str | Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Score a run, print a table per source and write `eval/NAME.json` (`eval/NAME.STAGE.json` for a stage, `eval/files/...` for `file`) into its folder.

    Args:
        sources: names of the run's `eval`, all by default. run: what is scored stands in its `eval`; default: the run's own `config.yaml`.
        file, images: instead of these a file, or a folder or glob of one split, of any format that `vlm.data.sources.sources_at` tells, and the folder of its pictures; its name is the split's.
        stage: its weights instead of the export. limit: at most so many samples per source, spread evenly over it.

    A folder that `vlm import` wrote is scored on `file`, with nothing to know of its training.

    Returns name -> {"kinds": kind -> n and COLUMNS as shares or None, "mean": of the kinds, "protocol", "answers": one entry per question}.
    question_only: the commonest training answer to the question's text, numbers masked, else of its kind. grey: the model's answers to grey pictures, None for kinds without.
    blind: the larger of these. chance: 1 / number of distinct training answers of the kind, None where training has no such kind.
    Raises ConfigurationError for an unknown name, CheckpointError for a folder without a run, DataError.
    """
    folder = Path(run_folder)
    if limit is not None and limit < 1:
        raise ConfigurationError("nothing would be asked", got=f"limit {limit}", expected="1 or more", cure="leave it away to ask everything")
    spec = run or (compose(RunSpec, folder / "config.yaml", allow_import=False) if (folder / "config.yaml").is_file() else None)
    if file is not None and (spec is not None or (folder / "config.json").is_file()):
        chosen = _one_split(file, images)
    elif spec is not None:
        chosen = _chosen(spec, sources)
    else:
        raise CheckpointError(
            f"{folder} holds no run", expected="config.yaml and export/", cure="give the folder that `vlm train` wrote, or with --file one that `vlm import` wrote"
        )
    if stage is not None and (spec is None or stage not in spec.stages):
        raise ConfigurationError(f"{folder} has no stage {stage!r}", expected=f"one of {', '.join(spec.stages)}" if spec else "a run")
    files = {name: scores_file(folder, name, stage, own=file is None) for name in chosen}
    readers = {name: source.open() for name, source in chosen.items()}
    asked = {name: _asked(reader, limit) for name, reader in readers.items()}
    subjects = {name: scored(source, readers[name], stage=stage, limit=limit, max_new_tokens=max_new_tokens) for name, source in chosen.items()}
    model, processor = load(folder / "stages" / stage if stage else folder)
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    learned = _training_answers(spec, {question.kind for found in asked.values() for question in found}) if spec else TrainingAnswers()
    results: dict[str, dict[str, Any]] = {}
    for name, found in asked.items():
        about = {"run": spec.name if spec else folder.name, "stage": stage, "limit": limit}
        results[name] = {**about, **_result(model, processor, name, found, learned, batch_size, subjects[name])}
        write_whole(files[name], json.dumps(results[name], indent=1, ensure_ascii=False))
        Console().print(table(name, results[name]))
    return results


# ---- what is asked -------------------------------------------------------------------------------------------------------


def _chosen(spec: RunSpec, names: Sequence[str] | None) -> dict[str, Any]:
    """Name -> data source."""
    if not spec.eval:
        raise ConfigurationError(f"run {spec.name} names nothing to evaluate on", cure="write `eval: {heldout: SOURCE}` into the configuration, or give a file")
    for name in names or ():
        if name not in spec.eval:
            raise ConfigurationError(f"run {spec.name} has no evaluation {name!r}", expected=f"one of {', '.join(spec.eval)}")
    return {name: spec.data[source] for name, source in spec.eval.items() if not names or name in names}


def _one_split(file: str | Path, images: str | Path | None) -> dict[str, Any]:
    """Name -> data source of the one split that lies there."""
    found = sources_at(file, images=images)
    if len(found) != 1:
        several = ", ".join(f"{split} ({source.file})" for split, source in found.items())
        raise ConfigurationError(f"{file} holds {len(found)} splits, and one is scored", got=several or "none", cure="name the file or folder of one")
    return found


def _asked(reader: Reader[Any], limit: int | None) -> list[Question]:
    """Every question, once its pictures are known to be there: what is missing shows before a model is loaded, not behind a thousand answers."""
    found = [question for number in spread(len(reader), limit) for question in questions(reader[number])]
    for question in found:
        check_pictures(question.sample)
    return found


def _training_answers(spec: RunSpec, kinds: set[str]) -> TrainingAnswers:
    """What the last stage answered; of kinds that it does not have, what the last stage answered that does."""
    learned, missing = TrainingAnswers(), set(kinds)
    for place, stage in enumerate(reversed(list(spec.stages.values()))):
        for name in stage.sources:
            reader = spec.data[name].open()
            for number in range(len(reader)):
                for question in questions(reader[number]):
                    if not place or question.kind in missing:
                        learned.add(question)
        missing -= learned.kinds
        if not missing:
            break
    return learned


# ---- scores --------------------------------------------------------------------------------------------------------------


def _result(model: "VLM", processor: "VLMProcessor", name: str, asked: Sequence[Question], learned: TrainingAnswers, batch_size: int, subject: Mapping[str, Any]) -> dict[str, Any]:
    max_new_tokens = subject["max_new_tokens"]
    said = _answers(model, processor, [question.sample for question in asked], batch_size, max_new_tokens, name)
    pictured = [number for number, question in enumerate(asked) if question.sample.pictures]
    unseen = dict(zip(pictured, _answers(model, processor, [grey(asked[number].sample) for number in pictured], batch_size, max_new_tokens, f"{name}, grey"), strict=True))
    rows = [_entry(question, answer, unseen.get(number, answer), learned.guess(question)) for number, (question, answer) in enumerate(zip(asked, said, strict=True))]
    kinds = _kinds(rows, {asked[number].kind for number in pictured}, learned)
    return {"kinds": kinds, "mean": _mean(kinds), "protocol": protocol(model, processor, subject, len(asked)), "answers": rows}


def _answers(model: "VLM", processor: "VLMProcessor", samples: Sequence[Sample], batch_size: int, max_new_tokens: int, what: str) -> list[Answer]:
    step = SORTED_TOGETHER * batch_size
    starts = track(range(0, len(samples), step), description=what, console=Console(stderr=True), transient=True)
    return [answer for start in starts for answer in answer_all(model, processor, samples[start : start + step], batch_size=batch_size, max_new_tokens=max_new_tokens)]


def _entry(question: Question, said: Answer, unseen: Answer, guess: str) -> dict[str, Any]:
    return {
        "id": question.sample.id,
        "kind": question.kind,
        "question": question.text,
        "truth": question.truth,
        "answer": said.text,
        "right": matches(said.text, question.truth),
        "finish_reason": said.finish_reason,
        "grey_answer": unseen.text,  # of a question without pictures: the same words to the model, the same answer
        "question_only_answer": guess,
    }


def _kinds(rows: Sequence[Mapping[str, Any]], pictured: set[str], learned: TrainingAnswers) -> dict[str, dict[str, Any]]:
    names = [row["kind"] for row in rows]
    accuracy = shares(names, (row["right"] for row in rows))
    question_only = shares(names, (matches(row["question_only_answer"], row["truth"]) for row in rows))
    unseen = shares(names, (matches(row["grey_answer"], row["truth"]) for row in rows))
    found: dict[str, dict[str, Any]] = {}
    for kind in accuracy:
        without = unseen[kind] if kind in pictured else None
        guessed = question_only[kind] if learned.kinds else None  # what nobody was trained on here has no commonest answer
        known = [share for share in (guessed, without) if share is not None]
        values = (accuracy[kind], max(known, default=None), guessed, without, learned.chance(kind))
        found[kind] = {"n": names.count(kind), **dict(zip(COLUMNS, values, strict=True))}
    return found


def _mean(kinds: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Of the kinds, each counted once, as far as they have a value."""
    mean: dict[str, Any] = {"n": sum(values["n"] for values in kinds.values())}
    for column in COLUMNS:
        known = [values[column] for values in kinds.values() if values[column] is not None]
        mean[column] = sum(known) / len(known) if known else None
    return mean


def protocol(model: "VLM", processor: "VLMProcessor", subject: Mapping[str, Any], asked: int) -> dict[str, Any]:
    """Everything that figures of two runs must share to be compared, and its hash. subject: `vlm.eval.scores.scored`; asked: the number of questions."""
    facts = {
        "scored": dict(subject),
        "questions": asked,
        "prompt": asdict(processor.prompt.spec),
        "template": processor.prompt.template.chat,
        "system": processor.prompt.template.system if processor.prompt.spec.system is None else processor.prompt.spec.system,
        "pictures": processor.picture_policy,
        "decoding": {"greedy": True, "stop_ids": stop_ids(model, processor)},
    }
    return {**facts, "hash": hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()}


# ---- what is shown -------------------------------------------------------------------------------------------------------


def table(name: str, result: Mapping[str, Any]) -> Table:
    """The scores of one source in percent."""
    made = Table(title=f"{name}: {result['mean']['n']} questions, each asked alone", caption=f"{MATCHER}; protocol {result['protocol']['hash'][:12]}")
    made.add_column("kind")
    for column in ("n", *COLUMNS):
        made.add_column(column.replace("_", " "), justify="right")
    for kind, values in result["kinds"].items():
        made.add_row(kind, *_cells(values))
    if len(result["kinds"]) > 1:
        made.add_section()
        made.add_row("mean", *_cells(result["mean"]))
    return made


def _cells(values: Mapping[str, Any]) -> list[str]:
    return [str(values["n"]), *("-" if values[column] is None else f"{100 * values[column]:.1f}" for column in COLUMNS)]
