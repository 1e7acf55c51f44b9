"""Imports of Arcana folders, made small: its program's keys in and out, strictly, with the reference model's answers."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import vlm
from tests.golden.case import Case
from vlm.cli import app
from vlm.connectors.mlp import MLPSpec
from vlm.connectors.qladder import QLadderSpec
from vlm.data.sample import Sample, Turn, held
from vlm.encoders.siglip import SigLIPSpec
from vlm.errors import CheckpointError, ConfigurationError
from vlm.features import ImageInput, TokenLayout
from vlm.llm.lora import LoRASpec
from vlm.llm.mm_lora import MMLoRASpec
from vlm.loading import first_model
from vlm.model import VLM
from vlm.processor import VLMProcessor
from vlm.prompt import PromptSpec
from vlm.weights import arcana, arcana_read
from vlm.weights.export import export_run
from vlm.weights.imports import import_model, read_model

TOWER = "model.vision_tower.vision_tower."
VISION = tiny.tower_config(num_hidden_layers=3)
QUERIES, RANKS = 5, {"V": 3, "L": 4}


def words() -> PreTrainedTokenizerFast:
    """A tokenizer with Vicuna's marks, and like Vicuna's without a picture token."""
    raw = Tokenizer.from_str(tiny._metaspace("first"))
    raw.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in ("<s>", "</s>")])
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", raw.token_to_id("<s>"))])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>", clean_up_tokenization_spaces=False)


ROLES = {
    "connector.qladder.layers.1.query_norm.weight": f"{TOWER}LadderAdapters.1.layer_norm0.weight",
    "connector.qladder.layers.1.key_norm.weight": f"{TOWER}LadderAdapters.1.layer_norm1.weight",
    "connector.qladder.layers.1.mlp_norm.weight": f"{TOWER}LadderAdapters.1.layer_norm2.weight",
    "connector.qladder.layers.1.k_proj.weight": f"{TOWER}LadderAdapters.1.cross_attn.k_proj.weight",
    "llm.model.layers.0.mlp.up_proj.base_layer.weight": "model.layers.0.mlp.up_proj.weight",
    "llm.model.layers.0.mlp.up_proj.lora_A.vision.weight": "model.layers.0.mlp.up_proj.V_Slora_A.weight",
    "llm.model.layers.0.mlp.up_proj.lora_B.language.weight": "model.layers.0.mlp.up_proj.L_Slora_B.weight",
}
ROWS = len(words())
NUMBERS = {name: value for name, value in tiny.llm_config(vocab_size=ROWS).items() if not name.endswith("token_id")}
PICTURE = ImageInput({"pixels": torch.randn(3, 28, 28, generator=torch.Generator().manual_seed(1))}, 28, 28, TokenLayout(()))


def official() -> dict[str, Tensor]:
    """Every tensor of a small model, in the words of the program."""
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, into: int, out: int, bias: bool = True) -> None:
        shapes.update({f"{name}.weight": (out, into), **({f"{name}.bias": (out,)} if bias else {})})

    def norm(*names: str) -> None:
        shapes.update({f"{name}.{part}": (16,) for name in names for part in ("weight", "bias")})

    clip = f"{TOWER}vision_model."
    shapes |= {f"{clip}embeddings.class_embedding": (16,), f"{clip}embeddings.patch_embedding.weight": (16, 3, 14, 14), f"{clip}embeddings.position_embedding.weight": (5, 16)}
    norm(f"{clip}pre_layrnorm", f"{clip}post_layernorm")
    shapes[f"{TOWER}qladder_embeds"] = (1, QUERIES, 16)
    for block in range(3):
        for start, attention in ((f"{clip}encoder.layers.{block}", "self_attn"), (f"{TOWER}LadderAdapters.{block}", "cross_attn")):
            norm(*(f"{start}.layer_norm{number}" for number in ((1, 2) if attention == "self_attn" else (0, 1, 2))))
            for part in ("k", "v", "q", "out"):
                linear(f"{start}.{attention}.{part}_proj", 16, 16)
            linear(f"{start}.mlp.fc1", 16, 24)
            linear(f"{start}.mlp.fc2", 24, 16)
    linear("model.mm_projector.0", 16, 32)
    linear("model.mm_projector.2", 32, 32)
    for index in range(2):
        layer = f"model.layers.{index}"
        shapes |= {f"{layer}.{name}_layernorm.weight": (32,) for name in ("input", "post_attention")}
        sizes = {"self_attn.q": (32, 32), "self_attn.k": (32, 16), "self_attn.v": (32, 16), "self_attn.o": (32, 32), "mlp.gate": (32, 48), "mlp.up": (32, 48), "mlp.down": (48, 32)}
        for name, (into, out) in sizes.items():
            linear(f"{layer}.{name}_proj", into, out, bias=False)
            for letter, rank in RANKS.items():
                linear(f"{layer}.{name}_proj.{letter}_Slora_A", into, rank, bias=False)
                linear(f"{layer}.{name}_proj.{letter}_Slora_B", rank, out, bias=False)
    shapes |= {"model.embed_tokens.weight": (ROWS, 32), "model.norm.weight": (32,), "lm_head.weight": (ROWS, 32)}
    generator = torch.Generator().manual_seed(2)
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


def official_folder(folder: Path, kind: str = "arcana_llama", dtype: torch.dtype = torch.float32, change: Mapping[str, Tensor | None] | None = None, **config: Any) -> Path:
    """A folder of the program; its tower's numbers stand in FOLDER-tower. change: tensors to add, or None to take one out."""
    folder.mkdir()
    numbers = NUMBERS | {"model_type": kind, "rope_theta": 5e4, "mm_vision_select_layer": -2, "mm_projector_type": "mlp2x_gelu", "image_aspect_ratio": "pad"}
    (folder / "config.json").write_text(json.dumps(numbers | {"mm_hidden_size": 16, "mm_vision_tower": "openai/not-here"} | config))
    tensors: dict[str, Tensor | None] = {name: tensor.to(dtype) for name, tensor in official().items()}
    tensors.update(change or {})
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")
    words().save_pretrained(folder)
    tower = folder.with_name(f"{folder.name}-tower")
    tower.mkdir()
    (tower / "config.json").write_text(json.dumps(VISION | {"model_type": "clip_vision_model"}))
    return folder


