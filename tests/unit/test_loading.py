"""First weights from local folders as others write them, bit for bit; and what is refused."""

import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import conversations
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from vlm.config import LLMSpec, ModelSpec
from vlm.connectors.mlp import MLPSpec
from vlm.encoders.base import EncoderSpec
from vlm.encoders.clip import CLIPSpec
from vlm.encoders.siglip import SigLIPSpec
from vlm.errors import CheckpointError, ConfigurationError
from vlm.features import ImageInput, Level
from vlm.loading import first_model, load, text_config

TEXT_TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50, "max_position_embeddings": 8}
TOWERS = {"clip": CLIPSpec, "siglip": SigLIPSpec}


def random_llm(**numbers: Any) -> LLMSpec:
    return LLMSpec(config=tiny.llm_config(**numbers), weights="random")


def with_tower(encoder: EncoderSpec) -> ModelSpec:
    return ModelSpec(encoder=encoder, connector=MLPSpec(), llm=random_llm())


def with_llm(llm: LLMSpec) -> ModelSpec:
    return ModelSpec(encoder=CLIPSpec(config=tiny.tower_config(), weights="random"), connector=MLPSpec(), llm=llm)


def their_tower(kind: str, both: bool) -> tuple[Any, Any]:
    """transformers' own model with random weights (alone, or beside a text tower), and its vision tower."""
    torch.manual_seed(5)
    numbers = tiny.tower_config(kind)
    if kind == "clip":
        whole: Any = CLIPModel(CLIPConfig(text_config=TEXT_TOWER, vision_config=numbers, projection_dim=16)) if both else CLIPVisionModel(CLIPVisionConfig(**numbers))
    else:
        whole = SiglipModel(SiglipConfig(text_config=TEXT_TOWER, vision_config=numbers)) if both else SiglipVisionModel(SiglipVisionConfig(**numbers))
    return whole.eval(), whole.vision_model if both else whole


def equal(module: torch.nn.Module, expected: dict[str, Tensor]) -> bool:
    got = module.state_dict()
    return got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in got)


# ---- towers ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("kind", TOWERS)
def test_a_tower_of_transformers(tmp_path: Path, kind: str, both: bool) -> None:
    whole, tower = their_tower(kind, both)
    whole.save_pretrained(tmp_path)
    spec = TOWERS[kind](path=str(tmp_path))
    assert (spec.size, spec.patch, spec.width, spec.depth) == (28, 14, 16, 3)
    assert spec.numbers()["intermediate_size"] == 24
    encoder: Any = first_model(with_tower(spec), 399).encoder
    assert equal(encoder.tower, tower.state_dict())


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("kind", TOWERS)
def test_a_released_file(tmp_path: Path, kind: str, form: str) -> None:
    """The names of released files: `vision_model.` in front, a text tower beside, buffers that no module keeps any more."""
    _, tower = their_tower(kind, False)
    tensors = {f"vision_model.{name}": tensor.clone() for name, tensor in tower.state_dict().items()}
    tensors |= {
        "vision_model.embeddings.position_ids": torch.arange(5)[None],
        "text_model.embeddings.position_ids": torch.arange(8)[None],
        "text_model.final_layer_norm.weight": torch.ones(16),
    }
    tensors |= {"logit_scale": torch.tensor(2.0)} | ({"visual_projection.weight": torch.zeros(16, 16)} if kind == "clip" else {"logit_bias": torch.tensor(1.0)})
    write(tensors, tmp_path / form)
    encoder: Any = first_model(with_tower(TOWERS[kind](path=str(tmp_path), config=tiny.tower_config(kind))), 399).encoder
    assert equal(encoder.tower, tower.state_dict())


