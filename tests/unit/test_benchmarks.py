"""Every bench runs at its miniature size, which also proves that its two sides are equal (losses, tokens, samples): a bench asserts that itself. No time is asserted."""

import importlib
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
NAMES = sorted(file.stem for file in BENCHMARKS.glob("[!_]*.py"))


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A bench as a module, as if its file were run; without the folder of real pictures, so that the test is the same everywhere."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setenv("VLM_DATA", str(BENCHMARKS / "no such folder"))
    return importlib.import_module


@pytest.mark.parametrize("name", NAMES)
def test_runs(load: Any, name: str) -> None:
    bench = load(name)
    results = list(bench.measure(bench.TINY))
    assert results
    for result in results:
        assert result.value >= 0, result
        assert result.claim in str(result)


def test_unequal_sides_are_found(load: Any, tmp_path: Path) -> None:
    sides, train_step = load("_sides"), load("train_step")
    samples = load("_corpus").corpus(tmp_path, 2)
    folder = sides.Ours(samples, sides.NARROW, 4, 1).export(tmp_path / "llava")
    others = samples.holding("others", [record | {"conversations": [*record["conversations"][:-1], {"from": "gpt", "value": "nothing"}]} for record in samples.records])
    with pytest.raises(AssertionError, match="supervised tokens|loss before"):
        train_step.sides(samples, others, folder, train_step.TINY, 4, {"micro_batch": 4})


def test_ratio_is_theirs_over_ours(load: Any) -> None:
    paired = load("_paired")
    seconds = iter(range(100))
    order: list[str] = []

    def side(name: str, takes: float) -> Any:
        def block(number: int) -> tuple[float, float]:
            order.append(f"{name}{number}")
            return takes * (1 + next(seconds)), takes

        return block

    result = paired.compare("a claim", side("a", 1.0), side("b", 3.0), pairs=2, warm=0, wanted=(">=", 2.5))
    assert order == ["a0", "b0", "b1", "a1"]
    assert result.cpu == 3.0
    assert result.value == pytest.approx(((3 * 2 / 1) + (3 * 3 / 4)) / 2)
    assert "met" in str(result) and "MISSED" in str(paired.compare("a claim", side("a", 3.0), side("b", 1.0), pairs=1, warm=0, wanted=(">=", 2.5)))


def test_peak_is_that_of_tensors(load: Any) -> None:
    import torch

    peak = load("_memory").peak
    size = 4 * 1000 * 1000
    assert size <= peak(lambda: torch.ones(1000, 1000).sum()) < 1.1 * size
    assert 2 * size <= peak(lambda: torch.ones(1000, 1000) + 1) < 2.1 * size
