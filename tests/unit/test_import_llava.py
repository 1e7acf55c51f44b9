"""Imports of LLaVA folders, made small: every spelling of the keys answers as transformers' own class does. One fresh process answers for every model of this module."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from llava_folders import BASES, LISTS, LLAVA_15, OLD, SPELLINGS, change, respelt, spelt, with_start
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, LlavaForConditionalGeneration, PreTrainedTokenizerFast
from typer.testing import CliRunner

import vlm
from vlm.cli import app
from vlm.connectors.mlp import MLPSpec
from vlm.encoders.clip import CLIPSpec
from vlm.errors import CheckpointError, ConfigurationError
from vlm.features import ImageInput
from vlm.prompt import Prompt, PromptSpec
from vlm.weights import export as exporting
from vlm.weights import imports, llava, llava_read
from vlm.weights.imports import choose_prompt, import_model
from vlm.weights.public import chat_template

OWN = tiny.CHATML.replace("<|im_start|>", "#<|im_start|>")


@dataclass
class Theirs:
    folder: Path
    asked: list[exporting.Messages]
    answers: list[exporting.Case]


def without_breaks(messages: exporting.Messages) -> exporting.Messages:
    return [{**message, "content": [{**part, "text": part["text"].lstrip("\n")} if part["type"] == "text" else part for part in message["content"]]} for message in messages]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Theirs]:
    root = tmp_path_factory.mktemp("bases")
    exporting.draw_pictures(root)
    found: dict[str, Theirs] = {}
    for name, base in BASES.items():
        base.write(root / name)
        found[name] = Theirs(root / name, [exporting.questions()[index] for index in base.asked], [])
    jobs = [(one.folder, [without_breaks(asked) if BASES[name].breaks else asked for asked in one.asked]) for name, one in found.items()]
    for one, answers in zip(found.values(), exporting.fresh_answers(jobs, root), strict=True):
        one.answers = answers
    return found


@pytest.fixture(scope="module")
def llama(bases: dict[str, Theirs]) -> Path:
    return bases["llama"].folder


CASES = [
    *(("llama", spelling) for spelling in SPELLINGS),
    ("legacy", "hf_new"),
    ("qwen2", "hf_old"),
    ("qwen2", "hf_new"),
    ("mistral", "tower_without_prefix"),
    ("mistral", "hf_new"),
]


@pytest.mark.parametrize("base, spelling", CASES)
def test_it_answers_as_transformers_own_class_and_goes_back(base: str, spelling: str, bases: dict[str, Theirs], tmp_path: Path) -> None:
    theirs = bases[base]
    report = import_model(str(respelt(theirs.folder, tmp_path / "theirs", spelling)), tmp_path / "ours")
    model, processor = vlm.load(tmp_path / "ours")
    original = spelling.startswith("original")
    vicuna = base in ("llama", "legacy")
    assert (report.prompt, report.images) == (("vicuna_v1", "pad") if vicuna else ("chatml", "native"))
    assert processor.prompt.spec.system == (None if original or not vicuna else "")
    assert processor.prompt.spec.word_marks == (original or base == "legacy") == any("word mark" in note for note in report.notes)
    assert model.dtype == BASES[base].dtype

    llava.write(model, processor, tmp_path / "back")
    back, source = load_file(tmp_path / "back" / "model.safetensors"), spelt(load_file(theirs.folder / "model.safetensors"), OLD)
    assert back.keys() == source.keys()
    assert all(torch.equal(back[name], source[name]) and back[name].dtype == source[name].dtype for name in source)

    if original:  # its program has a system text, transformers' template has none
        processor.prompt = Prompt(PromptSpec(use="vicuna_v1", system=""), processor.tokenizer)
    ours = exporting.answers(model, processor, theirs.folder, theirs.asked, theirs.folder.parent)
    assert exporting.compare(ours, theirs.answers, tmp_path).max_logit_difference <= 1e-4
    assert sum("pixels" in case for case in ours) == (1 if vicuna else 3)


def test_what_the_folder_says_of_answers_is_kept(llama: Path, tmp_path: Path) -> None:
    import_model(str(respelt(llama, tmp_path / "theirs", "hf_old")), tmp_path / "ours")
    model, processor = vlm.load(tmp_path / "ours")
    assert set(model.generation_config.eos_token_id) >= {processor.tokenizer.eos_token_id}
    assert max(processor.tokenizer.get_vocab().values()) + 1 in model.generation_config.suppress_tokens
    assert json.loads((tmp_path / "ours" / "import.json").read_text())["source"] == str(tmp_path / "theirs")


# ---- keys ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spelling, prefix", [("hf_old", "vision_tower.vision_model."), ("hf_new", "model.vision_tower."), ("original", "model.vision_tower.vision_tower.vision_model.")]
)
def test_missing_and_unexpected_keys_are_listed_as_the_file_spells_them(spelling: str, prefix: str, llama: Path, tmp_path: Path) -> None:
    gone, extra = f"{prefix}encoder.layers.2.mlp.fc2.weight", "multi_modal_projector.linear_3.weight"

    def work(tensors: dict[str, Tensor]) -> None:
        del tensors[gone]
        tensors[extra] = torch.zeros(2)

    folder = change(respelt(llama, tmp_path / "theirs", spelling), work)
    with pytest.raises(CheckpointError, match=rf"1 missing \({gone}\); 1 unexpected \({extra}\)"):
        import_model(str(folder), tmp_path / "ours")
    assert not list(tmp_path.glob("ours*"))


def test_a_tensor_of_another_shape_or_given_twice_is_named(llama: Path, tmp_path: Path) -> None:
    def work(tensors: dict[str, Tensor]) -> None:
        tensors["multi_modal_projector.linear_1.bias"] = torch.zeros(7)
        tensors["lm_head.weight"] = tensors["language_model.lm_head.weight"] + 1

    folder = change(respelt(llama, tmp_path / "theirs", "hf_old"), work)
    with pytest.raises(
        CheckpointError, match=r"1 given twice with different values \(.*lm_head\.weight\); 1 mis-shaped \(multi_modal_projector.linear_1.bias \(7,\) for \(32,\)\)"
    ):
        import_model(str(folder), tmp_path / "ours")


def test_a_head_that_is_not_the_embedding_is_untied(bases: dict[str, Theirs], tmp_path: Path) -> None:
    other = torch.randn(512, 32).to(torch.bfloat16)
    folder = change(respelt(bases["qwen2"].folder, tmp_path / "theirs", "hf_new"), lambda tensors: tensors.update({"lm_head.weight": other}))
    report = import_model(str(folder), tmp_path / "ours")
    model, _ = vlm.load(tmp_path / "ours")
    assert any("untied" in note for note in report.notes)
    assert torch.equal(model.get_output_embeddings().weight, other) and not torch.equal(model.get_input_embeddings().weight, other)


def test_a_tied_head_that_the_file_repeats_stays_one_tensor(bases: dict[str, Theirs], tmp_path: Path) -> None:
    repeat = lambda tensors: tensors.update({"lm_head.weight": tensors["model.language_model.embed_tokens.weight"].clone()})  # noqa: E731
    import_model(str(change(respelt(bases["qwen2"].folder, tmp_path / "theirs", "hf_new"), repeat)), tmp_path / "ours")
    model, _ = vlm.load(tmp_path / "ours")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert "llm.lm_head.weight" not in load_file(tmp_path / "ours" / "model.safetensors")


def test_the_widest_dtype_of_a_mixed_file_is_kept(llama: Path, tmp_path: Path) -> None:
    halve = lambda tensors: tensors.update({name: tensor.half() for name, tensor in tensors.items() if "language_model" in name})  # noqa: E731
    report = import_model(str(change(respelt(llama, tmp_path / "theirs", "hf_old"), halve)), tmp_path / "ours")
    assert report.dtype == "float32"
    assert "the file mixes float16, float32; all became float32" in report.notes


def test_buffers_of_old_files_are_left_out_and_count_for_nothing(bases: dict[str, Theirs], tmp_path: Path) -> None:
    old = {"language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "vision_tower.vision_model.embeddings.position_ids": torch.arange(5)[None]}
    report = import_model(str(change(respelt(bases["qwen2"].folder, tmp_path / "theirs", "hf_old"), lambda tensors: tensors.update(old))), tmp_path / "ours")
    assert report.dtype == "bfloat16" and not any("mixes" in note for note in report.notes)


def test_a_vocabulary_without_room_grows_and_its_rows_stay(llama: Path, tmp_path: Path) -> None:
    model, notes = imports.read_model(llava_read.read(respelt(llama, tmp_path / "theirs", "hf_old")), 722)
    source = load_file(llama / "model.safetensors")["language_model.model.embed_tokens.weight"]
    embedding = model.get_input_embeddings().weight
    assert embedding.shape == (723, 32) and torch.equal(embedding[:720], source)
    assert torch.allclose(embedding[720:], source.mean(0).expand(3, -1), atol=1e-6)
    assert notes[0] == "the vocabulary of 720 rows got 3 more, for the picture token and the tokenizer"


def test_large_models_are_written_in_shards(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imports, "SHARD", "200KB")
    import_model(str(respelt(llama, tmp_path / "theirs", "hf_old")), tmp_path / "ours")
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 2
    model, _ = vlm.load(tmp_path / "ours")
    assert torch.equal(model.state_dict()["llm.lm_head.weight"], load_file(llama / "model.safetensors")["language_model.lm_head.weight"])


# ---- the tower -----------------------------------------------------------------------------------------------------------


def without_tower(llama: Path, folder: Path, **more: Any) -> Path:
    return change(respelt(llama, folder, "original", **more), lambda tensors: [tensors.pop(name) for name in list(tensors) if "vision_tower" in name])


@pytest.fixture
def tower(tmp_path: Path) -> Path:
    CLIPVisionModel(CLIPVisionConfig(**tiny.tower_config(hidden_size=128, intermediate_size=96))).save_pretrained(tmp_path / "tower")
    return tmp_path / "tower"


@pytest.mark.parametrize("named", [True, False])
def test_a_tower_beside_the_checkpoint(named: bool, llama: Path, tower: Path, tmp_path: Path) -> None:
    folder = without_tower(llama, tmp_path / "theirs", mm_vision_tower=str(tower) if named else "openai/not-here")
    import_model(str(folder), tmp_path / "ours", tower=None if named else str(tower))
    model, _ = vlm.load(tmp_path / "ours")
    written = load_file(tower / "model.safetensors")
    assert torch.equal(model.state_dict()["encoder.tower.embeddings.class_embedding"], next(tensor for name, tensor in written.items() if name.endswith("class_embedding")))


def test_a_tower_that_is_nowhere_is_an_error(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no vision tower.*'openai/not-here'.*--tower"):
        import_model(str(without_tower(llama, tmp_path / "theirs")), tmp_path / "ours")


def test_heads_that_no_file_tells_are_asked_for(tmp_path: Path, tower: Path) -> None:
    found = {"encoder.tower." + name: torch.empty(shape) for name, shape in {"embeddings.class_embedding": (80,), "embeddings.patch_embedding.weight": (80, 3, 14, 14), "embeddings.position_embedding.weight": (5, 80)}.items()}  # fmt: skip
    with pytest.raises(ConfigurationError, match="number of attention heads.*width 80.*multiple of 64.*--tower"):
        llava_read.program_tower(tmp_path, "openai/not-here", found, None)
    spec, place = llava_read.program_tower(tmp_path, "openai/not-here", found, str(tower))
    assert isinstance(spec, CLIPSpec) and spec.numbers()["num_attention_heads"] == 2 and place is None


# ---- what ours do not have -----------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "layers": ("hf_old", {"vision_feature_layer": [-2, -5]}, r"vision_feature_layer is \[-2, -5\]"),
    "class_token": ("hf_old", {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy is full, and can be default"),
    "activation": ("hf_old", {"projector_hidden_act": "relu", "multimodal_projector_bias": False}, "projector_hidden_act is relu.*; multimodal_projector_bias is False"),
    "decoder": ("hf_old", {"text_config": {"model_type": "gemma2"}}, "text_config.model_type is gemma2"),
    "tiles": ("original", {"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres'"),
    "marks": ("original", {"mm_use_im_start_end": True, "mm_projector_type": "resampler"}, "mm_projector_type is 'resampler'.*; mm_use_im_start_end is True"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_without_a_counterpart_is_named(name: str, llama: Path, tmp_path: Path) -> None:
    spelling, changed, words = REFUSED[name]
    with pytest.raises(ConfigurationError, match=words):
        import_model(str(respelt(llama, tmp_path / "theirs", spelling, **changed)), tmp_path / "ours")


def test_an_image_processor_of_another_size_is_named(llama: Path, tmp_path: Path) -> None:
    folder = respelt(llama, tmp_path / "theirs", "hf_old")
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "CLIPImageProcessor", "size": 56, "crop_size": 56, "resample": 2}))
    with pytest.raises(ConfigurationError, match=r"size is 56, and can be a square of the tower's 28 pixels; .*resample is 2"):
        import_model(str(folder), tmp_path / "ours")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("preprocessor_config.json", {"size": None}, "image processor of .*theirs have another form.* got size None"),
        ("preprocessor_config.json", {"crop_size": None, "image_mean": 0.5}, "got crop_size None, image_mean 0.5"),
        ("generation_config.json", {"eos_token_id": "</s>"}, r"generation_config.json: eos_token_id is no id of a token. got '</s>'"),
    ],
)
def test_settings_of_another_form_are_named(name: str, content: dict[str, Any], words: str, llama: Path, tmp_path: Path) -> None:
    folder = respelt(llama, tmp_path / "theirs", "hf_old")
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=words):
        import_model(str(folder), tmp_path / "ours")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_quantised_weights_are_refused(dtype: torch.dtype, llama: Path, tmp_path: Path) -> None:
    folder = change(
        respelt(llama, tmp_path / "theirs", "hf_old"), lambda tensors: tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items() if "lm_head" in name})
    )
    with pytest.raises(CheckpointError, match=f"is quantised.* got 1 tensors of {str(dtype).removeprefix('torch.')}"):
        import_model(str(folder), tmp_path / "ours")


def test_what_is_no_llava(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no LLaVA.*model_type 'bert'"):
        import_model(str(respelt(llama, tmp_path / "theirs", "hf_old", model_type="bert")), tmp_path / "ours")
    with pytest.raises(ConfigurationError, match="no import is called 'blip'.*one of llava"):
        import_model(str(llama), tmp_path / "ours", "blip")
    with pytest.raises(ConfigurationError, match=r"theirs holds something already"):
        import_model(str(llama), tmp_path / "theirs")
    with pytest.raises(CheckpointError, match="neither a folder nor a cached hub snapshot"):
        import_model(str(tmp_path / "nowhere"), tmp_path / "ours")


def test_a_linear_projector_is_imported_and_has_no_way_back(llama: Path, tmp_path: Path) -> None:
    def work(tensors: dict[str, Tensor]) -> None:
        for part in ("weight", "bias"):
            tensors[f"model.mm_projector.{part}"] = tensors.pop(f"model.mm_projector.0.{part}")
            del tensors[f"model.mm_projector.2.{part}"]

    folder = change(respelt(llama, tmp_path / "theirs", "original", mm_projector_type="linear"), work)
    import_model(str(folder), tmp_path / "ours")
    model, _ = vlm.load(tmp_path / "ours")
    assert torch.equal(model.state_dict()["connector.linear.layers.0.weight"], load_file(llama / "model.safetensors")["multi_modal_projector.linear_1.weight"])
    assert [one.split()[0] for one in llava.obstacles(model.spec, model.config.text_config)] == ["model.connector"]


def test_parts_from_a_flat_config(bases: dict[str, Theirs], tmp_path: Path) -> None:
    found = llava_read.read(respelt(bases["mistral"].folder, tmp_path / "theirs", "original", mm_projector_type="mlp3x_gelu", image_aspect_ratio="square"))
    assert found.connector == MLPSpec(level=-2, depth=3) and found.policy == "native"
    assert found.encoder.numbers() == CLIPSpec(config=tiny.tower_config(hidden_size=128, intermediate_size=96, projection_dim=512)).numbers()  # type: ignore[attr-defined]
    assert (found.text.model_type, found.text.sliding_window, found.text.num_key_value_heads) == ("mistral", 12, 2)
    assert not [key for key in found.text.to_dict() if key.startswith("mm_")]


# ---- the prompt ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template, expected",
    [
        (LISTS, PromptSpec(use="chatml")),
        (tiny.CHATML, PromptSpec(use="chatml")),
        (LLAVA_15, PromptSpec(use="vicuna_v1", system="")),
        (OWN, PromptSpec(use="tokenizer")),
        (None, PromptSpec(use="vicuna_v1")),
    ],
)
def test_the_prompt_reads_as_the_chat_template_does(template: str | None, expected: PromptSpec) -> None:
    tokenizer = with_start() if template == LLAVA_15 else tiny.tokenizer()
    assert choose_prompt(tokenizer, template)[0] == expected


def test_the_start_token_that_the_tokenizer_adds_is_written_by_the_prompt() -> None:
    tokenizer = with_start()
    assert choose_prompt(tokenizer, OWN)[0].use == "tokenizer"
    assert tokenizer.chat_template.startswith("{{ bos_token }}")


def test_our_own_export_is_recognised() -> None:
    tokenizer = with_start()
    template = chat_template(Prompt(PromptSpec(use="vicuna_v1"), tokenizer))
    assert choose_prompt(tokenizer, template)[0] == PromptSpec(use="vicuna_v1")


def test_a_template_that_nothing_reads_alike_has_to_be_replaced_by_hand() -> None:
    with pytest.raises(ConfigurationError, match=r"no prompt reads questions as the checkpoint's own chat template.*--prompt: plain, vicuna_v1, chatml, deepseek_vl, tokenizer"):
        choose_prompt(tiny.tokenizer(), LLAVA_15.replace("ASSISTANT:", "ANSWER:"))
    assert choose_prompt(tiny.tokenizer(), LLAVA_15, "chatml")[0] == PromptSpec(use="chatml")


# ---- commands ------------------------------------------------------------------------------------------------------------


def test_the_command_and_what_opens_its_folder(bases: dict[str, Theirs], tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["import", str(bases["qwen2"].folder), "--family", "llava", "--out", str(tmp_path / "ours")])
    assert done.exit_code == 0, done.output
    assert "siglip, mlp, qwen2, bfloat16, prompt chatml, pictures native" in done.output.replace("\n", " ")
    root = tiny.data_root(tmp_path / "data")
    scores = vlm.evaluate(tmp_path / "ours", file=root / "heldout.json", limit=2)["heldout"]
    assert scores["mean"]["n"] == 2 and scores["mean"]["question_only"] is None and scores["mean"]["grey"] is not None
    with pytest.raises(CheckpointError, match="holds no run"):
        vlm.evaluate(tmp_path / "ours")


# ---- the field's folders ---------------------------------------------------------------------------------------------------


def field_tokenizer(folder: Path) -> str:
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{index}": index for index in range(3, 63)}, "<image>": 63}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>", additional_special_tokens=["<image>"])
    made.save_pretrained(folder)
    return str(folder)


def test_field_key_layouts(field_folder: Path, tmp_path: Path) -> None:
    """original_llava has no number of heads anywhere (its tower is 16 wide): the numbers come from a folder given by hand, the weights from the file."""
    case = field_folder / "ckpt_llava_key_layouts"
    expected = json.loads((case / "expected.json").read_text())
    words = field_tokenizer(tmp_path / "tokenizer")
    ids = torch.randint(3, 60, (1, 12))
    ids[0, 2:6] = 63
    pixels = torch.randn(3, 8, 8)
    logits = []
    for name in expected["same_weights"]:
        import_model(str(case / name), tmp_path / name, tokenizer=words, tower=str(case / "hf_old") if name == "original_llava" else None)
        model, processor = vlm.load(tmp_path / name)
        parts = [key.split(".")[0] for key in model.state_dict()]
        assert {part: parts.count(part) for part in set(parts)} == expected["tensors_by_part"]
        with torch.no_grad():
            logits.append(model(input_ids=ids, images=[ImageInput({"pixels": pixels}, 8, 8, processor.layout(8, 8))]).logits)
    theirs = LlavaForConditionalGeneration.from_pretrained(case / "hf_old").eval()
    with torch.no_grad():
        logits.append(theirs(input_ids=ids, pixel_values=pixels[None]).logits)
    assert all((one - logits[0]).abs().max() <= expected["logits_equal_within"] for one in logits)
    wrong = expected["one_missing_one_extra"]
    with pytest.raises(CheckpointError) as problem:
        import_model(str(case / "one_missing_one_extra"), tmp_path / "wrong", tokenizer=words)
    assert all(name in str(problem.value) for name in (*wrong["missing"], *wrong["unexpected"]))


def test_field_padded_vocabulary(field_folder: Path, tmp_path: Path) -> None:
    case = field_folder / "ckpt_vocab_padded"
    expected = json.loads((case / "expected.json").read_text())
    import_model(str(case / "base"), tmp_path / "ours")
    model, processor = vlm.load(tmp_path / "ours")
    source = load_file(case / "base" / "model.safetensors")["language_model.model.embed_tokens.weight"]
    assert torch.equal(model.get_input_embeddings().weight, source) and len(source) == expected["embedding_rows"] == model.config.text_config.vocab_size
    assert model.config.image_token_id == processor.image_token_id
    assert set(range(len(processor.tokenizer), len(source))) <= set(model.generation_config.suppress_tokens)
