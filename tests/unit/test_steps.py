"""Steps and the loop over them: what a step holds on every rank, and what it divides by."""

import contextlib
import json
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from interrupted import kept, records
from safetensors.torch import load_file
from torch import Tensor, nn

import vlm
from vlm.config import LLMSpec, ModelSpec
from vlm.connectors.mlp import MLPSpec
from vlm.data.mixture import Mixture
from vlm.data.sample import Picture, Sample, Turn
from vlm.encoders.clip import CLIPSpec
from vlm.errors import DataError
from vlm.llm.head import adapt_head
from vlm.loading import first_model
from vlm.model import VLM, VLMOutput
from vlm.processor import VLMProcessor, load_tokenizer
from vlm.prompt import PromptSpec
from vlm.row import Row, collate
from vlm.train import loop, stages
from vlm.train.config import RunSpec, ScheduleSpec, StageSpec
from vlm.train.engine import Engine, connect, deepspeed_config
from vlm.train.loop import one_step
from vlm.train.steps import MicroBatch, Step, StepData, accumulation, loader

IGNORE = -100
STAGE = StageSpec(train={}, data="fixed", prompt=PromptSpec(use="plain"), schedule=ScheduleSpec(kind="constant", warmup=0))


class HeadOnly(nn.Module):
    """Stands for a model: its hidden states are given, its head and its loss are VLM's."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.head.weight.data.copy_(weight)
        adapt_head(self.head, SimpleNamespace(vocab_size=len(weight)))

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, hidden: Tensor, labels: Tensor) -> VLMOutput:
        result = VLMOutput(context=SimpleNamespace(losses={}, document=torch.arange(len(labels))[:, None].expand_as(labels)))  # type: ignore[arg-type]
        VLM._add_loss(self, result, hidden, labels, len(labels))  # type: ignore[arg-type]
        return result


def engine_of(model: nn.Module, rate: float = 0.5) -> Engine:
    *_, device = connect()
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "lr": rate, "peak": rate, "path": "head"}])
    return Engine(model, optimizer, deepspeed_config(STAGE, torch.float32) | {"gradient_clipping": 0.0}, device)


def micro_batch(hidden: Tensor, labels: Tensor) -> MicroBatch:
    """hidden (B, S, D), labels (B, S)."""
    supervised = int((labels[:, 1:] != IGNORE).sum())
    names = [str(index) for index in range(len(labels))] if supervised else []
    return MicroBatch(
        {"hidden": hidden, "labels": labels}, supervised, {"token": labels.numel(), "vision_token": 0, "document": len(names)}, names, ["fixed"] * len(names), ["text"] * len(names)
    )


def classified(x: Tensor, y: Tensor) -> MicroBatch:
    """One row per example (n, D) with target (n,): its state predicts the second token."""
    return micro_batch(torch.stack([x, x], 1), torch.stack([torch.full_like(y, IGNORE), y], 1))


def steps_of(engine: Engine, groups: Sequence[list[MicroBatch]]) -> list[dict[str, Any]]:
    return [one_step(engine, Step(number, group), STAGE, len(groups), ("fixed",)) for number, group in enumerate(groups)]


# ---- what a step divides by: train_accumulation_tail -----------------------------------------------------------------------


def tail_case(w: Tensor, x: Tensor, y: Tensor, counts: list[int]) -> tuple[list[dict[str, Any]], Tensor]:
    """Five micro-batches, accumulation two: the third step's second micro-batch is empty, as StepData gives it."""
    micros = [classified(a, b) for a, b in zip(x.split(counts), y.split(counts), strict=True)]
    micros.append(classified(torch.zeros(1, x.shape[1]), torch.full((1,), IGNORE)))
    model = HeadOnly(w)
    records = steps_of(engine_of(model), [micros[0:2], micros[2:4], micros[4:6]])
    return records, model.head.weight.detach()


