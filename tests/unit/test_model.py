"""The model: batches equal rows, rows in one row equal rows apart, gradients come in one order, files give back what was saved."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conversations import batch_of, drawn, packed, processor, rows_of, says, user
from equal import differences, measure, trained
from models import DECODERS, FAMILY, TOWERS, made, model_spec
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

import vlm.auto  # noqa: F401
from vlm.connectors.mlp import MLPSpec
from vlm.data.sample import Picture, Sample
from vlm.errors import CheckpointError, DataError
from vlm.llm import context as contexts
from vlm.llm.decoder import layers
from vlm.loading import first_model, load, saved_model
from vlm.model import VLM
from vlm.processor import VLMProcessor, placeholder_id
from vlm.row import IGNORE, Row

EVERY = pytest.mark.parametrize("family, attention, tower", [*((*decoder, "clip") for decoder in DECODERS), ("llama", "sdpa", "siglip")])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Picture]:
    return drawn(tmp_path_factory.mktemp("pictures"))


# ---- equalities ------------------------------------------------------------------------------------------------------------


@EVERY
def test_a_mixed_batch_is_the_sum_of_its_rows(pictures: list[Picture], family: str, attention: str, tower: str) -> None:
    model, rows = made(family, attention, tower), rows_of(pictures, tower)
    together = measure(model, batch_of(*rows.values()))
    alone = measure(model, *(batch_of(row) for row in rows.values()))
    assert together.gradients.keys() == trained(model).keys()
    assert not differences(together, alone)
    plain = [row for name, row in rows.items() if name != "branches"]
    assert batch_of(*plain)["plain"] and not differences(measure(model, batch_of(*plain)), measure(model, batch_of(*plain) | {"plain": False}))


@EVERY
def test_checkpointed_is_not(pictures: list[Picture], family: str, attention: str, tower: str) -> None:
    model, rows = made(family, attention, tower), rows_of(pictures, tower)
    batches = [batch_of(*rows.values()), batch_of(rows["vision"]), packed(rows["several"], rows["branches"])]
    before = measure(model, *batches)
    model.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls = count_calls(model)
    assert not differences(measure(model, *batches), before)
    assert calls[0] == 2 * len(batches)  # it was really recomputed


def count_calls(model: VLM) -> list[int]:
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    layers(model.llm)[0].mlp.register_forward_pre_hook(count)
    return calls


@FAMILY
def test_documents_of_one_row_do_not_see_one_another(pictures: list[Picture], family: str, attention: str) -> None:
    model, rows = made(family, attention), rows_of(pictures)
    if family in tiny.WINDOWED:
        assert min(map(len, rows.values())) > 12 in [layer.window for layer in layers(model.llm)]  # the window acts inside the documents
    for names in (("vision", "text"), ("several", "branches", "text"), ("branches", "branches")):
        chosen = [rows[name] for name in names]
        alone = measure(model, *map(batch_of, chosen))
        assert not differences(measure(model, packed(*chosen)), alone), names
        leaking = packed(*chosen)
        leaking["document_ids"] = torch.zeros_like(leaking["document_ids"])
        assert differences(measure(model, leaking), alone), names


def test_a_mask_without_the_document_test_is_noticed(pictures: list[Picture], monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = made(), rows_of(pictures)
    alone = measure(model, batch_of(rows["vision"]), batch_of(rows["text"]))
    allowed = contexts.TokenContext._allowed

    def leaking(self: contexts.TokenContext, window: int | None, first_key: int) -> Tensor:
        one = replace(self, document=torch.zeros_like(self.document), keys=replace(self.keys, document=torch.zeros_like(self.keys.document)))
        return allowed(one, window, first_key)

    monkeypatch.setattr(contexts.TokenContext, "_allowed", leaking)
    assert differences(measure(model, packed(rows["vision"], rows["text"])), alone)


@FAMILY
def test_branches_are_conversations_of_their_own(pictures: list[Picture], family: str, attention: str) -> None:
    model, one = made(family, attention), processor(policy="pad")
    pairs = [("What colour?", "red"), ("How many?", "two objects"), ("Where?", "left")]
    apart = [one.row(Sample("", (user(pictures[1], f"\n{question}"), says(answer)))) for question, answer in pairs]
    assert not differences(measure(model, batch_of(rows_of(pictures)["branches"])), measure(model, *map(batch_of, apart)))


@FAMILY
def test_on_text_it_is_transformers_own_model(pictures: list[Picture], family: str, attention: str) -> None:
    model = made(family, attention).eval()
    theirs = AutoModelForCausalLM.from_config(model.llm.config, attn_implementation=attention).eval()
    theirs.load_state_dict(model.llm.state_dict())
    ids = torch.randint(0, 300, (2, 30))
    whole, padded = torch.ones_like(ids), torch.ones_like(ids)
    padded[1, :11] = 0  # on the left, as for generation
    with torch.no_grad():
        for mask in (whole, padded):
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            ours = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
            expected = theirs(input_ids=ids, attention_mask=mask, position_ids=positions).logits
            assert torch.allclose(ours[mask == 1], expected[mask == 1], rtol=0, atol=1e-6)
        assert torch.allclose(model(input_ids=ids).logits, model(input_ids=ids, attention_mask=whole).logits, rtol=0, atol=1e-6)  # causality alone is the mask


def test_a_window_holds_where_causality_is_the_mask(pictures: list[Picture]) -> None:
    """sdpa without a mask, except in layers whose window is shorter than the rows."""
    model, rows = made("qwen2", "sdpa", use_sliding_window=True, sliding_window=12, max_window_layers=1), rows_of(pictures)
    assert [layer.window for layer in model.llm.model.layers] == [None, 12]
    theirs = AutoModelForCausalLM.from_config(model.llm.config, attn_implementation="sdpa")
    theirs.load_state_dict(model.llm.state_dict())
    ids = torch.randint(0, 300, (2, 30))
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, theirs(input_ids=ids).logits, rtol=0, atol=1e-6)
    alone = measure(model, *map(batch_of, rows.values()))
    assert not differences(measure(model, batch_of(*rows.values())), alone) and not differences(measure(model, packed(*rows.values())), alone)


# ---- gradients -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def arrivals(model: VLM) -> Iterator[list[str]]:
    """Names of parameters in the order in which their gradients are complete."""
    seen: list[str] = []

    def write(name: str) -> Any:
        return lambda _: seen.append(name)

    handles = [parameter.register_post_accumulate_grad_hook(write(name)) for name, parameter in model.named_parameters() if parameter.requires_grad]
    yield seen
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("frozen", [(), ("encoder",), ("encoder", "llm")])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family, tower", [("llama", "clip"), ("qwen2", "siglip"), ("gemma2", "clip")])
def test_gradients_arrive_in_one_order(pictures: list[Picture], family: str, tower: str, checkpointing: bool, frozen: tuple[str, ...]) -> None:
    model, rows = made(family, tower=tower), rows_of(pictures, tower)
    for name in frozen:
        getattr(model, name).requires_grad_(False)
    if checkpointing:
        model.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    unsupervised = replace(rows["text"], labels=[IGNORE] * len(rows["text"]))
    batches = {
        "vision": batch_of(rows["vision"]),
        "text": batch_of(rows["text"]),
        "mixed": batch_of(*rows.values()),
        "several, longer first": batch_of(rows["several"], rows["vision"]),
        "packed with branches": packed(rows["text"], rows["branches"], rows["several"]),
        "empty": batch_of(Row("", "", [0], [IGNORE], [0], [-1], [0], [0], [])),
        "unsupervised": batch_of(unsupervised),
    }
    orders = {}
    for name, batch in batches.items():
        model.zero_grad(set_to_none=True)
        with arrivals(model) as seen:
            model(**batch).loss_sum.backward()
        orders[name] = list(seen)
    expected = {name for name, parameter in trained(model).items() if parameter.requires_grad}
    for name, order in orders.items():
        assert set(order) == expected and len(order) == len(expected), name
        assert order == orders["vision"], name


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("level", [-2, -1, 1, 0, "final"])
def test_what_is_called_unused_gets_no_gradient_and_all_else_does(pictures: list[Picture], tower: str, level: Any) -> None:
    spec = replace(model_spec(tower=tower), connector=MLPSpec(level=level))
    torch.manual_seed(0)
    model = first_model(spec, placeholder_id(tiny.tokenizer())).train()
    measure(model, batch_of(*rows_of(pictures, tower).values()))
    assert {name for name, parameter in model.named_parameters() if parameter.grad is None} == model.state_dict().keys() - trained(model).keys() - {
        name for name, _ in model.named_buffers()
    }
    assert {id(parameter) for parameter in model.unused()} <= {id(parameter) for parameter in model.encoder.parameters()}
    for name, parameter in trained(model).items():
        dark = name.endswith("k_proj.bias") or (
            level == 0 and name.endswith("class_embedding")
        )  # a shift of all keys changes no attention; a summary token is read by patches only
        if name.startswith("encoder.") and not dark:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_every_parameter_is_in_one_group() -> None:
    for family in tiny.FAMILIES:
        model = made(family)
        grouped = [id(parameter) for parameters in model.groups().values() for parameter in parameters]
        assert len(grouped) == len(set(grouped)) and set(grouped) == {id(parameter) for parameter in model.parameters()}
        assert {"encoder", "connector.mlp", "llm.embed", "llm.attention", "llm.ffn", "llm.norm"} <= model.groups().keys()
        assert ("llm.head" in model.groups()) == (family not in tiny.TIED)


# ---- pictures among text ---------------------------------------------------------------------------------------------------


def test_a_row_holds_its_own_pictures_only(pictures: list[Picture]) -> None:
    model, rows = made().eval(), rows_of(pictures)
    with torch.no_grad():
        together = model.embed(*embedded(batch_of(*rows.values())))
        for index, row in enumerate(rows.values()):
            assert torch.allclose(model.embed(*embedded(batch_of(row)))[0], together[index, : len(row)], atol=1e-6), row.id
        other = rows | {"vision": replace(rows["vision"], images=rows["several"].images[1:])}
        swapped = model.embed(*embedded(batch_of(*other.values())))
    changed = (swapped - together).abs().amax(-1) > 1e-4
    vision = batch_of(*rows.values())["mm_token_type_ids"] == 1
    assert torch.equal(changed[0], vision[0]) and not changed[1:].any()


def embedded(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Any]:
    return batch["input_ids"], batch["mm_token_type_ids"] == 1, batch["images"]


def test_a_batch_with_a_missing_picture_is_refused(pictures: list[Picture]) -> None:
    model, batch = made(), batch_of(rows_of(pictures)["several"])
    for images in (batch["images"][:1], batch["images"] * 2):
        with pytest.raises(DataError, match=r"got (4|16) features; expected 8 placeholder tokens"):
            model(**batch | {"images": images})


@pytest.mark.parametrize("training", [True, False])
def test_placeholders_without_any_picture_are_refused(pictures: list[Picture], training: bool) -> None:
    model, batch = made().train(training), batch_of(rows_of(pictures)["several"])
    with pytest.raises(DataError, match=r"got 0 features; expected 8 placeholder tokens"):
        model(**batch | {"images": []})


def test_the_processor_may_be_left_out_for_text(pictures: list[Picture]) -> None:
    model = made().eval()
    output = model(input_ids=torch.randint(0, 300, (2, 5)))
    assert output.context.document.tolist() == [[0] * 5, [1] * 5] and int(output.context.units()["document"]) == 2


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_bfloat16(pictures: list[Picture], family: str) -> None:
    model, batch = made(family), batch_of(*rows_of(pictures).values())
    exact = model(**batch).loss.item()
    half = made(family).to(torch.bfloat16)
    output = half(**batch | {"images": [image.to(torch.device("cpu"), torch.bfloat16) for image in batch["images"]]})
    output.loss.backward()
    assert output.loss_sum.dtype == torch.float32 and output.loss.item() == pytest.approx(exact, rel=0.05)
    assert all(parameter.grad is not None and torch.isfinite(parameter.grad).all() for parameter in trained(half).values())


# ---- files -----------------------------------------------------------------------------------------------------------------

SAVED = [("llama", "clip", {}), ("llama", "siglip", {"vocab_size": 512}), ("qwen2", "clip", {"tie_word_embeddings": True}), ("gemma2", "siglip", {})]


def equal(left: VLM, right: VLM) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("family, tower, numbers", SAVED)
def test_what_is_saved_comes_back_bit_for_bit(pictures: list[Picture], tmp_path: Path, family: str, tower: str, numbers: dict[str, Any]) -> None:
    model, one = made(family, tower=tower, **numbers).eval(), processor(policy="pad", encoder=model_spec(tower=tower).encoder)
    next(model.encoder.parameters()).data += 0.125  # a tuned tower is not overwritten by a stock one
    model.save_pretrained(tmp_path)
    one.save_pretrained(tmp_path)
    batch = batch_of(*rows_of(pictures, tower).values())
    expected = model(**batch).loss_sum
    ways = {
        "from_pretrained": VLM.from_pretrained(tmp_path),
        "auto": AutoModelForImageTextToText.from_pretrained(tmp_path),
        "saved_model": saved_model(tmp_path),
        "load": load(tmp_path)[0],
    }
    for name, again in ways.items():
        assert type(again) is VLM and equal(model, again), name
        assert torch.equal(again.eval()(**batch).loss_sum, expected), name
        tied = again.llm.get_output_embeddings().weight is again.llm.get_input_embeddings().weight
        assert tied == bool(model.llm.config.tie_word_embeddings), name
        assert (again.spec.encoder, again.spec.connector) == (model.spec.encoder, model.spec.connector), name
    for reader in (AutoProcessor.from_pretrained(tmp_path), VLMProcessor.from_pretrained(tmp_path), load(tmp_path)[1]):
        assert type(reader) is VLMProcessor
        talk = Sample("", (user(pictures[0], "\nWhat?"), says("red")))
        left, right = reader.row(talk), one.row(talk)
        assert (left.ids, left.labels, left.types) == (right.ids, right.labels, right.types)
        assert all(torch.equal(left.images[0].views[name], view) for name, view in right.images[0].views.items())
        assert reader.policy == "pad" and reader.prompt.spec == one.prompt.spec


def test_transformers_does_not_draw_our_values_again() -> None:
    model = made()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for marked in (*model.modules(), *model.parameters()):
        marked.__dict__.pop("_is_hf_initialized", None)
    model.initialize_weights()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    made().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("fault", ["missing", "unexpected", "mis-shaped"])
@pytest.mark.parametrize("part", ["encoder.tower.encoder.layers.0.mlp.fc1.weight", "connector.mlp.layers.0.bias", "llm.model.layers.1.self_attn.q_proj.weight"])
def test_keys_that_do_not_fit_are_named(saved: Path, tmp_path: Path, part: str, fault: str) -> None:
    tensors = load_file(saved / "model.safetensors")
    if fault == "missing":
        del tensors[part]
    elif fault == "mis-shaped":
        tensors[part] = torch.cat([tensors[part], tensors[part]])
    named = part + ".more" if fault == "unexpected" else part
    if fault == "unexpected":
        tensors[named] = torch.zeros(2)
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for way in (VLM.from_pretrained, AutoModelForImageTextToText.from_pretrained, saved_model):
        with pytest.raises(CheckpointError, match=named.replace(".", r"\.")):
            way(tmp_path)


def test_a_checkpoint_of_an_unknown_part_names_it(saved: Path, tmp_path: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    config["encoder"]["use"] = "clap"
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    with pytest.raises(Exception, match=r"no encoder is called 'clap'.*did you mean 'clip'"):
        VLM.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds no model"):
        load(tmp_path / "elsewhere")
