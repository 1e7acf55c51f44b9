"""Rows as batches: padded on either side and told by position, branches and packed documents apart."""

import json
from pathlib import Path

import pytest
import tiny
from conversations import drawn, processor, sample, says, user
from transformers import AutoTokenizer

from vlm.data.sample import Picture, Turn
from vlm.llm.context import TEXT
from vlm.row import IGNORE, Row, collate


@pytest.fixture
def pictures(tmp_path: Path) -> list[Picture]:
    return drawn(tmp_path)


def test_collate_pads_on_the_right(pictures: list[Picture]) -> None:
    one = processor()
    rows = [
        one.row(sample(user("Hello!"), says("Hello!"))),
        one.row(sample(user(pictures[0], pictures[1], "Which?"), says("two"))),
        one.row(sample(user(pictures[2]), says("red"))),
    ]
    batch = collate(rows, pad_id=5)
    length = max(map(len, rows))
    for number, row in enumerate(rows):
        gap = length - len(row)
        assert batch["input_ids"][number].tolist() == row.ids + [5] * gap
        assert batch["labels"][number].tolist() == row.labels + [IGNORE] * gap
        assert batch["mm_token_type_ids"][number].tolist() == row.types + [TEXT] * gap
        assert batch["document_ids"][number].tolist() == [number] * len(row) + [-1] * gap
        assert batch["position_ids"][number].tolist() == row.positions + [0] * gap
        before = sum(len(other.images) for other in rows[:number])
        assert batch["picture_ids"][number].tolist() == [picture + before if picture >= 0 else -1 for picture in row.pictures] + [-1] * gap
    assert batch["images"] == [image for row in rows for image in row.images]
    assert batch["plain"] is True
    assert "branch_ids" not in batch


def test_collate_pads_on_the_left(pictures: list[Picture]) -> None:
    one = processor()
    questions = [sample(user("Hello!")), sample(user(pictures[0], "\nWhat?"))]
    rows = [one.row(question, mode="infer", generate=True) for question in questions]
    batch = one(questions)
    for number, row in enumerate(rows):
        gap = max(map(len, rows)) - len(row)
        assert batch["input_ids"][number].tolist() == [one.pad_id] * gap + row.ids
        assert batch["attention_mask"][number].tolist() == [0] * gap + [1] * len(row)
        assert batch["mm_token_type_ids"][number].tolist() == [TEXT] * gap + row.types
    assert len(batch["images"]) == 1
    assert collate(rows, pad_id=0, left=True)["plain"] is False


def test_collate_of_branches() -> None:
    one = processor()
    rows = [one.row(sample(user("q"), says("a"))), one.row(sample(user("q"), says("a"), user("r"), says("b"), independent=True))]
    batch = collate(rows, pad_id=0)
    gap = len(rows[1]) - len(rows[0])
    assert batch["branch_ids"].tolist() == [[0] * len(rows[1]), rows[1].branches]
    assert batch["plain"] is False
    assert batch["position_ids"][0].tolist() == rows[0].positions + [0] * gap


@pytest.mark.parametrize("pad", ["<|im_end|>", None], ids=["pad is eos", "no pad"])
def test_padding_is_told_by_position(pad: str | None) -> None:
    """The usual cure for a tokenizer without a padding token must not hide the end marks."""
    tokenizer = tiny.tokenizer(pad=pad)
    size = len(tokenizer)
    one, other = processor(tokenizer=tokenizer), processor()
    talks = [sample(user("q"), says("a")), sample(user("What is it?"), says("a dog"), user("And?"), says("two"))]
    rows = [one.row(talk) for talk in talks]
    batch = collate(rows, pad_id=one.pad_id)
    assert batch["labels"].tolist() == collate([other.row(talk) for talk in talks], pad_id=0)["labels"].tolist()
    assert (batch["labels"] == tokenizer.eos_token_id).sum(1).tolist() == [1, 2]
    assert (batch["document_ids"] >= 0).sum(1).tolist() == [len(row) for row in rows]
    assert len(tokenizer) == size


def test_field_tok_pad_is_eos(field_folder: Path) -> None:
    case = field_folder / "tok_pad_is_eos"
    expected = json.loads((case / "expected.json").read_text())
    for name in ("pad_is_turn_end", "no_pad_no_bos"):
        tokenizer = AutoTokenizer.from_pretrained(case / name)
        rows_before = len(tokenizer)
        one = processor("tokenizer", tokenizer=tokenizer)
        talks = [[Turn(turn["role"], (turn["content"],), turn["role"] == "assistant") for turn in talk] for talk in json.loads((case / "conversations.json").read_text())]
        batch = collate([one.row(sample(*talk)) for talk in talks], pad_id=one.pad_id)
        assert [[label for label in row if label != IGNORE] for row in batch["labels"].tolist()] == expected["supervised_ids"]
        assert (batch["document_ids"] >= 0).sum(1).tolist() == expected["row_lengths_unpadded"]
        assert len(tokenizer) == rows_before + expected["embedding_rows_added"]


def test_a_packed_row_is_its_documents() -> None:
    one = processor()
    rows = [one.row(sample(user(" ".join(["word"] * count)), says("yes"))) for count in (1, 8, 15)]
    rows[1].labels[0] = rows[1].ids[0]  # a prompt that supervises its first token: nothing predicts it
    batch = collate([Row.packed(rows), rows[0]], pad_id=one.pad_id)
    length, first = sum(map(len, rows)), batch["document_ids"][0]
    assert first.tolist() == [0] * len(rows[0]) + [1] * len(rows[1]) + [2] * len(rows[2])
    assert batch["document_ids"][1].tolist() == [3] * len(rows[0]) + [-1] * (length - len(rows[0]))
    assert batch["position_ids"][0].tolist() == [place for row in rows for place in range(len(row))]
    assert batch["input_ids"][0].tolist() == [index for row in rows for index in row.ids]
    assert (batch["labels"][0] != IGNORE).sum() == sum(row.supervised for row in rows)
