"""One rank = two ranks at ZeRO 0 to 3 (gloo): gradients, the loss curve, and parts of a user's own. One torchrun per ZeRO stage."""

from pathlib import Path

import pytest
import torch
from interrupted import records
from ranks import assert_equal_steps, assert_resumed, launch
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("ranks_worker.py")


@pytest.fixture(scope="module")
def one(mixed_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(WORKER, mixed_root, tmp_path_factory.mktemp("one"), 0, 1)


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in records(folder)]


@pytest.mark.ranks
def test_accumulation_does_not_change_the_gradient(one: Path) -> None:
    for accumulate in ("1", "8"):
        assert_equal_steps(one, one / accumulate)


@pytest.mark.ranks
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_one_rank_equals_two(mixed_root: Path, one: Path, tmp_path: Path, zero: int) -> None:
    two = launch(WORKER, mixed_root, tmp_path / "two", zero, 2)
    assert_equal_steps(one, two)
    assert_resumed(two)
    assert losses(two / "whole") == losses(two / "cut")
    assert losses(two / "curve") == pytest.approx(losses(one / "curve"), abs=1e-4)
    assert losses(two / "packed") == pytest.approx(losses(one / "curve"), abs=1e-4), "packed = unpacked, in steps of differently many micro-batches"
    for one_record, two_record in zip(records(one / "packed"), records(two / "packed"), strict=True):
        assert one_record.get("notes") == two_record.get("notes"), "notes are counted over all ranks"
    modalities = [record["modality"] for record in records(two / "curve") if record["stage"] == "instruct"]
    assert all(found == entry["modality"] for found, entry in zip(modalities, (r for r in records(one / "curve") if r["stage"] == "instruct"), strict=True))
    if zero in (0, 3):
        assert losses(two / "extension") == pytest.approx(losses(one / "extension"), abs=1e-4)
        last = records(two / "extension")[-1]
        assert last["auxiliary"]["twin"] == pytest.approx(records(one / "extension")[-1]["auxiliary"]["twin"], rel=1e-4)
        left, right = (load_file(folder / "extension" / "export" / "model.safetensors") for folder in (one, two))
        assert all(torch.allclose(left[name], right[name], atol=1e-4) for name in left)
