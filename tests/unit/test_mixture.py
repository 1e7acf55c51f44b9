"""The deterministic step: pure, complete, resumable, in the shares that were asked for."""

from collections import Counter
from typing import Any

import pytest

from vlm.data.mixture import WINDOW, Mixture
from vlm.errors import ConfigurationError


def mixture(sizes: dict[str, int], weights: dict[str, float] | None = None, batch: int = 4, seed: int = 1, stage: int = 0, **length: Any) -> Mixture:
    return Mixture(sizes, weights, batch, seed, stage, **(length or {"epochs": 1}))


def run(mix: Mixture, start: int = 0) -> list[list[tuple[str, int]]]:
    return [mix.step(k) for k in range(start, mix.steps)]


def test_ten_samples_two_epochs_batch_four():
    steps = run(mixture({"s": 10}, epochs=2))
    assert [len(step) for step in steps] == [4] * 5
    drawn = [sample for step in steps for sample in step]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == [("s", index) for index in range(10)]


@pytest.mark.parametrize("weights", [None, {"a": 3, "b": 1, "c": 0.5}])
def test_any_step_alone_equals_the_whole_run(weights: dict[str, float] | None):
    whole = run(mixture({"a": 10, "b": 7, "c": 40}, weights, epochs=3))
    fresh = {k: mixture({"a": 10, "b": 7, "c": 40}, weights, epochs=3) for k in range(len(whole))}
    assert [fresh[k].step(k) for k in reversed(range(len(whole)))] == whole[::-1]
    used = mixture({"a": 10, "b": 7, "c": 40}, weights, epochs=3)
    assert [used.step(k) for k in (20, 3, 21, 3, 0)] == [whole[k] for k in (20, 3, 21, 3, 0)]


@pytest.mark.parametrize("batch", [1, 3, 8, 50])
def test_each_epoch_holds_every_sample_once(batch: int):
    drawn = [sample for step in run(mixture({"a": 10, "b": 7}, batch=batch, epochs=3)) for sample in step]
    everything = {("a", index) for index in range(10)} | {("b", index) for index in range(7)}
    assert len(drawn) == 51
    assert all(set(drawn[start : start + 17]) == everything for start in (0, 17, 34))


