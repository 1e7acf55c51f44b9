"""What a step holds on every rank: its samples, its micro-batches, what replaces bad ones, packed rows."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from vlm.config import LLMSpec, ModelSpec
from vlm.connectors.mlp import MLPSpec
from vlm.data.mixture import Mixture
from vlm.data.sample import Picture, Sample, Turn
from vlm.encoders.clip import CLIPSpec
from vlm.errors import DataError
from vlm.processor import VLMProcessor
from vlm.prompt import PromptSpec
from vlm.train.steps import Step, StepData, accumulation, loader

IGNORE = -100


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


def test_ranks_that_do_not_see_the_same_samples_have_other_plans(processor: VLMProcessor) -> None:
    """A file that one rank alone cannot read would give it another plan: rows trained twice or never, or one call of the model more than the others make."""
    parts = [data(processor, rank, 2, 12, 2, skip=("one",), pack=300) for rank in range(2)]
    assert parts[0][0].plan == parts[1][0].plan != 0
    parts[1].readers["one"] = Talks("one", 19, bad=2)
    plans = [part[0].plan for part in parts]
    assert plans[0] != plans[1]


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
