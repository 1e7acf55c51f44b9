"""The prompts and label walks of released LLaVA and Arcana, quirks included; reached by `official: true` in a `prompt:` mapping.

Reproduced from systems/arcana.md, sections 3 and 7 (quirks 14 and 18). `prompt.py` is the correct form: it labels by spans, this module finds the answers
again in the finished text by counting tokens, and gives a sample up where the count does not come out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlm.errors import ConfigurationError, DataError

__all__ = ["IGNORE", "IMAGE", "PLACEHOLDER", "TEMPLATES", "Labelled", "Template", "collate", "conversation_prompt", "prompt_ids", "prompt_text", "train_ids_and_labels"]

IGNORE = -100
IMAGE = -200
PLACEHOLDER = "<image>"

Conversation = Sequence[Mapping[str, str]]  # [{"from": "human" | "gpt", "value": text}, ...]


@dataclass(frozen=True)
class Template:
    """Text around the turns. roles: asker, answerer. separators: after the system text and questions, and after answers. stop: what ends an answer."""

    system: str
    roles: tuple[str, str]
    separators: tuple[str, str]

    @property
    def stop(self) -> str:
        return self.separators[1]


_SYSTEM = "A chat between a curious {0} and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
_VICUNA = Template(_SYSTEM.format("user"), ("USER", "ASSISTANT"), (" ", "</s>"))

TEMPLATES = {
    "v1": _VICUNA,
    "vicuna_v1": _VICUNA,
    "llava_v1": Template(_SYSTEM.format("human"), ("USER", "ASSISTANT"), (" ", "</s>")),
    "llava_v0": Template(_SYSTEM.format("human"), ("Human", "Assistant"), ("###", "###")),
    "plain": Template("", ("", ""), ("\n", "\n")),
}
_WALKED = ("v1", "vicuna_v1", "llava_v1")


class Labelled(NamedTuple):
    """A training sample. ignored: why all labels are -100, which the released code only warns about; "" where the sample is supervised."""

    prompt: str
    input_ids: list[int]
    labels: list[int]
    ignored: str = ""


def prompt_text(turns: Sequence[tuple[str, str | None]], template: str, system: str | None = None) -> str:
    """(role, text) turns, the roles as the template writes them -> prompt. A turn of None or "" is left open: role and colon only (quirk 18). system: in the place of the template's own."""
    form = _template(template)
    if template == "plain":
        return "".join((text or "") + separator for (_, text), separator in zip(turns, _alternating(form, len(turns)), strict=True))
    written = [f"{role}: {text}{separator}" if text else f"{role}:" for (role, text), separator in zip(turns, _alternating(form, len(turns)), strict=True)]
    return (form.system if system is None else system) + form.separators[0] + "".join(written)


def prompt_ids(prompt: str, tokenizer: Any) -> list[int]:
    """Ids with -200 for every placeholder. The pieces between them are tokenised alone; of the start tokens that each may bring, the first is kept."""
    pieces = [tokenizer(piece).input_ids for piece in prompt.split(PLACEHOLDER)]
    start = 1 if pieces[0] and pieces[0][0] == tokenizer.bos_token_id else 0
    ids = list(pieces[0])
    for piece in pieces[1:]:
        ids += [IMAGE, *piece[start:]]
    return ids


def conversation_prompt(conversation: Conversation, template: str, has_image: bool) -> str:
    """Training text of a conversation. With an image, placeholders are moved to the front of their turn, at most one each (quirk 14).

    `plain` keeps the answer alone, behind a bare placeholder; the others drop a first turn that is not the human's.

    Raises:
        DataError: turns that do not alternate; `plain` without exactly two turns, the first holding a placeholder.
    """
    form = _template(template)
    values = [_placeholder_first(turn["value"]) if has_image else turn["value"] for turn in conversation]
    if template == "plain":
        if len(values) != 2 or PLACEHOLDER not in values[0]:
            raise DataError(f"template plain takes a turn with {PLACEHOLDER} and one answer", got=f"{len(values)} turns", cure="train text and dialogues with another template")
        return PLACEHOLDER + values[1] + form.separators[1]
    senders = [turn["from"] for turn in conversation]
    if senders and senders[0] != "human":
        senders, values = senders[1:], values[1:]
    expected = [("human", "gpt")[place % 2] for place in range(len(senders))]
    if senders != expected:
        raise DataError("the turns do not alternate", got=", ".join(senders), expected=", ".join(expected), cure="mend the conversation; the released code stops here too")
    return prompt_text([(form.roles[place % 2], value) for place, value in enumerate(values)], template)


