"""Folders of weights: index and shards that disagree, files that are no weights, cached snapshots, files of a connector alone."""

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlm.config import LLMSpec, ModelSpec
from vlm.configuration import VLMConfig
from vlm.connectors.base import ConnectorSpec
from vlm.connectors.linear import LinearSpec
from vlm.connectors.mlp import MLPSpec
from vlm.encoders.clip import CLIPSpec
from vlm.errors import CheckpointError
from vlm.loading import first_model
from vlm.model import VLM
from vlm.weights.files import find_folder, read_shapes, read_tensors

FIRST, SECOND, INDEX = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(2)
    return {f"layers.{index}.weight": torch.randn(4, 3) for index in range(6)} | {"scale": torch.tensor(2.0, dtype=torch.bfloat16)}


def save(found: dict[str, Tensor], file: Path) -> None:
    if file.suffix == ".safetensors":
        save_file(found, file, metadata={"format": "pt"})
    else:
        torch.save(found, file)


@pytest.fixture(params=["safetensors", "bin"])
def sharded(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Two shards and their index, in both forms."""
    return write_sharded(tmp_path / "sharded", request.param)


def write_sharded(folder: Path, form: str = "safetensors") -> Path:
    folder.mkdir()
    found, (first, second, index) = tensors(), names(form)
    keys = sorted(found)
    weight_map = {key: first if key < "layers.3" else second for key in keys}
    for file in (first, second):
        save({key: found[key] for key in keys if weight_map[key] == file}, folder / file)
    (folder / index).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def names(form: str) -> tuple[str, str, str]:
    stem = "model" if form == "safetensors" else "pytorch_model"
    return f"{stem}-00001-of-00002.{form}", f"{stem}-00002-of-00002.{form}", f"{stem}.{form}.index.json"


def names_in(folder: Path) -> tuple[str, str, str]:
    return names("bin" if list(folder.glob("*.bin")) else "safetensors")


def change_index(folder: Path, work: Callable[[dict[str, str]], None]) -> None:
    file = folder / names_in(folder)[2]
    content = json.loads(file.read_text())
    work(content["weight_map"])
    file.write_text(json.dumps(content))


def same(folder: Path) -> bool:
    got, expected = dict(read_tensors(folder)), tensors()
    return got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) and got[name].dtype == expected[name].dtype for name in got)


# ---- index and shards ----------------------------------------------------------------------------------------------------


def test_a_whole_checkpoint_says_nothing(sharded: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(sharded)
        shapes = read_shapes(sharded)
    assert {name: (tuple(one.shape), one.dtype, one.device.type) for name, one in shapes.items()} == {
        name: (tuple(one.shape), one.dtype, "meta") for name, one in tensors().items()
    }


def test_a_stale_shard_is_named_and_not_read(sharded: Path) -> None:
    first = names_in(sharded)[0]
    stray = first.replace("00001-of-00002", "00003-of-00003")
    save({"scale": torch.tensor(9.0)}, sharded / stray)
    with pytest.warns(UserWarning, match=f"{stray}.*does not name"):
        assert same(sharded)


def test_a_key_that_the_index_forgot_is_read_all_the_same(sharded: Path) -> None:
    change_index(sharded, lambda weight_map: weight_map.pop("layers.4.weight"))
    with pytest.warns(UserWarning, match=r"does not name layers\.4\.weight"):
        assert same(sharded)


def test_a_key_in_another_shard_than_the_index_says_is_named(sharded: Path) -> None:
    first = names_in(sharded)[0]
    change_index(sharded, lambda weight_map: weight_map.update({"layers.4.weight": first}))
    with pytest.raises(CheckpointError, match=rf"{first}.*lacks tensors.*layers\.4\.weight"):
        list(read_tensors(sharded))


def test_a_missing_shard_is_named(sharded: Path) -> None:
    second = names_in(sharded)[1]
    (sharded / second).unlink()
    with pytest.raises(CheckpointError, match=f"shard {second} named by"):
        list(read_tensors(sharded))


@pytest.mark.parametrize("left", [5, -10])
def test_a_cut_shard_is_named(left: int, sharded: Path) -> None:
    second = sharded / names_in(sharded)[1]
    os.truncate(second, left if left > 0 else second.stat().st_size + left)
    with pytest.raises(CheckpointError, match=f"{second.name} is damaged, truncated or incomplete"):
        list(read_tensors(sharded))


def test_shards_without_an_index_are_not_put_together(sharded: Path) -> None:
    first, _, index = names_in(sharded)
    (sharded / index).unlink()
    with pytest.raises(CheckpointError, match=f"shards without {index}.*{first}"):
        list(read_tensors(sharded))


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_named(text: str, sharded: Path) -> None:
    file = sharded / names_in(sharded)[2]
    file.write_text(text)
    with pytest.raises(CheckpointError, match=f"{file.name} (is damaged|has no weight_map)"):
        list(read_tensors(sharded))


def test_an_index_that_leaves_its_folder_is_refused(sharded: Path) -> None:
    change_index(sharded, lambda weight_map: weight_map.update({"scale": "../other.safetensors"}))
    with pytest.raises(CheckpointError, match=r"outside of its folder.*\.\./other"):
        list(read_tensors(sharded))


def test_a_single_file_wins_over_an_old_index(tmp_path: Path) -> None:
    save(tensors(), tmp_path / "model.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"scale": FIRST}}))
    with pytest.warns(UserWarning, match="both model.safetensors, which is read, and"):
        assert same(tmp_path)


def test_adapters_and_other_files_are_no_weights(tmp_path: Path) -> None:
    for name in ("adapter_model.safetensors", "consolidated.safetensors", "training_args.bin"):
        save({"x": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"holds no weights.*adapter_model\.safetensors, consolidated\.safetensors, training_args\.bin"):
        list(read_tensors(tmp_path))
    save(tensors(), tmp_path / "model.safetensors")
    assert same(tmp_path)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save({"model": tensors()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="something else than tensors by name"):
        list(read_tensors(tmp_path))


def test_an_old_torch_file_without_a_zip_is_read(tmp_path: Path) -> None:
    torch.save(tensors(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert same(tmp_path)


FIELD = ("complete", "stale_shard_beside", "index_without_one_key", "key_in_wrong_shard", "missing_shard", "cut_shard", "no_index", "single_file_and_old_index")


@pytest.mark.parametrize("name", FIELD)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_field_sharded_index(name: str, field_folder: Path) -> None:
    case = field_folder / "ckpt_sharded_index"
    expected = json.loads((case / "expected.json").read_text())
    refused = {"no_index": [INDEX], "key_in_wrong_shard": expected["key_in_wrong_shard"]["all_12_or_error_names"]}
    refused |= {one: expected[one]["error_names"] for one in ("missing_shard", "cut_shard")}
    if name in refused:
        with pytest.raises(CheckpointError) as problem:
            list(read_tensors(case / name))
        assert all(word in str(problem.value) for word in refused[name])
        return
    got, whole = dict(read_tensors(case / name)), dict(read_tensors(case / "complete"))
    assert len(got) == expected["tensors"] and all(torch.equal(got[key], whole[key]) for key in whole)


# ---- cached snapshots ----------------------------------------------------------------------------------------------------


def test_a_cached_snapshot_is_found_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "models--some--tower"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    save(tensors(), snapshot / "model.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert find_folder("some/tower") == snapshot and same(find_folder("some/tower"))
    with pytest.raises(CheckpointError, match="no weights at 'some/other'"):
        find_folder("some/other")


# ---- a connector's own file ------------------------------------------------------------------------------------------------


def model(connector: ConnectorSpec) -> VLM:
    return first_model(ModelSpec(encoder=CLIPSpec(config=tiny.tower_config(), weights="random"), connector=connector, llm=LLMSpec(config=tiny.llm_config(), weights="random")), 399)


def projector(prefix: str, first: str = "0.", second: str | None = "2.") -> dict[str, Tensor]:
    found = {f"{prefix}{first}weight": torch.randn(32, 16), f"{prefix}{first}bias": torch.randn(32)}
    return found | ({f"{prefix}{second}weight": torch.randn(32, 32), f"{prefix}{second}bias": torch.randn(32)} if second else {})


SPELLINGS = [
    ("model.mm_projector.", "0.", "2."), ("mm_projector.", "0.", "2."), ("", "0.", "2."), ("base_model.model.model.mm_projector.", "0.", "2."),
    ("multi_modal_projector.", "linear_1.", "linear_2."), ("model.multi_modal_projector.", "linear_1.", "linear_2."), ("connector.mlp.", "layers.0.", "layers.2."),
]  # fmt: skip


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_projector_file_is_the_connectors_first_weights(spelling: tuple[str, str, str], form: str, tmp_path: Path) -> None:
    found = projector(*spelling)
    save(found, tmp_path / f"mm_projector.{form}")
    made = model(MLPSpec(path=str(tmp_path / f"mm_projector.{form}")))
    got = made.connector["mlp"].state_dict()
    assert all(torch.equal(got[ours], theirs) for ours, theirs in zip(("layers.0.weight", "layers.0.bias", "layers.2.weight", "layers.2.bias"), found.values(), strict=True))
    assert made.config.connector["path"] is None


@pytest.mark.parametrize("prefix", ["model.mm_projector.", "mm_projector.", ""])
def test_a_linear_projector_file(prefix: str, tmp_path: Path) -> None:
    found = projector(prefix, "", None)
    save(found, tmp_path / "mm_projector.bin")
    got = model(LinearSpec(path=str(tmp_path / "mm_projector.bin"))).connector["linear"].state_dict()
    assert torch.equal(got["layers.0.weight"], found[f"{prefix}weight"])


def test_another_projector_is_named_with_the_one_that_is_wanted(tmp_path: Path) -> None:
    file = tmp_path / "mm_projector.bin"
    save(projector("model.mm_projector.", "", None), file)
    with pytest.raises(CheckpointError, match=r"got linear \(model\.mm_projector\.weight, \.\.\.\); expected mlp"):
        model(MLPSpec(path=str(file)))
    save(projector("model.mm_projector."), file)
    with pytest.raises(CheckpointError, match=r"got mlp \(model\.mm_projector\.0\.weight, \.\.\.\); expected linear"):
        model(LinearSpec(path=str(file)))
    with pytest.raises(CheckpointError, match=r"2 missing \(layers\.4\.bias, layers\.4\.weight\)"):
        model(MLPSpec(depth=3, path=str(file)))
    with pytest.raises(CheckpointError, match="there is no file .*nowhere"):
        model(MLPSpec(path=str(tmp_path / "nowhere.bin")))


def test_where_a_chain_came_from_stays_behind(tmp_path: Path) -> None:
    save(projector(""), tmp_path / "second.bin")
    chain = LinearSpec(hidden=16, then=MLPSpec(path=str(tmp_path / "second.bin")))
    made = model(chain)
    assert torch.equal(made.connector["mlp_1"].state_dict()["layers.2.bias"], load_bias(tmp_path / "second.bin"))
    config = VLMConfig.of(made.spec, made.config.text_config, 399)
    assert config.connector["then"]["path"] is None


def load_bias(file: Path) -> Tensor:
    return torch.load(file, weights_only=True)["2.bias"]


def test_field_projector_files(field_folder: Path) -> None:
    case = field_folder / "ckpt_llava_key_layouts"
    expected = json.loads((case / "expected.json").read_text())
    spec = ModelSpec(
        encoder=CLIPSpec(config=tiny.tower_config(), weights="random"),
        connector=MLPSpec(),
        llm=LLMSpec(config=tiny.llm_config(hidden_size=16, num_attention_heads=2), weights="random"),
    )
    for name in ("projector_only_mlp.safetensors", "projector_only_bare.safetensors"):
        got = first_model(ModelSpec(encoder=spec.encoder, connector=MLPSpec(path=str(case / name)), llm=spec.llm), 399).connector["mlp"].state_dict()
        written = load_file(case / name)
        assert len(got) == expected[name] and {tuple(one.flatten().tolist()) for one in got.values()} == {tuple(one.flatten().tolist()) for one in written.values()}
    with pytest.raises(CheckpointError, match=r"got linear .*expected mlp"):
        first_model(ModelSpec(encoder=spec.encoder, connector=MLPSpec(path=str(case / "projector_only_linear.safetensors")), llm=spec.llm), 399)
