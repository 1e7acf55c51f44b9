"""The runner fails where it must: unknown prefix or field, missing output, wrong shape, dtype or number."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.golden import runner
from tests.golden.case import Case
from tests.golden.compare import differences, tolerance_of
from tests.golden.runner import NotBuilt, Row, folders, row_of, run

PAIR = {"atol": 0.0, "rtol": 0.1}


def test_longest_known_prefix_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "TABLE", {prefix: NotBuilt(prefix) for prefix in ("a_pixels", "a_pixels_sizes", "a")})
    assert [row_of(name) for name in ("a_pixels_672", "a_pixels_sizes_672", "a_layer")] == [NotBuilt("a_pixels"), NotBuilt("a_pixels_sizes"), NotBuilt("a")]
    with pytest.raises(AssertionError, match="unknown prefix: b_pixels"):
        row_of("b_pixels")


@pytest.mark.parametrize("name", ["arcana_qladder_same", "dsvl_native_hybrid", "eve_v1_pixels_sizes_672", "eve_v2_layer_full", "moe_gate_module_bf16", "pmod_anyres_max"])
def test_kinds_of_all_families_are_known(name: str) -> None:
    assert isinstance(row_of(name), Row | NotBuilt)


def _case(folder: Path, config: Mapping[str, Any]) -> Case:
    (folder / "case.json").write_text(json.dumps({"config": config, "tolerance": PAIR}))
    (folder / "expected.json").write_text(json.dumps({"answer": 2}))
    save_file({"out": torch.ones(2)}, folder / "expected.safetensors")
    return Case(folder)


@pytest.mark.parametrize(
    "config, problems",
    [
        ({"width": 1, "outer": {"read": 1}}, []),
        ({"width": 1, "outer": {"read": 1, "idle": 0}}, []),
        ({"width": 1, "outer": {"read": 1, "new": 1}}, ["unknown field in config: outer.new"]),
        ({"width": 1, "outer": {"read": 1}, "new": {"a": 1, "b": 2}}, ["unknown field in config: new.a", "unknown field in config: new.b"]),
    ],
)
def test_unknown_fields_fail(tmp_path: Path, config: Mapping[str, Any], problems: list[str]) -> None:
    def answer(case: Case) -> Mapping[str, Any]:
        assert case.config["width"] == case.config["outer"]["read"]
        return {"answer": 2, "out": torch.ones(2)}

    assert run(_case(tmp_path, config), Row(answer, frozenset({"idle"}))) == problems


def test_all_outputs_must_be_computed(tmp_path: Path) -> None:
    assert run(_case(tmp_path, {}), Row(lambda case: {"out": torch.ones(2)})) == ["answer: was not computed"]
    assert run(_case(tmp_path, {}), Row(lambda case: {"answer": 2, "out": torch.ones(2), "more": 1})) == []


def test_one_thread_and_back(tmp_path: Path) -> None:
    seen: list[int] = []

    def answer(case: Case) -> Mapping[str, Any]:
        seen.append(torch.get_num_threads())
        raise ZeroDivisionError

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ZeroDivisionError):
            run(_case(tmp_path, {}), Row(answer))
        assert (seen, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "expected, got, agree",
    [
        (torch.ones(2), torch.tensor([1.0, 1.09]), True),
        (torch.ones(2), torch.tensor([1.0, 1.2]), False),
        (torch.ones(2), torch.ones(1, 2), False),
        (torch.ones(2), torch.ones(2).double(), False),
        (torch.ones(2), torch.tensor([1.0, float("nan")]), False),
        (torch.tensor([1.0, float("-inf")]), torch.tensor([1.0, float("-inf")]), True),
        (torch.tensor([1.0, float("-inf")]), torch.tensor([1.0, float("inf")]), False),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, float("inf")]), False),
        (torch.tensor([100]), torch.tensor([101]), False),
        (torch.tensor([True]), torch.tensor([True]), True),
        (torch.tensor([True]), torch.tensor([1], dtype=torch.uint8), False),
        (torch.ones(1, dtype=torch.bfloat16), torch.ones(1, dtype=torch.bfloat16), True),
        ({"a": [1, 2.0, "x", None]}, {"a": (1, 2.1, "x", None)}, True),
        ({"a": [1, 2.0]}, {"a": [1, 2.3]}, False),
        ({"a": [1]}, {"a": [True]}, False),
        ({"a": [1]}, {"a": [1.0]}, False),
        ({"a": [100]}, {"a": [101]}, False),
        ({"a": "x"}, {"a": "y"}, False),
        ({"a": 1}, {"a": 1, "b": 1}, False),
        ({"1": [1, 2]}, {1: torch.tensor([1, 2])}, True),
        ([1, 2], [1], False),
    ],
)
def test_comparison(expected: Any, got: Any, agree: bool) -> None:
    assert (differences({"out": expected}, {"out": got}, PAIR) == []) is agree


def test_tolerance_by_name() -> None:
    def aliases(name: str) -> list[str]:
        return ["pixel_values"] if name.endswith(".pad") else []

    assert tolerance_of("x", "exact") == (0, 0)
    assert tolerance_of("x", {"atol": 1, "rtol": 2}) == (1, 2)
    table = {"grad": {"atol": 1, "rtol": 1}, "grad.x": {"atol": 2, "rtol": 2}, "pixel_values": {"atol": 3, "rtol": 3}, "ids": "exact", "default": {"atol": 4, "rtol": 4}}
    wanted = {"grad.x": 2, "grad.layers.0.weight": 1, "a.pad": 3, "ids": 0, "other": 4}
    assert {name: tolerance_of(name, table, aliases)[0] for name in wanted} == wanted
    assert tolerance_of("other", {"atol": 5, "rtol": 5, "grad": "exact"}) == (5, 5)
    with pytest.raises(AssertionError, match="no tolerance for other"):
        tolerance_of("other", {"grad": "exact"})


def test_folders_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_GOLDEN", str(tmp_path))
    with pytest.raises(AssertionError, match="no cases in"):
        folders()
    (tmp_path / "arcana_other").mkdir()
    copied = sorted(folder.name for folder in (Path(__file__).parent / "cases").iterdir())
    assert [folder.name for folder in folders()] == [*copied, "arcana_other"]
    monkeypatch.setenv("VLM_GOLDEN", str(tmp_path / "missing"))
    with pytest.raises(FileNotFoundError):
        folders()


def test_the_copies_stay_small() -> None:
    assert sum(file.stat().st_size for file in (Path(__file__).parent / "cases").rglob("*") if file.is_file()) <= 3 * 2**20
