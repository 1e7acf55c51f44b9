"""Cases of DeepSeek-VL that no reference folder brings, made here: what the format allows is served."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.golden import dsvl
from tests.golden.case import Case, Fields
from tests.golden.dsvl_chat import chat
from tests.golden.runner import row_of

GIVEN = Path(__file__).parent / "cases" / "dsvl_chat"
TAG, END = "<image_placeholder>", "<｜end▁of▁sentence｜>"


def conversations(folder: Path, *talks: list[tuple[str, str]], **config: Any) -> Case:
    folder.mkdir()
    shutil.copy(GIVEN / "tokenizer.json", folder)
    described = json.loads((GIVEN / "case.json").read_text(encoding="utf-8"))
    (folder / "case.json").write_text(json.dumps({**described, "config": described["config"] | config}))
    (folder / "inputs.json").write_text(json.dumps({"conversations": [[{"role": role, "content": content} for role, content in talk] for talk in talks]}))
    return Case(folder)


def test_any_system_text_and_number_of_picture_tokens(tmp_path: Path) -> None:
    case = conversations(
        tmp_path / "dsvl_chat_other",
        [("User", f" {TAG} größe 图片?"), ("Assistant", "Ω it is. ")],
        [("User", "q"), ("Assistant", " ")],
        system_prompt="Be brief.",
        num_image_tokens=6,
        mask_prompt=True,
    )
    got = chat(case)
    row = row_of("dsvl_chat_other")
    assert not case.config.unread(row.without_effect)  # type: ignore[union-attr]
    first, second = got["samples"]
    assert first["sft_format"] == f"Be brief.\n\nUser: {TAG} größe 图片?\n\nAssistant: Ω it is.{END}", "the text, with characters that the tokenizer does not have"
    assert second["sft_format"] == "Be brief.\n\nUser: q\n\nAssistant:"
    assert first["num_image_tokens"] == [6] and first["input_ids"].count(got["image_id"]) == 6 and tuple(got["images_emb_mask"].shape) == (2, 1, 6)


def test_a_batch_without_pictures_has_one_empty_place(tmp_path: Path) -> None:
    got = chat(conversations(tmp_path / "dsvl_chat_text", [("User", "q"), ("Assistant", ""), ("User", "r"), ("Assistant", "a")], system_prompt=""))
    assert tuple(got["images_emb_mask"].shape) == (1, 1, 4) and not got["images_emb_mask"].any()
    assert got["samples"][0]["sft_format"] == f"User: q\n\nAssistant:User: r\n\nAssistant: a{END}", "an answer without text has nothing to learn, and no separator"


@pytest.mark.parametrize("kind", ["identity", "linear", "mlp_gelu", "low_high_hybrid_split_mlp_gelu"])
def test_every_aligner_reads_the_towers_output(kind: str) -> None:
    assert dsvl.connector_spec(Fields({"projector_type": kind})).level == "final"