def test_an_incomplete_accumulation_group_divides_by_what_it_holds() -> None:
    w, x, y, counts = torch.randn(6, 3), torch.randn(17, 3), torch.randint(6, (17,)), [3, 1, 6, 2, 5]
    records, got = tail_case(w, x, y, counts)
    reference = w.double().requires_grad_(True)
    for record, start, end in zip(records, (0, 4, 12), (4, 12, 17), strict=True):
        loss = F.cross_entropy(x[start:end].double() @ reference.T, y[start:end])  # the mean over the group's own targets
        (gradient,) = torch.autograd.grad(loss, reference)
        assert record["loss"] == pytest.approx(loss.item(), abs=1e-6) and record["supervised"] == end - start
        reference = (reference - 0.5 * gradient).detach().requires_grad_(True)
    assert torch.allclose(got.double(), reference, atol=1e-6)


def test_field_accumulation_tail(field_folder: Path) -> None:
    folder = field_folder / "train_accumulation_tail"
    given, expected = load_file(folder / "linear.safetensors"), json.loads((folder / "expected.json").read_text())
    records, got = tail_case(given["w0"], given["x"], given["y"], given["counts"].tolist())
    assert len(records) == expected["steps"]
    assert [record["loss"] for record in records] == pytest.approx(expected["losses"], abs=expected["tolerance"])
    assert torch.allclose(got, torch.tensor(expected["final_w"]), rtol=0, atol=expected["tolerance"])


# ---- nothing to learn from: train_zero_supervised --------------------------------------------------------------------------