@pytest.mark.parametrize("both", [True, False])
def test_a_siglip_without_a_pooling_head_leaves_that_of_the_file_behind(tmp_path: Path, both: bool) -> None:
    whole, tower = their_tower("siglip", both)
    whole.save_pretrained(tmp_path)
    bare = SigLIPSpec(path=str(tmp_path), config=tiny.tower_config("siglip", vision_use_head=False))
    encoder: Any = first_model(with_tower(bare), 399).encoder
    expected = {name: tensor for name, tensor in tower.state_dict().items() if not name.startswith("head.")}
    assert len(expected) < len(tower.state_dict()) and equal(encoder.tower, expected)
    assert encoder.unused({"image": ["final"]}) == []


def write(tensors: dict[str, Tensor], file: Path) -> None:
    if file.suffix == ".bin":
        torch.save(tensors, file)
    else:
        save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", TOWERS)
def test_levels_are_transformers_own_hidden_states(tmp_path: Path, kind: str) -> None:
    whole, tower = their_tower(kind, True)
    whole.save_pretrained(tmp_path)
    spec = TOWERS[kind](path=str(tmp_path))
    encoder = first_model(with_tower(spec), 399).encoder.eval()
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    for block in tower.encoder.layers:
        block.register_forward_pre_hook(lambda _, args, kwargs: inputs.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True)
        block.register_forward_hook(lambda _, args, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    images = [ImageInput(spec.preprocess(tiny.picture(seed=number, size=(40, 33)), "infer"), 40, 33, spec.layout(40, 33, "infer")["image"]) for number in range(3)]
    with torch.no_grad():
        theirs = tower(pixel_values=torch.stack([image.views["pixels"] for image in images]))
        final = tower.post_layernorm(outputs[-1])
        every: list[Level] = [0, 1, 2, 3, -1, -2, -4, "final"]
        found = encoder(images, {"image": every}).stream()
    expected: dict[Level, Tensor] = {0: inputs[0], 1: inputs[1], 2: inputs[2], 3: outputs[2], -1: outputs[2], -2: inputs[2], -4: inputs[0], "final": final}
    for level in every:
        assert torch.equal(found.levels[level], expected[level].flatten(0, 1)), level
    assert not torch.allclose(expected[3], final)
    assert torch.equal(final if kind == "siglip" else final[:, 0], theirs.last_hidden_state if kind == "siglip" else theirs.pooler_output)
    assert found.prefix == (kind == "clip") and found.lengths == (4 + found.prefix,) * 3 and found.grids == ((2, 2),) * 3


# ---- decoders --------------------------------------------------------------------------------------------------------------


def their_llm(family: str, **numbers: Any) -> Any:
    torch.manual_seed(6)
    config = tiny.llm_config(family, **numbers)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))


