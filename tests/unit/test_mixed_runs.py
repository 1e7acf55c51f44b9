"""Whole runs over rows with no, one and two pictures: a killed one goes on with the next sample, text alone leaves the connector as it was (field: train_resume_position, train_mixed_modalities)."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from interrupted import kept, records
from safetensors.torch import load_file

import vlm
from vlm.loading import first_model
from vlm.model import VLM
from vlm.processor import VLMProcessor, load_tokenizer
from vlm.prompt import PromptSpec
from vlm.row import Row, collate
from vlm.train import loop, stages
from vlm.train.config import RunSpec, ScheduleSpec, StageSpec
from vlm.train.engine import Engine
from vlm.train.loop import one_step
from vlm.train.steps import Step

ALIGN = {"train": {"connector": 1e-3}, "prompt": PromptSpec(use="chatml"), "schedule": ScheduleSpec(kind="cosine", warmup=0.25)}


@dataclass(frozen=True)
class Inputs:
    """A LLaVA file and its folder of pictures."""

    file: Path
    images: Path


def colours(folder: Path, name: str, forms: Sequence[int]) -> Inputs:
    """A file of conversations with 0, 1 or 2 pictures each."""
    (folder / "img").mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for index, pictures in enumerate(forms):
        tiny.picture(seed=index, size=(30 + index, 28)).save(folder / "img" / f"{index}.png")
        names = [f"{(index + offset) % len(forms)}.png" for offset in range(pictures)]
        question = "<image>" * pictures + ("\nColour?" if pictures else f"{index} plus one?")
        row: dict[str, Any] = {"id": index, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": f"it is {index + 1}"}]}
        rows.append(row | ({"image": names[0] if pictures == 1 else names} if pictures else {}))
    file = folder / f"{name}.json"
    file.write_text(json.dumps(rows))
    return Inputs(file, folder / "img")


def compose(root: Path, runs: Path, name: str, inputs: Inputs, *more: str, **stage: Any) -> RunSpec:
    """llava_tiny with one stage on these inputs."""
    run = vlm.compose(
        "llava_tiny", f"data_root={root}", f"runs={runs}", f"name={name}", f"data.captions.file={inputs.file}", f"data.captions.images={inputs.images}", "seed=1", *more
    )
    return replace(run, stages={"only": StageSpec(data="captions", **(ALIGN | stage))})


@contextlib.contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """The ids of the steps that a run trains, in order."""
    seen: list[list[str]] = []

    def one(engine: Engine, step: Step, *rest: Any) -> dict[str, Any]:
        seen.append([name for micro in step.micro_batches for name in micro.ids])
        return one_step(engine, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "one_step", one)
        yield seen


def killed(whole: Path, folder: Path, k: int) -> None:
    """What a run leaves that is killed after step k and its checkpoint."""
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("stages", "export", "pictures", *(f"step-{later}" for later in range(k + 1, 9))))
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:k]))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("which", ["own", "folder"])
def test_a_killed_run_goes_on_with_the_next_sample(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, which: str, workers: int) -> None:
    if which == "own":
        inputs = colours(tmp_path, "ten", [1, 0, 1, 2, 1, 1, 0, 1, 1, 1])
    else:
        folder = request.getfixturevalue("field_folder") / "train_resume_position"
        inputs = Inputs(folder / "ten.json", folder / "img")
    settings = ("save.every=1", "save.keep=9", f"workers={workers}")
    stage = {"batch": 4, "micro_batch": 1, "epochs": 2.0}

    with watched(monkeypatch) as unbroken:
        whole = vlm.fit(compose(root, tmp_path, "whole", inputs, *settings, **stage))
    everything = [str(index) for index in range(10)]
    assert len(unbroken) == 5 and sorted(chain.from_iterable(unbroken)) == sorted(everything * 2)
    assert sorted(unbroken[0] + unbroken[1]) != sorted(everything) and set(unbroken[0] + unbroken[1]) | set(unbroken[2]) == set(everything)  # step 3 holds two of each epoch

    for k in (1, 2, 3, 4):
        killed(whole, tmp_path / f"cut{k}", k)
        with watched(monkeypatch) as later:
            resumed = vlm.fit(compose(root, tmp_path, f"cut{k}", inputs, *settings, **stage), resume=True)
        assert later == unbroken[k:], k
        assert [kept(record) for record in records(resumed)] == [kept(record) for record in records(whole)], k  # losses bit for bit, rates, norms
        left, right = (load_file(folder / "export" / "model.safetensors") for folder in (whole, resumed))
        assert all(torch.equal(left[name], right[name]) for name in left), k


@pytest.fixture(params=["own", "folder"])
def mixed(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Inputs]:
    """Files `train` (0, 1, 2, 1, 0, 1 pictures) and `text_only`."""
    if request.param == "own":
        forms = {"train": [0, 1, 2, 1, 0, 1], "text_only": [0, 0, 0]}
        return lambda name: colours(tmp_path, name, forms[name])
    folder: Path = request.getfixturevalue("field_folder") / "train_mixed_modalities"
    return lambda name: Inputs(folder / f"{name}.json", folder / "img")


def rows_of(run: RunSpec) -> tuple[VLM, VLMProcessor, list[Row]]:
    tokenizer = load_tokenizer(run.model)
    processor = VLMProcessor(run.model, 32, tokenizer, run.stages["only"].prompt)
    torch.manual_seed(0)
    model = first_model(run.model, processor.image_token_id).train()
    reader = run.data["captions"].open()
    return model, processor, [processor.row(reader[index]) for index in range(len(reader))]


def test_text_only_rows_give_the_connector_zeros(root: Path, tmp_path: Path, mixed: Callable[[str], Inputs]) -> None:
    run = compose(root, tmp_path, "mixed", mixed("train"))
    model, processor, rows = rows_of(run)
    assert [len(row.images) for row in rows] == [0, 1, 2, 1, 0, 1]
    for row in rows:
        model.zero_grad(set_to_none=True)
        model(**collate([row], pad_id=processor.pad_id)).loss.backward()
        for name, parameter in model.connector.named_parameters():
            assert parameter.grad is not None, name
            assert bool(parameter.grad.any()) == bool(row.images), (row.id, name)


def test_the_picture_reaches_the_model(root: Path, tmp_path: Path, mixed: Callable[[str], Inputs]) -> None:
    model, processor, rows = rows_of(compose(root, tmp_path, "mixed", mixed("train")))
    swapped = replace(rows[1], images=[rows[2].images[1]])
    with torch.no_grad():
        before, after, again = (model(**collate([row], pad_id=processor.pad_id)).loss.item() for row in (rows[1], swapped, rows[1]))
    assert before == again and abs(before - after) > 1e-4


def test_micro_batches_of_one_take_a_step_each(root: Path, tmp_path: Path, mixed: Callable[[str], Inputs]) -> None:
    folder = vlm.fit(compose(root, tmp_path, "each", mixed("train"), batch=1, micro_batch=1))
    found = records(folder)
    assert [record["step"] for record in found] == [1, 2, 3, 4, 5, 6] and sum(record["modality"]["text"] for record in found) == 2
    assert all(record["samples"] == 1 and record["supervised"] > 0 and bool(record["vision_tokens"]) == bool(record["modality"]["vision"]) for record in found)


def test_text_alone_trains_and_leaves_the_connector_as_it_was(root: Path, tmp_path: Path, mixed: Callable[[str], Inputs]) -> None:
    run = compose(root, tmp_path, "text", mixed("text_only"), batch=2, micro_batch=1, steps=3, train={"connector": 1e-2, "llm": 1e-2})
    warnings = vlm.check(run).warnings
    assert len([line for line in warnings if "trains the connector, but no sample of" in line]) == 1
    torch.manual_seed(stages._seed(run.seed, 0, 0))
    start = first_model(run.model, load_tokenizer(run.model).convert_tokens_to_ids("<image>")).state_dict()  # type: ignore[arg-type]
    trained = load_file(vlm.fit(run) / "export" / "model.safetensors")
    moved = {name for name, tensor in trained.items() if not torch.equal(tensor, start[name])}
    assert moved and not any(name.startswith(("connector.", "encoder.")) for name in moved)
