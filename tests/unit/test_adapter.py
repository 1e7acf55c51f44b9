"""Adapter files: stock PEFT reads ours, ours are made from those of others, and what does not fit is refused."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from adapted import logits, made, model_spec
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel

import vlm
from vlm.config import LLMSpec
from vlm.connectors.linear import LinearSpec
from vlm.errors import CheckpointError, ConfigurationError
from vlm.llm.lora import LoRASpec
from vlm.llm.mm_lora import MMLoRASpec
from vlm.loading import first_model
from vlm.model import VLM
from vlm.train.folder import absolute
from vlm.weights.adapter import write_adapters


def base_of(model: VLM, folder: Path) -> Path:
    """The decoder as a model of others, without our adapters."""
    numbers = model.config.text_config
    plain = AutoModelForCausalLM.from_config(numbers)
    tensors = {name.replace(".base_layer", ""): tensor for name, tensor in model.llm.state_dict().items() if ".lora_" not in name}
    plain.load_state_dict(tensors)
    plain.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("family", "targets"), [("llama", None), ("llama", ("layers.0.mlp.up_proj", "lm_head", "embed_tokens")), ("gemma2", ("q_proj", "lm_head"))])
def test_stock_peft_reads_ours(family: str, targets: tuple[str, ...] | None, tmp_path: Path) -> None:
    model = made(model_spec(family, {"mine": LoRASpec(rank=3, alpha=5, rslora=True, targets=targets)}))
    write_adapters(model, tmp_path / "out")
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_of(model, tmp_path / "base")), tmp_path / "out" / "mine").eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = stock(input_ids=ids).logits
    assert (logits(model, {"input_ids": ids}) - expected).abs().max() <= 1e-6
    written = json.loads((tmp_path / "out" / "mine" / "adapter_config.json").read_text())["target_modules"]
    assert (len(written) == 7) if targets is None else ("model.layers.0.mlp.up_proj" in written or set(written) == {"q_proj", "lm_head"})
    assert (expected - logits(made(model_spec(family)), {"input_ids": ids})).abs().max() > 0.01


def test_stock_peft_reads_our_tower(tmp_path: Path) -> None:
    model = made(model_spec(adapt={"tower_lora": LoRASpec(part="encoder", rank=2)})).eval()
    write_adapters(model, tmp_path)
    tower = CLIPVisionModel(CLIPVisionConfig(**tiny.tower_config()))
    own: Any = model.encoder.tower
    tower.load_state_dict({name.replace(".base_layer", ""): tensor for name, tensor in own.state_dict().items() if ".lora_" not in name})
    stock = PeftModel.from_pretrained(tower, tmp_path / "tower_lora").eval()
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        difference = own(pixel_values=pixels).last_hidden_state - stock(pixel_values=pixels).last_hidden_state
    assert difference.abs().max() <= 1e-6
    with pytest.raises(ConfigurationError, match="bridge has no stock form"):
        write_adapters(made(model_spec(adapt={"bridge": LoRASpec(part="connector")})), tmp_path / "bridge")


def with_values(model: VLM) -> VLM:
    """Its MM-LoRA has values everywhere."""
    with torch.no_grad():
        for path, parameters in model.groups().items():
            for parameter in parameters if ".mm_lora." in path else ():
                nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.mark.parametrize(("family", "targets"), [("llama", None), ("phi", ("q_proj", "layers.1.mlp.fc2"))])
def test_stock_peft_reads_each_side_of_mm_lora(family: str, targets: tuple[str, ...] | None, tmp_path: Path) -> None:
    model = with_values(made(model_spec(family, {"mine": MMLoRASpec(rank={"vision": 3, "language": 5}, scale={"vision": 2.0, "language": 0.5}, targets=targets)})))
    written = write_adapters(model, tmp_path / "out")
    assert set(written) == {"mine/vision", "mine/language"}
    settings = {name: json.loads((tmp_path / "out" / name / "adapter_config.json").read_text()) for name in written}
    said = {name: tuple(one[key] for key in ("peft_type", "r", "lora_alpha", "lora_dropout")) for name, one in settings.items()}
    assert said == {"mine/vision": ("LORA", 3, 6, 0.05), "mine/language": ("LORA", 5, 2.5, 0.05)}
    base = base_of(model, tmp_path / "base")
    embeddings = torch.randn(2, 20, 32)
    found = []
    for name, kind in (("mine/vision", 1), ("mine/language", 0)):
        stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, attn_implementation=model.llm.config._attn_implementation), tmp_path / "out" / name).eval()
        with torch.no_grad():
            ours = model(inputs_embeds=embeddings, mm_token_type_ids=torch.full((2, 20), kind)).logits
            found.append(stock(inputs_embeds=embeddings).logits)
        assert torch.equal(ours, found[-1]), name
    assert (found[0] - found[1]).abs().max() > 0.01


def test_a_modality_without_rank_is_not_written_and_the_other_is_exact(tmp_path: Path) -> None:
    model = with_values(made(model_spec(adapt={"mm_lora": MMLoRASpec(rank={"vision": 0, "language": 4}), "tower": LoRASpec(part="encoder", rank=2)})))
    assert set(write_adapters(model, tmp_path / "out")) == {"mm_lora/language", "tower"}
    assert [path.name for path in (tmp_path / "out" / "mm_lora").iterdir()] == ["language"]
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_of(model, tmp_path / "base")), tmp_path / "out" / "mm_lora" / "language").eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(logits(model, {"input_ids": ids}), stock(input_ids=ids).logits)


def theirs(folder: Path, **settings: Any) -> tuple[VLM, Path]:
    """A plain model of ours, and a stock adapter with values that peft made for its decoder."""
    model = made(model_spec())
    base = AutoModelForCausalLM.from_pretrained(base_of(model, folder / "base"))
    torch.manual_seed(5)
    wrapped = get_peft_model(base, LoraConfig(**({"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "lm_head"], "init_lora_weights": False} | settings)))
    wrapped.save_pretrained(str(folder / "adapter"))
    return model, folder / "adapter"


def test_an_adapter_of_others_is_a_first_value(tmp_path: Path) -> None:
    model, adapter = theirs(tmp_path)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), adapter).eval()(input_ids=ids).logits
    spec = LoRASpec(path=str(adapter), dropout=0.1)
    assert (spec.rank, spec.alpha, spec.rslora, spec.targets) == (3, 7.0, False, ("lm_head", "q_proj"))
    model.add("lora", spec)
    assert (logits(model, {"input_ids": ids}) - expected).abs().max() <= 1e-6
    assert model.config.adapt["lora"]["path"] is None  # a checkpoint needs no folder of others
    with pytest.raises(ConfigurationError, match="rank is not that of the adapter"):
        LoRASpec(path=str(adapter), rank=4)
    with pytest.raises(ConfigurationError, match="no weights at 'gone'"):
        LoRASpec(path="gone")
    assert LoRASpec(path="gone", rank=3, alpha=7.0, rslora=False, targets=("lm_head", "q_proj")).rank == 3  # as a run's config.yaml has it


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_dora": True, "target_modules": ["q_proj"]}, "use_dora True"),
        ({"bias": "lora_only", "target_modules": ["q_proj"]}, "bias lora_only"),
        ({"modules_to_save": ["embed_tokens"]}, r"modules_to_save \['embed_tokens'\]"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
        ({"init_lora_weights": "pissa", "target_modules": ["q_proj"]}, "changed the base weights"),
    ],
)  # fmt: skip
def test_more_than_plain_lora_is_refused_by_name(settings: Mapping[str, Any], said: str, tmp_path: Path) -> None:
    _, adapter = theirs(tmp_path, **settings)
    with pytest.raises(ConfigurationError, match=f"more than plain LoRA.*{said}"):
        LoRASpec(path=str(adapter))


@pytest.mark.parametrize("rank", [None, "x"])
def test_an_adapter_without_its_rank_is_refused(rank: str | None, tmp_path: Path) -> None:
    _, adapter = theirs(tmp_path)
    file = adapter / "adapter_config.json"
    written = json.loads(file.read_text())
    file.write_text(json.dumps({**written, "r": rank}))
    with pytest.raises(ConfigurationError, match=rf"adapter_config\.json is damaged\. got r {rank!r}, lora_alpha"):
        LoRASpec(path=str(adapter))


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    _, adapter = theirs(tmp_path)
    with pytest.raises(CheckpointError, match=r"adapter .* does not fit.*lora_A\.weight \(3, 32\) for \(3, 64\)"):
        first_model(model_spec(adapt={"lora": LoRASpec(path=str(adapter))}, hidden_size=64), 330)
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"] = tensors.pop("base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight")
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"unexpected model\.layers\.0\.mlp\.up_proj\.lora_A\.weight.*missing model\.layers\.1\.self_attn\.q_proj\.lora_B\.weight"):
        made(model_spec()).add("lora", LoRASpec(path=str(adapter)))


def test_base_tensors_of_an_adapter_are_those_of_the_base_or_refused(tmp_path: Path) -> None:
    _, adapter = theirs(tmp_path)
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.lm_head.base_layer.weight"
    assert name in tensors  # peft writes it because the head carries LoRA
    tensors[name] += 1
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"unexpected lm_head\.base_layer\.weight"):
        made(model_spec()).add("lora", LoRASpec(path=str(adapter)))


def test_rows_of_added_tokens_are_the_mean_of_the_others(tmp_path: Path) -> None:
    _, adapter = theirs(tmp_path)
    spec = model_spec(adapt={"lora": LoRASpec(path=str(adapter))})
    model = first_model(replace(spec, llm=LLMSpec(path=str(tmp_path / "base"))), 402)
    scores = logits(model, {"input_ids": torch.arange(20)[None]})
    assert scores.shape[-1] == 403
    assert (scores[..., 400:] - scores[..., :400].mean(-1, keepdim=True)).abs().max() <= 1e-5


def test_a_released_llava_lora_brings_its_projector(tmp_path: Path) -> None:
    """adapter_model.bin and non_lora_trainables.bin, as LLaVA-1.5's finetune_lora script leaves them."""
    model, adapter = theirs(tmp_path, target_modules=["q_proj", "v_proj"])
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    projector = {name: torch.randn_like(tensor) for name, tensor in model.connector["mlp"].state_dict().items()}
    torch.save({f"base_model.model.model.mm_projector.{name.removeprefix('layers.')}": tensor.half() for name, tensor in projector.items()}, adapter / "non_lora_trainables.bin")
    model.add("lora", LoRASpec(path=str(adapter)))
    assert all(torch.equal(tensor, projector[name].half().float()) for name, tensor in model.connector["mlp"].state_dict().items())
    assert all(p.abs().max() > 0 for p in model.groups()["llm.lora"])
    with pytest.raises(CheckpointError, match="holds another projector than the model"):
        first_model(replace(model_spec(adapt={"lora": LoRASpec(path=str(adapter))}), connector=LinearSpec()), 330)
    torch.save({"base_model.model.lm_head.weight": torch.zeros(1)}, adapter / "non_lora_trainables.bin")
    with pytest.raises(CheckpointError, match=r"non_lora_trainables\.bin does not fit.*lm_head"):
        made(model_spec()).add("lora", LoRASpec(path=str(adapter)))


def test_a_run_knows_where_its_adapter_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs(tmp_path)
    root = tiny.data_root(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    run = vlm.compose("llava_tiny", f"data_root={root}", "model.adapt={lora: {path: adapter}}")
    assert absolute(run).model.adapt["lora"] == replace(run.model.adapt["lora"], path=str(tmp_path / "adapter"))
