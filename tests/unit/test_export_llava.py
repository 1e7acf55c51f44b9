"""Exports as LlavaForConditionalGeneration. One fresh process answers for every folder of this module."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from models import model_spec
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import GenerationConfig, LlavaConfig, LlavaForConditionalGeneration

from vlm.connectors.linear import LinearSpec
from vlm.connectors.mlp import MLPSpec
from vlm.data.sample import Picture, Turn
from vlm.errors import CheckpointError, ConfigurationError, NumericsError
from vlm.loading import first_model
from vlm.model import VLM
from vlm.processor import VLMProcessor, placeholder_id
from vlm.prompt import PICTURE, Prompt, PromptSpec
from vlm.weights import export as exporting
from vlm.weights import llava

SYSTEM_REFUSED = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + tiny.CHATML.removeprefix("{% for m in messages %}")


def sentencepiece_like(adds_bos: bool = True) -> Any:
    """Marks in front of every piece, and a beginning token that the tokenizer adds by itself."""
    made = tiny.tokenizer("metaspace_legacy", bos="<s>")
    if adds_bos:
        made._tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", made.bos_token_id)])
    return made


@dataclass(frozen=True)
class Made:
    tower: str
    decoder: str
    policy: str
    prompt: PromptSpec
    tokenizer: Callable[[], Any] = tiny.tokenizer
    numbers: tuple[tuple[str, Any], ...] = ()
    level: int = -2
    dtype: torch.dtype = torch.float32

    def build(self) -> tuple[VLM, VLMProcessor]:
        spec = model_spec(self.decoder, self.tower, **dict(self.numbers))
        spec = replace(spec, connector=MLPSpec(level=self.level))
        tokenizer = self.tokenizer()
        torch.manual_seed(1)
        model = first_model(spec, placeholder_id(tokenizer)).eval()
        for parameter in model.parameters():  # not the buffers: from_pretrained keeps rotary frequencies in fp32 as well
            parameter.data = parameter.data.to(self.dtype)
        return model, VLMProcessor(spec, 32, tokenizer, self.prompt, self.policy)


MADE = {
    "clip_llama_pad": Made("clip", "llama", "pad", PromptSpec(use="chatml", system='You see "pictures".\nBe brief \\ good {{ }} 图🙂.')),
    "clip_qwen2_native": Made("clip", "qwen2", "native", PromptSpec(use="chatml"), numbers=(("tie_word_embeddings", True), ("vocab_size", 512)), dtype=torch.bfloat16),
    "siglip_llama_pad": Made("siglip", "llama", "pad", PromptSpec(use="vicuna_v1"), sentencepiece_like, (("vocab_size", 700),), level=3),
    "siglip_qwen2_crop": Made("siglip", "qwen2", "crop", PromptSpec(use="tokenizer"), lambda: tiny.tokenizer(chat=SYSTEM_REFUSED)),
    "siglip_llama_native": Made("siglip", "llama", "native", PromptSpec(use="plain"), lambda: tiny.tokenizer("metaspace_first"), (("vocab_size", 700),), level=1),
    "clip_mistral_pad": Made("clip", "mistral", "pad", PromptSpec(use="chatml")),
    "clip_qwen2_squash": Made("clip", "qwen2", "squash", PromptSpec(use="vicuna_v1"), lambda: tiny.tokenizer(bos="<s>"), level=0),
}
FAULTY = "clip_llama_pad"


@dataclass
class Exported:
    folder: Path
    model: VLM
    processor: VLMProcessor
    ours: list[exporting.Case]
    theirs: list[exporting.Case]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """Every model of MADE and, as "fault", one with a weight that was changed after writing."""
    root = tmp_path_factory.mktemp("exports")
    exporting.draw_pictures(root)
    found: dict[str, Exported] = {}
    jobs = []
    for name, made in MADE.items():
        model, processor = made.build()
        llava.write(model, processor, root / name)
        asked = exporting.questions(pictures_only=made.prompt.use == "plain")
        found[name] = Exported(root / name, model, processor, exporting.answers(model, processor, root / name, asked, root), [])
        jobs.append((root / name, asked))
    found["fault"] = replace(found[FAULTY], folder=_spoilt(found[FAULTY].folder, root / "fault"))
    jobs.append((root / "fault", exporting.questions()))
    for one, theirs in zip(found.values(), exporting.fresh_answers(jobs, root), strict=True):
        one.theirs = theirs
    return found


def _spoilt(source: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["vision_tower.vision_model.embeddings.patch_embedding.weight"][0, 0, 0, 0] += 0.2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", MADE)
def test_a_fresh_process_gives_our_logits_and_greedy_tokens(name: str, exported: dict[str, Exported]):
    one = exported[name]
    report = exporting.compare(one.ours, one.theirs, one.folder)
    assert report.prompts == (2 if MADE[name].prompt.use == "plain" else 4)
    assert report.max_logit_difference <= 1e-4
    assert report.tokens_equal >= report.prompts
    assert [len(case.get("pixels", ())) for case in one.theirs[:2]] == [1, 2]


def test_a_weight_changed_after_writing_is_noticed(exported: dict[str, Exported]):
    with pytest.raises(NumericsError, match="prompt 0: logits differ"):
        exporting.compare(exported["fault"].ours, exported["fault"].theirs, exported["fault"].folder)


@pytest.mark.parametrize(
    "part, error, words", [("ids", CheckpointError, "other ids"), ("pixels", CheckpointError, "other pixels"), ("tokens", NumericsError, "greedy tokens differ")]
)
def test_every_other_difference_is_named(part: str, error: type[Exception], words: str, exported: dict[str, Exported]):
    one = exported[FAULTY]
    changed = [dict(case) for case in one.theirs]
    changed[1][part] = changed[1][part] + 1
    with pytest.raises(error, match=f"prompt 1: .*{words}"):
        exporting.compare(one.ours, changed, one.folder)


def test_a_logit_that_is_not_a_number_is_no_success(exported: dict[str, Exported]):
    one = exported[FAULTY]
    with pytest.raises(NumericsError):
        exporting.compare(one.ours, [case | {"logits": case["logits"] * float("nan")} for case in one.theirs], one.folder)


@pytest.mark.parametrize("name", MADE)
def test_keys_are_those_of_released_files_and_of_transformers(name: str, exported: dict[str, Exported], tmp_path: Path):
    one = exported[name]
    config = LlavaConfig.from_pretrained(one.folder)
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    written, saved = (set(load_file(folder / "model.safetensors")) for folder in (one.folder, tmp_path))
    assert {llava.from_llava(key) for key in written} == {llava.from_llava(key) for key in saved}
    assert {key.split(".layers.")[0] for key in written if ".layers." in key} == {"vision_tower.vision_model.encoder", "language_model.model"}
    assert ("language_model.lm_head.weight" in written) == (not config.tie_word_embeddings)


@pytest.mark.parametrize("name", MADE)
def test_the_key_map_goes_both_ways(name: str, exported: dict[str, Exported]):
    for key in exported[name].model.state_dict():
        assert llava.from_llava(llava.to_llava(key)) == key


def test_a_key_without_a_place_is_an_error_and_an_unknown_one_stays():
    with pytest.raises(CheckpointError, match=r"llm\.ladder\.weight"):
        llava.to_llava("llm.ladder.weight")
    assert llava.from_llava("image_newline") == "image_newline"


def test_every_row_of_the_key_map_is_read_back():
    """Rows may share their left side (spellings), never their right one; the longest right side that fits wins."""
    assert len({theirs for _, theirs in llava.KEYS}) == len(llava.KEYS)
    for ours, theirs in llava.KEYS:
        assert llava.from_llava(theirs + "x.weight") == ours + "x.weight"


def test_dtype_ties_and_padded_vocabulary_are_kept(exported: dict[str, Exported]):
    one = exported["clip_qwen2_native"]
    config = json.loads((one.folder / "config.json").read_text())
    assert (config["dtype"], config["tie_word_embeddings"], config["text_config"]["vocab_size"]) == ("bfloat16", True, 512)
    with safe_open(one.folder / "model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}  # noqa: SIM118
        assert file.get_slice("language_model.model.embed_tokens.weight").get_shape() == [512, 32]


def test_config_says_what_the_connector_reads(exported: dict[str, Exported]):
    read = {name: LlavaConfig.from_pretrained(one.folder) for name, one in exported.items()}
    assert read["clip_llama_pad"].vision_feature_select_strategy == "default"
    assert read["siglip_llama_pad"].vision_feature_select_strategy == "full"
    assert [read[name].vision_feature_layer % 4 for name in MADE] == [made.level % 4 for made in MADE.values()]
    assert read["clip_qwen2_squash"].vision_feature_layer == -4
    assert {config.image_seq_length for config in read.values()} == {4}
    assert read["siglip_llama_pad"].image_token_id == exported["siglip_llama_pad"].processor.image_token_id


def test_generation_settings_say_how_an_answer_ends_and_what_is_never_said(tmp_path: Path):
    model, processor = replace(MADE[FAULTY], tokenizer=lambda: tiny.tokenizer(eos="<|endoftext|>")).build()
    model.generation_config = GenerationConfig(eos_token_id=[9], temperature=0.7, do_sample=True)
    llava.write(model, processor, tmp_path)
    ids = processor.tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    written = GenerationConfig.from_pretrained(tmp_path)
    assert written.eos_token_id == sorted([9, *ids])
    assert written.suppress_tokens == sorted({processor.image_token_id, *range(len(processor.tokenizer), 400)})
    assert (written.pad_token_id, written.temperature, written.do_sample) == (processor.pad_id, 0.7, True)


# ---- the chat template ---------------------------------------------------------------------------------------------------

SYSTEM = Turn("system", ("Be brief.",))
ASK = Turn("user", (Picture("p"), "\nWhat?"))
ANSWER = Turn("assistant", ("It is red.",))
TALKS = {
    "question": (ASK,),
    "two": (Turn("user", (Picture("p"), " and ", Picture("q"), "  x")), ANSWER, Turn("user", ("And\nnow?",))),
    "system": (SYSTEM, ASK, ANSWER, Turn("user", ("Two?",))),
    "systems": (SYSTEM, Turn("system", ("Be kind.",)), ASK),
}
DATED = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') + '|' }}{% endif %}" + tiny.CHATML
PROMPTS = {
    "chatml": (PromptSpec(use="chatml", system="Über 'all' \"q\"\n\\{%"), None),
    "vicuna": (PromptSpec(use="vicuna_v1"), None),
    "vicuna_without_system": (PromptSpec(use="vicuna_v1", system=""), None),
    "plain": (PromptSpec(use="plain"), None),
    "fold": (PromptSpec(use="tokenizer"), SYSTEM_REFUSED),
    "dated": (PromptSpec(use="tokenizer"), DATED),
}


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize(("kind", "marks"), [("byte_level", False), ("metaspace_legacy", False), ("metaspace_legacy", True), ("metaspace_first", False), ("metaspace_first", True)])
def test_template_renders_what_training_shows(name: str, talk: str, kind: str, marks: bool):
    spec, chat = PROMPTS[name]
    if (name, kind, marks) == ("plain", "metaspace_first", True) and len(TALKS[talk]) > 1:
        pytest.skip("where the tokenizer writes no mark, no template writes one in front of an answer: a talk in `plain` has one picture and no question behind it")
    spec, tokenizer = replace(spec, word_marks=marks), tiny.tokenizer(kind, bos="<s>", chat=chat)
    image = placeholder_id(tokenizer)
    prompt = Prompt(spec, tokenizer)
    template = llava.chat_template(prompt)
    expected = [image if one == PICTURE else one for one in prompt.encode(TALKS[talk], generate=True).ids]

    as_lists = [{"role": t.role, "content": [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in t.parts]} for t in TALKS[talk]]
    as_strings = [{"role": t.role, "content": "".join(p if isinstance(p, str) else "<image>" for p in t.parts)} for t in TALKS[talk]]
    for messages in (as_lists, as_strings):
        text = tokenizer.apply_chat_template(messages, chat_template=template, add_generation_prompt=True, tokenize=False)
        assert llava.public_tokenizer(prompt)(text)["input_ids"] == expected


# ---- refusals and files --------------------------------------------------------------------------------------------------

REFUSED = {
    "model.encoder is dino": lambda spec: replace(spec, encoder=SimpleNamespace(use="dino")),
    "model.connector is linear": lambda spec: replace(spec, connector=LinearSpec()),
    "model.connector.depth is 3": lambda spec: replace(spec, connector=MLPSpec(depth=3)),
    "model.connector.hidden is 48": lambda spec: replace(spec, connector=MLPSpec(hidden=48)),
    "model.connector.then is linear": lambda spec: replace(spec, connector=MLPSpec(hidden=32, then=LinearSpec())),
    "model.connector.level is final": lambda spec: replace(spec, connector=MLPSpec(level="final")),
    "model.adapt is mm_lora": lambda spec: replace(spec, adapt={"mm_lora": SimpleNamespace(mergeable=False)}),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_llava_does_not_have_is_named(words: str):
    spec = REFUSED[words](model_spec())
    assert [one.split(",")[0] for one in llava.obstacles(spec, SimpleNamespace(model_type="llama", hidden_size=32))] == [words]


def test_a_family_with_capped_logits_is_refused(tmp_path: Path):
    model, processor = Made("clip", "gemma2", "native", PromptSpec(use="chatml")).build()
    with pytest.raises(ConfigurationError, match=r"model\.llm is gemma2, LLaVA has llama or mistral or qwen2"):
        llava.write(model, processor, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_picture_policy_without_a_public_class_is_refused(tmp_path: Path):
    model, processor = MADE[FAULTY].build()
    processor.policy = "tiles"
    with pytest.raises(ConfigurationError, match="picture policy 'tiles'"):
        llava.write(model, processor, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    model, processor = MADE[FAULTY].build()
    model.save_pretrained(tmp_path / "run")
    processor.save_pretrained(tmp_path / "run")
    return tmp_path / "run"


def test_an_export_appears_only_when_it_is_proven(run: Path, monkeypatch: pytest.MonkeyPatch):
    """The real process refuses a file that lacks a tensor; then a stand-in agrees; then it disagrees, and the good export stays."""
    agreed: list[exporting.Case] = []
    answers, write = exporting.answers, llava.write

    def remember(*args: Any) -> list[exporting.Case]:
        agreed[:] = answers(*args)
        return agreed

    def forget(model: VLM, processor: VLMProcessor, folder: Path) -> None:
        write(model, processor, folder)
        tensors = load_file(folder / "model.safetensors")
        del tensors["multi_modal_projector.linear_2.bias"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(exporting, "answers", remember)
    with monkeypatch.context() as patch:
        patch.setattr(llava, "write", forget)
        with pytest.raises(CheckpointError, match=r"missing_keys.*linear_2\.bias"):
            exporting.export_run(run)
    out, failed = run / "export-llava", run / "export-llava.failed"
    assert failed.is_dir()
    assert not out.exists()

    monkeypatch.setattr(exporting, "fresh_answers", lambda jobs, scratch: [agreed])
    report = exporting.export_run(run)
    written = {"folder": str(out), "max_logit_difference": 0.0, "tokens_equal": report.tokens_equal, "prompts": 4, "merged": "", "changed": ""}
    assert json.loads((out / "export_check.json").read_text()) == written

    proven = (out / "model.safetensors").stat().st_ino
    monkeypatch.setattr(exporting, "fresh_answers", lambda jobs, scratch: [[case | {"logits": case["logits"] + 2e-4} for case in agreed]])
    with pytest.raises(NumericsError, match="logits differ"):
        exporting.export_run(run)
    assert (out / "model.safetensors").stat().st_ino == proven
    monkeypatch.setattr(exporting, "fresh_answers", lambda jobs, scratch: [agreed])
    exporting.export_run(run)
    assert (out / "model.safetensors").stat().st_ino != proven
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == ["export-llava", "export-llava.failed"]


def test_an_interrupted_export_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(model: VLM, processor: VLMProcessor, folder: Path) -> None:
        folder.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(llava, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        exporting.export_run(run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [run]


def test_a_folder_with_something_else_is_left_alone(run: Path, tmp_path: Path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"x")
    with pytest.raises(ConfigurationError, match="holds something else"):
        exporting.export_run(run, tmp_path / "photos")
    with pytest.raises(ConfigurationError, match="expected one of llava"):
        exporting.export_run(run, to="gguf")
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.png"]