def train_ids_and_labels(conversation: Conversation, tokenizer: Any, template: str, *, has_image: bool, model_max_length: int, legacy: bool) -> Labelled:
    """One conversation -> prompt, ids with -200, labels.

    Args:
        tokenizer: puts its start token in front by itself and pads with the unknown token, as Vicuna's does.
        model_max_length: cuts the ids of text-only samples here; those of others are cut by `collate`.
        legacy: the `legacy` switch of the Llama tokenizer; False takes one token off the later rounds.

    Raises:
        ConfigurationError: no label walk was released for the template. DataError: see `conversation_prompt`.
    """
    if template != "plain" and template not in _WALKED:
        raise ConfigurationError(f"no label walk was released for template {template!r}", expected=f"one of plain, {', '.join(_WALKED)}", cure="leave `official` out")
    prompt = conversation_prompt(conversation, template, has_image)
    if template == "plain":
        ids = prompt_ids(prompt, tokenizer)
        hidden = len(prompt_ids(PLACEHOLDER, tokenizer))
        return Labelled(prompt, ids, [IGNORE] * hidden + ids[hidden:])
    ids = prompt_ids(prompt, tokenizer) if has_image else tokenizer(prompt, truncation=True, max_length=model_max_length).input_ids
    labels, reached = _walk(prompt, ids, tokenizer, _template(template), has_image, legacy)
    counted = sum(token != _pad_id(tokenizer) for token in ids)
    if reached < model_max_length and reached != counted:
        return Labelled(prompt, ids, [IGNORE] * len(ids), f"the rounds have {reached} tokens, the prompt {counted}")
    return Labelled(prompt, ids, labels)


def collate(samples: Sequence[Labelled], pad_id: int, model_max_length: int) -> dict[str, Tensor]:
    """Samples -> input_ids, labels (B, S) int64 and attention_mask (B, S) bool; padded right, cut at `model_max_length`. Every id equal to `pad_id` is masked, unknown text too."""
    longest = min(max(len(sample.input_ids) for sample in samples), model_max_length)

    def rows(lists: Sequence[list[int]], value: int) -> Tensor:
        return torch.tensor([(row + [value] * longest)[:longest] for row in lists], dtype=torch.int64)

    ids = rows([sample.input_ids for sample in samples], pad_id)
    return {"input_ids": ids, "labels": rows([sample.labels for sample in samples], IGNORE), "attention_mask": ids != pad_id}


def _walk(prompt: str, ids: list[int], tokenizer: Any, form: Template, has_image: bool, legacy: bool) -> tuple[list[int], int]:
    """Labels, and the number of tokens that the rounds account for. A round's own start token stands for the end mark it was split at."""

    def count(text: str) -> int:
        return len(prompt_ids(text, tokenizer) if has_image else tokenizer(text).input_ids)

    answer = form.separators[0] + form.roles[1] + ": "
    labels, at = list(ids), 1
    labels[:1] = [IGNORE]
    for number, text in enumerate(prompt.split(form.stop)):
        parts = text.split(answer)
        if len(parts) != 2:
            break
        shift = 1 if number and not legacy else 0
        question = count(parts[0] + answer) - 2 - shift  # 2: the start token, and the blank that belongs to the answer's first token
        labels[at : at + question] = [IGNORE] * len(labels[at : at + question])
        at += count(text) - shift
    labels[at:] = [IGNORE] * len(labels[at:])
    return labels, at


def _template(name: str) -> Template:
    if name not in TEMPLATES:
        raise ConfigurationError(f"no released template is called {name!r}", expected=f"one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def _alternating(form: Template, turns: int) -> list[str]:
    return [form.separators[place % 2] for place in range(turns)]


def _placeholder_first(text: str) -> str:
    if PLACEHOLDER not in text:
        return text
    return f"{PLACEHOLDER}\n{text.replace(PLACEHOLDER, '').strip()}".strip()


def _pad_id(tokenizer: Any) -> int:
    return tokenizer.unk_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
