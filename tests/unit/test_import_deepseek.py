"""Imports of DeepSeek-VL folders, made small: the official program's keys and transformers' own, strictly, with their outputs."""

import json
import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import vlm
from tests.golden import dsvl_model
from tests.golden.case import Case
from vlm.cli import app
from vlm.config import LLMSpec, ModelSpec
from vlm.configuration import VLMConfig
from vlm.connectors.hybrid_mlp import HybridMLPSpec
from vlm.connectors.mlp import MLPSpec
from vlm.data.sample import Sample, Turn, held
from vlm.encoders.hybrid import HybridSpec, SAMSpec
from vlm.encoders.siglip import SigLIPSpec
from vlm.errors import CheckpointError, ConfigurationError
from vlm.letterbox import fit_square
from vlm.llm.decoder import decoder_config
from vlm.loading import build
from vlm.model import VLM
from vlm.processor import VLMProcessor
from vlm.prompt import PromptSpec
from vlm.tiles import Tiling
from vlm.weights import deepseek_official, deepseek_read
from vlm.weights.deepseek import HYBRID, picture_rule
from vlm.weights.deepseek_keys import model_to_official
from vlm.weights.export import export_run
from vlm.weights.imports import import_model, read_model

BEGIN, END, IMAGE = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<image_placeholder>"
SAM = {"width": 16, "layers": 3, "heads": 2, "patch_size": 8, "prompt_embed_dim": 4, "global_attn_indexes": [0, 2], "downsample_channels": [8, 16]}
SIGLIP = {"width": 16, "layers": 3, "heads": 2, "patch_size": 8, "mlp_ratio": 4}
CLIP = {"pixel_mean": [0.48145466, 0.4578275, 0.40821073], "pixel_std": [0.26862954, 0.26130258, 0.27577711]}
HALF = {"pixel_mean": [0.5, 0.5, 0.5], "pixel_std": [0.5, 0.5, 0.5]}
TEXT = {name: value for name, value in tiny.llm_config().items() if not name.endswith("token_id")}


def words() -> PreTrainedTokenizerFast:
    """A tokenizer with DeepSeek-VL's marks, which puts its begin token in front by itself."""
    raw: Any = tiny.tokenizer()._tokenizer
    raw.add_special_tokens([BEGIN, END, IMAGE])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=BEGIN, eos_token=END, pad_token=END, image_token=IMAGE, clean_up_tokenization_spaces=False)


def official_config(hybrid: bool = True, depth: int = 3) -> dict[str, Any]:
    """config.json as the official program writes it; its towers stand in the configuration, because no released one is small."""
    low: dict[str, Any] = {"model_name": "siglip_tiny", "image_size": 32, "select_feature": "same", "select_layer": -2, **HALF}
    high = {"model_name": "sam_tiny", "image_size": 64, "select_feature": "same", "select_layer": -1, "ckpt_path": "", "output_dim": 16, **CLIP}
    vision = {"cls": "HybridVisionTower", "params": {"high_res_cfg": high, "low_res_cfg": low, "concat_type": "tuple", "freeze_high": True, "freeze_low": True}}
    aligner = {"projector_type": "low_high_hybrid_split_mlp_gelu", "depth": depth, "input_dim": 16, "n_embed": 32}
    if not hybrid:
        vision, aligner = {"cls": "CLIPVisionTower", "params": low}, aligner | {"projector_type": "mlp_gelu"}
    return {
        "model_type": "multi_modality",
        "vision_config": vision | {"model_type": "vision"},
        "aligner_config": {"cls": "MlpProjector", "model_type": "aligner", "params": aligner},
        "language_config": TEXT,
        "SAM_MODEL_CONFIG": {"sam_tiny": SAM},
        "SigLIP_MODEL_CONFIG": {"siglip_tiny": SIGLIP},
        "interpolate_size": [16, 16],
    }


