"""MM-LoRA: the identity at first, each token its own update, the equalities of every adaptation in every family, Arcana's published numbers."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import tiny
import torch
from adapted import batches_of, logits, made, model_spec
from equal import differences, measure
from torch import Tensor, nn

from vlm.composition import from_plain, to_plain
from vlm.config import LLMSpec
from vlm.errors import ConfigurationError
from vlm.llm import registry
from vlm.llm.base import check_claims
from vlm.llm.context import Scope, TokenContext
from vlm.llm.decoder import skeleton
from vlm.llm.lora import LoRASpec
from vlm.llm.mm_lora import MMLoRALinear, MMLoRASpec
from vlm.loading import saved_model, text_config
from vlm.model import VLM

RANKS = {"vision": 2, "language": 3}
EVERYWHERE = {"mm_lora": MMLoRASpec(rank=RANKS, scale={"vision": 1.5, "language": 2.0}, dropout=0.0)}
SHAPES = ("vision", "text", "both", "packed")


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return batches_of(tmp_path_factory.mktemp("pictures"))


def linear(spec: MMLoRASpec, into: int = 6, out: int = 5, bias: bool = True) -> MMLoRALinear:
    """One routed layer, with values everywhere, that sees what its scope holds."""
    torch.manual_seed(0)
    layer = spec.routed(nn.Linear(into, out, bias=bias), Scope())
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def seen(vision: Tensor) -> TokenContext:
    facts: Any = dict.fromkeys(("document", "picture", "branch", "order", "position", "keys"))
    return TokenContext(type=vision.long(), **facts)


# ---- one layer ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [{"vision": 2, "language": 3}, {"vision": 4, "language": 0}, {"vision": 0, "language": 4}])
@pytest.mark.parametrize("scale", [2.0, {"vision": 0.5, "language": 3.0}])
def test_each_token_takes_its_own_update(ranks: dict[str, int], scale: Any) -> None:
    layer = linear(MMLoRASpec(rank=ranks, scale=scale, dropout=0.0))
    x, vision = torch.randn(2, 7, 6), torch.rand(2, 7) > 0.5
    base: Any = layer.base_layer
    expected = base(x)
    for modality, mask in (("vision", vision), ("language", ~vision)):
        if ranks[modality]:
            factor = scale[modality] if isinstance(scale, dict) else scale
            expected = expected + mask[..., None] * factor * (x @ layer.lora_A[modality].weight.T @ layer.lora_B[modality].weight.T)  # type: ignore[operator]
    with layer.scope.use(seen(vision)):
        assert torch.allclose(layer(x), expected, atol=1e-5)
    language = base(x)
    if ranks["language"]:
        factor = scale["language"] if isinstance(scale, dict) else scale
        language = language + factor * (x @ layer.lora_A["language"].weight.T @ layer.lora_B["language"].weight.T)  # type: ignore[operator]
    assert torch.allclose(layer(x), language, atol=1e-5)  # no context: all language
    assert torch.allclose(layer(x[0]), language[0], atol=1e-5)


def test_every_parameter_gets_a_gradient_from_tokens_of_either_kind() -> None:
    layer = linear(MMLoRASpec(rank=RANKS, dropout=0.0))
    for only, other in (("vision", "language"), ("language", "vision")):
        layer.zero_grad()
        with layer.scope.use(seen(torch.full((1, 4), only == "vision"))):
            layer(torch.randn(1, 4, 6)).square().sum().backward()
        for pair in (layer.lora_A, layer.lora_B):
            assert pair[only].weight.grad.any() and pair[other].weight.grad is not None and not pair[other].weight.grad.any()  # type: ignore[union-attr]


def test_what_is_not_finite_stays_in_its_modality() -> None:
    layer = linear(MMLoRASpec(rank=RANKS, dropout=0.0))
    vision = torch.tensor([[True, False]])
    with torch.no_grad():
        layer.lora_A["vision"].weight.fill_(torch.inf)  # type: ignore[union-attr]
    with layer.scope.use(seen(vision)):
        out = layer(torch.rand(1, 2, 6))
    assert not out[0, 0].isfinite().any() and out[0, 1].isfinite().all()


@pytest.mark.parametrize("dropout", [0.3, {"vision": 0.1, "language": 0.6}, {"vision": 0.4, "language": 0.0}])
def test_dropout_has_the_rate_of_the_tokens_modality(dropout: Any) -> None:
    layer = linear(MMLoRASpec(rank=RANKS, dropout=dropout)).train()
    vision = torch.arange(400) % 2 == 0
    dropped = layer.drop(torch.ones(400, 100), vision)
    for modality, rows in (("vision", vision), ("language", ~vision)):
        rate = dropout[modality] if isinstance(dropout, dict) else dropout
        kept = dropped[rows] != 0
        assert abs(1 - kept.float().mean().item() - rate) < 0.02
        assert torch.allclose(dropped[rows][kept], torch.tensor(1 / (1 - rate)))
    assert torch.equal(layer.eval().drop(torch.ones(4, 3), vision[:4]), torch.ones(4, 3))


def test_dropout_is_in_the_layers_output() -> None:
    layer = linear(MMLoRASpec(rank=RANKS, dropout=0.5)).train()
    x = torch.randn(1, 8, 6)
    assert not torch.allclose(layer(x), layer.eval()(x))


def test_a_pair_is_never_merged() -> None:
    with pytest.raises(ConfigurationError, match="cannot be merged"):
        linear(MMLoRASpec(rank=RANKS)).merge()


# ---- settings ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"rank": {"vision": 2}}, "rank is given per modality. got vision; expected vision and language"),
        ({"rank": {"vision": -1, "language": 2}}, "rank cannot be this. got -1"),
        ({"rank": {"vision": 0, "language": 0}}, "both ranks are 0"),
        ({"scale": 0.0}, "scale cannot be this. got 0.0"),
        ({"dropout": {"vision": 0.1, "language": 1.0}}, "dropout cannot be this. got 1.0"),
        ({"dropout": {"vision": 0.1, "text": 0.1}}, "dropout is given per modality. got vision, text"),
        ({"targets": ()}, "targets cannot be this"),
    ],
)
def test_settings_that_make_no_sense(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        MMLoRASpec(**fields)
    assert words in str(caught.value)


def test_what_is_written_comes_back() -> None:
    for spec in (MMLoRASpec(), EVERYWHERE["mm_lora"], MMLoRASpec(dropout={"vision": 0.1, "language": 0.2}, targets=("q_proj",))):
        assert from_plain(registry, to_plain(spec)) == spec


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "input_layernorm"])
def test_only_linears_of_the_layers_tell_pictures_from_text(target: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot tell tokens of pictures from others"):
        made(model_spec(adapt={"mm_lora": MMLoRASpec(rank=RANKS, targets=(target,))}))


# ---- in a decoder --------------------------------------------------------------------------------------------------------------


def test_published_sizes() -> None:
    """systems/arcana.md, section 6.1: 7B and 13B at 64 + 192."""
    llama = {"model_type": "llama", "vocab_size": 32000, "tie_word_embeddings": False}
    sizes: tuple[tuple[dict[str, int], tuple[int, int]], ...] = (
        ({"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}, (159_907_840, 479_723_520)),
        ({"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}, (1_001_390_080 // 4, 1_001_390_080 * 3 // 4)),
    )
    for numbers, expected in sizes:
        decoder = skeleton(text_config(replace(model_spec(), llm=LLMSpec(config=llama | numbers))))
        spec = MMLoRASpec()
        with torch.device("meta"):
            spec.build(decoder, Scope())
        counts = {path: sum(parameter.numel() for parameter in parameters) for path, parameters in spec.groups(decoder).items()}
        assert counts == {"mm_lora.vision": expected[0], "mm_lora.language": expected[1]}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_nothing_changes_at_first(family: str, batches: dict[str, Any]) -> None:
    plain = made(model_spec(family))
    before = logits(plain, batches["both"])
    plain.add("mm_lora", MMLoRASpec(rank=RANKS))
    assert not any(module.training for module in plain.modules())  # peft's layers are born in training mode
    assert torch.equal(logits(plain, batches["both"]), before)
    groups = plain.groups()
    assert len(groups["llm.mm_lora.vision"]) == len(groups["llm.mm_lora.language"]) >= 2 * 4 * 2
    assert {parameter.requires_grad for parameter in groups["llm.mm_lora.vision"]} == {True}
    assert all(pair["vision"].weight.any() and not up["vision"].weight.any() for pair, up in pairs(plain))


def pairs(model: VLM) -> list[tuple[Any, Any]]:
    spec: Any = model.spec.adapt["mm_lora"]
    return [(layer.lora_A, layer.lora_B) for layer in spec.layers(model.llm).values()]


def test_pictures_take_one_side_and_words_the_other(batches: dict[str, Any]) -> None:
    model = made(model_spec(adapt=EVERYWHERE))
    before = {name: logits(model, batches[name]) for name in ("text", "vision")}
    with torch.no_grad():
        for _, up in pairs(model):
            up["vision"].weight.mul_(2)
    assert torch.equal(logits(model, batches["text"]), before["text"])
    assert not torch.allclose(logits(model, batches["vision"]), before["vision"], atol=1e-3)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_rows_batches_checkpoints_and_answers_agree(family: str, batches: dict[str, Any]) -> None:
    """packed = unpacked, checkpointed = not, batched left-padded = single, cached = uncached; and a context without pictures is noticed."""
    model = made(model_spec(family, EVERYWHERE))
    apart = measure(model, batches["vision"], batches["text"])
    assert not differences(measure(model, batches["both"]), apart)
    assert not differences(measure(model, batches["packed"]), apart)
    closed = MMLoRALinear._closed
    with patch.object(MMLoRALinear, "_closed", lambda layer, context, low: closed(layer, None, low)):
        assert differences(measure(model, batches["packed"]), apart)
    model.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert not differences(measure(model, batches["vision"], batches["text"]), apart)
    model.llm.gradient_checkpointing_disable()
    model.eval()
    together = model.generate(**batches["ask"], max_new_tokens=6, do_sample=False)
    for row, name in zip(together, ("ask_a", "ask_b"), strict=True):
        for cached in (True, False):
            [single] = model.generate(**batches[name], max_new_tokens=6, do_sample=False, use_cache=cached)
            assert row.tolist() == single.tolist()


def test_two_micro_batches_in_flight_keep_their_own_facts(batches: dict[str, Any]) -> None:
    """Both forward passes before the first backward, with checkpointing: recomputation must see the tokens of its own call."""
    model = made(model_spec(adapt=EVERYWHERE))
    apart = measure(model, batches["vision"], batches["text"])
    model.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.zero_grad(set_to_none=True)
    outputs = [model(**batches[name]) for name in ("vision", "text")]
    for output in outputs:
        output.loss_sum.backward()
    for name, gradient in apart.gradients.items():
        assert torch.allclose(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-6), name  # type: ignore[arg-type]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_come_in_one_order_whatever_the_rows_hold(family: str, checkpointing: bool, batches: dict[str, Any]) -> None:
    model = made(model_spec(family, EVERYWHERE))
    if checkpointing:
        model.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    order: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    orders = []
    for shape in SHAPES:
        order.clear()
        model(**batches[shape]).loss_sum.backward()
        orders.append(list(order))
    assert all(one == orders[0] for one in orders) and sum("lora_" in name for name in orders[0]) == 4 * len(pairs(model))


def test_what_is_saved_comes_back(tmp_path: Path, batches: dict[str, Any]) -> None:
    model = made(model_spec(adapt=EVERYWHERE))
    before = logits(model, batches["both"])
    model.save_pretrained(tmp_path)
    for one in (VLM.from_pretrained(tmp_path), saved_model(tmp_path)):
        assert torch.equal(logits(one, batches["both"]), before)


# ---- beside others ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("lora", "mm_lora"), ("mm_lora", "lora")])
def test_it_takes_what_others_leave(names: tuple[str, str], batches: dict[str, Any], tmp_path: Path) -> None:
    parts: Mapping[str, Any] = {"lora": LoRASpec(rank=2, targets=("q_proj", "lm_head")), "mm_lora": MMLoRASpec(rank=RANKS, dropout=0.0)}
    model = made(model_spec(adapt={name: parts[name] for name in names}))
    assert len(pairs(model)) == 12 and not any("q_proj" in path for path in parts["mm_lora"].layers(model.llm))
    assert {path.rpartition(".")[2] for path in parts["lora"].layers(model.llm)} == {"q_proj", "lm_head"}
    apart = measure(model, batches["vision"], batches["text"])
    assert not differences(measure(model, batches["packed"]), apart)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(VLM.from_pretrained(tmp_path), batches["both"]), logits(model, batches["both"]))


def test_named_targets_that_another_claims_are_refused() -> None:
    config = text_config(model_spec())
    claims = {"lora": LoRASpec(targets=("q_proj",)).plan(config), "mm_lora": MMLoRASpec(targets=("q_proj", "v_proj")).plan(config)}
    with pytest.raises(ConfigurationError, match="lora and mm_lora claim the same module"):
        check_claims(claims)
