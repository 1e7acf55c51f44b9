"""What a prompt or a chat template has no place for, refuses or breaks: it is told, or the prompt is refused before a run begins."""

import json

import pytest
import tiny
from conversations import says, user
from prompts import GEMMA, learned, of, prompt, shown, system
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from vlm.data.sample import Picture, Turn
from vlm.errors import ConfigurationError, DataError
from vlm.prompt import PICTURE

REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn here') }}{% endif %}" + (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns must alternate') }}{% endif %}{% endfor %}" + GEMMA
)
DROPS = GEMMA.replace("in messages", "in messages if m['role'] != 'system'")


# ---- system turns and refusals -------------------------------------------------------------------------------------------


def test_the_system_text_of_a_prompt() -> None:
    vicuna = prompt("vicuna_v1")
    assert shown(vicuna.tokenizer, vicuna.encode((user("q"),)).ids).startswith("A chat between a curious user")
    assert shown(vicuna.tokenizer, vicuna.encode((system("Short."), user("q"))).ids) == "Short. USER: q "
    assert shown(vicuna.tokenizer, prompt("vicuna_v1", system="").encode((user("q"),)).ids) == "USER: q "
    assert shown(vicuna.tokenizer, prompt("chatml", system="Short.").encode((user("q"),)).ids).startswith("<|im_start|>system\nShort.<|im_end|>")


@pytest.mark.parametrize(("chat", "sentence"), [(REFUSES, ": no system turn here"), (DROPS, ""), (DROPS.replace("model", "ASSISTANT"), "")])
def test_a_system_text_that_the_template_has_no_place_for_is_folded_and_counted(chat: str, sentence: str) -> None:
    used = of(chat)
    folded = used.encode((system("Answer in French."), user(Picture(""), "\nq"), says("a"), user("r")))
    plain = used.encode((user("Answer in French.\n\n", Picture(""), "\nq"), says("a"), user("r")))
    assert (folded.ids, folded.supervised) == (plain.ids, plain.supervised)
    assert (folded.notes, plain.notes) == (("system text folded into the first question",), ())
    twice = used.encode((system("A."), system("B."), user("q"), says("a")))
    assert shown(used.tokenizer, twice.ids).startswith("<|im_start|>user\nA.\n\nB.\n\nq<|im_end|>")
    with pytest.raises(DataError, match=f"^f.json, sample 2: the chat template refuses or loses the system turn{sentence}. set fold_system: fold"):
        of(chat, fold_system="error").encode((system("s"), user("q"), says("a")), where="f.json, sample 2")
    with pytest.raises(DataError, match="sample 2: a system turn has no question to be put in front of"):
        used.encode((system("s"), says("a")), where="sample 2")


def test_a_prompt_of_pictures_counts_the_system_turn_that_it_leaves_out() -> None:
    row = prompt("plain").encode((system("s"), user(Picture(""), "q"), says("a")))
    assert (row.notes, row.ids[0]) == (("system turn left out",), PICTURE)


def test_a_template_that_refuses_turns_is_quoted() -> None:
    used = of(REFUSES)
    for turns in ((user("q"), user("r"), says("a")), (says("hello"), user("q"), says("a")), (user("q"), says("a"), says("b"))):
        with pytest.raises(
            DataError, match=r"^train.jsonl, sample 5: the chat template cannot render this conversation: turns must alternate\. mend the turns, or choose another prompt"
        ):
            used.encode(turns, where="train.jsonl, sample 5")
    assert learned(used, user("q"), says("a"), user("r")) == ["a<|im_end|>"]


def test_any_fault_of_a_template_is_reported() -> None:
    used = of(GEMMA.replace("m['content'] +", "m['content'] + ('' if messages | length < 5 else 1 / 0) +"))
    with pytest.raises(DataError, match="sample 1: the chat template cannot render this conversation: division by zero"):
        used.encode((user("q"), says("a"), user("q"), says("a"), user("q")), where="sample 1")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (("in messages %}", "in messages[-2:] %}"), "got 2 parts"),
        (("m['content']", "m['content'] + m['content']"), "got 8 parts"),
        (("in messages %}", "in messages | reverse %}"), "got 4 parts"),
    ],
    ids=["loses", "repeats", "reorders"],
)
def test_a_template_that_changes_the_conversation_is_refused(change: tuple[str, str], fault: str) -> None:
    with pytest.raises(ConfigurationError, match=f"does not fit the tokenizer: the chat template loses, repeats or reorders parts of the conversation. {fault} in the prompt"):
        of(GEMMA.replace(*change))


# ---- prompts that do not fit ---------------------------------------------------------------------------------------------


def test_an_unknown_prompt() -> None:
    with pytest.raises(ConfigurationError, match=r"no prompt is called 'chat_ml'. expected one of plain, vicuna_v1, chatml, deepseek_vl, tokenizer"):
        prompt("chat_ml")
    with pytest.raises(ConfigurationError, match=r"the tokenizer has no chat template. choose one of plain"):
        prompt("tokenizer", tiny.tokenizer(chat=None))


