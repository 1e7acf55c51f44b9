"""Prompts on small tokenizers, chat templates for them, and what a row of theirs learns."""

from collections.abc import Sequence
from typing import Any

import tiny
from transformers import PreTrainedTokenizerBase

from vlm.data.sample import Turn
from vlm.prompt import PICTURE, Encoded, Prompt, PromptSpec

GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)


def system(text: str) -> Turn:
    return Turn("system", (text,))


def prompt(use: str = "chatml", tokenizer: PreTrainedTokenizerBase | None = None, **options: Any) -> Prompt:
    return Prompt(PromptSpec(use=use, **options), tokenizer or tiny.tokenizer())


def of(chat: str, **options: Any) -> Prompt:
    """The tokenizer's own template."""
    return prompt("tokenizer", tiny.tokenizer(chat=chat), **options)


def shown(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of ids that stand behind others: a first space of a whole text cannot be told from none by decode() of SentencePiece-like tokenizers, so it is decoded behind an x."""
    head = tokenizer("x", add_special_tokens=False)["input_ids"]
    text = tokenizer.decode([*head, *(index for index in ids if index != PICTURE)], clean_up_tokenization_spaces=False)
    return text.removeprefix(tokenizer.decode(head))  # type: ignore[union-attr,arg-type]


def stretches(encoded: Encoded) -> list[list[int]]:
    """The supervised ids, stretch by stretch."""
    found: list[list[int]] = []
    for place, (index, supervised) in enumerate(zip(encoded.ids, encoded.supervised, strict=True)):
        if supervised and (place == 0 or not encoded.supervised[place - 1]):
            found.append([])
        if supervised:
            found[-1].append(index)
    return found


def learned(used: Prompt, *turns: Turn) -> list[str]:
    return [shown(used.tokenizer, ids) for ids in stretches(used.encode(turns))]


def controls(used: Prompt, encoded: Encoded) -> list[int]:
    return [index for index in encoded.ids if index in used.text.control.values()]
