"""`vlm check`: every problem at once, each with what, got, expected and cure; what was not checked; what a run would do."""

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from rich.console import Console
from tokenizers import processors
from torch import nn

import vlm
from vlm import encoders, llm
from vlm.composition import ConfigurationProblems
from vlm.encoders.base import Encoder, EncoderSpec
from vlm.errors import ConfigurationError, VLMError
from vlm.features import TokenLayout
from vlm.llm.base import AdaptationSpec
from vlm.processor import VLMProcessor, load_tokenizer
from vlm.train import check as checks
from vlm.train import cost
from vlm.train.check import check_run as check
from vlm.train.config import RunSpec
from vlm.train.findings import Report
from vlm.train.parts import parts_table

TALK = [{"from": "human", "value": "q1"}, {"from": "gpt", "value": "a1"}]
SEEN = [{"from": "human", "value": "<image>\nq1"}, {"from": "gpt", "value": "a1"}]


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root that nobody changes."""
    return tiny.data_root(tmp_path_factory.mktemp("data"))


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "data")


def compose(root: Path, *overrides: str) -> RunSpec:
    return vlm.compose("llava_tiny", f"data_root={root}", *overrides)


def write(root: Path, rows: list[Any], name: str = "instruct") -> None:
    (root / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")


def only(report: Report) -> VLMError:
    assert len(report.problems) == 1, list(map(str, report.problems))
    return report.problems[0]


def printed(report: Any) -> str:
    out = io.StringIO()
    report.print(Console(file=out, width=200))
    return out.getvalue()


# ---- parts of the tests' own ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class NativeSpec(EncoderSpec):
    """An encoder without a size of its own: one token per 14 x 14 pixels."""

    weights: Any = "random"

    @property
    def levels(self) -> Mapping[str, int]:
        return {"image": 1}

    @property
    def widths(self) -> Mapping[str, int]:
        return {"image": 8}

    def layout(self, width: int, height: int, mode: Any) -> Mapping[str, TokenLayout]:
        return {"image": TokenLayout.grid(height // 14, width // 14)}

    def build(self) -> Encoder:
        encoder = Encoder()
        encoder.patches = nn.Linear(14 * 14 * 3, 8)
        return encoder


@dataclass(frozen=True, kw_only=True)
class BiasSpec(AdaptationSpec):
    """One more vector in the decoder."""

    def build(self, decoder: nn.Module, scope: Any) -> None:
        decoder.more = nn.Parameter(torch.zeros(7))

    def release(self, decoder: nn.Module) -> None:
        pass

    def groups(self, decoder: nn.Module) -> Mapping[str, list[nn.Parameter]]:
        return {"bias": [decoder.more]}  # type: ignore[list-item]

    def breaks(self) -> list[str]:
        return ["cached = uncached, unless bias is 0"]


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(encoders.registry._specs, "native", NativeSpec)
    monkeypatch.setitem(llm.registry._specs, "bias", BiasSpec)
    monkeypatch.setattr(NativeSpec, "use", "native", raising=False)
    monkeypatch.setattr(BiasSpec, "use", "bias", raising=False)


# ---- what a run would do -------------------------------------------------------------------------------------------------


def test_a_sound_run_has_no_problems_and_says_what_it_does(whole: Path) -> None:
    report = check(compose(whole))
    assert report.ok
    assert (report.problems, report.warnings, report.not_checked) == ([], [], [])
    align, instruct = report.stages
    assert align.length == cost.Length(4, 16, 16 / 12)
    assert (align.total, align.trainable) == (36224 + 2112 + 53408, 2112)
    assert instruct.trainable == 2112 + 53408
    assert align.picture_tokens == 4
    text = printed(report)
    for fact in (
        "encoder: clip, 36,224 parameters",
        "4 steps, 16 samples",
        "4 samples per step = 1 rank x 2 rows x 2 micro-batches",
        "4 tokens each",
        "LlavaForConditionalGeneration",
    ):
        assert fact in text


def test_samples_are_rendered_with_the_supervised_tokens_marked(whole: Path) -> None:
    report = check(compose(whole))
    assert [len(stage.rendered) for stage in report.stages] == [3, 3]
    plain = report.stages[0].rendered[0]
    assert plain[0] == ("<picture: 4 tokens>", False)
    assert plain[1][1]
    assert plain[1][0].endswith(" picture\n")
    text = printed(report)
    assert "[[blue<|im_end|>]]" in text
    assert "<question 2> How many objects are there?" in text
    assert "[[What" not in text


def test_a_terminal_shows_the_supervised_tokens_in_colour(whole: Path) -> None:
    out = io.StringIO()
    check(compose(whole)).print(Console(file=out, width=200, force_terminal=True, color_system="standard"))
    assert "\x1b[1;32mblue<|im_end|>\x1b[0m" in out.getvalue()
    assert "[[" not in out.getvalue()


def test_batch_is_ranks_times_rows_times_micro_batches(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    even, odd = (check(compose(whole, f"every_stage.batch={batch}", "every_stage.micro_batch=2"), quick=True).stages[0].batch for batch in (8, 6))
    assert even == "8 samples per step = 2 ranks x 2 rows x 2 micro-batches"
    assert odd == "6 samples per step = 2 ranks x 2 rows x 2 micro-batches at most (not divisible: some hold fewer rows)"


def test_neither_deepspeed_nor_a_gpu_library_is_imported(whole: Path) -> None:
    code = f"import sys, vlm; assert vlm.check(vlm.compose('llava_tiny', 'data_root={whole}')).ok; print([name for name in sys.modules if name.split('.')[0] == 'deepspeed'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


def test_an_adaptation_counts_from_its_stage_on(whole: Path, parts: None) -> None:
    report = check(compose(whole, "model.adapt.bias.since=instruct", "stages.instruct.train.connector=frozen", "stages.instruct.train.llm={rest: frozen, bias: 1.0e-3}"))
    assert report.ok, report.problems
    assert report.stages[1].total - report.stages[0].total == report.stages[1].trainable == 7
    assert "does not hold: bias: cached = uncached, unless bias is 0" in printed(report)
    assert "model.adapt is bias" in report.exports["llava"]


def test_pictures_of_many_sizes_have_a_range_of_tokens(root: Path, parts: None) -> None:
    report = check(compose(root, "model.encoder=native", "model.connector.level=0"))
    assert report.ok, report.problems
    assert report.stages[0].picture_tokens == 32 * 32
    assert report.stages[0].picture_range == (4, 4)
    tiny.picture(size=(140, 70)).save(root / "img" / "3.png")
    assert check(compose(root, "model.encoder=native", "model.connector.level=0", "every_stage.max_length=2000")).stages[0].picture_range == (4, 50)


# ---- problems of the configuration ---------------------------------------------------------------------------------------

WRONG: dict[str, tuple[list[str], list[str]]] = {
    "epochs and steps": (["stages.align.epochs=2"], ["stages.align: both epochs and steps are given", "got epochs 2, steps 4", "stages.align.epochs=null"]),
    "batch": (["stages.align.batch=0"], ["stages.align.batch: must be at least 1", "got 0", "expected 1 or more", "set stages.align.batch"]),
    "micro_batch": (["stages.instruct.micro_batch=-2"], ["stages.instruct.micro_batch: must be at least 1", "got -2"]),
    "steps": (["stages.align.steps=0"], ["stages.align: a stage's length is not a positive number", "steps 0"]),
    "seed": (["seed=-1", "stages.instruct=null"], ["stages.align: batch must be at least 1, seed at least 0"]),
    "stage's source": (["stages.align.data=caption"], ["stages.align.data: no data source is called 'caption'", "one of captions, questions, heldout", "did you mean 'captions'?"]),
    "stage's weighted source": (["stages.align.data={captions: 1, question: 2}"], ["stages.align.data: no data source is called 'question'", "did you mean 'questions'?"]),
    "weight": (["stages.align.data={captions: 1, heldout: -1}"], ["stages.align: the weight of the data source heldout is not a positive number", "got -1"]),
    "eval's source": (["eval.more=held"], ["eval.more: no data source is called 'held'", "did you mean 'heldout'?"]),
    "since": (["model.adapt.bias.since=instrct"], ["model.adapt.bias.since: no stage is called 'instrct'", "one of align, instruct", "did you mean 'instruct'?"]),
    "group": (["stages.align.train.conector=1"], ["stages.align.train.conector: train: no group 'conector'", "did you mean 'connector'?"]),
    "group below": (["stages.instruct.train.llm={ffm: 1}"], ["stages.instruct.train.llm: train: no group 'llm.ffm'", "did you mean 'ffn'?"]),
    "nothing trained": (["stages.align.train.connector=frozen"], ["stages.align: train: this stage would train nothing", "'connector': 'frozen'", "a rate for one of"]),
    "prompt": (
        ["stages.align.prompt=vicuna"],
        ["stages.align.prompt: no prompt is called 'vicuna'", "plain, vicuna_v1, chatml, deepseek_vl, tokenizer", "did you mean 'vicuna_v1'?"],
    ),
    "crop": (
        ["model.encoder=native", "model.connector.level=0", "stages.align.images=crop"],
        ["stages.align.images: picture policy 'crop' needs an encoder with a `size`", "images: native"],
    ),
    "squash": (["model.encoder=native", "model.connector.level=0", "stages.align.images=squash"], ["stages.align.images: picture policy 'squash' needs"]),
    "one picture": (["stages.align.max_length=4"], ["stages.align.max_length: too short for one picture", "got 4", "more than its 4 tokens", "raise stages.align.max_length"]),
    "bf16": (["precision=bf16", "stages.align.deepspeed=zero1"], ["stages.instruct.deepspeed: bf16 at ZeRO 0", "zero1 or higher"]),
    "zero": (
        ["stages.align.deepspeed={zero_optimization: {stage: 4}}"],
        ["stages.align.deepspeed: no ZeRO stage is given", "{'stage': 4}", "stage 0, 1, 2 or 3", "configs/deepspeed"],
    ),
    "level": (["model.connector.level=3"], ["model.connector.level: the encoder has no such hidden state", "got 3", "-3 to 2, or final", "model.connector.level=-2"]),
    "negative level": (["model.connector.level=-4"], ["model.connector.level: the encoder has no such hidden state", "got -4"]),
    "named level": (["model.connector.level=last"], ["model.connector.level: the encoder has no such hidden state", "got last"]),
    "stream": (["model.connector.stream=high"], ["model.connector.stream: no stream is called 'high'", "one of image"]),
    "later stream": (["model.connector={hidden: 8, then: {use: mlp, stream: high}}"], ["model.connector.then.stream: no stream is called 'high'"]),
    "chain": (["model.connector.then={use: mlp}"], ["model.connector: connector mlp is followed by another connector", "set hidden: N"]),
    "model_type": (["model.llm.config.model_type=null"], ["model.llm: the decoder's config names no model_type", "model_type: llama"]),
    "no decoder": (["model.llm.config=null"], ["model.llm: the decoder has neither a path nor a config", "llm.path"]),
    "decoder's weights": (["model.llm.weights=path"], ["model.llm: weights of a path are asked for", "got no path", "model.llm.weights=random"]),
    "encoder's weights": (["model.encoder.weights=path"], ["model.encoder: weights of a path are asked for", "model.encoder.weights=random"]),
    "tokenizer": (["model.llm.tokenizer=null"], ["model.llm: the decoder has no tokenizer", "llm.tokenizer"]),
    "data file": (["data.captions.file=nowhere.json"], ["data.captions: the data file nowhere.json cannot be read", "got No such file", "set `file`"]),
    "pictures' folder": (["data.captions.images=nowhere"], ["data.captions.images: there is no such folder of pictures", "got nowhere", "set data.captions.images"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_problem_says_what_got_expected_and_cure(whole: Path, parts: None, case: str) -> None:
    overrides, said = WRONG[case]
    problem = str(only(check(compose(whole, *overrides))))
    for part in said:
        assert part in problem


@pytest.mark.parametrize("level", ["-3", "0", "2", "final"])
def test_every_level_of_the_encoder_can_be_read(whole: Path, level: str) -> None:
    assert check(compose(whole, f"model.connector.level={level}")).ok


def test_all_problems_are_found_at_once_and_raised_together_by_quick(whole: Path, parts: None) -> None:
    chosen = ["batch", "stage's weighted source", "eval's source", "since", "level", "decoder's weights", "bf16"]
    run = compose(whole, *(override for case in chosen for override in WRONG[case][0]))
    text = "\n".join(map(str, check(run).problems))
    for case in chosen:
        assert WRONG[case][1][0] in text
    with pytest.raises(ConfigurationProblems) as raised:
        check(run, quick=True)
    assert [str(problem) for problem in raised.value.problems] == text.split("\n")


def test_quick_passes_a_sound_run_without_rendering_samples(whole: Path) -> None:
    report = check(compose(whole), quick=True)
    assert report.ok
    assert not any(stage.rendered for stage in report.stages)


def drop_marks(root: Path) -> None:
    file = root / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in ("<|im_start|>", "<|im_end|>")]
    file.write_text(json.dumps(content), encoding="utf-8")
    settings = root / "tokenizer" / "tokenizer_config.json"
    settings.write_text(settings.read_text(encoding="utf-8").replace("<|im_end|>", "<|endoftext|>"), encoding="utf-8")


def test_a_prompt_whose_control_token_the_tokenizer_lacks(root: Path) -> None:
    drop_marks(root)
    problem = str(only(check(compose(root))))
    assert "stages.instruct.prompt: prompt 'chatml' needs the control token '<|im_start|>'" in problem
    assert "choose another prompt" in problem


def test_a_tokenizer_without_any_end_token(root: Path) -> None:
    tiny.tokenizer(eos=None, pad=None, chat=None).save_pretrained(root / "tokenizer")
    problem = str(only(check(compose(root, "stages.instruct.prompt=vicuna_v1"))))
    assert "stages.instruct.prompt: prompt 'vicuna_v1' writes no end mark" in problem
    assert "give the tokenizer an end token" in problem


def test_a_damaged_tokenizer_is_a_problem(root: Path) -> None:
    (root / "tokenizer" / "tokenizer.json").write_text("{", encoding="utf-8")
    assert "model.llm.tokenizer" in str(only(check(compose(root))))


def test_a_part_that_refuses_to_be_built_is_one_problem_for_all_stages(whole: Path, parts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: NativeSpec) -> Encoder:
        raise ConfigurationError("native needs a licence", cure="get one")

    monkeypatch.setattr(NativeSpec, "build", refuse)
    assert str(only(check(compose(whole, "model.encoder=native", "model.connector.level=0")))) == "model: native needs a licence. get one"


# ---- what is not checked -------------------------------------------------------------------------------------------------


def test_a_data_root_that_is_not_set_is_no_problem() -> None:
    report = check(vlm.compose("llava_tiny"))
    assert report.ok
    (line,) = report.not_checked
    assert line.startswith("data_root is not set, so model.llm.tokenizer, data.captions.file")
    assert report.stages[0].length == cost.Length(4, 16, None)
    assert report.stages[0].trainable == 2112


def test_a_misspelt_prompt_is_found_without_a_tokenizer() -> None:
    assert "no prompt is called 'vicuna'" in str(only(check(vlm.compose("llava_tiny", "stages.align.prompt=vicuna"))))


def test_models_and_a_file_of_known_size_that_are_not_there(whole: Path) -> None:
    overrides = ["model.llm.tokenizer=no/such", "data.captions.file=none.json", "data.captions.samples=100", "stages.align.steps=null", "stages.align.epochs=2"]
    report = check(compose(whole, *overrides))
    assert report.ok
    assert "model.llm.tokenizer: no/such is neither a folder nor a cached hub snapshot" in report.not_checked
    assert "data.captions.file: none.json is not there; its 100 samples are taken from `samples`" in report.not_checked
    assert report.stages[0].length == cost.Length(50, 200, 2.0)


def test_a_file_of_another_size_than_named_counts_and_is_told(whole: Path) -> None:
    report = check(compose(whole, "data.captions.samples=100"))
    assert report.ok
    assert report.warnings == ["data.captions.samples: 100 are named, the file holds 12, which count"]


def test_headers_are_read_up_to_a_number_and_all_by_everything(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "HEADERS", 3)
    (root / "img" / "11.png").write_bytes(b"no picture")  # of the last sample
    run = compose(root, "stages.align.steps=1", "stages.instruct=null", "eval.heldout=null")
    some = check(run)
    assert some.ok
    assert some.not_checked == ["data.captions: the headers of 9 pictures (--all reads every one)"]
    assert "sample 11: the file is not a picture" in str(only(check(run, everything=True)))


def test_after_the_time_is_up_new_forms_of_conversation_are_still_rendered(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "SECONDS", -1.0)
    write(root, [{"conversations": [{"from": "human", "value": "word " * 100}, TALK[1]]} for _ in range(3)])
    report = check(compose(root, "stages.instruct.max_length=120"))
    assert report.ok
    assert report.not_checked == ["data.questions: whether 3 rows of stage instruct are too long, after -1 s of measuring (--all measures every one)"]
    write(root, [{"conversations": TALK}, {"conversations": [TALK[0], *TALK]}])
    refusing(root)
    assert "turns must alternate" in str(only(check(compose(root, "stages.instruct.prompt=tokenizer"))))


# ---- records -------------------------------------------------------------------------------------------------------------


def test_pictures_that_are_not_there_or_damaged_are_named_by_sample(root: Path) -> None:
    (root / "img" / "4.png").unlink()
    (root / "img" / "8.png").write_bytes((root / "img" / "8.png").read_bytes()[:-20])
    texts = [str(problem) for problem in check(compose(root, "stages.instruct=null", "eval.heldout=null")).problems]
    assert len(texts) == 2
    assert "align.json, sample 4: there is no such picture file" in texts[0]
    assert f"got {root / 'img' / '4.png'}" in texts[0]
    assert "check the path" in texts[0]
    assert "align.json, sample 8: the picture is truncated or corrupt" in texts[1]


def test_five_of_a_kind_are_named_and_the_others_counted(root: Path) -> None:
    sound = [{"conversations": TALK}]
    write(root, [*sound, *({"conversations": SEEN} for _ in range(9)), *({"conversations": TALK[:1]} for _ in range(2))])
    texts = [str(problem) for problem in check(compose(root)).problems]
    assert len(texts) == 5 + 1 + 2
    for index, text in enumerate(texts[:5], 1):
        assert f"instruct.json, sample {index}: pictures and placeholders differ. got images 0, placeholders 1" in text
    assert "4 more samples are refused like the last one above" in texts[5]
    assert "sample 10: no assistant turn" in texts[6]


def test_a_record_of_two_stages_is_reported_once(root: Path) -> None:
    write(root, [{"conversations": TALK[:1]}, {"conversations": TALK}])
    assert "sample 0: no assistant turn" in str(only(check(compose(root, "stages.align.data=questions", "stages.align.prompt=chatml"))))


def test_skipped_samples_are_counted_but_some_must_be_left(root: Path) -> None:
    long = {"conversations": [{"from": "human", "value": "word " * 200}, TALK[1]]}
    write(root, [{"conversations": TALK}, long, {"conversations": []}])
    run = compose(root, "stages.instruct.max_length=40", "data.questions.on_bad=skip")
    report = check(run)
    assert report.ok  # one bad record may always be
    warning = report.warnings[0]
    assert warning.startswith("data.questions: 2 samples are left out or replaced (on_bad: skip), the first:")
    assert "sample 2: no turns" in warning
    write(root, [long, long])
    assert "all 2 samples lose every supervised token at max_length 40" in str(only(check(run)))


def test_every_answer_beyond_max_length_is_one_problem(root: Path) -> None:
    write(root, [{"id": i, "conversations": [{"from": "human", "value": "word " * 40}, {"from": "gpt", "value": "answer"}]} for i in range(4)])
    run = compose(root, "stages.instruct.max_length=16")
    problem = str(only(check(run)))
    needed = processor(run, 1).row(run.data["questions"].open()[0])
    for part in (
        "instruct.json: all 4 samples lose",
        "max_length 16 of stage instruct",
        "instruct.json, sample 0",
        f"got {len(needed)} tokens needed",
        "raise stages.instruct.max_length",
    ):
        assert part in problem
    with pytest.raises(ConfigurationError):
        check(run, quick=True)


def test_some_answers_beyond_max_length_are_named_and_cut_rows_counted(root: Path) -> None:
    question, answer = {"from": "human", "value": "word " * 40}, {"from": "gpt", "value": "answer"}
    write(root, [{"conversations": TALK}, {"conversations": [question, answer]}, {"conversations": [*TALK, question, answer]}])
    report = check(compose(root, "stages.instruct.max_length=40"))
    assert "instruct.json, sample 1: no token of sample '1' is supervised once it is cut to 40 tokens" in str(only(report))
    assert [(note.partition(",")[0], count) for note, count in report.stages[1].counted.items()] == [("questions: cut to max_length 40", 2)]
    assert "sample 1: sample '1' is too long" in str(check(compose(root, "stages.instruct.max_length=40", "stages.instruct.too_long=error")).problems[0])


def vicuna(root: Path) -> None:
    """A tokenizer that starts every string with <s> and ends answers in </s>."""
    tokenizer = tiny.tokenizer(bos="<s>", eos="</s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.save_pretrained(root / "tokenizer")


def test_rows_that_may_not_be_cut_are_not_said_to_lose_their_answers(root: Path) -> None:
    write(root, [{"conversations": [{"from": "human", "value": "word " * 40}, TALK[1]]} for _ in range(2)])
    texts = [str(problem) for problem in check(compose(root, "stages.instruct.max_length=16", "stages.instruct.too_long=error")).problems]
    assert len(texts) == 2
    assert all("is too long" in text and "set too_long: cut" in text for text in texts)


def test_official_prompts_are_rendered_for_every_sample(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vicuna(root)
    write(root, [{"image": "img/0.png", "conversations": [SEEN[0], answer]} for answer in (TALK[1], {"from": "gpt", "value": "Write <image>."})])
    run = compose(root, "stages.instruct.prompt={use: vicuna_v1, official: true}", "stages.align.prompt=vicuna_v1")
    assert "instruct.json, sample 1: an official prompt knows no system turns, no <image> in text" in str(only(check(run)))
    monkeypatch.setattr(checks, "SECONDS", -1.0)
    assert any("whether 2 rows of stage instruct" in line for line in check(run).not_checked)


def test_a_picture_larger_than_a_row_is_named_where_sizes_differ(root: Path, parts: None) -> None:
    tiny.picture(size=(420, 420)).save(root / "img" / "5.png")
    run = compose(root, "model.encoder=native", "model.connector.level=0", "stages.align.max_length=1025", "stages.instruct=null", "eval.heldout=null")
    assert check(run).ok
    tiny.picture(size=(560, 560)).save(root / "img" / "5.png")
    problem = str(only(check(run)))
    assert "align.json, sample 5: one picture takes 1600 tokens" in problem
    assert "less than max_length 1025" in problem


def test_lengths_that_hang_on_unread_headers_are_not_guessed(root: Path, parts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "HEADERS", 5)
    report = check(compose(root, "model.encoder=native", "model.connector.level=0", "every_stage.max_length=1100", "stages.instruct=null", "eval.heldout=null"))
    assert "data.captions: the length of 7 rows of stage align, whose pictures' sizes are not known" in report.not_checked


def processor(run: RunSpec, index: int) -> VLMProcessor:
    stage = list(run.stages.values())[index]
    return VLMProcessor(run.model, 32, load_tokenizer(run.model), stage.prompt, stage.images.use)


@pytest.mark.parametrize(("prompt", "source"), [("chatml", "questions"), ("vicuna_v1", "questions"), ("plain", "captions")])
def test_rows_are_counted_as_cut_exactly_where_the_processor_cuts(root: Path, prompt: str, source: str) -> None:
    pairs = [turn for word in "abcdefgh" for turn in ({"from": "human", "value": word}, {"from": "gpt", "value": word})]
    system = {"from": "system", "value": "Be brief, whatever is asked."}
    short = [{"independent": free, "conversations": turns} for free in (True, False) for turns in (pairs, [system, *pairs], pairs[:2])]
    write(root, json.loads((root / "instruct.json").read_text(encoding="utf-8")) + short)
    run = compose(root, f"stages.instruct.prompt={prompt}")
    reader, real = run.data[source].open(), processor(run, 1)
    long = [len(real.row(sample)) for sample in reader]
    rows = cost.RowLengths(run.model, 32, real.tokenizer, run.stages["instruct"].prompt)
    for limit in sorted({edge for count in long for edge in (count - 1, count)}):
        measure = cost.Measure("instruct", rows, limit, "cut")
        cost.scan("", reader, [measure], headers=0, until=float("inf"))
        assert measure.cut == sum(count > limit for count in long), limit


# ---- kinds of conversations (field cases, on inputs of this file's making, and on the folders where they are) -----------

REFUSES = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn is known here') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns must alternate') }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DROPS = tiny.CHATML.replace("for m in messages", "for m in messages if m['role'] != 'system'")


def refusing(root: Path, chat: str = REFUSES) -> None:
    tiny.tokenizer(chat=chat).save_pretrained(root / "tokenizer")


def test_all_kinds_that_a_template_refuses_are_found_with_its_own_sentence(root: Path) -> None:
    refusing(root)
    user, answer = TALK
    system = {"from": "system", "value": "Answer in French."}
    write(root, [{"conversations": turns} for turns in (TALK, [system, *TALK], [user, user, answer], [answer, user, answer], [user, answer, answer], [user, answer, user])])
    report = check(compose(root, "stages.instruct.prompt=tokenizer"))
    texts = list(map(str, report.problems))
    assert len(texts) == 3
    for index, text in zip((2, 3, 4), texts, strict=True):
        assert f"instruct.json, sample {index}: the chat template cannot render this conversation: turns must alternate" in text
        assert "choose another prompt" in text
    assert report.stages[1].counted == {"questions: system text folded into the first question": 1, "questions: unsupervised trailing turn": 1}
    strict = check(compose(root, "stages.instruct.prompt={use: tokenizer, fold_system: error}"))
    assert any("sample 1: the chat template refuses or loses the system turn" in str(problem) for problem in strict.problems)


def test_a_system_turn_that_a_template_drops_is_folded_and_shown(root: Path) -> None:
    refusing(root, DROPS)
    write(root, [{"conversations": [{"from": "system", "value": "Answer in French."}, *TALK]}])
    report = check(compose(root, "stages.instruct.prompt=tokenizer"))
    assert report.ok
    assert report.stages[1].counted == {"questions: system text folded into the first question": 1}
    assert "Answer in French.\n\nq1" in "".join(text for text, _ in report.stages[1].rendered[0])


def test_a_stage_that_trains_the_connector_on_text_alone_is_warned_of_once(root: Path) -> None:
    write(root, [{"conversations": TALK}, {"conversations": TALK}])
    report = check(compose(root))
    assert report.ok
    assert report.warnings == ["stage instruct trains the connector, but no sample of 2 has an image"]
    assert not check(compose(root, "stages.instruct.train.connector=frozen")).warnings
    write(root, [{"conversations": TALK}, {"image": "img/0.png", "conversations": SEEN}])
    assert not check(compose(root)).warnings


def field_run(root: Path, file: Path, *overrides: str) -> RunSpec:
    return compose(root, f"data.questions.file={file}", f"data.questions.images={file.parent}", *overrides)


def test_field_template_roles(field_folder: Path, root: Path) -> None:
    case = field_folder / "tok_template_roles"
    talks: dict[str, Any] = json.loads((case / "conversations.json").read_text(encoding="utf-8"))
    write(root, [{"id": name, "messages": turns} for name, turns in talks.items()])
    for kind, refused in (("refuses", {"two_users", "assistant_first", "two_assistants"}), ("drops_system", set())):
        report = check(compose(root, f"model.llm.tokenizer={case / kind}", "stages.instruct.prompt=tokenizer"))
        said = [f"instruct.json, sample {index}: the chat template cannot render this conversation: turns must alternate" for index, name in enumerate(talks) if name in refused]
        assert len(report.problems) == len(said)
        assert all(part in str(problem) for part, problem in zip(said, report.problems, strict=True))
        assert report.stages[1].counted["questions: system text folded into the first question"] == 1


def test_field_zero_supervised(field_folder: Path, root: Path) -> None:
    problem = str(only(check(field_run(root, field_folder / "train_zero_supervised" / "all_answers_cut.json", "stages.instruct.max_length=16"))))
    for part in ("all_answers_cut.json: all 4 samples lose every supervised token at max_length 16", "sample 0", "tokens needed", "raise stages.instruct.max_length"):
        assert part in problem


def test_field_mixed_modalities(field_folder: Path, root: Path) -> None:
    case = field_folder / "train_mixed_modalities"
    assert check(field_run(root, case / "train.json")).warnings == []
    report = check(field_run(root, case / "text_only.json"))
    assert report.ok
    assert report.warnings == ["stage instruct trains the connector, but no sample of 2 has an image"]


@pytest.mark.parametrize(("case", "refused"), [("data_roles", (9, 10, 11, 12)), ("data_placeholder_count", (1, 2, 3, 6))])
def test_field_records_are_refused_by_index(field_folder: Path, root: Path, case: str, refused: tuple[int, ...]) -> None:
    for name in ("a.jpg", "b.jpg"):
        tiny.picture().save(root / name)
    report = check(compose(root, f"data.questions.file={field_folder / case / 'train.json'}", f"data.questions.images={root}"))
    assert [next(index for index in range(13) if f"sample {index}:" in str(problem)) for problem in report.problems] == list(refused)
    assert report.stages[1].counted == ({"questions: unsupervised trailing turn": 1} if case == "data_roles" else {})


# ---- vlm list ------------------------------------------------------------------------------------------------------------


def test_the_table_of_parts_names_parts_prompts_and_configurations(parts: None) -> None:
    tables = parts_table().tables
    assert dict(tables["encoders"])["native"] == "An encoder without a size of its own: one token per 14 x 14 pixels."
    assert dict(tables["connectors"])["mlp"] == "LLaVA-1.5's projector: linears with GELU between them."
    assert {"plain", "vicuna_v1", "chatml", "deepseek_vl", "tokenizer"} == set(dict(tables["prompts"]))
    assert dict(tables["configs/run"])["llava_1.5_7b"].startswith("LLaVA-1.5 7B: CLIP")
    text = printed(parts_table())
    for word in ("siglip", "zero3", "vicuna_7b_v1.5", "adaptations"):
        assert word in text


def test_numbers_that_are_not_those_beside_the_weights_are_a_warning(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tower"
    folder.mkdir()
    numbers = dict(compose(root).model.encoder.config or {})
    (folder / "config.json").write_text(json.dumps({"vision_config": numbers | {"hidden_act": "gelu"}}))
    report = check(compose(root, f"model.encoder.path={folder}", "model.encoder.weights=path"))
    assert [line for line in report.warnings if "hidden_act 'quick_gelu' (beside the weights 'gelu')" in line and str(folder) in line]
    (folder / "config.json").write_text(json.dumps({"vision_config": numbers}))
    assert not check(compose(root, f"model.encoder.path={folder}", "model.encoder.weights=path")).warnings


def test_packed_rows_are_told_and_hold_every_sample(root: Path) -> None:
    report = check(compose(root, "every_stage.pack=600", "stages.align.micro_batch=auto"))
    assert report.ok
    assert report.stages[0].batch == "4 samples per step = 1 rank, packed into rows of at most 600 tokens, as many rows as fit into memory per micro-batch"
    assert report.stages[1].batch == "4 samples per step = 1 rank, packed into rows of at most 600 tokens, at most 2 rows per micro-batch"
    assert check(compose(root, "every_stage.micro_batch=auto")).stages[0].batch == "4 samples per step = 1 rank x as many rows as fit into memory"
    problem = str(only(check(compose(root, "stages.instruct.pack=100"))))
    assert "stages.instruct.pack" in problem and "got max_length 512; expected at most pack 100" in problem and "stages.instruct.max_length=100" in problem


def test_flash_attention_wants_bf16_and_a_family_that_is_proven(root: Path) -> None:
    problem = only(check(compose(root, "model.llm.attention=flash_attention_2", "precision=fp32")))
    assert "model.llm.attention" in str(problem) and "bf16" in str(problem)
    family = (
        "model.llm.config={model_type: stablelm, vocab_size: 512, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 2}"
    )
    assert "documents of a row might see one another" in str(only(check(compose(root, "model.llm.attention=flash_attention_2", family))))


def test_more_bad_records_than_the_budget_are_a_problem(root: Path) -> None:
    write(root, [{"conversations": TALK}, {"conversations": []}, {"conversations": []}])
    run = compose(root, "data.questions.on_bad=skip")
    assert "data.questions: too many bad samples. got 2 of 3 samples" in str(only(check(run)))
    assert check(compose(root, "data.questions.on_bad=skip", "bad_budget=0.5")).ok


@pytest.mark.parametrize(
    "override, told",
    [
        ("workers=-2", "workers is out of range. got -2; expected 0 or more"),
        ("bad_budget=5", "bad_budget is out of range. got 5.0; expected from 0 to 1"),
        ("save.keep=0", "save.keep is out of range"),
        ("model.llm.config.hidden_sizes=3", "LlamaConfig has no hidden_sizes. did you mean 'hidden_size'?"),
        ("model.encoder.config.foo=3", "CLIPVisionConfig has no foo"),
    ],
)
def test_values_that_would_be_ignored_or_break_later_are_problems(root: Path, override: str, told: str) -> None:
    assert told.replace(" is out", ": is out") in str(only(check(compose(root, override))))


def test_an_adaptation_without_a_rate_is_told(root: Path) -> None:
    report = check(compose(root, "model.adapt={lora: {rank: 2}}", "stages.instruct.train.llm=frozen"))
    assert [w for w in report.warnings if "model.adapt.lora is never trained: no stage gives llm.lora a rate" in w]
    assert not [w for w in check(compose(root, "model.adapt={lora: {rank: 2}}", "stages.instruct.train.llm={lora: 1.0e-3}")).warnings if "never trained" in w]
