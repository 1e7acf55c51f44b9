"""Runs that go on from a finished model: an imported folder, another run, with adaptations that the folder does not have."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from interrupted import stopped_at
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import vlm
from vlm.configuration import VLMConfig
from vlm.errors import CheckpointError, ConfigurationError
from vlm.loading import first_model
from vlm.train.start import check_start, started_model
from vlm.weights.imports import import_model


@pytest.fixture(scope="module")
def imported(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA of transformers' own class with the parts of llava_tiny and a padded vocabulary, imported."""
    folder = tmp_path_factory.mktemp("imported")
    tokenizer = tiny.tokenizer()
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    text = LlamaConfig(vocab_size=600, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=1024)
    torch.manual_seed(4)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>"))).to(torch.bfloat16)
    model.save_pretrained(folder / "theirs")
    tokenizer.save_pretrained(folder / "theirs")
    import_model(str(folder / "theirs"), folder / "ours")
    return folder / "ours"


def compose(root: Path, start: Path, *more: str) -> Any:
    return vlm.compose("llava_tiny", f"data_root={root}", f"start={start}", *more)


def fit(root: Path, start: Path, runs: Path, *more: str, resume: bool = False) -> dict[str, torch.Tensor]:
    return load_file(vlm.fit(compose(root, start, f"runs={runs}", *more), resume=resume) / "export" / "model.safetensors")


def test_a_run_from_an_imported_folder(root: Path, imported: Path, tmp_path: Path) -> None:
    before, after = load_file(imported / "model.safetensors"), fit(root, imported, tmp_path)
    assert before.keys() == after.keys() and after["llm.lm_head.weight"].shape == (600, 32)
    frozen = [name for name in before if name.startswith("encoder.")]
    assert all(torch.equal(before[name].float(), after[name]) for name in frozen)
    moved = [name for name in before if name.startswith(("connector.", "llm.model.layers"))]
    assert all(0 < (before[name].float() - after[name]).abs().max() < 2e-2 for name in moved)


