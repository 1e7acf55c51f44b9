"""The shipped configurations: each is composed and checked, and its numbers are the published ones."""

import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import vlm
from vlm.cli import app
from vlm.composition import CONFIGS
from vlm.llm.decoder import build_decoder
from vlm.loading import text_config

# Parameters of the released checkpoints: towers without their projection to the text (but for open_clip's, which holds it), decoders with a tied head counted once.
ENCODERS = {
    "clip_b_16": (85_799_424, 196),
    "clip_l_224": (303_179_776, 256),
    "clip_l_336": (303_507_456, 576),
    "dinov2_s_14_reg": (22_057_344, 1369),
    "mobilenetv2": (2_223_872, 49),
    "openclip_l_14_laion2b": (303_966_208, 256),
    "sam_b_siglip_l_1024": (400_045_313, 576),
    "siglip_b_16_224": (92_884_224, 196),
    "siglip_l_16_384": (316_283_904, 576),
    "siglip_so400m_384": (428_225_600, 729),
}
DECODERS = {
    "gemma2_2b": 2_614_341_888,
    "gemma3_1b": 999_885_952,
    "llama_2_7b": 6_738_415_616,
    "llama_3.2_1b": 1_235_814_400,
    "mistral_7b_v0.3": 7_248_023_552,
    "phi_2": 2_779_683_840,
    "phi_3_mini": 3_821_079_552,
    "pythia_410m": 405_334_016,
    "qwen2.5_0.5b": 494_032_768,
    "qwen2_0.5b": 494_032_768,
    "qwen2_7b": 7_615_616_512,
    "qwen3_0.6b": 596_049_920,
    "stablelm_2_1.6b": 1_644_515_328,
    "vicuna_13b_v1.5": 13_015_864_320,
    "vicuna_7b_v1.5": 6_738_415_616,
}


def names(group: str) -> list[str]:
    return sorted(file.stem for file in (CONFIGS / group).glob("*.yaml"))


def size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_every_named_model_stands_in_the_table_of_published_numbers() -> None:
    assert names("encoder") == sorted(ENCODERS)
    assert names("llm") == sorted(DECODERS)


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_an_encoder_has_its_published_parameters_and_tokens(name: str) -> None:
    encoder = vlm.compose("llava_1.5_7b", f"model.encoder={name}").model.encoder
    with torch.device("meta"):
        assert size(encoder.build()) == ENCODERS[name][0]
    layouts = encoder.layout(640, 480, "infer")
    read = [layouts["features"]] if "features" in layouts else layouts.values()  # the stages of a pyramid have grids of their own
    assert {layout.without("summary").count for layout in read} == {ENCODERS[name][1]}


@pytest.mark.parametrize("name", sorted(DECODERS))
def test_a_decoder_has_its_published_parameters(name: str) -> None:
    model = vlm.compose("llava_1.5_7b", f"model.llm={name}").model
    with torch.device("meta"):
        assert size(build_decoder(text_config(model))) == DECODERS[name]


@pytest.mark.parametrize(("group", "name"), [(group, name) for group in ("encoder", "llm") for name in names(group)])
def test_a_comment_states_the_numbers_of_its_file(group: str, name: str) -> None:
    stated = {int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", (CONFIGS / group / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0])}
    assert stated >= set(ENCODERS[name] if group == "encoder" else (DECODERS[name],))


@pytest.mark.parametrize("name", names("run"))
def test_every_run_passes_the_check_and_says_what_was_not_checked(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["check", name])
    assert result.exit_code == 0, result.output
    assert "not checked: data_root is not set" in result.output
    assert "no problems" in result.output


def test_llava_7b_has_the_published_steps_and_projector() -> None:
    report = vlm.check(vlm.compose("llava_1.5_7b"))
    align, instruct = report.stages
    assert [(stage.length.steps, stage.length.samples) for stage in report.stages if stage.length] == [(2181, 558128), (5198, 665298)]
    assert (align.picture_tokens, instruct.picture_tokens) == (576, 576)
    assert align.trainable == sum(group.count for group in align.groups if group.path == "connector.mlp") == 20_979_712
    assert instruct.trainable == 20_979_712 + DECODERS["vicuna_7b_v1.5"]
    assert align.total == ENCODERS["clip_l_336"][0] + instruct.trainable
    assert report.exports == {"llava": "transformers' LlavaForConditionalGeneration"}