def official_folder(folder: Path, hybrid: bool = True, config: dict[str, Any] | None = None, depth: int = 3, more: Mapping[str, Tensor] | None = None) -> VLM:
    """A folder in official keys, with what the program stores and never reads; -> the model that it is of."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config or official_config(hybrid, depth)))
    mean = CLIP["pixel_mean"] if hybrid else HALF["pixel_mean"]
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_size": 64 if hybrid else 32, "min_size": 12 if hybrid else 14, "image_mean": mean, "do_normalize": False, "rescale_factor": 1 / 255})
    )
    words().save_pretrained(folder)
    made = filled(model_of(hybrid, depth))
    tower = "vision_model.vision_tower_low.vision_tower" if hybrid else "vision_model.vision_tower"
    idle = {f"{tower}.attn_pool.latent": torch.zeros(1, 1, 16)} | ({"vision_model.high_layer_norm.weight": torch.ones(16)} if hybrid else {})
    tensors = {**model_to_official(made.state_dict()), **idle, **(more or {})}
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return made


def model_of(hybrid: bool, depth: int) -> VLM:
    """The same model from parts of ours. select_layer -2 keeps two of three blocks."""
    numbers = {
        "hidden_size": 16,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "hidden_act": "gelu",
        "vision_use_head": False,
    }
    low = SigLIPSpec(config=numbers | {"layer_norm_eps": 1e-6})
    encoder: Any = replace(low, fit="letterbox", official=True)
    if hybrid:
        sam = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "mlp_dim": 64, "image_size": 64, "patch_size": 8, "output_channels": 4, "window_size": 14}
        encoder = HybridSpec(high=SAMSpec(config=sam | {"global_attn_indexes": [0, 2]}, downsample_channels=(8, 16), interpolate=(16, 16)), low=low, min_size=12)
    connector = HybridMLPSpec(depth=depth) if hybrid else MLPSpec(depth=depth, level="final")
    return build(VLMConfig.of(ModelSpec(encoder=encoder, connector=connector, llm=LLMSpec()), decoder_config(dict(TEXT)), len(words()) - 1))


def filled(model: VLM) -> VLM:
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


def asked() -> Sample:
    picture = held(tiny.picture_bytes(tiny.picture(seed=1, size=(53, 21))))
    return Sample("q", (Turn("user", (picture, "What is it?")),))


def logits(model: VLM, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return cast(Tensor, model(**inputs).logits)


@pytest.mark.parametrize("hybrid", [True, False])
def test_official_keys_come_in_and_go_back(tmp_path: Path, hybrid: bool) -> None:
    source = official_folder(tmp_path / "theirs", hybrid)
    done = CliRunner().invoke(app, ["import", str(tmp_path / "theirs"), "--family", "deepseek_vl", "--out", str(tmp_path / "ours")])
    assert done.exit_code == 0, done.output
    assert f"{1 + hybrid} tensors that are never used were left out" in done.output and "prompt deepseek_vl" in done.output
    model, processor = vlm.load(tmp_path / "ours")
    assert model.spec.encoder == source.spec.encoder and model.spec.connector == source.spec.connector
    assert processor.image_token_id == processor.tokenizer.convert_tokens_to_ids(IMAGE) == source.config.image_token_id
    inputs = processor([asked()])
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 16 and inputs["input_ids"][0, 0] == processor.tokenizer.convert_tokens_to_ids(BEGIN)
    assert torch.equal(logits(model.eval(), inputs), logits(source, inputs))
    done = CliRunner().invoke(app, ["export", str(tmp_path / "ours"), "--to", "deepseek_vl_official"])
    assert done.exit_code == 0, done.output
    assert "max logit difference 0.00e+00 over 4 prompts, greedy tokens equal" in done.output and "rule" not in done.output
    folder = tmp_path / "ours" / "export-deepseek_vl_official"
    back, written = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "theirs"))
    assert back.keys() == {name for name in written if "attn_pool" not in name and "layer_norm" not in name}
    assert all(torch.equal(back[name], written[name]) for name in back)
    again = deepseek_read.read(folder)
    assert (again.encoder.levels, again.encoder.widths, again.connector) == (model.spec.encoder.levels, model.spec.encoder.widths, model.spec.connector)


def test_a_single_tower_sees_pictures_as_the_official_program_does(tmp_path: Path) -> None:
    official_folder(tmp_path / "theirs", hybrid=False)
    spec = deepseek_read.read(tmp_path / "theirs").encoder
    picture = tiny.picture(seed=2, size=(49, 33))
    square = np.asarray(fit_square(picture, 32, (127, 127, 127), "trunc"), dtype=np.float32).transpose(2, 0, 1) / 255
    assert np.abs(spec.preprocess(picture, "infer")["pixels"].numpy() - (square - 0.5) / 0.5).max() < 1e-5


def test_strict_keys_and_settings(tmp_path: Path) -> None:
    def refused(name: str, error: type[Exception], message: str, config: Any = None, more: Mapping[str, Tensor] | None = None) -> None:
        official_folder(tmp_path / name, config=config, more=more)
        with pytest.raises(error, match=message):
            import_model(str(tmp_path / name), tmp_path / "out", "deepseek_vl")

    unknown = {"vision_model.vision_tower_low.vision_tower.blocks.0.ls1": torch.ones(1)}
    refused("unknown", CheckpointError, r"1 unexpected \(vision_model.vision_tower_low.vision_tower.blocks.0.ls1\)", more=unknown)
    config = official_config()
    config["language_config"] = config["language_config"] | {"num_hidden_layers": 3}
    refused("deeper", CheckpointError, r"9 missing \(language_model.model.layers.2.input_layernorm.weight", config)
    config = official_config()
    config["vision_config"]["params"]["high_res_cfg"]["select_feature"] = "patch"
    config["aligner_config"]["params"]["projector_type"] = "mlp_gelu"
    refused("settings", ConfigurationError, "projector_type is 'mlp_gelu'.*select_feature is 'patch', and can be same", config)
    config = official_config()
    config["vision_config"]["params"]["low_res_cfg"]["model_name"] = "eva"
    refused("tower", ConfigurationError, "nothing says what tower 'eva' is", config)
    (tmp_path / "settings" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match="is no DeepSeek-VL.*'llama'"):
        deepseek_read.read(tmp_path / "settings")


def told(folder: Path, *path: str, **fields: Any) -> Path:
    """A folder of config.json alone, with other fields at one place; ... takes one away."""
    config: Any = deepcopy(official_config())
    place = config
    for key in path:
        place = place[key]
    for name, value in fields.items():
        place.pop(name) if value is ... else place.update({name: value})
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


PARAMS = ("vision_config", "params")


@pytest.mark.parametrize(
    "path, fields, message",
    [
        (("SAM_MODEL_CONFIG", "sam_tiny"), {"global_attn_indexes": ...}, r"SAM_MODEL_CONFIG.sam_tiny.global_attn_indexes: is missing"),
        (("SigLIP_MODEL_CONFIG", "siglip_tiny"), {"patch_size": ..., "width": "w"}, r"siglip_tiny.width: .*got 'w' \(str\); expected int; .*siglip_tiny.patch_size: is missing"),
        (("SigLIP_MODEL_CONFIG", "siglip_tiny"), {"heads": 3}, r"siglip_tiny: the heads .* got width 16, 3 heads"),
        (("vision_config",), {"params": ...}, r"vision_config.params: .*got null; expected a mapping"),
        (PARAMS, {"high_res_cfg": ...}, r"vision_config.params.high_res_cfg: .*got null; expected a mapping"),
        (PARAMS, {"concat_type": "mean"}, r"concat_type: .*got 'mean'"),
        ((), {"interpolate_size": [16]}, r"interpolate_size is no size. got \[16\]"),
        ((), {"interpolate_size": [12, 12]}, r"needs both streams on one grid"),
        ((), {"language_config": None}, r"language_config .* got None; expected a mapping"),
        (("language_config",), {"num_attention_heads": 5}, r"language_config .*hidden size \(32\) is not a multiple of the number of attention heads \(5\)"),
        (("language_config",), {"num_key_value_heads": 3}, r"num_key_value_heads 3; expected a divisor of num_attention_heads, 4"),
        (("aligner_config", "params"), {"depth": 0}, r"aligner_config.params.depth is 0, and can be 1 or more"),
        (("aligner_config", "params"), {"input_dim": 17}, r"aligner_config.params.input_dim is 17, and can be the towers' 16"),
        ((*PARAMS, "low_res_cfg"), {"select_layer": -4}, r"low_res_cfg.select_layer is -4, and can be -3 or more"),
        ((*PARAMS, "high_res_cfg"), {"image_size": 0}, r"high_res_cfg.image_size is 0, and can be 8 or more"),
        ((*PARAMS, "low_res_cfg"), {"model_name": "sam_tiny"}, r"nothing says what tower 'sam_tiny' is"),
        ((*PARAMS, "high_res_cfg"), {"select_feature": ...}, r"high_res_cfg.select_feature is 'patch', and can be same"),
    ],
)
def test_what_is_wrong_in_a_configuration_is_named(tmp_path: Path, path: tuple[str, ...], fields: dict[str, Any], message: str) -> None:
    folder = told(tmp_path / "theirs", *path, **fields)
    with pytest.raises((CheckpointError, ConfigurationError), match=f"^{re.escape(str(folder))} cannot be imported.*{message}"):
        deepseek_read.read(folder)


def test_a_siglip_selects_everything_whatever_is_written(tmp_path: Path) -> None:
    for feature in ("patch", ...):
        deepseek_read.program_parts(tmp_path, json.loads((told(tmp_path, *PARAMS, "low_res_cfg", select_feature=feature) / "config.json").read_text()))


def test_keys_are_spelt_as_in_the_file(tmp_path: Path) -> None:
    official_folder(tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    tensors = load_file(file)
    qkv = "vision_model.vision_tower_low.vision_tower.blocks.0.attn.qkv"
    tensors |= {"language_model.model.layers.0.extra": torch.ones(1), "aligner.layers.1.bias": torch.ones(31), f"{qkv}.bias": torch.ones(2)}
    del tensors[f"{qkv}.weight"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError) as caught:
        import_model(str(tmp_path / "theirs"), tmp_path / "out", "deepseek_vl")
    missing = f"3 missing ({', '.join(f'{qkv}.weight[{part}]' for part in 'kqv')})"
    misshaped = f"4 mis-shaped (aligner.layers.1.bias (31,) for (32,), {qkv}.bias[q] (1,) for (16,), {qkv}.bias[k] (1,) for (16,), ...)"
    assert caught.value.got == f"{missing}; 1 unexpected (language_model.model.layers.0.extra); {misshaped}"


@pytest.mark.parametrize(
    "hybrid, changed, refusal",
    [
        (True, {"image_mean": None}, "image_mean is None, and can be the tower's"),
        (True, {"image_mean": ...}, None),
        (True, {"image_mean": [0.5, 0.5, 0.5]}, "image_mean is .*in whose colour pictures are padded"),
        (True, {"image_mean": 1}, "its image processor is wrong: image_mean"),
        (False, {"image_mean": None}, None),
        (False, {"image_mean": ...}, "image_mean is .*0.48145466"),
    ],
)
def test_the_padding_has_the_colour_of_the_processor(tmp_path: Path, hybrid: bool, changed: dict[str, Any], refusal: str | None) -> None:
    """The program's own default is CLIP's mean; null is grey, which is the mean of the single tower here."""
    official_folder(tmp_path / "theirs", hybrid)
    file = tmp_path / "theirs" / "preprocessor_config.json"
    file.write_text(json.dumps({name: value for name, value in (json.loads(file.read_text()) | changed).items() if value is not ...}))
    if refusal is None:
        deepseek_read.read(tmp_path / "theirs")
        return
    with pytest.raises((CheckpointError, ConfigurationError), match=refusal):
        deepseek_read.read(tmp_path / "theirs")


def test_a_processor_that_normalises_brings_the_mean_to_a_tower_that_does_not(tmp_path: Path) -> None:
    config = official_config(hybrid=False)
    config["vision_config"]["params"] |= {"pixel_mean": None}
    official_folder(tmp_path / "theirs", hybrid=False, config=config)
    file = tmp_path / "theirs" / "preprocessor_config.json"
    file.write_text(json.dumps({"image_size": 32}))
    found: Any = deepseek_read.read(tmp_path / "theirs").encoder
    assert (found.mean, found.std) == (tuple(CLIP["pixel_mean"]), tuple(CLIP["pixel_std"])), "the program's own defaults"
    file.write_text(json.dumps({"image_size": 32, "image_mean": None}))
    with pytest.raises(ConfigurationError, match="image_mean or image_std is None"):
        deepseek_read.read(tmp_path / "theirs")


def test_the_other_rule_for_pictures_keeps_how_they_are_cut() -> None:
    spec = model_of(False, 2).spec
    processor = VLMProcessor(spec, 32, words(), PromptSpec(use="deepseek_vl"), "anyres", tiling=Tiling(max_tiles=6))
    changed, _ = picture_rule(processor, official=False)
    assert changed.model.encoder.official is False and changed.picture_policy == processor.picture_policy


@pytest.mark.parametrize("name", ["dsvl_model_hybrid", "dsvl_model_siglip"])
def test_the_reference_models_come_in_whole(golden_folder: Path, tmp_path: Path, name: str) -> None:
    case = Case(golden_folder / name)
    (tmp_path / "config.json").write_text(json.dumps(case.description["config"]))
    save_file(case.weights, tmp_path / "model.safetensors")
    found = deepseek_read.read(tmp_path)
    model, _ = read_model(found, case.description["config"]["image_id"])
    expected, dropped = dsvl_model.loaded(case)
    assert f"{len(dropped)} tensors that are never used" in found.notes[0]
    own = expected.state_dict()
    assert model.state_dict().keys() == own.keys() and all(torch.equal(tensor, own[key]) for key, tensor in model.state_dict().items())
    assert model_to_official(own).keys() == case.weights.keys() - set(dropped)


RELEASED = {
    "vision_config": {
        "cls": "HybridVisionTower",
        "model_type": "vision",
        "params": {
            "concat_type": "tuple",
            "freeze_high": True,
            "freeze_low": True,
            "high_res_cfg": {"model_name": "sam_b_downsample", "image_size": 1024, "select_feature": "same", "select_layer": -1, "output_dim": 1024, **CLIP},
            "low_res_cfg": {"model_name": "siglip_large_patch16_384", "image_size": 384, "select_feature": "same", "select_layer": -1, "output_dim": 1024, **HALF},
        },
    },
    "aligner_config": {
        "cls": "MlpProjector",
        "model_type": "aligner",
        "params": {"projector_type": "low_high_hybrid_split_mlp_gelu", "depth": 2, "input_dim": 1024, "n_embed": 4096},
    },
}
"""Of the 7B (specification, section 2.6)."""


def test_a_released_configuration_comes_back_as_it_was() -> None:
    released: dict[str, Any] = {**RELEASED, "model_type": "multi_modality", "language_config": {"model_type": "llama", "num_hidden_layers": 30, "rope_theta": 20000.0}}

    def there_and_back(config: dict[str, Any]) -> dict[str, Any]:
        encoder, connector, text = deepseek_read.program_parts(Path("config.json"), config)
        spec = ModelSpec(encoder=encoder, connector=connector, llm=LLMSpec())
        assert deepseek_official.obstacles(spec, text) == []
        return deepseek_official._config(spec, text)

    back = there_and_back(released)
    language = back.pop("language_config")
    assert back == {**RELEASED, "model_type": "multi_modality", "architectures": ["MultiModalityCausalLM"]}, "no table beside the names that the program knows"
    assert language.items() >= released["language_config"].items() and "rope_parameters" not in language
    for name, layer, expected in (("siglip_so400m_patch14_384", -3, ("siglip_so400m_patch14_384", -3)), ("siglip_large_patch16_384", 5, ("siglip_large_patch16_384", -20))):
        single = {"cls": "CLIPVisionTower", "params": {**RELEASED["vision_config"]["params"]["low_res_cfg"], "model_name": name, "select_layer": layer}}
        for kind in ("linear", "identity"):
            aligner = {"params": {"projector_type": kind, "n_embed": 4096}}
            back = there_and_back({**released, "vision_config": single, "aligner_config": aligner})
            params = back["vision_config"]["params"]
            assert (params["model_name"], params["select_layer"]) == expected and back["aligner_config"]["params"]["projector_type"] == kind


def test_what_the_official_program_does_not_have_is_named(tmp_path: Path) -> None:
    spec, text = model_of(True, 2).spec, decoder_config(dict(TEXT))
    encoder: Any = spec.encoder
    assert deepseek_official.obstacles(spec, text) == []

    def refused(**fields: Any) -> list[str]:
        return [line.split(",")[0] for line in deepseek_official.obstacles(replace(spec, **fields), text)]

    other = replace(
        encoder,
        low=replace(encoder.low, config={**encoder.low.config, "hidden_act": "gelu_pytorch_tanh"}),
        high=replace(encoder.high, config={**encoder.high.config, "window_size": 7}),
    )
    assert refused(encoder=other) == ["model.encoder.high.window_size is 7", "model.encoder.low.hidden_act is gelu_pytorch_tanh"]
    assert refused(connector=MLPSpec(level="final")) == ["model.connector is mlp"]
    assert refused(encoder=encoder.low) == ["model.connector is hybrid_mlp", "model.encoder.fit is squash"]
    scaled = decoder_config(TEXT | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}})
    assert deepseek_official.obstacles(spec, scaled)[0].startswith("model.llm.rope_parameters is {")


@pytest.mark.parametrize("hybrid", [True, False])
def test_native_classes_answer_alike_and_come_back(tmp_path: Path, hybrid: bool) -> None:
    """Official -> ours -> transformers' class, in a fresh process with its own processor -> ours."""
    source = official_folder(tmp_path / "theirs", hybrid, depth=2)
    import_model(str(tmp_path / "theirs"), tmp_path / "ours", "deepseek_vl")
    name = "deepseek_vl_hybrid" if hybrid else "deepseek_vl"
    done = CliRunner().invoke(app, ["export", str(tmp_path / "ours"), "--to", name])
    assert done.exit_code == 0, done.output
    assert "transformers' rule instead of the official program's" in done.output and "over 4 prompts, greedy tokens equal" in done.output
    native = tmp_path / "ours" / f"export-{name}"
    old = {re.sub(r"^model\.vision_model\.", "model.vision_model.vision_model.", key): tensor for key, tensor in load_file(native / "model.safetensors").items()}
    save_file({**old, "model.vision_model.vision_model.head.probe": torch.zeros(1, 1, 16)}, native / "model.safetensors", metadata={"format": "pt"})
    report = import_model(str(native), tmp_path / "again", "deepseek_vl")
    assert "1 tensors that are never used were left out (model.vision_model.vision_model.head.probe)" in report.notes
    again, processor = vlm.load(tmp_path / "again")
    own = source.state_dict()
    assert again.state_dict().keys() == own.keys() and all(torch.equal(tensor, own[key]) for key, tensor in again.state_dict().items())
    assert processor.prompt.spec.use == "deepseek_vl" and processor([asked()])["input_ids"].tolist() == vlm.load(tmp_path / "ours")[1]([asked()])["input_ids"].tolist()
    rule = {"rounding": "round"} if hybrid else {"official": False}
    encoder: Any = source.spec.encoder
    fields = {
        name: (getattr(again.spec.encoder, name), getattr(replace(encoder, **rule), name))
        for name in ("rounding", "min_size", "resample", "official", "mean")
        if hasattr(encoder, name)
    }
    assert all(got == expected for got, expected in fields.values()), fields
    done = CliRunner().invoke(app, ["export", str(tmp_path / "again"), "--to", "deepseek_vl_official"])
    assert done.exit_code == 0, done.output
    assert "the official program's rule instead of transformers'" in done.output
    assert deepseek_read.read(tmp_path / "again" / "export-deepseek_vl_official").encoder == replace(encoder, path=None)


def test_what_the_native_classes_do_not_have_is_named(tmp_path: Path) -> None:
    official_folder(tmp_path / "theirs")
    import_model(str(tmp_path / "theirs"), tmp_path / "ours", "deepseek_vl")
    with pytest.raises(ConfigurationError, match="cannot be exported as deepseek_vl_hybrid: model.connector.depth is 3, deepseek_vl_hybrid has 2"):
        export_run(tmp_path / "ours", to="deepseek_vl_hybrid")
    with pytest.raises(ConfigurationError, match="model.encoder is hybrid, deepseek_vl has siglip; model.connector is hybrid_mlp, deepseek_vl has mlp"):
        export_run(tmp_path / "ours", to="deepseek_vl")
    spec = model_of(True, 2).spec
    fixed = HybridSpec(high=replace(spec.encoder.high, interpolate=(12, 12), downsample_channels=(6, 16)), low=spec.encoder.low)  # type: ignore[attr-defined]
    found = HYBRID.obstacles(replace(spec, encoder=fixed), decoder_config(dict(TEXT)))
    assert [line.split(" is ")[0] for line in found] == ["model.encoder.high.interpolate", "model.encoder.high.downsample_channels"]
