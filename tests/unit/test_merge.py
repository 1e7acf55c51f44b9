"""Merged LoRA: the same logits from a model without adapters, also where the head is tied; what `vlm merge` and the export write."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import adapted
import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from typer.testing import CliRunner

import vlm
from vlm.cli import app
from vlm.config import LLMSpec, ModelSpec
from vlm.connectors.mlp import MLPSpec
from vlm.data.sample import Sample, Turn
from vlm.encoders.clip import CLIPSpec
from vlm.errors import ConfigurationError, NumericsError
from vlm.llm.base import AdaptationSpec
from vlm.llm.lora import LoRASpec
from vlm.llm.mm_lora import MMLoRASpec
from vlm.loading import first_model, saved_model
from vlm.model import VLM
from vlm.processor import VLMProcessor
from vlm.prompt import PromptSpec
from vlm.weights.export import export_run
from vlm.weights.merge import merge_language, merge_lora, merge_run, merge_text

TOWER = {"tower_lora": LoRASpec(part="encoder", rank=2), "bridge": LoRASpec(part="connector", rank=2, rslora=True)}
IDS = torch.arange(20)[None]


def made(family: str = "llama", *, adapt: Mapping[str, AdaptationSpec], **numbers: Any) -> VLM:
    """In evaluation mode."""
    return adapted.made(adapted.model_spec(family, adapt, **numbers), std=0.1).eval()


def answer(model: VLM) -> Tensor:
    """Logits of a text, and of a picture behind the encoder and the connector."""
    pixels = model.spec.encoder.preprocess(tiny.picture(seed=1), "infer")
    image = model.spec.encoder.dummy()
    image = type(image)(pixels, image.width, image.height, image.layout)
    with torch.no_grad():
        inputs = torch.cat([model.see([image]).tokens[None], model.get_input_embeddings()(IDS)], 1)
        return model(inputs_embeds=inputs, mm_token_type_ids=torch.zeros(inputs.shape[:2], dtype=torch.int64)).logits


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("targets", [None, ("q_proj", "lm_head"), ("embed_tokens",)])
def test_merged_is_unmerged(family: str, targets: tuple[str, ...] | None, tmp_path: Path) -> None:
    model = made(family, adapt={"mine": LoRASpec(rank=3, targets=targets), **TOWER})
    before, plain = answer(model), {name.replace(".base_layer", ""): p.clone() for name, p in model.named_parameters(remove_duplicate=False) if ".lora_" not in name}
    done = merge_lora(model)
    assert done.names == ("mine", "tower_lora", "bridge") and done.untied == (family == "gemma2" and targets is not None)
    assert (answer(model) - before).abs().max() <= 1e-5
    assert model.config.adapt == {} == model.spec.adapt
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert not any("lora" in name or "base_layer" in name for name in tensors)
    for again in (VLM.from_pretrained(tmp_path), saved_model(tmp_path).eval()):
        assert torch.equal(answer(again), answer(model))
    tied = family == "gemma2" and targets is None
    assert json.loads((tmp_path / "config.json").read_text())["text_config"]["tie_word_embeddings"] == tied
    assert ("llm.lm_head.weight" in tensors) != tied
    changed = {"llm.lm_head.weight": targets == ("q_proj", "lm_head"), "llm.model.embed_tokens.weight": targets == ("embed_tokens",)}
    for name, moved in changed.items():
        if name in tensors:
            assert torch.equal(tensors[name], plain[name]) != moved, name


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_merges(family: str) -> None:
    model = made(family, adapt={"lora": LoRASpec(rank=3)})
    before = answer(model)
    merge_lora(model)
    after = answer(model)
    assert (after - before).abs().max() <= 1e-5 and not any("lora_" in name for name, _ in model.named_parameters())


def test_half_precision_is_merged_in_full() -> None:
    model = made(adapt={"lora": LoRASpec(rank=3, targets=("q_proj",))})
    layer = model.llm.get_submodule("model.layers.0.self_attn.q_proj")
    layer.base_layer.to(torch.bfloat16)  # type: ignore[union-attr,operator]
    base: Any = layer.base_layer
    exact = base.weight.float() + layer.lora_B["default"].weight @ layer.lora_A["default"].weight * 2  # type: ignore[index,operator]
    merge_lora(model)
    merged: Any = model.llm.get_submodule("model.layers.0.self_attn.q_proj").weight
    assert merged.dtype == torch.bfloat16 and torch.equal(merged, exact.to(torch.bfloat16))


def test_a_broken_adapter_is_not_merged() -> None:
    model = made(adapt={"lora": LoRASpec(rank=3, targets=("q_proj",))})
    with torch.no_grad():
        model.llm.get_submodule("model.layers.1.self_attn.q_proj").lora_B["default"].weight[0, 0] = torch.nan  # type: ignore[index,union-attr]
    with pytest.raises(NumericsError, match=r"llm\.model\.layers\.1\.self_attn\.q_proj cannot be merged"):
        merge_lora(model)


def saved(model: VLM, folder: Path) -> Path:
    model.save_pretrained(folder)
    VLMProcessor(model.spec, 32, tiny.tokenizer(), PromptSpec(use="chatml")).save_pretrained(folder)
    return folder


def test_vlm_merge_writes_a_folder_that_loads(tmp_path: Path) -> None:
    model = made("gemma2", adapt={"lora": LoRASpec(rank=3, targets=("lm_head",))})
    source = saved(model, tmp_path / "source")
    result = CliRunner().invoke(app, ["merge", str(source)])
    assert result.exit_code == 0, result.output
    assert "merged lora into 1 weights; the tied head was untied first: tie_word_embeddings is false now" in result.output
    merged, processor = vlm.load(source / "merged")
    assert (answer(merged) - answer(model)).abs().max() <= 1e-5
    assert processor.tokenizer.get_vocab() == tiny.tokenizer().get_vocab()
    with pytest.raises(ConfigurationError, match="holds something already"):
        merge_run(source)
    with pytest.raises(ConfigurationError, match="has no LoRA"):
        merge_run(source / "merged")
    assert sorted(path.name for path in source.iterdir() if "partial" in path.name) == []


def test_an_export_is_merged_and_an_adapter_is_not(tmp_path: Path) -> None:
    model = made("qwen2", adapt={"lora": LoRASpec(rank=3, targets=("lm_head", "v_proj")), **TOWER}, tie_word_embeddings=True)
    source = saved(model, tmp_path / "source")
    report = export_run(source)
    assert report.max_logit_difference <= 1e-4 and "untied" in report.merged
    with safe_open(source / "export-llava" / "model.safetensors", "pt") as file:
        assert "language_model.lm_head.weight" in file.keys()  # noqa: SIM118
    with pytest.raises(ConfigurationError, match="bridge has no stock form"):
        vlm_export(source)
    lone = saved(made("qwen2", adapt={"lora": LoRASpec(rank=3)}), tmp_path / "lone")
    assert "28 tensors for AutoModelForCausalLM" in vlm_export(lone)
    assert sorted(path.name for path in (lone / "export-peft" / "lora").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def vlm_export(folder: Path) -> str:
    result = CliRunner().invoke(app, ["export", str(folder), "--to", "peft"])
    if result.exit_code:
        raise ConfigurationError(result.output.replace("\n", " "))
    return result.output


# ---- text alone ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("rank", [{"vision": 3, "language": 5}, {"vision": 2, "language": 0}])
def test_the_language_side_alone_is_a_text_model(family: str, rank: dict[str, int], tmp_path: Path) -> None:
    model = made(family, adapt={"lora": LoRASpec(rank=2, targets=("q_proj",)), "mm_lora": MMLoRASpec(rank=rank), **TOWER})
    source = saved(model, tmp_path / "source")
    refused = CliRunner().invoke(app, ["merge", str(source)])
    assert refused.exit_code == 1 and "mm_lora cannot be merged" in refused.output and "--text-only" in refused.output
    done = CliRunner().invoke(app, ["merge", str(source), "--text-only"])
    assert done.exit_code == 0, done.output
    assert f"merged lora, mm_lora into {2 + 12 * bool(rank['language'])} weights" in done.output
    folder = source / "merged-text"
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    again, info = loaded
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not any("lora" in name or "base_layer" in name for name in load_file(folder / "model.safetensors"))
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        assert (again.eval()(input_ids=IDS).logits - before).abs().max() <= 1e-5
        if rank["language"]:
            assert (made(family, adapt={"lora": LoRASpec(rank=2, targets=("q_proj",))})(input_ids=IDS).logits - before).abs().max() > 0.01
    processor = vlm.load(source)[1]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    said = tokenizer.apply_chat_template([{"role": "user", "content": "What colour is it?"}], add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
    asked = Sample("q", (Turn("user", ("What colour is it?",)),))
    assert said == processor([asked])["input_ids"][0].tolist()
    tokens = again.generate(torch.tensor([said]), max_new_tokens=5, do_sample=False)[:, len(said) :]
    assert torch.equal(tokens, model.generate(**processor([asked]), generation_config=GenerationConfig.from_pretrained(folder), max_new_tokens=5))


def test_text_alone_needs_something_to_merge(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="has no LoRA"):
        merge_text(saved(made(adapt={}), tmp_path / "plain"))
    model = made(adapt={"mm_lora": MMLoRASpec(rank={"vision": 1, "language": 1}, targets=("q_proj",))})
    with torch.no_grad():
        model.llm.get_submodule("model.layers.1.self_attn.q_proj").lora_B["language"].weight[0, 0] = torch.nan  # type: ignore[index,union-attr]
    with pytest.raises(NumericsError, match=r"llm\.model\.layers\.1\.self_attn\.q_proj cannot be merged"):
        merge_language(model)


# ---- the field case --------------------------------------------------------------------------------------------------------------


def with_adapter(base: Path, adapter: Path) -> VLM:
    llm = LLMSpec(path=str(base), weights="path")
    spec = ModelSpec(encoder=CLIPSpec(config=tiny.tower_config(), weights="random"), connector=MLPSpec(), llm=llm, adapt={"lora": LoRASpec(path=str(adapter))})
    return first_model(spec, 0).eval()


def text_logits(model: VLM, ids: Tensor) -> Tensor:
    types = torch.zeros_like(ids)  # id 0 stands for pictures, of which there are none
    with torch.no_grad():
        return model(input_ids=ids, mm_token_type_ids=types).logits[0]


def through_the_merge(model: VLM, ids: Tensor, folder: Path) -> tuple[Tensor, Tensor, dict[str, Tensor], bool]:
    """Logits before, logits of the merged, saved and reloaded model, its tensors, and whether its configuration says tied."""
    before = text_logits(model, ids)
    merge_lora(model)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    return before, text_logits(VLM.from_pretrained(folder), ids), load_file(folder / "model.safetensors"), config["text_config"]["tie_word_embeddings"]


def test_ckpt_tied_lora_merge_on_our_own_input(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    numbers = tiny.llm_config("llama", tie_word_embeddings=True)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(numbers.pop("model_type"), **numbers))
    base.save_pretrained(tmp_path / "base")
    embedding = base.get_input_embeddings().weight.detach().clone()
    stock = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["lm_head", "q_proj"], init_lora_weights=False))
    stock.save_pretrained(str(tmp_path / "adapter"))
    with torch.no_grad():
        expected = stock.eval()(input_ids=IDS).logits[0]
    before, after, tensors, tied = through_the_merge(with_adapter(tmp_path / "base", tmp_path / "adapter"), IDS, tmp_path / "merged")
    assert (before - expected).abs().max() <= 1e-5 and (after - expected).abs().max() <= 1e-5
    assert not tied and torch.equal(tensors["llm.model.embed_tokens.weight"], embedding)
    assert (tensors["llm.lm_head.weight"] - embedding).abs().max() > 0.01


def test_ckpt_tied_lora_merge_on_the_folder(field_folder: Path, tmp_path: Path) -> None:
    case = field_folder / "ckpt_tied_lora_merge"
    expected = json.loads((case / "expected.json").read_text())
    ids = torch.tensor(json.loads((case / "input_ids.json").read_text())).reshape(1, -1)
    embedding = load_file(case / "base" / "model.safetensors")["model.embed_tokens.weight"]
    before, after, tensors, tied = through_the_merge(with_adapter(case / "base", case / "adapter"), ids, tmp_path)
    for logits in (before, after):
        assert logits[-1, :8].tolist() == pytest.approx(expected["logits_last_position_first_8"], abs=expected["tolerance"])
        assert logits.argmax(-1).tolist() == expected["argmax_per_position"]
    assert tied == expected["merged_config_tie_word_embeddings"]
    assert torch.equal(tensors["llm.model.embed_tokens.weight"], embedding) == expected["merged_embed_equals_base_embed"]
    assert (tensors["llm.lm_head.weight"] - embedding).abs().max().item() == pytest.approx(expected["merged_head_minus_embed_max"], abs=expected["tolerance"])
