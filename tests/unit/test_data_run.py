"""One content in every format: the readers give the same samples, and a run over several formats is the same run."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from interrupted import kept, records, stopped_at
from safetensors.torch import load_file

import vlm
from vlm.data.convert import convert_data
from vlm.data.sample import Picture, Sample
from vlm.data.sources import sources_at
from vlm.data.tar import TarSource


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.mixed_root(tmp_path_factory.mktemp("data"))


def content(sample: Sample) -> Any:
    """What a model sees of a sample, with the pictures' bytes in the place of the pictures."""
    turns = [(turn.role, turn.supervised, turn.kind, tuple(part.read() if isinstance(part, Picture) else part for part in turn.parts)) for turn in sample.turns]
    return sample.id, sample.independent, turns


def test_every_reader_gives_the_same_samples(root: Path, tmp_path: Path) -> None:
    expected = [content(sample) for sample in sources_at(root / "instruct.json", images=root)["instruct"].open()]
    assert len(expected) == 12 and any(isinstance(part, bytes) for *_, turns in expected for *_, parts in turns for part in parts)
    for form in ("llava", "messages", "sharegpt", "parquet", "tar"):
        convert_data(str(root / "instruct.json"), tmp_path / form, to=form, images=root, per_shard=5)
        (source,) = [spec for split, spec in sources_at(tmp_path / form).items() if split == "instruct"]
        assert [content(sample) for sample in source.open()] == expected, form
    streamed = TarSource(file=str(tmp_path / "tar" / "instruct-*.tar"), stream=True).open()
    assert [content(sample) for sample in streamed] == expected and streamed.blocks == (5, 5, 2)


def run(root: Path, folder: Path, name: str, *more: str, resume: bool = False) -> Path:
    return vlm.fit(vlm.compose("llava_tiny", f"data_root={root}", f"runs={folder}", f"name={name}", "save.every=1", *tiny.MIXED, *more), resume=resume)


def outcome(folder: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    return [kept(record) for record in records(folder)], load_file(folder / "export" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(root, tmp_path_factory.mktemp("runs"), "whole")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("more", [(), ("every_stage.pack=120", "every_stage.max_length=120"), ("data.captions.stream=true",)], ids=["plain", "packed", "streamed"])
def test_a_mixed_run_goes_on_bit_for_bit(root: Path, tmp_path: Path, whole: Path, workers: int, more: tuple[str, ...]) -> None:
    """Two ranks: tests/unit/test_ranks.py."""
    expected = whole if not more else run(root, tmp_path, "whole", *more)
    with stopped_at(6):
        run(root, tmp_path, "cut", f"workers={workers}", *more)
    left, right = outcome(expected), outcome(run(root, tmp_path, "cut", f"workers={workers}", *more, resume=True))
    assert left[0] == right[0]
    assert all(torch.equal(left[1][name], tensor) for name, tensor in right[1].items())
    sources = [record["sources"] for record in left[0] if record["stage"] == "instruct"]
    assert sum(found.get("questions", {}).get("samples", 0) for found in sources) == 11 and sum(found.get("captions", {}).get("samples", 0) for found in sources) == 5
