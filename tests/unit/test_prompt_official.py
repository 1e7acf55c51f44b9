"""The released prompts and label walks (the numbers of the release itself are in the golden cases arcana_prompt)."""

import json
import re
from typing import Any

import pytest
import tiny
from conversations import says, user
from prompts import prompt, shown, stretches, system
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from vlm.data.sample import Picture, Turn
from vlm.errors import ConfigurationError, DataError
from vlm.prompt import GIVEN_UP, PICTURE
from vlm.prompt_official import IGNORE, IMAGE, TEMPLATES, Labelled, collate, prompt_ids, prompt_text, train_ids_and_labels

SYSTEM = TEMPLATES["v1"].system


def tokenizer(legacy: bool = False) -> Any:
    """Byte-level letters with Vicuna's accident: "USER" is one token right after </s>, two at the start of a string, where a blank mark comes before it."""
    words = ["<unk>", "<s>", "</s>", "USER", "▁", *(chr(code) for code in range(33, 127)), "\n"]
    built = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    built.normalizer = normalizers.Replace(" ", "▁")
    marks = pre_tokenizers.Metaspace("▁", prepend_scheme="always" if legacy else "first", split=False)
    built.pre_tokenizer = pre_tokenizers.Sequence([marks, pre_tokenizers.Split(Regex("USER|[\\s\\S]"), "isolated")])
    built.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    built.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=built, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>")


def said(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[place % 2], "value": value} for place, value in enumerate(values)]


def labelled(*values: str, template: str = "v1", has_image: bool = True, limit: int = 2048, legacy: bool = False) -> Labelled:
    return train_ids_and_labels(said(*values), tokenizer(legacy), template, has_image=has_image, model_max_length=limit, legacy=legacy)


def supervised(sample: Labelled) -> str:
    """The supervised tokens as text, | between stretches."""
    text = "".join("|" if label == IGNORE else tokenizer().convert_ids_to_tokens(label) for label in sample.labels)
    return re.sub(r"\|+", "|", text).strip("|")


@pytest.mark.parametrize(
    "template, roles, text",
    [
        ("v1", ("USER", "ASSISTANT"), f"{SYSTEM} USER: q ASSISTANT: a</s>USER: r ASSISTANT:"),
        ("llava_v1", ("USER", "ASSISTANT"), f"{SYSTEM.replace('user', 'human')} USER: q ASSISTANT: a</s>USER: r ASSISTANT:"),
        ("llava_v0", ("Human", "Assistant"), f"{SYSTEM.replace('user', 'human')}###Human: q###Assistant: a###Human: r###Assistant:"),
        ("plain", ("", ""), "q\na\nr\n\n"),
    ],
)
def test_templates(template: str, roles: tuple[str, str], text: str) -> None:
    turns = [(roles[place % 2], words) for place, words in enumerate(("q", "a", "r", None))]
    assert prompt_text(turns, template) == text


def test_ids_keep_one_start_token_and_every_placeholder() -> None:
    words = tokenizer()
    ids = prompt_ids("a<image>b<image><image>", words)
    assert ids == [1, *words("a").input_ids[1:], IMAGE, *words("b").input_ids[1:], IMAGE, IMAGE]
    assert prompt_ids("<image>", words) == [1, IMAGE]
    bare = tokenizer()
    bare.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    assert prompt_ids("a<image>b", bare) == [*bare("a").input_ids, IMAGE, *bare("b").input_ids]


def test_answers_with_their_end_marks_are_supervised() -> None:
    for has_image in (True, False):
        sample = labelled("What?", "A bus.", "Red?", "Yes.", has_image=has_image)
        assert supervised(sample) == "▁A▁bus.</s>|▁Yes.</s>"
        assert (len(sample.labels), sample.ignored) == (len(sample.input_ids), "")
        assert all(label in (IGNORE, token) for label, token in zip(sample.labels, sample.input_ids, strict=True))


