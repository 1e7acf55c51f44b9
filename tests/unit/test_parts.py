"""The table of `vlm list`."""

import pytest
from tiny_run import printed, register

from vlm.train.parts import parts_table


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)


def test_the_table_of_parts_names_parts_prompts_and_configurations(parts: None) -> None:
    tables = parts_table().tables
    assert dict(tables["encoders"])["native"] == "An encoder without a size of its own: one token per 14 x 14 pixels."
    assert dict(tables["connectors"])["mlp"] == "LLaVA-1.5's projector: linears with GELU between them."
    assert {"plain", "vicuna_v1", "chatml", "deepseek_vl", "tokenizer"} == set(dict(tables["prompts"]))
    assert dict(tables["configs/run"])["llava_1.5_7b"].startswith("LLaVA-1.5 7B: CLIP")
    text = printed(parts_table())
    for word in ("siglip", "zero3", "vicuna_7b_v1.5", "adaptations"):
        assert word in text