@pytest.mark.parametrize("form", ["whole", "sharded", "bin", "bin sharded"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_decoder_of_transformers(tmp_path: Path, family: str, form: str) -> None:
    theirs = their_llm(family)
    theirs.save_pretrained(tmp_path, max_shard_size="60KB" if "sharded" in form else "1GB")
    if "sharded" in form:
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    if "bin" in form:
        as_bin(tmp_path)
    model = first_model(with_llm(LLMSpec(path=str(tmp_path))), 399)
    assert model.llm.config.model_type == theirs.config.model_type
    assert equal(model.llm, theirs.state_dict())
    assert (model.llm.get_output_embeddings().weight is model.llm.get_input_embeddings().weight) == (family in tiny.TIED)
    ids = torch.randint(0, 300, (1, 9))
    with torch.no_grad():
        assert torch.allclose(model.eval()(input_ids=ids).logits, theirs.eval()(input_ids=ids).logits, rtol=0, atol=1e-6)


def as_bin(folder: Path) -> None:
    """The same checkpoint in the older form."""
    for file in folder.glob("*.safetensors"):
        torch.save(load_file(file), folder / file.name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin"))
        file.unlink()
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        content = json.loads(index.read_text())
        content["weight_map"] = {name: file.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin") for name, file in content["weight_map"].items()}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(content))
        index.unlink()


@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_grows_for_the_placeholder_and_never_shrinks(tmp_path: Path, tied: bool) -> None:
    theirs = their_llm("qwen2", vocab_size=300, tie_word_embeddings=tied)
    theirs.save_pretrained(tmp_path)
    model = first_model(with_llm(LLMSpec(path=str(tmp_path))), 302)
    for ours, old in ((model.llm.get_input_embeddings(), theirs.get_input_embeddings()), (model.llm.get_output_embeddings(), theirs.get_output_embeddings())):
        assert ours.weight.shape == (303, 32) and torch.equal(ours.weight[:300], old.weight)
        assert torch.allclose(ours.weight[300:], old.weight.mean(0).expand(3, -1), atol=1e-6)
    padded = first_model(with_llm(LLMSpec(path=str(tmp_path))), 5)
    assert equal(padded.llm, theirs.state_dict()) and padded.config.text_config.vocab_size == 300


def test_numbers_in_the_yaml_win_over_the_file(tmp_path: Path) -> None:
    their_llm("llama").save_pretrained(tmp_path)
    spec = with_llm(LLMSpec(path=str(tmp_path), config=tiny.llm_config(rope_theta=5e5)))
    assert text_config(spec).rope_parameters["rope_theta"] == 5e5
    assert first_model(spec, 399).llm.config.rope_parameters["rope_theta"] == 5e5


# ---- what is refused -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    their_llm("llama").save_pretrained(tmp_path, max_shard_size="60KB")
    return tmp_path


def load_llm(folder: Path, **more: Any) -> None:
    first_model(with_llm(LLMSpec(path=str(folder), **more)), 399)


def test_a_missing_shard_is_named(folder: Path) -> None:
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"{shard.name} named by model\.safetensors\.index\.json.*fetch"):
        load_llm(folder)


def test_a_cut_file_is_named(folder: Path) -> None:
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    os.truncate(shard, shard.stat().st_size - 10)
    with pytest.raises(CheckpointError, match=rf"{shard.name} is damaged"):
        load_llm(folder)


def test_a_shard_without_what_the_index_promises_is_named(folder: Path) -> None:
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    tensors = load_file(shard)
    gone = sorted(tensors)[0]
    del tensors[gone]
    write(tensors, shard)
    with pytest.raises(CheckpointError, match=rf"{shard.name}.*lacks tensors.*{gone}"):
        load_llm(folder)


@pytest.mark.parametrize("fault", ["missing", "unexpected", "mis-shaped"])
def test_keys_that_do_not_fit_are_named(tmp_path: Path, fault: str) -> None:
    theirs = their_llm("llama")
    theirs.config.save_pretrained(tmp_path)
    tensors = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    name = "model.layers.1.mlp.down_proj.weight"
    if fault == "missing":
        del tensors[name]
    elif fault == "unexpected":
        tensors[name := "model.layers.7.mlp.down_proj.weight"] = torch.zeros(2, 2)
    else:
        tensors[name] = tensors[name][:, :-1].contiguous()
    write(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"1 {fault} \({name}" + (r" \(32, 47\) for \(32, 48\)" if fault == "mis-shaped" else "")):
        load_llm(tmp_path)


def test_a_decoder_does_not_fit_other_numbers(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"mis-shaped.*\(400, 32\) for \(400, 64\)"):
        load_llm(folder, config=tiny.llm_config(hidden_size=64))


def test_a_larger_file_does_not_lose_rows_of_its_vocabulary(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"mis-shaped.*\(400, 32\) for \(350, 32\)"):
        first_model(with_llm(LLMSpec(path=str(folder), config=tiny.llm_config(vocab_size=350))), 10)


def test_a_wrong_path(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no weights at .*nowhere.*neither a folder nor a cached hub snapshot"):
        load_llm(tmp_path / "nowhere", config=tiny.llm_config())
    with pytest.raises(CheckpointError, match=r"no weights at .*nowhere"):
        CLIPSpec(path=str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match=r"holds no weights.*model\.safetensors"):
        load_llm(tmp_path, config=tiny.llm_config())
    with pytest.raises(CheckpointError, match=r"holds no config\.json.*llm\.config"):
        load_llm(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds no config\.json.*encoder\.config"):
        CLIPSpec(path=str(tmp_path))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a stage leaves, its weights in shards."""
    folder = tmp_path_factory.mktemp("whole")
    processor = conversations.processor()
    first_model(processor.model, processor.image_token_id).save_pretrained(folder, max_shard_size="60KB")
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("damage", ["cut", "no object", "empty", "gone"])
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "vlm_processor.json", "tokenizer.json", "tokenizer_config.json", "model-00002", "model.safetensors.index.json"]
)
def test_a_damaged_folder_of_ours_is_no_traceback(whole: Path, tmp_path: Path, name: str, damage: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    (file,) = folder.glob(f"{name}*") if name == "model-00002" else [folder / name]
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        os.truncate(file, file.stat().st_size // 2)
    else:
        file.write_text("[]" if damage == "no object" else "")
    if damage == "gone" and name in ("generation_config.json", "tokenizer_config.json"):
        load(folder)  # nothing needs them
        return
    with pytest.raises(CheckpointError, match=f"{file.name}|holds no|no tokenizer in" if damage == "gone" else file.name):
        load(folder)


def test_keys_that_our_files_must_have(whole: Path, tmp_path: Path) -> None:
    for name in ("config.json", "vlm_processor.json"):
        shutil.copytree(whole, folder := tmp_path / name)
        (folder / name).write_text("{}")
        with pytest.raises(CheckpointError, match=rf"{name} (describes no model of vlm|is damaged: KeyError\('prompt'\))"):
            load(folder)


def test_weights_from_a_path_need_one() -> None:
    with pytest.raises(ConfigurationError, match=r"no path is given.*weights: random"):
        first_model(with_llm(LLMSpec(config=tiny.llm_config())), 399)
    with pytest.raises(ConfigurationError, match=r"no path is given.*weights: random"):
        first_model(with_tower(CLIPSpec(config=tiny.tower_config())), 399)
    with pytest.raises(ConfigurationError, match="neither a path nor a config"):
        first_model(with_llm(LLMSpec()), 399)


class Code:
    """What must not run: it leaves a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.mark,)


def test_a_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    theirs = their_llm("llama")
    theirs.config.save_pretrained(tmp_path)
    torch.save(theirs.state_dict() | {"code": Code(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises((CheckpointError, pickle.UnpicklingError)):
        load_llm(tmp_path)
    assert not (tmp_path / "ran").exists()


# ---- first values ----------------------------------------------------------------------------------------------------------


def test_random_weights_depend_on_the_seed_alone() -> None:
    spec = with_tower(SigLIPSpec(config=tiny.tower_config("siglip"), weights="random"))

    def drawn(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return first_model(spec, 399).state_dict()

    one, again, other = drawn(1), drawn(1), drawn(2)
    assert all(torch.isfinite(tensor).all() for tensor in one.values())
    assert all(torch.equal(one[name], again[name]) for name in one)
    varied = {name for name in one if not torch.equal(one[name], other[name])}
    assert all(len(one[name].unique()) == 1 for name in one.keys() - varied)  # zeros and ones
    assert {"encoder", "connector", "llm"} == {name.split(".")[0] for name in varied}


def test_loading_one_part_leaves_the_drawing_of_the_others_alone(tmp_path: Path) -> None:
    their_llm("llama").save_pretrained(tmp_path)
    spec = with_llm(LLMSpec(path=str(tmp_path)))
    drawn = replace(spec, llm=random_llm())
    models = []
    for one in (spec, drawn):
        torch.manual_seed(3)
        models.append(first_model(one, 399))
    assert equal(models[0].encoder, models[1].encoder.state_dict()) and equal(models[0].connector, models[1].connector.state_dict())
    assert not equal(models[0].llm, models[1].llm.state_dict())