def imported(folder: Path) -> Path:
    out = folder.with_name(f"{folder.name}-vlm")
    import_model(str(folder), out, "arcana", tower=f"{folder}-tower")
    return out


def features(model: VLM) -> Tensor:
    with torch.no_grad():
        return model.see([PICTURE]).tokens


@pytest.mark.parametrize("kind, dtype", [("arcana_llama", torch.float32), ("llava_llama", torch.bfloat16)])
def test_official_keys_come_in_and_go_back(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = official_folder(tmp_path / "theirs", kind, dtype)
    done = CliRunner().invoke(app, ["import", str(theirs), "--family", "arcana", "--out", str(tmp_path / "ours"), "--tower", f"{theirs}-tower"])
    assert done.exit_code == 0, done.output
    assert f"clip, qladder -> mlp, llama + mm_lora, {str(dtype).removeprefix('torch.')}, prompt vicuna_v1, pictures pad" in done.output
    model, processor = vlm.load(tmp_path / "ours")
    assert model.spec.connector == QLadderSpec(queries=QUERIES, level=-2, official=True, then=MLPSpec())
    assert model.spec.adapt == {"mm_lora": MMLoRASpec(rank={"vision": 3, "language": 4}, scale=2.0, dropout=0.05)}
    assert model.dtype == dtype and model.config.text_config.rope_parameters["rope_theta"] == 5e4
    own, given = model.state_dict(), load_file(theirs / "model.safetensors")
    for ours, names in ROLES.items():
        assert torch.equal(own[ours], given[names]), ours
    sample = Sample("q", (Turn("user", (held(tiny.picture_bytes(tiny.picture(seed=1, size=(53, 21)))), "What is it?")),))
    assert (processor([sample])["input_ids"] == processor.image_token_id).sum() == 4 + QUERIES
    assert [len(model.unused()) > 0, len(model.parts()[0].unused())] == [True, 18], "the ladder layer that is never read is kept"
    done = CliRunner().invoke(app, ["export", str(tmp_path / "ours"), "--to", "arcana"])
    assert done.exit_code == 0, done.output
    assert "max logit difference 0.00e+00 over 4 prompts, greedy tokens equal" in done.output
    assert "64 queries and ranks 64 and 192: write 5, 3 and 4 there" in done.output and "mm_vision_tower" in done.output
    folder = tmp_path / "ours" / "export-arcana"
    back, written = (load_file(place / "model.safetensors") for place in (folder, theirs))
    assert back.keys() == written.keys() and all(torch.equal(back[name], written[name]) and back[name].dtype == dtype for name in written)
    config = json.loads((folder / "config.json").read_text())
    assert config.items() >= {"model_type": "arcana_llama", "mm_vision_select_layer": -2, "image_aspect_ratio": "pad", "mm_use_im_patch_token": False, "vocab_size": ROWS}.items()
    assert config["rope_theta"] == 5e4 and "qladder_select" not in config
    assert PreTrainedTokenizerFast.from_pretrained(folder).get_vocab() == words().get_vocab(), "the program has no picture token"
    again = arcana_read.read(folder)
    assert (again.connector, again.adapt) == (model.spec.connector, model.spec.adapt)


def test_the_last_ladder_layer_is_chosen_by_a_setting(tmp_path: Path) -> None:
    same = vlm.load(imported(official_folder(tmp_path / "same")))[0]
    last = vlm.load(imported(official_folder(tmp_path / "last", qladder_select="last")))[0]
    moved = (features(same) - features(last)).abs().amax(-1) > 0
    assert moved.tolist() == [False] * 4 + [True] * QUERIES
    report = export_run(tmp_path / "last-vlm", to="arcana")
    assert "last ladder layer, as in the program's archive" in report.changed
    assert json.loads((tmp_path / "last-vlm" / "export-arcana" / "config.json").read_text())["qladder_select"] == "last"


def test_layers_that_were_never_built_go_out_as_copies_of_their_blocks(tmp_path: Path) -> None:
    """As a run trains it: two of three ladder layers, and a LoRA of the tower that is merged first."""
    connector = QLadderSpec(queries=2, level=-2, then=MLPSpec())
    theirs = vlm.load(imported(official_folder(tmp_path / "theirs")))[0]
    llm = replace(theirs.spec.llm, config=NUMBERS, weights="random")
    adapt = {"tower": LoRASpec(part="encoder", rank=2), "mine": MMLoRASpec(rank={"vision": 2, "language": 1})}
    spec = replace(theirs.spec, encoder=replace(theirs.spec.encoder, weights="random"), connector=connector, llm=llm, adapt=adapt)  # type: ignore[call-arg]
    model = first_model(spec, ROWS).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    processor = VLMProcessor(model.spec, 32, vlm.load(tmp_path / "theirs-vlm")[1].tokenizer, PromptSpec(use="vicuna_v1"), "native")
    model.save_pretrained(tmp_path / "run")
    processor.save_pretrained(tmp_path / "run")
    assert len(model.parts()[0].layers) == 2  # type: ignore[arg-type]
    report = export_run(tmp_path / "run", to="arcana")
    assert "merged tower" in report.merged and report.max_logit_difference <= 1e-5
    assert "a word mark stands behind each picture, as the program tokenises; the run has none" in report.changed
    tensors = load_file(tmp_path / "run" / "export-arcana" / "model.safetensors")
    block, ladder = f"{TOWER}vision_model.encoder.layers.2.", f"{TOWER}LadderAdapters.2."
    for part in ("layer_norm1.bias", "layer_norm2.weight", "mlp.fc2.weight", "self_attn.k_proj.bias", "self_attn.q_proj.weight"):
        assert torch.equal(tensors[ladder + part.replace("self_attn", "cross_attn")], tensors[block + part])
    assert tensors[f"{ladder}layer_norm0.weight"].unique().tolist() == [1] and not tensors[f"{ladder}layer_norm0.bias"].any()
    assert {name.replace("LadderAdapters.2", "LadderAdapters.1") for name in tensors if ladder in name} <= tensors.keys()
    assert tensors["lm_head.weight"].shape == (ROWS, 32)


def test_strict_keys_and_settings(tmp_path: Path) -> None:
    def refused(name: str, error: type[Exception], message: str, change: Mapping[str, Tensor | None] | None = None, **config: Any) -> None:
        folder = official_folder(tmp_path / name, change=change, **config)
        with pytest.raises(error, match=message):
            imported(folder)

    refused("unknown", CheckpointError, r"1 unexpected \(model.vision_tower.vision_tower.gate\)", {f"{TOWER}gate": torch.ones(1)})
    refused("ladder", CheckpointError, r"1 missing \(.*LadderAdapters.1.layer_norm0.bias\)", {f"{TOWER}LadderAdapters.1.layer_norm0.bias": None})
    ladder = {number: {name: None for name in official() if f"LadderAdapters.{number}." in name} for number in range(3)}
    refused("more", CheckpointError, r"got 1 unexpected \(.*LadderAdapters.3.layer_norm0.bias\); expected", {f"{TOWER}LadderAdapters.3.layer_norm0.bias": torch.ones(16)})
    refused("first", CheckpointError, r"got 18 missing \(.*LadderAdapters.0.cross_attn.*\); expected", ladder[0])
    refused("read", CheckpointError, r"got 18 missing \(.*LadderAdapters.1.cross_attn.*\); expected", {**ladder[1], **ladder[2]})
    refused("level", ConfigurationError, r'got mm_vision_select_layer 3; expected -3 to 2. set mm_vision_select_layer, or "qladder_select": "last"', mm_vision_select_layer=3)
    refused("rank", CheckpointError, r"1 mis-shaped \(model.layers.1.mlp.up_proj.V_Slora_A.weight", {"model.layers.1.mlp.up_proj.V_Slora_A.weight": torch.ones(2, 32)})
    refused("biased", CheckpointError, r"1 unexpected \(model.layers.0.mlp.up_proj.bias\)", {"model.layers.0.mlp.up_proj.bias": torch.ones(48)})
    refused("queries", CheckpointError, "holds no model.vision_tower.vision_tower.qladder_embeds", {f"{TOWER}qladder_embeds": None})
    refused("type", CheckpointError, "is no Arcana.*'llava_qwen2'", model_type="llava_qwen2")
    refused("settings", ConfigurationError, "mm_projector_type is 'linear', .*image_aspect_ratio is 'anyres'", mm_projector_type="linear", image_aspect_ratio="anyres")
    (tmp_path / "type" / "config.json").write_text(json.dumps({"model_type": "llava_llama"}))
    save_file({"lm_head.weight": torch.ones(1)}, tmp_path / "type" / "model.safetensors")
    with pytest.raises(CheckpointError, match="is no Arcana.*a LLaVA is imported with --family llava"):
        arcana_read.read(tmp_path / "type")


def test_a_tower_may_stand_elsewhere_and_what_is_never_read_nowhere(tmp_path: Path) -> None:
    inside = {name.removeprefix(TOWER): tensor for name, tensor in official().items() if name.startswith(f"{TOWER}vision_model.")}
    folder = official_folder(tmp_path / "theirs", change=dict.fromkeys([TOWER + name for name in inside], None))
    save_file(inside, tmp_path / "theirs-tower" / "model.safetensors")
    trimmed = official_folder(tmp_path / "trimmed", change=dict.fromkeys([name for name in official() if "LadderAdapters.2" in name], None))
    expected = features(vlm.load(imported(official_folder(tmp_path / "whole")))[0])
    assert all(torch.equal(features(vlm.load(imported(one))[0]), expected) for one in (folder, trimmed))


def test_what_arcana_does_not_have_is_named(tmp_path: Path) -> None:
    model, _ = vlm.load(imported(official_folder(tmp_path / "theirs")))
    spec, text = model.spec, model.config.text_config
    connector, adapter = spec.connector, spec.adapt["mm_lora"]
    assert arcana.obstacles(spec, text) == []

    def found(**fields: Any) -> list[str]:
        return [line.split(",")[0] for line in arcana.obstacles(replace(spec, **fields), text)]

    assert found(encoder=SigLIPSpec(config=tiny.tower_config("siglip"))) == ["model.encoder is siglip"]
    assert found(encoder=replace(spec.encoder, fit="squash")) == ["model.encoder.fit is squash"]
    assert found(connector=MLPSpec()) == ["model.connector is mlp"]
    assert found(connector=replace(connector, then=MLPSpec(depth=3))) == ["model.connector.then.depth is 3"]
    assert found(connector=replace(connector, then=MLPSpec(hidden=7, then=MLPSpec()))) == ["model.connector.then.then is mlp", "model.connector.then.hidden is 7"]
    assert found(adapt={}) == ["model.adapt is no MM-LoRA"]
    assert found(adapt={"mm_lora": replace(adapter, scale=1.0)}) == ["model.adapt.mm_lora.scale is {'vision': 1.0"]  # type: ignore[call-arg]
    assert found(adapt={"mm_lora": replace(adapter, rank={"vision": 0, "language": 4})}) == ["model.adapt.mm_lora.rank is {'vision': 0"]  # type: ignore[call-arg]
    assert found(adapt={"mm_lora": replace(adapter, targets=("q_proj", "v_proj"))}) == ["model.adapt.mm_lora.targets is 4 of 14 linears"]  # type: ignore[call-arg]
    text.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    assert found()[0].startswith("model.llm.rope_parameters is {")
    with pytest.raises(ConfigurationError, match="model.adapt is mm_lora, LLaVA has a decoder without adaptations"):
        export_run(tmp_path / "theirs-vlm", to="llava")


@pytest.mark.parametrize("name", ["generate", "train", "left", "release"])
def test_the_reference_models_come_in_whole(golden_folder: Path, tmp_path: Path, name: str) -> None:
    case = Case(golden_folder / f"arcana_model_{name}")
    config: Any = case.description["config"]
    (tmp_path / "config.json").write_text(json.dumps(config["llm_config"] | config | {"model_type": "arcana_llama"}))
    save_file(case.weights, tmp_path / "model.safetensors")
    rows = config["llm_config"]["vocab_size"]
    model, _ = read_model(arcana_read.read(tmp_path), rows)
    back = {arcana.to_arcana(key): tensor[:rows] if "embed_tokens" in key or "lm_head" in key else tensor for key, tensor in model.state_dict().items()}
    assert back.keys() == case.weights.keys() and all(torch.equal(tensor, case.weights[key]) for key, tensor in back.items())
    if "generated_ids" not in case.expected:
        return
    images = [ImageInput({"pixels": pixels}, 0, 0, TokenLayout(())) for pixels in case.tensors["images"]]
    [length] = {len(model.see([image]).tokens) for image in images}
    [row] = case.tensors["input_ids"].tolist()
    ids = torch.tensor([[one for index in row for one in ([rows] * length if index == config["image_token_index"] else [index])]])
    assert torch.equal(ids == rows, case.expected["im_mask"].bool())
    tokens = model.generate(input_ids=ids, images=images, max_new_tokens=config["max_new_tokens"], do_sample=False, eos_token_id=None, suppress_tokens=[rows])
    assert torch.equal(tokens, case.expected["generated_ids"])
