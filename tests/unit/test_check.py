"""`vlm check`: every problem of a configuration at once, each with what, got, expected and cure; what was not checked; what a run would do."""

import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from rich.console import Console
from tiny_run import NativeSpec, compose, only, printed, register

import vlm
from vlm.composition import ConfigurationProblems
from vlm.encoders.base import Encoder
from vlm.errors import ConfigurationError
from vlm.train import check_data, cost
from vlm.train.check import check_run as check


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


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)


# ---- what a run would do --------------------------------------------------------------------------------------------------


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
    assert "model.adapt is bias" in report.impossible["llava"]


def test_pictures_of_many_sizes_have_a_range_of_tokens(root: Path, parts: None) -> None:
    report = check(compose(root, "model.encoder=native", "model.connector.level=0"))
    assert report.ok, report.problems
    assert report.stages[0].picture_tokens == 32 * 32
    assert report.stages[0].picture_range == (4, 4)
    tiny.picture(size=(140, 70)).save(root / "img" / "3.png")
    assert check(compose(root, "model.encoder=native", "model.connector.level=0", "every_stage.max_length=2000")).stages[0].picture_range == (4, 50)


def test_packed_rows_are_told_and_hold_every_sample(root: Path) -> None:
    report = check(compose(root, "every_stage.pack=600", "stages.align.micro_batch=auto"))
    assert report.ok
    assert report.stages[0].batch == "4 samples per step = 1 rank, packed into rows of at most 600 tokens, as many rows as fit into memory per micro-batch"
    assert report.stages[1].batch == "4 samples per step = 1 rank, packed into rows of at most 600 tokens, at most 2 rows per micro-batch"
    assert check(compose(root, "every_stage.micro_batch=auto")).stages[0].batch == "4 samples per step = 1 rank x as many rows as fit into memory"
    problem = str(only(check(compose(root, "stages.instruct.pack=100"))))
    assert "stages.instruct.pack" in problem and "got max_length 512; expected at most pack 100" in problem and "stages.instruct.max_length=100" in problem


# ---- problems of the configuration ----------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("name", ["..", ".", "", "a/b"])
def test_a_name_that_leads_out_of_the_runs_folder_is_refused(whole: Path, name: str) -> None:
    run = compose(whole)
    with pytest.raises(ConfigurationError, match="the name .* is not the name of a folder. expected a name without slashes"):
        compose(whole, f"name='{name}'")
    with pytest.raises(ConfigurationError, match="the stage .* is not the name of a folder"):
        replace(run, stages={name: run.stages["align"]})


def test_runs_that_are_no_folder_are_a_problem(whole: Path) -> None:
    assert "runs: " in (problem := str(only(check(compose(whole, f"runs={whole / 'align.json'}"))))) and f"got the file {whole / 'align.json'}" in problem


def test_flash_attention_wants_bf16_and_a_family_that_is_proven(root: Path) -> None:
    problem = only(check(compose(root, "model.llm.attention=flash_attention_2", "precision=fp32")))
    assert "model.llm.attention" in str(problem) and "bf16" in str(problem)
    family = (
        "model.llm.config={model_type: stablelm, vocab_size: 512, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 2}"
    )
    assert "documents of a row might see one another" in str(only(check(compose(root, "model.llm.attention=flash_attention_2", family))))


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


def test_rows_longer_than_the_decoders_positions_are_a_warning(root: Path) -> None:
    assert check(compose(root, "stages.instruct.max_length=1025", "model.llm.config.max_position_embeddings=1024")).warnings == [
        "stages.instruct.max_length 1,025 is more than the decoder's 1,024 positions: it has never seen longer rows, and chat refuses them"
    ]


def test_numbers_that_are_not_those_beside_the_weights_are_a_warning(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tower"
    folder.mkdir()
    numbers = dict(compose(root).model.encoder.config or {})
    (folder / "config.json").write_text(json.dumps({"vision_config": numbers | {"hidden_act": "gelu"}}))
    report = check(compose(root, f"model.encoder.path={folder}", "model.encoder.weights=path"))
    assert [line for line in report.warnings if "hidden_act 'quick_gelu' (beside the weights 'gelu')" in line and str(folder) in line]
    (folder / "config.json").write_text(json.dumps({"vision_config": numbers}))
    assert not check(compose(root, f"model.encoder.path={folder}", "model.encoder.weights=path")).warnings


def test_an_adaptation_without_a_rate_is_told(root: Path) -> None:
    report = check(compose(root, "model.adapt={lora: {rank: 2}}", "stages.instruct.train.llm=frozen"))
    assert [w for w in report.warnings if "model.adapt.lora is never trained: no stage gives llm.lora a rate" in w]
    assert not [w for w in check(compose(root, "model.adapt={lora: {rank: 2}}", "stages.instruct.train.llm={lora: 1.0e-3}")).warnings if "never trained" in w]


# ---- what is not checked --------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr(check_data, "HEADERS", 3)
    (root / "img" / "11.png").write_bytes(b"no picture")  # of the last sample
    run = compose(root, "stages.align.steps=1", "stages.instruct=null", "eval.heldout=null")
    some = check(run)
    assert some.ok
    assert some.not_checked == ["data.captions: the headers of 9 pictures (--all reads every one)"]
    assert "sample 11: the file is not a picture" in str(only(check(run, everything=True)))