def test_a_control_token_that_is_missing() -> None:
    content = json.loads(tiny.tokenizer().backend_tokenizer.to_str())
    content["added_tokens"] = []
    with pytest.raises(ConfigurationError, match=r"'chatml' needs the control token '<\|im_start\|>', which the tokenizer does not have"):
        prompt("chatml", PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content))))


def test_a_tokenizer_without_an_end_token() -> None:
    bare = tiny.tokenizer(
        eos=None, chat="{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    for use in ("vicuna_v1", "tokenizer"):
        with pytest.raises(ConfigurationError, match=rf"prompt '{use}' writes no end mark behind an answer.*got eos_token None.*give the tokenizer an end token"):
            prompt(use, bare)
    assert prompt("plain", bare).end_ids
    assert prompt("chatml", bare).end_ids == (bare.convert_tokens_to_ids("<|im_end|>"),)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("<|im_start|>model\n' }}{% endif %}", "<|im_start|>model\n<think>' }}{% endif %}"), "prompts that inference never shows"),
        (("+ m['content']", "+ ('' if m['role'] == 'user' or not loop.last else '<think></think>') + m['content']"), "otherwise when it is the last"),
        (("<|im_end|>\n' }}{% endfor %}", "' + ('<|im_end|>' if loop.last or m['role'] == 'user' else '<|endoftext|>') }}{% endfor %}"), "otherwise when it is the last"),
        (("{{ bos_token }}", "{{ messages | length }}"), "prompts that inference never shows"),
        (("{% endfor %}", ""), "is not Jinja"),
    ],
    ids=["opens a thinking mark", "thinks in the last answer", "ends the last answer otherwise", "rewrites history", "syntax"],
)
def test_a_template_whose_training_is_not_its_inference(change: tuple[str, str], message: str) -> None:
    assert change[0] in GEMMA
    with pytest.raises(ConfigurationError, match=f"prompt 'tokenizer'.*{message}.*choose another prompt"):
        of(GEMMA.replace(*change))


def test_templates_with_generation_blocks() -> None:
    chat = GEMMA.replace("m['content'] +", "m['content'] }}{% generation %}{{").replace("{% endfor %}", "{% endgeneration %}{% endfor %}")
    assert of(chat).encode((user("q"), says("a"))).ids == of(GEMMA).encode((user("q"), says("a"))).ids


# ---- what a template does to the text of turns --------------------------------------------------------------------------------

TALK = (system(" Be brief.\n"), user("\n What? "), says(" red \n"), user("  Why? "), says("so "))


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize("strip", [" | trim", ".lstrip()", ".rstrip()"])
def test_blanks_that_a_template_cuts_off_are_cut_off_in_rows(role: str, strip: str) -> None:
    chat = tiny.CHATML.replace("m['content']", f"(m['content']{strip} if m['role'] == '{role}' else m['content'])")
    used = of(chat)
    theirs = used.tokenizer.apply_chat_template([{"role": turn.role, "content": turn.text} for turn in TALK], tokenize=False)
    assert chat != tiny.CHATML and used.tokenizer.decode(used.encode(TALK).ids) == theirs


@pytest.mark.parametrize("change", ["m['content'] | upper", "m['content'] | tojson", "m['content'] | replace(',', ';')"])
def test_a_template_that_changes_text_is_refused(change: str) -> None:
    with pytest.raises(ConfigurationError, match="the tokenizer's chat template changes the text of turns"):
        of(tiny.CHATML.replace("m['content']", f"({change})"))


def test_a_template_has_every_special_token_of_the_tokenizer() -> None:
    tokenizer = tiny.tokenizer(chat="{{ cls_token }}" + tiny.CHATML)
    tokenizer.add_special_tokens({"cls_token": "<|cls|>"})
    assert prompt("tokenizer", tokenizer).encode((user("q"), says("a"))).ids[0] == tokenizer.cls_token_id


def test_half_a_character_is_named() -> None:
    with pytest.raises(DataError, match=r"^f.json, sample 3: turn 1 holds half a character at position 3"):
        prompt().encode((user("q"), says("caf\udce9")), where="f.json, sample 3")


def test_deepseek_strips_turns_and_writes_no_separator_behind_an_empty_one() -> None:
    used = prompt("deepseek_vl", tiny.tokenizer(bos="<s>"))

    def text(*turns: Turn, generate: bool = False) -> str:
        return used.tokenizer.decode(used.encode(turns, generate=generate).ids).removeprefix("<s>")

    assert text(system(" Be brief.\n"), user(" q "), says(" a\n")) == "Be brief.\n\n\nUser: q\n\nAssistant: a<|im_end|>"
    assert text(system(" \n"), user("q"), generate=True) == "User: q\n\nAssistant:"
    assert text(system("s"), user(" "), generate=True) == "s\n\nUser:Assistant:"