def test_weighted_sources_walk_their_own_epochs():
    drawn = [sample for step in run(mixture({"a": 10, "b": 3}, {"a": 1, "b": 1}, steps=40)) for sample in step]
    assert len(drawn) == 160
    for name, size in (("a", 10), ("b", 3)):
        mine = [index for source, index in drawn if source == name]
        epochs = [mine[start : start + size] for start in range(0, len(mine) - size, size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1


def test_order_differs_between_epochs_seeds_stages_and_sources():
    def order(**changed: Any) -> list[int]:
        return [index for step in run(mixture({"s": 50}, batch=50, **{"epochs": 2, **changed})) for _, index in step]

    base = order()
    assert base[:50] != base[50:]
    assert base[:50] != list(range(50))
    assert base[:50] != order(seed=2)[:50] != order(stage=1)[:50] != base[:50]
    pair = [sample for step in run(mixture({"a": 50, "b": 50}, {"a": 1, "b": 1})) for sample in step]
    assert [index for source, index in pair if source == "a"] != [index for source, index in pair if source == "b"]


def test_the_order_is_that_of_today():
    """Runs must resume under a later NumPy: this order may never change."""
    assert [index for _, index in mixture({"s": 10}, batch=10).step(0)] == [5, 0, 7, 8, 3, 6, 1, 9, 4, 2]


@pytest.mark.parametrize(
    "weights", [{"a": 1, "b": 1}, {"a": 0.8, "b": 0.2}, {"a": 1e-3, "b": 1}, {"a": 5, "b": 3, "c": 1}, {"a": 1, "b": 1, "c": 1}, {"a": 20, "b": 1, "c": 1, "d": 1, "e": 3.3}]
)
def test_shares_hold_at_every_position(weights: dict[str, float]):
    mix = mixture(dict.fromkeys(weights, 10), weights, batch=1, steps=3000)
    total, counts = sum(weights.values()), Counter[str]()
    for k in range(mix.steps):
        counts[mix.step(k)[0][0]] += 1
        for name, weight in weights.items():
            share = weight / total
            assert abs(counts[name] - share * (k + 1)) <= 0.5 + share * len(weights) / 2 + 1e-9


def test_shares_far_into_a_run_and_whatever_the_batch():
    sizes, weights = {"a": 100, "b": 100, "c": 100}, {"a": 0.7, "b": 0.2, "c": 0.1}
    far = 10**9
    large = mixture(sizes, weights, batch=1000, steps=far).step(far - 1)
    assert [sample for k in range(far * 4 - 4, far * 4) for sample in mixture(sizes, weights, batch=250, steps=far * 4).step(k)] == large
    assert all(abs(Counter(name for name, _ in large)[name] - 1000 * weight) <= 2 for name, weight in weights.items())


def test_several_sources_without_weights_are_shuffled_together():
    first = mixture({"a": 500, "b": 500}, batch=100).step(0)
    assert 25 < Counter(name for name, _ in first)["a"] < 75


BLOCKS = {"a": [30, 0, 1, 17, 30, 2, 30, 30, 30, 9]}


@pytest.mark.parametrize(("sizes", "weights"), [({"a": 179}, None), ({"b": 40, "a": 179, "c": 3}, None), ({"a": 179, "b": 40}, {"a": 1, "b": 2})])
def test_a_source_with_blocks_is_walked_by_few_blocks_at_a_time(sizes: dict[str, int], weights: dict[str, float] | None):
    mix = mixture(sizes, weights, batch=8, epochs=5, blocks=BLOCKS)
    mine = [index for step in run(mix) for source, index in step if source == "a"]
    block_of = [block for block, size in enumerate(BLOCKS["a"]) for _ in range(size)]
    epochs = [mine[start : start + 179] for start in range(0, len(mine) - 178, 179)]
    assert len(epochs) >= 2
    for epoch in epochs:
        assert sorted(epoch) == list(range(179))
        blocks = [block_of[index] for index in epoch]
        under_way = [{block for block in set(blocks[: place + 1]) if block in blocks[place:]} for place in range(179)]
        assert max(map(len, under_way)) == WINDOW
        assert len(set(blocks[60:90])) > 1
        assert epoch != sorted(epoch)
    firsts = [tuple(dict.fromkeys(block_of[index] for index in epoch)) for epoch in epochs]
    assert len(set(firsts)) == len(firsts)


def test_sources_with_blocks_and_without_weights_give_every_sample_once_per_epoch():
    sizes = {"b": 40, "a": 179, "c": 3}
    drawn = [sample for step in run(mixture(sizes, batch=7, epochs=4, blocks=BLOCKS)) for sample in step]
    everything = {(name, index) for name, size in sizes.items() for index in range(size)}
    assert all(set(drawn[start : start + 222]) == everything for start in range(0, 888, 222))
    for place in range(0, 888, 60):  # by turns, not one source after another
        assert 7 <= Counter(name for name, _ in drawn[place : place + 60])["b"] <= 14 or place + 60 > 888


def test_any_step_alone_equals_the_whole_run_with_blocks():
    def fresh() -> Mixture:
        return mixture({"b": 40, "a": 179}, epochs=3, blocks=BLOCKS)

    whole = run(fresh())
    assert [fresh().step(k) for k in reversed(range(len(whole)))] == whole[::-1]
    assert whole != run(mixture({"b": 40, "a": 179}, epochs=3, seed=2, blocks=BLOCKS))


def test_the_order_of_blocks_is_that_of_today():
    """As above: runs must resume under a later NumPy."""
    assert [index for _, index in mixture({"s": 12}, batch=12, epochs=1, blocks={"s": [2] * 6}).step(0)] == [10, 1, 0, 2, 11, 6, 7, 9, 8, 3, 4, 5]


@pytest.mark.parametrize("blocks", [{"a": [178]}, {"a": [180, -1]}, {"a": []}, {"z": [179]}])
def test_blocks_that_do_not_fit_are_refused(blocks: dict[str, list[int]]):
    with pytest.raises(ConfigurationError, match="do not make up its samples"):
        mixture({"a": 179}, epochs=1, blocks=blocks)


@pytest.mark.parametrize(
    ("sizes", "epochs", "batch", "steps", "last"),
    [({"a": 558128}, 1, 256, 2181, 48), ({"a": 665298}, 1, 128, 5198, 82), ({"a": 30}, 0.1, 1, 3, 1), ({"a": 5, "b": 6}, 0.5, 4, 2, 2)],
)
def test_number_of_steps(sizes: dict[str, int], epochs: float, batch: int, steps: int, last: int):
    mix = mixture(sizes, batch=batch, epochs=epochs)
    assert mix.steps == steps
    assert len(mix.step(steps - 1)) == last
    assert mixture(sizes, dict.fromkeys(sizes, 1.0), batch=batch, epochs=epochs).steps == steps
    for outside in (-1, steps):
        with pytest.raises(IndexError):
            mix.step(outside)


@pytest.mark.parametrize(
    ("settings", "fact"),
    [
        ({"sizes": {"a": 0}}, "a hold no samples"),
        ({"sizes": {}}, "no data source"),
        ({"weights": {"b": 1}}, "weights of b"),
        ({"weights": {"a": 0}}, "weight of the data source a"),
        ({"weights": {"a": float("nan")}}, "weight of the data source a"),
        ({"epochs": 1, "steps": 1}, "length is not clear"),
        ({"epochs": None}, "length is not clear"),
        ({"steps": 0}, "not a positive number"),
        ({"batch": 0}, "batch 0"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, Any], fact: str):
    with pytest.raises(ConfigurationError, match=fact):
        mixture(**{"sizes": {"a": 5}, **settings})
