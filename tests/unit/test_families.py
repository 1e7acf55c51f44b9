"""What differs from one decoder family to another: masks, windows, heads, names of parameters, attention implementations; and which families are refused."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from equal import Measured, differences, measure
from torch import Tensor
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

import vlm
from vlm.config import LLMSpec, ModelSpec
from vlm.connectors.mlp import MLPSpec
from vlm.encoders.clip import CLIPSpec
from vlm.errors import ConfigurationError, EnvironmentProblem
from vlm.features import ImageInput
from vlm.llm.context import TEXT, VISION, TokenContext
from vlm.llm.decoder import VARLEN, build_decoder, check_attention, layers, set_attention, stack
from vlm.loading import first_model
from vlm.model import VLM
from vlm.row import IGNORE, Row, collate

CLIP = CLIPSpec(config=tiny.tower_config(), weights="random")
PLACEHOLDER = 399
BOTH = pytest.mark.parametrize(
    "family, attention", [(family, attention) for family in tiny.FAMILIES for attention in ("sdpa", "eager") if (family, attention) != ("gemma2", "sdpa")]
)  # which transformers does not have


def made(family: str, attention: str = "auto", **numbers: Any) -> VLM:
    torch.manual_seed(0)
    model = first_model(ModelSpec(encoder=CLIP, connector=MLPSpec(), llm=LLMSpec(config=tiny.llm_config(family, **numbers), weights="random")), PLACEHOLDER)
    with torch.no_grad():
        for parameter in model.llm.parameters():  # no bias is zero, no scale is one
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    set_attention(model.llm, attention)
    return model.train()


def document(*parts: int, seed: int) -> Row:
    """A conversation of parts: so many words, or 0 for a picture (four tokens); the words of every second part of words are learned."""
    draw = torch.Generator().manual_seed(seed)
    row = Row("", "", [], [], [], [], [], [], [])
    learned = True
    for words in parts:
        count = words or 4
        ids = torch.randint(3, 300, (count,), generator=draw).tolist() if words else [PLACEHOLDER] * 4
        learned = not learned if words else learned
        row.labels += ids if words and learned else [IGNORE] * count
        row.ids += ids
        row.types += [TEXT if words else VISION] * count
        row.pictures += [-1 if words else len(row.images)] * count
        if not words:
            empty = CLIP.dummy()
            row.images.append(ImageInput({name: torch.randn(view.shape, generator=draw) for name, view in empty.views.items()}, empty.width, empty.height, empty.layout))
    row.branches, row.documents, row.positions = [0] * len(row.ids), [0] * len(row.ids), list(range(len(row.ids)))
    return row


DOCUMENTS = [document(3, 0, 4, 9, seed=1), document(20, 8, seed=2), document(2, 0, 1, 0, 5, 10, seed=3), document(1, 2, seed=4)]
"""One picture; text only; two pictures; very short. All but the last are longer than the windows of 12."""


def same(left: Measured, right: Measured) -> bool:
    """Whether two measurements agree within DESIGN rule 3, in every document too."""
    return torch.allclose(left.documents, right.documents, rtol=1e-6, atol=1e-7) and not differences(left, right)


def rows_apart() -> list[dict[str, Any]]:
    return [collate([row], pad_id=0) for row in DOCUMENTS]


def rows_packed() -> dict[str, Any]:
    """The documents in two rows, of which the second is padded."""
    return collate([Row.packed([DOCUMENTS[0], DOCUMENTS[1], DOCUMENTS[2]]), Row.packed(DOCUMENTS[3:])], pad_id=0)


# ---- masks -----------------------------------------------------------------------------------------------------------------


def without_documents(allowed: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def leaking(self: TokenContext, window: int | None, first_key: int) -> Tensor:
        blind = replace(self, document=self.document.clamp(max=0), keys=replace(self.keys, document=self.keys.document.clamp(max=0)))
        return allowed(blind, window, first_key)

    return leaking


def without_windows(allowed: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda self, window, first_key: allowed(self, None, first_key)


@BOTH
def test_packed_is_unpacked_and_a_leak_is_noticed(family: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(family, attention)
    assert (12 in [layer.window for layer in layers(model.llm)]) == (family in tiny.WINDOWED)
    apart, allowed = measure(model, *rows_apart()), TokenContext._allowed
    assert apart.documents.shape == (4,) and bool((apart.documents > 0).all())
    assert same(measure(model, rows_packed()), apart)
    for leak in (without_documents, *([without_windows] if family in tiny.WINDOWED else [])):
        monkeypatch.setattr(TokenContext, "_allowed", leak(allowed))
        assert not same(measure(model, rows_packed()), apart), leak.__name__


@BOTH
def test_text_has_transformers_own_loss(family: str, attention: str) -> None:
    capped = {"final_logit_softcapping": 2.0} if family.startswith("gemma") else {}
    model = made(family, attention, **capped).eval()
    theirs = AutoModelForCausalLM.from_config(model.llm.config, attn_implementation=attention).eval()
    theirs.load_state_dict(model.llm.state_dict())
    ids = torch.randint(0, 300, (2, 40))
    ours, own = model(input_ids=ids, labels=ids, logits_to_keep=0), theirs(input_ids=ids, labels=ids)
    assert torch.allclose(ours.logits, own.logits, rtol=0, atol=1e-6)
    assert ours.loss.item() == pytest.approx(own.loss.item(), rel=1e-6)
    assert not capped or 1.5 < own.logits.abs().max() <= 2
    ours.loss.backward()
    own.loss.backward()
    for (name, left), right in zip(model.llm.named_parameters(), theirs.parameters(), strict=True):
        assert left.grad is not None and right.grad is not None and torch.allclose(left.grad, right.grad, rtol=1e-5, atol=1e-6), name


# ---- parameters ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_parameters_are_grouped_by_what_they_are_for(family: str) -> None:
    model = made(family)
    names = {id(parameter): name for name, parameter in model.llm.named_parameters()}
    grouped = {path: [names[id(parameter)] for parameter in found] for path, found in model.groups().items() if path.startswith("llm.")}
    assert sorted(name for found in grouped.values() for name in found) == sorted(names.values())
    kinds = {
        "llm.embed": r"\.embed_(tokens|in)\.weight",
        "llm.attention": r"\.layers\.\d\.(self_attn|attention)\.([qkvo]_proj|qkv_proj|query_key_value|dense)\.(weight|bias)",
        "llm.ffn": r"\.layers\.\d\.mlp\.\w+\.(weight|bias)",
        "llm.norm": r"\.(layers\.\d\.(self_attn\.)?)?\w*norm(\.norms\.\d)?\.(weight|bias)",
        "llm.head": r"lm_head\.(weight|bias)",
    }
    for path, found in grouped.items():
        assert not [name for name in found if not re.search(kinds[path] + "$", name)], path
    assert set(grouped) == set(kinds) - ({"llm.head"} if family in tiny.TIED else set())
    assert ("lm_head.bias" in grouped.get("llm.head", [])) == (family == "phi")


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_gemma_scales_words_but_not_pictures(family: str) -> None:
    """transformers' PaliGemma and Gemma3 put features as they come from the projector among embeddings that the embedding itself has scaled."""
    model, row = made(family).eval(), DOCUMENTS[0]
    batch = collate([row], pad_id=0)
    vision = batch["mm_token_type_ids"] == VISION
    embeddings = model.embed(batch["input_ids"], vision, row.images)
    assert torch.equal(embeddings[vision], model.see(row.images).tokens)
    words = batch["input_ids"][~vision]
    assert torch.allclose(embeddings[~vision], next(model.llm.get_input_embeddings().parameters())[words] * 32**0.5, rtol=1e-6)
    seen: list[Tensor] = []
    layers(model.llm)[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    model(**batch)
    assert torch.equal(seen[0], embeddings)


# ---- what is refused -------------------------------------------------------------------------------------------------------

REFUSED = {
    "gpt2": ({}, "elsewhere than in `layers`"),
    "mamba": ({}, "layers of the kind linear_attention"),
    "falcon_h1": ({}, "layers of the kind hybrid"),
    "lfm2": ({"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}, "layers of the kind conv"),
    "llama4_text": ({}, "layers of the kind chunked_attention"),
    "bart": ({}, "takes no position_ids"),
    "jetmoe": ({}, "layer 0 has no attention, or one of an unknown name"),
    "whisper": ({}, "layer 0 expects an encoder"),
    "gemma3_text": ({"use_bidirectional_attention": True}, "attends in both directions"),
    "gemma3": ({}, "vision or audio part of its own"),
    "t5": ({}, "Unrecognized configuration class"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_family_that_cannot_be_masked_is_refused(kind: str) -> None:
    numbers, reason = REFUSED[kind]
    with torch.device("meta"), pytest.raises(ConfigurationError, match=reason) as caught:
        build_decoder(AutoConfig.for_model(kind, **numbers))
    assert kind in str(caught.value) and "take a causal LM" in str(caught.value)


def test_a_refused_family_is_a_problem_of_the_check() -> None:
    run = vlm.compose("llava_tiny", "model.llm={config: {model_type: mamba}, weights: random}", "data_root=/nowhere")
    assert any("'mamba' cannot be the decoder" in str(problem) for problem in vlm.check(run).problems)


# ---- attention without masks -----------------------------------------------------------------------------------------------


def flash_like(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, scaling: float, sliding_window: int | None = None, **kwargs: Any) -> Any:
    """What flash attention computes, from what it takes: (B, H, S, d) -> (B, S, H, d). Documents by cu_seq_lens, or padding by a (B, K) mask; the last query is at the last key."""
    cap = kwargs.get("softcap")
    cut = kwargs.get("cu_seq_lens_q")
    rows, heads, length, _ = query.shape
    key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    places = torch.arange(key.shape[2])
    distance = places[-length:, None] - places
    allowed = ((distance >= 0) & (distance < (sliding_window or distance.numel()))).expand(rows, 1, -1, -1)
    if attention_mask is not None:
        assert attention_mask.ndim == 2 and cut is None
        allowed = allowed & attention_mask[:, None, None].bool()
    if cut is not None:
        assert cut.dtype == torch.int32 and cut is kwargs["cu_seq_lens_k"] and kwargs["max_length_q"] == kwargs["max_length_k"] == cut.diff().max()
        segment = torch.bucketize(torch.arange(rows * length), cut, right=True).view(rows, 1, length)
        allowed = allowed & (segment[..., None] == segment[:, :, None])
    scores = query @ key.transpose(2, 3) * scaling
    scores = torch.tanh(scores / cap) * cap if cap else scores
    weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1)
    return (weights @ value).transpose(1, 2), None


@pytest.fixture
def flash() -> Iterator[str]:
    """Name of an attention implementation that is called as transformers calls flash attention. It is set on a config: asked by name, transformers would look for a package."""
    AttentionInterface.register("flash_like", flash_like)
    AttentionMaskInterface.register("flash_like", flash_attention_mask)
    yield "flash_like"
    AttentionInterface._global_mapping.pop("flash_like")
    AttentionMaskInterface._global_mapping.pop("flash_like")


PROVEN = [family for family in tiny.FAMILIES if tiny.FAMILIES[family]["model_type"] in VARLEN]


def test_every_family_that_may_use_flash_attention_is_tested() -> None:
    assert {tiny.FAMILIES[family]["model_type"] for family in PROVEN} == set(VARLEN)


@pytest.mark.parametrize("family", PROVEN)
def test_documents_without_a_mask_are_packed_as_with_one(family: str, flash: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(family)
    masked = measure(model, *rows_apart())
    model.llm.config._attn_implementation = flash
    assert same(measure(model, *rows_apart()), masked)
    assert same(measure(model, rows_packed()), masked)
    padded = collate(DOCUMENTS, pad_id=0)
    assert padded["plain"] and same(measure(model, padded), masked) and same(measure(model, padded | {"plain": False}), masked)
    model.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert same(measure(model, rows_packed()), masked)
    monkeypatch.setattr(TokenContext, "segments", lambda self: {})
    assert not same(measure(model, rows_packed()), masked)


@pytest.mark.parametrize("family", PROVEN)
def test_answers_without_a_mask_are_those_with_one(family: str, flash: str) -> None:
    model = made(family).eval()
    ids = torch.randint(3, 300, (2, 18))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    settings: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6, "min_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(input_ids=ids, **settings)
    model.llm.config._attn_implementation = flash
    given = model.generate(input_ids=ids, **settings)
    assert torch.equal(given.sequences, expected.sequences)
    assert torch.allclose(torch.stack(given.logits), torch.stack(expected.logits), rtol=0, atol=1e-4)


def test_what_flash_attention_cannot_do_is_said(flash: str) -> None:
    with pytest.raises(ConfigurationError, match=r"not safe for decoders of type 'stablelm'.*expected one of llama.*llm\.attention: auto"):
        set_attention(made("stablelm").llm, "flash_attention_2")
    spec = ModelSpec(encoder=CLIP, connector=MLPSpec(), llm=LLMSpec(config=tiny.llm_config("stablelm"), weights="random", attention="flash_attention_2"))
    with pytest.raises(ConfigurationError, match="not safe for decoders of type 'stablelm'"):  # before weights are loaded
        first_model(spec, PLACEHOLDER)
    branched = replace(DOCUMENTS[1], branches=[0] * 20 + [1] * 4 + [2] * 4, positions=[*range(20), *range(20, 24), *range(20, 24)])
    model = made("llama")
    model.llm.config._attn_implementation = flash
    with pytest.raises(ConfigurationError, match=r"independent questions need a mask.*got llm\.attention flash_like.*llm\.attention: sdpa"):
        model(**collate([branched], pad_id=0))


def test_an_attention_that_is_not_there_is_said() -> None:
    with pytest.raises(ConfigurationError, match=r"type 'gemma2' have no attention 'sdpa'.*llm\.attention: auto"):
        made("gemma2", "sdpa")
    if torch.cuda.is_available():
        pytest.skip("flash attention may be there")
    with pytest.raises(EnvironmentProblem, match=r"flash_attention_2 is not available here.*flash-attn"):
        made("llama", "flash_attention_2")
    check_attention(made("llama").llm.config, "flash_attention_2")  # a check on a laptop says nothing about the cluster
    assert made("llama", "eager").llm.config._attn_implementation == "eager" and made("gemma2").llm.config._attn_implementation == "eager"


# ---- beams -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gemma3", "gpt_neox", "phi3"])
def test_beams_of_a_batch_are_those_of_its_rows(family: str) -> None:
    model = made(family).eval()
    ids = torch.randint(3, 300, (2, 18))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    settings: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 3}
    together = model.generate(input_ids=ids, attention_mask=mask, **settings)
    assert torch.equal(together[:1], model.generate(input_ids=ids[:1], **settings))
    assert torch.equal(together[1:], model.generate(input_ids=ids[1:, 7:], **settings))


def test_a_stack_takes_our_embeddings_as_its_own() -> None:
    for family in tiny.FAMILIES:
        model, ids = made(family).eval(), torch.randint(3, 300, (1, 9))
        own = stack(model.llm)(input_ids=ids).last_hidden_state
        assert torch.equal(stack(model.llm)(inputs_embeds=model.get_input_embeddings()(ids)).last_hidden_state, own), family