def test_what_is_interrupted_in_its_first_stage_goes_on(root: Path, imported: Path, tmp_path: Path) -> None:
    whole = fit(root, imported, tmp_path, "name=whole", "save.every=2")
    with stopped_at(2):
        fit(root, imported, tmp_path, "name=cut", "save.every=2")
    again = fit(root, imported, tmp_path, "name=cut", "save.every=2", resume=True)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_run_goes_on_from_another_run_and_adds_an_adaptation(root: Path, imported: Path, tmp_path: Path) -> None:
    run = compose(root, imported, f"runs={tmp_path}", "name=first")
    first = vlm.fit(run)
    spec = compose(root, first, "model.adapt={lora: {rank: 2}}").model
    config = VLMConfig.from_pretrained(first / "export")
    model = started_model(str(first), spec, config.image_token_id)
    assert set(model.config.adapt) == {"lora"} and model.config.text_config.vocab_size == 600
    model.save_pretrained(tmp_path / "adapted")
    shutil.copy(first / "export" / "vlm_processor.json", tmp_path / "adapted")
    again = started_model(str(tmp_path / "adapted"), spec, config.image_token_id)
    assert all(torch.equal(one, other) for one, other in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    with pytest.raises(ConfigurationError, match=r"model\.adapt\.lora\.rank \(2 there, 4 here\)"):
        check_start(str(tmp_path / "adapted"), compose(root, first, "model.adapt={lora: {rank: 4}}").model, config.image_token_id)
    with pytest.raises(ConfigurationError, match=r"model\.adapt\.lora \(there, not in the first stage here\)"):
        check_start(str(tmp_path / "adapted"), run.model, config.image_token_id)


@pytest.mark.parametrize(
    "change, words",
    [
        ("model.encoder.config.hidden_act=gelu", r"model\.encoder\.config\.hidden_act \('quick_gelu' there, 'gelu' here\)"),
        ("model.connector.level=-1", r"model\.connector\.level \(-2 there, -1 here\)"),
        ("model.connector.use=linear", r"model\.connector\.depth \(2 there, None here\)"),
        ("model.llm.config.rope_theta=5e5", r"model\.llm\.rope_parameters\.rope_theta \(10000\.0 there, 500000\.0 here\)"),
        ("model.llm.config.vocab_size=700", r"tokenizer \(.* of 600 there, .* of 700 here; set model\.llm\.tokenizer="),
    ],
)
def test_every_part_that_differs_is_named_by_check(change: str, words: str, root: Path, imported: Path) -> None:
    report = vlm.check(compose(root, imported, change))
    assert [type(problem) for problem in report.problems] == [ConfigurationError]
    with pytest.raises(ConfigurationError, match=rf"start: .* is of another model than the run describes.*{words}"):
        report.stop()


def test_layers_that_nothing_reads_are_left_out_and_said_so(root: Path, tmp_path: Path) -> None:
    def run(start: Path | None = None, **settings: bool) -> Any:
        ladder = ", ".join(f"{name}: {str(value).lower()}" for name, value in settings.items())
        return vlm.compose("llava_tiny", f"data_root={root}", f"model.connector={{use: qladder, queries: 2, then: {{use: mlp}}, {ladder}}}", *([f"start={start}"] if start else []))

    tokenizer: Any = tiny.tokenizer()
    placeholder = tokenizer.convert_tokens_to_ids("<image>")
    for name, official in (("whole", True), ("trimmed", False)):
        first_model(run(official=official).model, placeholder, vocabulary=len(tokenizer)).save_pretrained(tmp_path / name)
    whole, trimmed = tmp_path / "whole", tmp_path / "trimmed"
    report = vlm.check(run(whole))
    assert not report.problems
    assert (
        "start: 18 tensors that nothing reads are left out (connector.qladder.layers.1.fc1.bias, connector.qladder.layers.1.fc1.weight, connector.qladder.layers.1.fc2.bias, ...)"
        in report.warnings
    )
    there, here = (started_model(str(whole), run(official=official).model, placeholder).state_dict() for official in (True, False))
    assert len(there) == len(here) + 18 and all(torch.equal(there[name], here[name]) for name in here)
    assert not vlm.check(run(trimmed, official=True, all_layers=False)).problems, "another spelling of the same"
    with pytest.raises(
        ConfigurationError, match=r"18 tensors that nothing reads are missing there, such as connector\.qladder\.layers\.1\.fc1\.bias; set model\.connector\.official=false"
    ):
        check_start(str(trimmed), run(official=True).model, placeholder)
    with pytest.raises(ConfigurationError, match=r"set model\.connector\.all_layers=null"):
        check_start(str(trimmed), run(all_layers=True).model, placeholder)


def test_check_names_a_folder_that_is_not_there_and_needs_no_other_weights(root: Path, imported: Path, tmp_path: Path) -> None:
    wanted = ("model.encoder.weights=path", "model.llm.weights=path")
    assert not vlm.check(compose(root, imported, *wanted)).problems
    (problem,) = vlm.check(compose(root, tmp_path / "nowhere", *wanted)).problems
    assert isinstance(problem, CheckpointError) and "start: " in str(problem) and "nowhere holds no model" in str(problem)


def test_the_parts_may_be_read_from_the_folder_itself(root: Path, imported: Path) -> None:
    run = compose(root, imported, f"model.encoder={{use: clip, path: {imported}}}", f"model.llm={{path: {imported}}}")
    assert not vlm.check(run).problems


def test_check_names_a_connector_file_that_is_not_there(root: Path, tmp_path: Path) -> None:
    (problem,) = vlm.check(vlm.compose("llava_tiny", f"data_root={root}", f"model.connector.path={tmp_path / 'none.bin'}")).problems
    assert isinstance(problem, CheckpointError) and "model.connector.path: there is no such file" in str(problem)
