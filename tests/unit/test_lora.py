"""LoRA on any part: the identity at first, the equalities of every adaptation, two stages of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny
import torch
from adapted import batches_of, logits, made, model_spec
from equal import differences, measure, trained
from interrupted import records, stopped_at
from safetensors.torch import load_file
from torch import nn

import vlm
from vlm.composition import from_plain
from vlm.encoders.siglip import SigLIPSpec
from vlm.errors import ConfigurationError
from vlm.llm import head as heads
from vlm.llm import registry
from vlm.llm.base import AdaptationSpec
from vlm.llm.lora import LoRASpec
from vlm.loading import saved_model
from vlm.model import VLM

EVERYWHERE = {
    "lora": LoRASpec(rank=3, targets=("*_proj", "lm_head", "embed_tokens")),
    "tower_lora": LoRASpec(part="encoder", rank=2),
    "bridge": LoRASpec(part="connector", rank=2, rslora=True),
}


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return batches_of(tmp_path_factory.mktemp("pictures"))


# ---- structure -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_nothing_changes_at_first_and_everything_trains_after(family: str, batches: dict[str, Any]) -> None:
    plain = made(model_spec(family))
    for name, spec in EVERYWHERE.items():
        before = logits(plain, batches["both"])
        plain.add(name, spec)
        assert not any(module.training for module in plain.modules())  # peft's layers are born in training mode
        assert torch.equal(logits(plain, batches["both"]), before)
    assert {"llm.lora", "encoder.lora", "connector.mlp.lora"} <= plain.groups().keys()
    named = {id(p): name for name, p in plain.named_parameters()}
    assert all(("lora_" in named[id(p)]) == path.endswith(".lora") for path, parameters in plain.groups().items() for p in parameters)
    assert measure(made(model_spec(family, EVERYWHERE)), batches["both"]).gradients.keys() == trained(plain).keys()


def test_the_default_is_every_linear_of_the_blocks() -> None:
    model = made(model_spec(adapt={"lora": LoRASpec(), "tower_lora": LoRASpec(part="encoder")}))
    spec: Any = model.spec.adapt["lora"]
    assert (spec.rank, spec.alpha) == (8, 16.0)
    assert sorted({path.rpartition(".")[2] for path in spec.layers(model.llm)}) == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert len(spec.layers(model.llm)) == 14
    siglip = SigLIPSpec(config=tiny.tower_config("siglip"), weights="random")
    model = made(replace(model_spec(), encoder=siglip, adapt={"lora": LoRASpec(part="encoder")}))
    assert len(model.groups()["encoder.lora"]) == 3 * 6 * 2  # none in the pooling head, whose attention reads its output linear without calling it


def test_adapters_of_a_frozen_encoder_learn(batches: dict[str, Any]) -> None:
    model = made(model_spec(adapt={"tower_lora": LoRASpec(part="encoder", rank=2)}))
    adapters = {id(p) for p in model.groups()["encoder.lora"]}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in adapters)
    gradients = measure(model, batches["both"]).gradients
    assert gradients and all("lora_" in name and gradient.abs().max() > 0 for name, gradient in gradients.items())
    assert not any(p.grad is not None for p in model.parameters() if id(p) not in adapters)


def test_what_is_saved_comes_back(tmp_path: Path, batches: dict[str, Any]) -> None:
    for family in ("llama", "gemma2"):  # gemma2's head is tied, and both ends of it carry LoRA
        model = made(model_spec(family, EVERYWHERE))
        before = logits(model, batches["both"])
        model.save_pretrained(tmp_path / family)
        again = VLM.from_pretrained(tmp_path / family)
        for one in (again, saved_model(tmp_path / family)):
            assert torch.equal(logits(one, batches["both"]), before)
        if family == "gemma2":
            ends: Any = (again.get_output_embeddings(), again.get_input_embeddings())
            assert ends[0].base_layer.weight is ends[1].base_layer.weight
    torch.nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    assert {p.dtype for p in VLM.from_pretrained(tmp_path / "bf16").parameters()} == {torch.bfloat16}


# ---- equalities --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "attention"), [("llama", "sdpa"), ("qwen2", "eager"), ("gemma2", "eager")])
def test_rows_batches_checkpoints_and_answers_agree(family: str, attention: str, batches: dict[str, Any]) -> None:
    model = made(model_spec(family, EVERYWHERE))
    model.llm.set_attn_implementation(attention)
    apart = measure(model, batches["vision"], batches["text"])
    assert not differences(measure(model, batches["both"]), apart)
    assert not differences(measure(model, batches["packed"]), apart)
    assert differences(measure(model, batches["packed"] | {"document_ids": torch.zeros_like(batches["packed"]["document_ids"])}), apart)
    model.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert not differences(measure(model, batches["vision"], batches["text"]), apart)
    model.llm.gradient_checkpointing_disable()
    model.eval()
    together = model.generate(**batches["ask"], max_new_tokens=6, do_sample=False)
    for row, name in zip(together, ("ask_a", "ask_b"), strict=True):
        [single] = model.generate(**batches[name], max_new_tokens=6, do_sample=False)
        assert row.tolist() == single.tolist()


def test_a_head_in_chunks_is_the_whole_head_and_calls_as_often(monkeypatch: pytest.MonkeyPatch, batches: dict[str, Any]) -> None:
    model = made(model_spec("gemma2", EVERYWHERE))
    calls: list[str] = []
    for name, module in model.get_output_embeddings().named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    whole = measure(model, batches["both"])
    before, calls[:] = list(calls), []
    monkeypatch.setattr(heads, "CHUNK", 2 * 400)
    assert not differences(measure(model, batches["both"]), whole)
    assert calls == before and before.count("lora_A.default") == 1
    labels = batches["both"]["labels"][:, 1:]
    at = labels != -100
    scores = logits(model, batches["both"])[:, :-1]
    assert whole.loss == pytest.approx(nn.functional.cross_entropy(scores[at], labels[at], reduction="sum").item(), rel=1e-5)


def test_dropout_acts_in_training_only(batches: dict[str, Any]) -> None:
    spec = model_spec(adapt={"lora": LoRASpec(rank=3, dropout=0.5, targets=("q_proj", "lm_head"))})
    model = made(spec)
    assert torch.equal(logits(model, batches["both"]), logits(made(replace(spec, adapt={"lora": LoRASpec(rank=3, targets=("q_proj", "lm_head"))})), batches["both"]))
    model.train()
    assert measure(model, batches["both"]).loss != measure(model, batches["both"]).loss


# ---- what is refused -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Owner(AdaptationSpec):
    """Owns a feed-forward network, as a mixture of experts does."""

    use: ClassVar[str] = "owner"
    place: ClassVar[int] = 2

    def plan(self, llm_config: Any) -> Sequence[str]:
        return ("model.layers.1.mlp",)

    def build(self, decoder: nn.Module, scope: object) -> None: ...

    def initialise(self, decoder: nn.Module) -> None: ...

    def groups(self, decoder: nn.Module) -> Mapping[str, list[nn.Parameter]]:
        return {}


@pytest.mark.parametrize(
    ("adapt", "said"),
    [
        ({"lora": LoRASpec(targets=("q_porj",))}, r"no module of the llm is called 'q_porj'.*did you mean 'q_proj'"),
        ({"lora": LoRASpec(targets=("mlp",))}, r"no module of the llm is called 'mlp'"),
        ({"lora": LoRASpec(targets=("input_layernorm",))}, r"input_layernorm of the llm cannot carry LoRA.*LlamaRMSNorm"),
        ({"lora": LoRASpec(), "more": LoRASpec(targets=("q_proj",))}, r"q_proj of the llm carries LoRA already"),
        ({"lora": LoRASpec(targets=("up_proj",)), "owner": Owner()}, r"lora and owner claim the same module.*model\.layers\.1\.mlp\.up_proj and model\.layers\.1\.mlp"),
    ],
)  # fmt: skip
def test_targets_that_cannot_be(adapt: Mapping[str, AdaptationSpec], said: str) -> None:
    model = made(model_spec())
    with pytest.raises(ConfigurationError, match=said):
        model.add_all(adapt)


def test_two_loras_share_a_part_where_their_targets_differ(tmp_path: Path, batches: dict[str, Any]) -> None:
    adapt = {"attention": LoRASpec(rank=4, targets=("*.self_attn.*_proj",)), "up": LoRASpec(rank=2, targets=("layers.1.mlp.up_proj",))}
    model = made(model_spec(adapt=adapt))
    assert len(model.groups()["llm.lora"]) == 2 * (8 + 1)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(saved_model(tmp_path), batches["both"]), logits(model, batches["both"]))


@pytest.mark.parametrize(
    ("plain", "said"), [({"rank": 0}, "rank cannot be this"), ({"dropout": 1.0}, "dropout cannot"), ({"targets": []}, "targets cannot"), ({"part": "head"}, "part: wrong")]
)
def test_settings_that_cannot_be(plain: Mapping[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        from_plain(registry, {"use": "lora", **plain})


def test_the_check_names_the_key(root: Path) -> None:
    report = vlm.check(vlm.compose("llava_tiny", f"data_root={root}", "model.adapt={lora: {targets: [q_porj]}}"))
    assert [str(problem).partition(":")[0] for problem in report.problems] == ["model.adapt.lora"]


def test_lora_does_not_come_after_what_is_built_on_top_of_it(root: Path) -> None:
    late = "model.adapt={twin: {since: align}, lora: {since: instruct}}"
    run = vlm.compose(str(Path(__file__).parents[1] / "extension" / "run.yaml"), f"data_root={root}", late)
    said = "lora enters after twin, which is built on top of it"
    assert any(said in str(problem) for problem in vlm.check(run).problems)
    model = made(model_spec(adapt={"twin": run.model.adapt["twin"]}))
    with pytest.raises(ConfigurationError, match=said):
        model.add("lora", run.model.adapt["lora"])


# ---- a run ---------------------------------------------------------------------------------------------------------------------


def run(root: Path, folder: Path, name: str, *more: str, resume: bool = False) -> Path:
    adapt = "{tower_lora: {use: lora, part: encoder, rank: 2}, lora: {since: instruct, rank: 4, dropout: 0.1, targets: ['*_proj', lm_head, embed_tokens]}}"
    train = ("stages.align.train={connector: 1.0e-3, encoder: {lora: 2.0e-3}}", "stages.instruct.train={connector: 1.0e-3, llm: {rest: frozen, lora: 2.0e-3}}")
    shape = ("model.llm.config.tie_word_embeddings=true", "save.every=1", "every_stage.checkpointing=true", f"model.adapt={adapt}")
    return vlm.fit(vlm.compose("llava_tiny", f"data_root={root}", f"runs={folder}", f"name={name}", *shape, *train, *more), resume=resume)


def test_a_run_of_two_stages_resumes_bit_by_bit(root: Path, tmp_path: Path) -> None:
    whole = run(root, tmp_path, "whole")
    with stopped_at(6):
        run(root, tmp_path, "cut")
    cut = run(root, tmp_path, "cut", resume=True)
    expected, got = (load_file(folder / "export" / "model.safetensors") for folder in (whole, cut))
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)

    align = load_file(whole / "stages" / "align" / "model.safetensors")
    assert not any(".lora_" in name for name in align if name.startswith("llm."))
    for name, tensor in expected.items():
        before: Any = align.get(name, align.get(name.replace(".base_layer", "") if name.startswith("llm.") else name))
        if name.startswith("connector.") or (".lora_B." in name and name.startswith("llm.") and ".layers.1.self_attn" in name):
            assert before is None or not torch.equal(tensor, before), name
            assert tensor.abs().max() > 0, name
        elif ".lora_" not in name or name.startswith("encoder."):
            assert torch.equal(tensor, before), name  # what nobody named is frozen
    assert any(tensor.abs().max() > 0 for name, tensor in align.items() if ".lora_B." in name and name.startswith("encoder."))
    rates = [record["rates"] for record in records(whole)]
    assert set(rates[0]) == {"connector.mlp", "encoder.lora"} and set(rates[-1]) == {"connector.mlp", "llm.lora"}


def test_the_same_at_zero_3(root: Path, tmp_path: Path) -> None:
    plain, sharded = (load_file(run(root, tmp_path, f"zero{zero}", f"every_stage.deepspeed=zero{zero}") / "export" / "model.safetensors") for zero in (0, 3))
    assert plain.keys() == sharded.keys()
    assert all(torch.allclose(plain[name], sharded[name], atol=2e-5) for name in plain)


def test_the_released_recipe() -> None:
    align, instruct = vlm.check(vlm.compose("llava_1.5_7b_lora")).stages
    trained = {group.path: (group.rate, group.count) for group in instruct.groups if group.rate is not None}
    layer = 4 * (4096 + 4096) + 3 * (4096 + 11008)  # per rank: A and B of q, k, v, o and of gate, up, down
    assert instruct.trainable == 32 * 128 * layer + 20_979_712
    assert trained["llm.lora"] == (2e-4, 32 * 128 * layer) and {rate for rate, _ in trained.values()} == {2e-4, 2e-5}
    assert not any(group.path == "llm.lora" for group in align.groups)