def halves(logits: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """Rows 0-1 and 2-3 as two micro-batches of a step; logits (4, S, V) through an identity head. Returns the loss and the head's gradient."""
    model = HeadOnly(torch.eye(logits.shape[-1]))
    engine = engine_of(model, rate=1.0)
    record = steps_of(engine, [[micro_batch(logits[:2], labels[:2]), micro_batch(logits[2:], labels[2:])]])[0]
    return record["loss"], torch.eye(logits.shape[-1]) - model.head.weight.detach()


def check_halves(logits: Tensor, labels: Tensor) -> float:
    loss, gradient = halves(logits, labels)
    weight = torch.eye(logits.shape[-1], requires_grad=True)
    whole = F.cross_entropy((logits[:, :-1] @ weight.T).flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)
    whole.backward()
    assert weight.grad is not None and torch.isfinite(gradient).all()
    assert loss == pytest.approx(whole.item(), abs=1e-6) and torch.allclose(gradient, weight.grad, atol=1e-6)
    return loss


@pytest.mark.parametrize("empty", [(0, 1), (2, 3), (1, 2)])
def test_an_empty_half_contributes_nothing(empty: tuple[int, int]) -> None:
    labels = torch.randint(9, (4, 5))
    labels[:, :3] = IGNORE
    labels[list(empty)] = IGNORE
    check_halves(torch.randn(4, 5, 9), labels)


def test_field_zero_supervised(field_folder: Path) -> None:
    folder = field_folder / "train_zero_supervised"
    given, expected = load_file(folder / "micro_batches.safetensors"), json.loads((folder / "expected.json").read_text())["tensors"]
    assert check_halves(given["logits"], given["labels"]) == pytest.approx(expected["loss_global_mean"], abs=expected["tolerance"])


def test_a_step_without_any_target_stops() -> None:
    nothing = torch.full((2, 4), IGNORE)
    engine = engine_of(HeadOnly(torch.eye(3)))
    with pytest.raises(DataError, match=r"step 1 has no supervised token on any rank.*max_length"):
        steps_of(engine, [[micro_batch(torch.randn(2, 4, 3), nothing)]])


# ---- StepData --------------------------------------------------------------------------------------------------------------


class Talks:
    """A reader of text-only samples of unequal lengths; of every `bad` samples number `only` is broken."""

    def __init__(self, name: str, size: int, bad: int = 0, only: int = 1):
        self.name, self.size, self.bad, self.only = name, size, bad, only

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        if self.bad and index % self.bad == self.only:
            raise DataError(f"{self.name}.json, sample {index}: broken")
        words = " ".join(["word"] * (1 + (7 * index) % 23))
        return Sample(f"{self.name}{index}", (Turn("user", (words,)), Turn("assistant", ("yes",), True)), self.name, f"{self.name}.json, sample {index}")


@pytest.fixture(scope="module")
def processor() -> VLMProcessor:
    spec = ModelSpec(encoder=CLIPSpec(config=tiny.tower_config(), weights="random"), connector=MLPSpec(), llm=LLMSpec(config=tiny.llm_config(), weights="random"))
    return VLMProcessor(spec, 32, tiny.tokenizer(), PromptSpec(use="chatml"))


def data(
    processor: VLMProcessor,
    rank: int = 0,
    ranks: int = 1,
    batch: int = 7,
    micro_batch: int = 2,
    bad: int = 0,
    skip: tuple[str, ...] = (),
    weights: Any = None,
    seed: int = 3,
    pack: int | None = None,
) -> StepData:
    readers = {"one": Talks("one", 19, bad), "two": Talks("two", 11)}
    mixture = Mixture({name: len(reader) for name, reader in readers.items()}, weights, batch, seed, 0, epochs=1.0)
    return StepData(readers, mixture, processor, skip=skip, rank=rank, ranks=ranks, micro_batch=micro_batch, max_length=256, too_long="cut", pack=pack)


def ids(step: Step) -> list[str]:
    return [name for micro in step.micro_batches for name in micro.ids]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("batch, micro", [(7, 2), (8, 1), (3, 4), (2, 1), (1, 3)])
@pytest.mark.parametrize("weights", [None, {"one": 1.0, "two": 3.0}])
def test_the_ranks_together_hold_the_step(processor: VLMProcessor, ranks: int, batch: int, micro: int, weights: Any) -> None:
    parts = [data(processor, rank, ranks, batch, micro, weights=weights) for rank in range(ranks)]
    whole = data(processor, batch=batch, micro_batch=micro, weights=weights)
    assert {len(part) for part in parts} == {len(whole)}
    for number in (0, len(whole) // 2, len(whole) - 1):
        steps, expected = [part[number] for part in parts], whole[number]
        assert sorted(name for step in steps for name in ids(step)) == sorted(ids(expected)) == sorted(f"{source}{index}" for source, index in whole.mixture.step(number))
        assert {len(step.micro_batches) for step in steps} == {accumulation(len(ids(expected)), micro, ranks)}
        assert sum(m.supervised for step in steps for m in step.micro_batches) == sum(m.supervised for m in expected.micro_batches) > 0
        assert sum(m.units["document"] for step in steps for m in step.micro_batches) == len(ids(expected))
        for step in steps:
            assert all(len(m.ids) <= micro for m in step.micro_batches)
            lengths = [int(row.sum()) for m in step.micro_batches if m.ids for row in m.inputs["document_ids"] >= 0]
            assert lengths == sorted(lengths)
            sizes = [len(ids(other)) for other in steps]
            assert max(sizes) - min(sizes) <= 1


def test_a_rank_without_samples_holds_a_row_that_teaches_nothing(processor: VLMProcessor) -> None:
    step = data(processor, rank=3, ranks=4, batch=2, micro_batch=1)[0]
    (micro,) = step.micro_batches
    assert micro.ids == [] and micro.supervised == 0 and micro.units == {"token": 0, "vision_token": 0, "document": 0}
    assert micro.inputs["input_ids"].shape == (1, 1) and (micro.inputs["labels"] == IGNORE).all()


def test_a_step_depends_on_seed_and_number_alone(processor: VLMProcessor) -> None:
    first, later = data(processor), data(processor)
    for number in (3, 0, 2):
        random.seed(number)
        torch.manual_seed(number)
        left, right = first[number], later[number]
        assert [m.ids for m in left.micro_batches] == [m.ids for m in right.micro_batches]
        assert all(torch.equal(a.inputs["input_ids"], b.inputs["input_ids"]) for a, b in zip(left.micro_batches, right.micro_batches, strict=True))
    assert [ids(first[k]) for k in range(len(first))] != [ids(data(processor, seed=4)[k]) for k in range(len(first))]
    assert sorted(name for k in range(len(first)) for name in ids(first[k])) == sorted([f"one{i}" for i in range(19)] + [f"two{i}" for i in range(11)])


def test_sources_that_take_turns_reach_every_rank(processor: VLMProcessor) -> None:
    parts = [data(processor, rank, 2, batch=4, weights={"one": 1.0, "two": 1.0}) for rank in range(2)]
    for part in parts:
        assert {micro_source for number in range(len(part)) for micro in part[number].micro_batches for micro_source in micro.sources} == {"one", "two"}


@pytest.mark.parametrize("pack", [None, 300])
def test_bad_samples_stop_or_are_replaced_with_the_reason(processor: VLMProcessor, pack: int | None) -> None:
    with pytest.raises(DataError, match=r"one\.json, sample \d+: broken"):
        [data(processor, bad=4, pack=pack)[number] for number in range(5)]
    with pytest.raises(DataError, match="broken"):
        [data(processor, bad=4, skip=("two",), pack=pack, rank=1, ranks=2)[number] for number in range(5)]
    whole = data(processor, bad=4, skip=("one",), pack=pack)
    parts = [data(processor, rank, 2, bad=4, skip=("one",), pack=pack) for rank in range(2)]
    steps = [part[number] for part in parts for number in range(len(part))]
    listed = [entry for step in steps for entry in step.skipped]
    assert {1, 5, 9, 13, 17} == {entry["index"] for entry in listed} and all(entry["index"] % 4 == 1 for entry in listed)
    assert all(entry["source"] == "one" and entry["kind"] == "other" and f"sample {entry['index']}: broken" in entry["reason"] for entry in listed)
    assert sorted(name for step in steps for name in ids(step)) == sorted(name for number in range(len(whole)) for name in ids(whole[number]))  # the ranks do not matter
    assert len([name for step in steps for name in ids(step)]) == 30
    assert sum(step.notes.get("replacement", 0) for step in steps) == 5


def test_a_source_of_bad_samples_only_stops(processor: VLMProcessor) -> None:
    part = data(processor, skip=("one",))
    part.readers["one"] = Talks("one", 19, bad=1, only=0)
    with pytest.raises(DataError, match=r"one: sample \d+ and 16 that were drawn to replace it are all bad"):
        [part[number] for number in range(5)]


class Pictures(Talks):
    """The same with a picture each; that of `cut` has a whole header and half a body."""

    def __init__(self, folder: Path, cut: int):
        super().__init__("one", 19)
        self.folder, self.cut = folder, cut
        for index in range(19):
            tiny.picture(seed=index).save(folder / f"{index}.png")
        half = (folder / f"{cut}.png").read_bytes()
        (folder / f"{cut}.png").write_bytes(half[: len(half) * 2 // 3])

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        return replace(sample, turns=(Turn("user", (Picture(str(self.folder / f"{index}.png")), *sample.turns[0].parts)), sample.turns[1]))


@pytest.mark.parametrize("cut", [0, 7])
def test_a_picture_found_broken_after_planning_is_replaced(processor: VLMProcessor, tmp_path: Path, cut: int) -> None:
    """Sample 0 is the shortest, and its row is full without it: what replaces it has no room there."""
    parts = [data(processor, rank, 2, skip=("one",), pack=180) for rank in range(2)]
    whole = data(processor, skip=("one",))
    for part in (*parts, whole):
        part.readers["one"] = Pictures(tmp_path, cut)
        part.max_length = 180
    for number in range(len(whole)):
        steps = [part[number] for part in parts]
        assert sorted(name for step in steps for name in ids(step)) == sorted(ids(whole[number]))
        assert len({len(step.micro_batches) for step in steps}) == 1
        assert all(m.inputs["input_ids"].shape[1] <= 180 for step in steps for m in step.micro_batches)
        assert sum(len(step.skipped) for step in steps) == len(whole[number].skipped)
    assert sum(len(whole[number].skipped) for number in range(len(whole))) == 1


# ---- packing ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("pack", [180, 300, 1000])
def test_packed_ranks_hold_the_step_in_equally_many_micro_batches(processor: VLMProcessor, ranks: int, pack: int) -> None:
    parts = [data(processor, rank, ranks, 12, 2, pack=pack) for rank in range(ranks)]
    for number in range(len(parts[0])):
        steps, drawn = [part[number] for part in parts], parts[0].mixture.step(number)
        assert sorted(name for step in steps for name in ids(step)) == sorted(f"{source}{index}" for source, index in drawn)
        assert len({len(step.micro_batches) for step in steps}) == 1
        for micro in (micro for step in steps for micro in step.micro_batches):
            rows, length = micro.inputs["input_ids"].shape
            assert rows <= 2 and length <= pack
            assert micro.inputs["documents"] == max(1, len(micro.ids)) and micro.inputs["plain"] is (rows == micro.inputs["documents"])
        total = sum(m.units["token"] for step in steps for m in step.micro_batches)
        assert total == sum(len(processor.row(parts[0].readers[source][index])) for source, index in drawn)


def test_ranks_that_do_not_see_the_same_samples_stop(processor: VLMProcessor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that one rank alone cannot read would give it another plan: rows trained twice or never, or one call of the model more than the others make."""
    parts = [data(processor, rank, 2, 12, 2, skip=("one",), pack=300) for rank in range(2)]
    assert parts[0][0].plan == parts[1][0].plan != 0
    parts[1].readers["one"] = Talks("one", 19, bad=2)
    plans = [part[0].plan for part in parts]
    assert plans[0] != plans[1]
    engine = engine_of(HeadOnly(torch.eye(3)))
    monkeypatch.setattr(engine, "ranks", 2)
    monkeypatch.setattr(engine, "sum", lambda values: values | {"plan": values["plan"] + plans[1], "plan_squared": values["plan_squared"] + plans[1] ** 2})
    step = Step(0, [classified(torch.randn(2, 3), torch.tensor([0, 1]))], plan=plans[0])
    with pytest.raises(DataError, match="the ranks do not see the same samples at step 1"):
        one_step(engine, step, STAGE, 1, ("fixed",))


def test_what_happened_to_samples_is_counted(processor: VLMProcessor) -> None:
    part = data(processor)
    whole = {f"{name}{index}": len(processor.row(Talks(name, size)[index])) for name, size in (("one", 19), ("two", 11)) for index in range(size)}
    part.max_length = max(whole.values()) - 1
    part.skip = frozenset(("one", "two"))  # a cut row may have no answer left
    steps = [part[number] for number in range(len(part))]
    counted = sum(step.notes.get("cut", 0) for step in steps) + len({(entry["source"], entry["index"]) for step in steps for entry in step.skipped})
    assert counted >= sum(length > part.max_length for length in whole.values()) > 0


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_starts_anywhere_and_draws_nothing(processor: VLMProcessor, workers: int) -> None:
    part = data(processor)
    before = torch.get_rng_state()
    got = list(loader(part, 2, workers))
    assert torch.equal(before, torch.get_rng_state())
    assert [step.number for step in got] == [2, 3, 4] and [ids(step) for step in got] == [ids(part[k]) for k in (2, 3, 4)]


# ---- whole runs on a small data set: train_resume_position, train_mixed_modalities -----------------------------------------

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


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.data_root(tmp_path_factory.mktemp("data"))


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
        seen.append(ids(step))
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