def test_the_legacy_switch_must_fit_the_tokenizer() -> None:
    rounds = ("What?", "A bus.", "Red?", "Yes.")
    assert labelled(*rounds, legacy=True).ignored == ""
    crossed = train_ids_and_labels(said(*rounds), tokenizer(legacy=False), "v1", has_image=True, model_max_length=2048, legacy=True)
    assert set(crossed.labels) == {IGNORE}
    assert re.fullmatch(r"the rounds have (\d+) tokens, the prompt (\d+)", crossed.ignored)


def test_placeholders_move_to_the_front_at_most_one_a_turn() -> None:
    assert "USER: <image>\nand \nCompare. ASSISTANT:" in labelled("<image> and <image>\nCompare.", "No.").prompt
    assert "USER: <image> ASSISTANT: No.</s>" in labelled("<image>\n", "No.").prompt
    two = labelled("Look\n<image>", "No.", "<image>\nthis?", "Yes.")
    assert two.input_ids.count(IMAGE) == 2
    assert supervised(two) == "▁No.</s>|▁Yes.</s>"
    assert "USER: a <image> b ASSISTANT:" in labelled("a <image> b", "No.", has_image=False).prompt


def test_an_opening_answer_is_dropped() -> None:
    turns = [{"from": "gpt", "value": "Hello!"}, *said("q", "a")]
    sample = train_ids_and_labels(turns, tokenizer(), "v1", has_image=False, model_max_length=2048, legacy=False)
    assert sample.prompt == f"{SYSTEM} USER: q ASSISTANT: a</s>"


def test_quirks_that_give_a_sample_up() -> None:
    assert set(labelled("What is ☃?", "A sign.").labels) == {IGNORE}, "an unknown character counts as padding"
    assert set(labelled("Who?", "He said ASSISTANT: yes.").labels) == {IGNORE}, "role text in an answer ends the walk"
    assert set(labelled("Who?", "a</s>b").labels) == {IGNORE}, "an end mark in an answer too"


def test_an_empty_answer_has_no_end_mark_and_is_not_learned() -> None:
    sample = labelled("Describe.", "", "Go on.", "Yes.")
    assert sample.prompt.endswith("USER: Describe. ASSISTANT:USER: Go on. ASSISTANT: Yes.</s>")
    assert supervised(sample) == "▁Yes.</s>"


def test_a_long_sample_is_not_given_up_but_cut() -> None:
    text = labelled("q" * 50, "a" * 300, has_image=False, limit=200)
    assert (len(text.input_ids), text.ignored) == (200, "")
    pictured = labelled("<image>" + "q" * 50, "a" * 300, limit=200)
    assert len(pictured.input_ids) > 200
    assert collate([pictured], 0, 200)["input_ids"].shape == (1, 200)


def test_plain_supervises_the_caption_as_it_is_written() -> None:
    sample = labelled("Describe it.\n<image>", "  a bus ", template="plain")
    assert sample.prompt == "<image>  a bus \n"
    assert sample.input_ids[:2] == [1, IMAGE]
    assert sample.labels == [IGNORE, IGNORE, *sample.input_ids[2:]]


def test_collate_pads_right_and_masks_every_pad_id() -> None:
    batch = collate([Labelled("", [1, 5, 0, 6], [IGNORE, IGNORE, 0, 6]), Labelled("", [1, 7], [IGNORE, 7])], 0, 3)
    assert batch["input_ids"].tolist() == [[1, 5, 0], [1, 7, 0]]
    assert batch["labels"].tolist() == [[IGNORE, IGNORE, 0], [IGNORE, 7, IGNORE]]
    assert batch["attention_mask"].tolist() == [[True, True, False], [True, True, False]]


def test_what_was_not_released_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no label walk was released for template 'llava_v0'"):
        labelled("q", "a", template="llava_v0")
    with pytest.raises(ConfigurationError, match="no released template is called 'v2'"):
        prompt_text([], "v2")
    with pytest.raises(DataError, match=r"template plain takes .* got 4 turns"):
        labelled("<image>", "a", "b", "c", template="plain")
    with pytest.raises(DataError, match=r"do not alternate. got human, human; expected human, gpt"):
        train_ids_and_labels([{"from": "human", "value": "q"}] * 2, tokenizer(), "v1", has_image=False, model_max_length=9, legacy=False)


# ---- rows of an official prompt --------------------------------------------------------------------------------------------


def vicuna(kind: str = "byte_level", legacy: bool = False) -> PreTrainedTokenizerBase:
    """A tokenizer that starts every string with <s> and ends answers in </s>."""
    tokenizer = tiny.tokenizer(kind, bos="<s>", eos="</s>", pad="<|endoftext|>")
    start = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    tokenizer.legacy = legacy  # type: ignore[attr-defined]
    return tokenizer


def test_official_rows_have_the_released_ids_and_labels() -> None:
    tokenizer = vicuna(legacy=True)
    used = prompt("vicuna_v1", tokenizer, official=True)
    said = [{"from": "human", "value": "What\n<image>"}, {"from": "gpt", "value": "red"}, {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "so"}]
    released = train_ids_and_labels(said, tokenizer, "vicuna_v1", has_image=True, model_max_length=2048, legacy=True)
    row = used.encode((user("What\n", Picture("")), says("red"), user("Why?"), says("so")))
    assert not released.ignored
    assert row.ids == [PICTURE if index == IMAGE else index for index in released.input_ids]
    assert row.supervised == [label != IGNORE for label in released.labels]
    assert [shown(tokenizer, ids) for ids in stretches(row)] == [" red</s>", " so</s>"]
    assert row.notes == ()
    plain = prompt("plain", tokenizer, official=True).encode((user("Describe it.\n", Picture("")), says("a dog")))
    assert plain.ids[:2] == [tokenizer.bos_token_id, PICTURE]
    assert [shown(tokenizer, ids) for ids in stretches(plain)] == ["a dog\n"]


def sentencepiece(legacy: bool) -> PreTrainedTokenizerBase:
    """Like Vicuna's: a mark in front of the first word, of a legacy one behind control tokens too, and no token across words."""
    raw = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    alphabet = sorted({character for text in tiny.TEXT for character in text if character.isascii()} | {"▁"})
    raw.train_from_iterator(tiny.TEXT, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]))
    content = json.loads(raw.to_str())
    raw = Tokenizer.from_str(json.dumps(content | {"added_tokens": content["added_tokens"][:1]}))  # bytes are ordinary tokens
    raw.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in ("<s>", "</s>", "<image>")])
    raw.pre_tokenizer = None if legacy else pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    if legacy:
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", raw.token_to_id("<s>"))])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>")
    made.legacy = legacy  # type: ignore[attr-defined]
    return made


TOKENIZERS = {"byte_level": vicuna, "legacy": lambda: sentencepiece(True), "first": lambda: sentencepiece(False)}
TALKS = [
    (user(Picture(""), "\nWhat is it?"),),
    (user("How many?"), says("two"), user("And now?")),
    (user("left ", Picture(""), " right ", Picture("")), says("red"), user(Picture(""), "x")),
]


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_official_inference_prompts_are_the_released_ones(kind: str, talk: tuple[Turn, ...]) -> None:
    """Word marks behind pictures, and behind `</s>` where the tokenizer is a legacy one; without `official` only where `word_marks` asks for them."""
    tokenizer = TOKENIZERS[kind]()
    said = [(("USER", "ASSISTANT")[turn.role == "assistant"], "".join(part if isinstance(part, str) else "<image>" for part in turn.parts)) for turn in talk]
    released = [PICTURE if index == IMAGE else index for index in prompt_ids(prompt_text([*said, ("ASSISTANT", None)], "vicuna_v1"), tokenizer)]
    assert prompt("vicuna_v1", tokenizer, official=True).encode(talk, generate=True).ids == released
    assert prompt("vicuna_v1", tokenizer, word_marks=True).encode(talk, generate=True).ids == released
    assert (prompt("vicuna_v1", tokenizer).encode(talk, generate=True).ids == released) == (kind == "byte_level" or (kind == "first" and PICTURE not in released))


@pytest.mark.parametrize("use", ["vicuna_v1", "plain"])
@pytest.mark.parametrize("more", [{"official": True}, {"word_marks": True}])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_training_rows_begin_with_the_prompt_that_inference_shows(kind: str, more: dict[str, bool], use: str) -> None:
    used = prompt(use, TOKENIZERS[kind](), **more)
    ask = user(Picture(""), "\nWhat is it?")
    row, asked = used.encode((ask, says("red and green"))), used.encode((ask,), generate=True)
    assert row.ids[: len(asked.ids)] == asked.ids and not any(row.supervised[: len(asked.ids)]) and all(row.supervised[len(asked.ids) :])


def test_a_system_turn_takes_the_place_of_the_released_system_text() -> None:
    used, tokenizer = prompt("vicuna_v1", vicuna(), official=True), vicuna()
    ids = used.encode((system("Be brief."), user("q")), generate=True).ids
    assert ids == tokenizer("Be brief. USER: q ASSISTANT:")["input_ids"]


@pytest.mark.parametrize("text", ["a</s>b", "<image>", "<|im_end|>"])
def test_text_that_the_released_program_takes_for_a_mark_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"an official prompt cannot show '<.*>' as text"):
        prompt("vicuna_v1", vicuna(), official=True).encode((user(text),), generate=True)


def test_official_reads_the_legacy_switch_and_counts_what_it_gives_up() -> None:
    turns = (user("q"), says("a"), user("r"), says("b"))
    wrong = prompt("vicuna_v1", vicuna(legacy=False), official=True).encode(turns)
    assert wrong.notes == (GIVEN_UP,)
    assert not any(wrong.supervised)
    assert any(prompt("vicuna_v1", vicuna(legacy=True), official=True).encode(turns).supervised)


def test_official_does_not_give_up_what_is_cut() -> None:
    """The release compares the counts of whole samples only; the row is still whole here, so that its length can be told."""
    turns = (user("q" * 90), says("a"), user("r"), says("b"))
    used = prompt("vicuna_v1", vicuna(legacy=False), official=True)
    whole, cut = used.encode(turns), used.encode(turns, max_length=60)
    assert (whole.notes, cut.notes) == ((GIVEN_UP,), ())
    assert len(cut.ids) == len(cut.supervised) == len(whole.ids) > 60


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ((system("s"), user("q"), says("a")), "no system turns"),
        ((user("q"), says("an <image> mark")), "no <image> in text"),
        ((user("q"), says("a", supervised=False), user("r"), says("b")), "no unsupervised answers"),
        ((user(Picture(""), Picture(""), "q"), says("a")), "keeps one picture per turn. got 1 kept; expected 2"),
        ((user("q"), user("r"), says("a")), "the turns do not alternate"),
    ],
)
def test_official_refuses_what_the_release_could_not_say(turns: tuple[Turn, ...], message: str) -> None:
    with pytest.raises(DataError, match=f"^f.json, sample 1: .*{message}"):
        prompt("vicuna_v1", vicuna(), official=True).encode(turns, where="f.json, sample 1")


def test_official_counts_an_opening_answer_that_it_leaves_out() -> None:
    assert prompt("vicuna_v1", vicuna(), official=True).encode((says("hello"), user("q"), says("a"))).notes == ("opening answer left out",)


def test_official_prompts_that_do_not_fit() -> None:
    for use in ("chatml", "tokenizer"):
        with pytest.raises(ConfigurationError, match=f"no label walk was released for prompt '{use}'. expected plain or vicuna_v1"):
            prompt(use, vicuna(), official=True)
    with pytest.raises(ConfigurationError, match="an official prompt has its own system text. got system 'Short.'"):
        prompt("vicuna_v1", vicuna(), official=True, system="Short.")
    with pytest.raises(ConfigurationError, match="puts its start token in front of every string.*leave `official` out"):
        prompt("vicuna_v1", official=True)
