"""Conversations -> token ids and what of them is supervised. Templates are data: the same Jinja text renders training, inference and the exported chat template.

A template is rendered over marks that stand for the turns' texts and pictures. Its own text may hold control tokens; what users wrote never meets the tokenizer's control tokens, it is
encoded piece by piece as plain text. An answer begins where the inference prompt ends, and the row begins with exactly the ids of that prompt.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import jinja2.sandbox
from transformers import PreTrainedTokenizerBase

from vlm.data.sample import Picture, Turn
from vlm.errors import ConfigurationError, DataError

__all__ = ["PICTURE", "TEMPLATES", "Encoded", "PlainText", "Prompt", "PromptSpec", "Template"]

PICTURE = -1
"""Stands in `Encoded.ids` where the tokens of one picture go."""


@dataclass(frozen=True)
class Template:
    """chat: Jinja text over `messages`. needs: control tokens that the tokenizer must have. system: the text of a conversation that brings none. pictures_only: user turns keep their pictures and lose their text."""

    chat: str
    needs: tuple[str, ...] = ()
    system: str | None = None
    pictures_only: bool = False


_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's questions."
)

TEMPLATES = {
    # LLaVA's stage 1: the picture, its caption, a line break.
    "plain": Template(
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] + '\n' }}{% else %}{{ m['content'] }}{% endif %}{% endfor %}", pictures_only=True
    ),
    # Vicuna v1.1 / LLaVA-1.5: answers end in the family's own end token.
    "vicuna_v1": Template(
        "{{ bos_token }}{% for m in messages %}"
        "{% if m['role'] == 'system' %}{{ m['content'] + ' ' }}"
        "{% elif m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
        "{% else %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
        system=_VICUNA_SYSTEM,
    ),
    "chatml": Template(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        needs=("<|im_start|>", "<|im_end|>"),
    ),
}
"""Prompt name -> template. The name "tokenizer" means the tokenizer's own chat template."""


@dataclass(frozen=True, kw_only=True)
class PromptSpec:
    """use: a name of TEMPLATES, or "tokenizer". system: text in front of conversations that bring none (None: the template's own, "" for none).

    fold_system: what happens to a system turn that the template refuses or loses: it is put in front of the first user turn ("fold", counted) or is an error.
    official: labels by the released walk (prompt_official.py).
    """

    use: str
    system: str | None = None
    fold_system: Literal["fold", "error"] = "fold"
    official: bool = False


@dataclass
class Encoded:
    """One rendered conversation. ids: token ids, PICTURE for each picture. supervised: per id. notes: what should be counted ("system text folded")."""

    ids: list[int]
    supervised: list[bool]
    notes: tuple[str, ...] = ()


class PlainText:
    """Encodes text as text: no control token comes out, and no word-boundary mark is put where the text goes on.

    The pieces of a row are encoded one by one. Tokenizers that put a mark in front of every string (SentencePiece-like ones) would put one at each seam; a piece that continues a row is
    therefore encoded behind an anchor, whose ids are cut off.
    """

    ANCHORS = ("\n", "|", ">", ".", "0", "x")

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.control = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
        for token, index in zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True):
            self.control.setdefault(token, index)
        self._control_ids = set(self.control.values())
        self._marks_start = any(self._raw(word) != self._behind(word, anchor) for word in ("a", "the") for anchor in self.ANCHORS[:2])
        self.ids = lru_cache(maxsize=65536)(self._ids)

    def _ids(self, text: str, start: bool) -> tuple[int, ...]:
        """Ids of `text`; start: it stands at the very beginning of the row."""
        if not text:
            return ()
        if not start and self._marks_start:
            return self._safe(self._continued(text), text, start)
        return self._safe(self._raw(text), text, start)

    def _continued(self, text: str) -> list[int]:
        for anchor in self.ANCHORS:
            ids = self._behind(text, anchor)
            if ids is not None:
                return ids
        return self._raw(text)

    def _raw(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]  # type: ignore[return-value]

    def _behind(self, text: str, anchor: str) -> list[int] | None:
        head, ids = self._raw(anchor), self._raw(anchor + text)
        return ids[len(head) :] if ids[: len(head)] == head else None

    def _safe(self, ids: list[int], text: str, start: bool) -> tuple[int, ...]:
        """Text that spells a control token which the tokenizer does not know how to split (one not marked special) is split by us."""
        if self._control_ids.isdisjoint(ids):
            return tuple(ids)
        for token in sorted(self.control, key=len, reverse=True):
            at = text.find(token)
            if at >= 0 and len(token) > 1:
                cut = at + 1
                return self._ids(text[:cut], start) + self._ids(text[cut:], False)
        return tuple(ids)  # an ordinary word that is listed as an added token


@dataclass(frozen=True)
class _Piece:
    """A stretch of the rendered row: one control token, one picture, or text that is encoded at once."""

    text: str
    kind: Literal["control", "picture", "text"]
    supervised: bool = False


_MARK = re.compile("\ue000([tp])(\\d+)\ue001")


class Prompt:
    """One prompt template on one tokenizer.

    Raises ConfigurationError where they do not fit: an unknown name, a control token the tokenizer lacks, no end mark, a template whose inference prompt is not what training shows.
    """

    def __init__(self, spec: PromptSpec, tokenizer: PreTrainedTokenizerBase):
        self.spec, self.tokenizer = spec, tokenizer
        self.template = self._find(spec.use)
        self.text = PlainText(tokenizer)
        for token in self.template.needs:
            if token not in self.text.control:
                raise ConfigurationError(
                    f"prompt {spec.use!r} needs the control token {token!r}, which the tokenizer does not have", cure="choose another prompt, or add the token to the tokenizer"
                )
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: ""
        self._compiled = environment.from_string(self.template.chat)
        self._controls = re.compile("|".join(re.escape(token) for token in sorted(self.text.control, key=len, reverse=True)) or "(?!)")
        self.end_ids = self._end_ids()

    def _find(self, name: str) -> Template:
        if name in TEMPLATES:
            return TEMPLATES[name]
        if name != "tokenizer":
            raise ConfigurationError(f"no prompt is called {name!r}", expected=f"one of {', '.join([*TEMPLATES, 'tokenizer'])}")
        chat = self.tokenizer.chat_template
        if isinstance(chat, dict):
            chat = chat.get("default")
        if not chat:
            raise ConfigurationError("prompt 'tokenizer' was asked for, but the tokenizer has no chat template", cure=f"choose one of {', '.join(TEMPLATES)}")
        return Template(chat)

    def _end_ids(self) -> tuple[int, ...]:
        """Ids of the end mark; one trial conversation also proves that training shows what inference prompts."""
        trial = (Turn("user", ("q",)), Turn("assistant", ("a",), supervised=True), Turn("user", ("r",)), Turn("assistant", ("b",), supervised=True))
        if self.template.pictures_only:
            trial = (Turn("user", (Picture(""),)), trial[1])
        try:
            encoded = self.encode(trial)
        except DataError as problem:
            raise ConfigurationError(f"prompt {self.spec.use!r} does not fit the tokenizer: {problem.what}", cure=problem.cure) from problem
        answer = len(self.text.ids("b" if len(trial) > 2 else "a", False))
        last = [index for index, kept in zip(encoded.ids, encoded.supervised, strict=True) if kept]
        end = last[-1:]
        if len(last) <= answer or (self.spec.use != "plain" and end[0] not in self.text._control_ids):
            raise ConfigurationError(
                f"prompt {self.spec.use!r} writes no end mark behind an answer, so the model would never learn to stop",
                got=f"eos_token {self.tokenizer.eos_token!r}",
                cure="give the tokenizer an end token, or choose another prompt",
            )
        return tuple(end)

    # ---- rendering -------------------------------------------------------------------------------------------------------

    def encode(self, turns: Sequence[Turn], *, generate: bool = False, where: str = "") -> Encoded:
        """Ids and supervision of a conversation; generate: end with the prompt for the next answer.

        Raises DataError with `where` and the template's own sentence, where the template cannot render the turns.
        """
        turns, notes = self._with_system(tuple(turns), where)
        pieces = self._pieces(turns, generate, where)
        ids: list[int] = []
        supervised: list[bool] = []
        for piece in pieces:
            if piece.kind == "picture":
                new: Sequence[int] = (PICTURE,)
            elif piece.kind == "control":
                new = (self.text.control[piece.text],)
            else:
                new = self.text.ids(piece.text, not ids)
            ids.extend(new)
            supervised.extend([piece.supervised] * len(new))
        return Encoded(ids, supervised, notes)

    def _with_system(self, turns: tuple[Turn, ...], where: str) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
        """The turns with the default system text, or with a system text folded into the first question where the template refuses or loses it."""
        if self.template.pictures_only:
            return tuple(turn for turn in turns if turn.role != "system"), ("system turn left out",) if any(turn.role == "system" for turn in turns) else ()
        if not any(turn.role == "system" for turn in turns):
            system = self.template.system if self.spec.system is None else self.spec.system
            return (Turn("system", (system,)), *turns) if system else turns, ()
        if self._keeps_system:
            return turns, ()
        if self.spec.fold_system == "error":
            raise DataError(f"{where}: the chat template refuses or loses the system turn", cure="set fold_system: fold in the prompt, or choose another template")
        folded, text = [], "".join(turn.text for turn in turns if turn.role == "system")
        for turn in turns:
            if turn.role == "user" and text:
                turn, text = Turn("user", (text + "\n\n", *turn.parts), kind=turn.kind), ""
            if turn.role != "system":
                folded.append(turn)
        return tuple(folded), ("system text folded into the first question",)

    @cached_property
    def _keeps_system(self) -> bool:
        try:
            return "S" in self._compiled.render(
                messages=[{"role": "system", "content": "S"}, {"role": "user", "content": "q"}], add_generation_prompt=False, bos_token="", eos_token="", unk_token="", pad_token=""
            )
        except jinja2.TemplateError:
            return False

    def _render(self, messages: list[dict[str, str]], generate: bool, where: str) -> str:
        names = {name: getattr(self.tokenizer, name, None) or "" for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
        try:
            return self._compiled.render(messages=messages, add_generation_prompt=generate, **names)
        except jinja2.TemplateError as problem:
            raise DataError(f"{where}: the chat template cannot render this conversation: {problem}", cure="fold or drop the system turn (fold_system), mend the turns, or choose another prompt") from problem

    def _pieces(self, turns: Sequence[Turn], generate: bool, where: str) -> list[_Piece]:
        contents: list[str | Picture] = []
        messages: list[dict[str, str]] = []
        for turn in turns:
            marks = []
            for part in turn.parts:
                if isinstance(part, str) and (not part or (self.template.pictures_only and turn.role == "user")):
                    continue
                marks.append(f"\ue000{'p' if isinstance(part, Picture) else 't'}{len(contents)}\ue001")
                contents.append(part)
            messages.append({"role": turn.role, "content": "".join(marks)})
        whole = self._render(messages, generate, where)
        if (found := len(_MARK.findall(whole))) != len(contents):
            raise DataError(f"{where}: the chat template loses or repeats parts of the conversation", got=f"{found} parts in the prompt", expected=f"{len(contents)}", cure="choose another prompt")
        spans = [self._answer_span(messages, whole, i, where) for i, turn in enumerate(turns) if turn.role == "assistant" and turn.supervised]
        return self._cut(whole, contents, spans)

    def _answer_span(self, messages: list[dict[str, str]], whole: str, index: int, where: str) -> tuple[int, int]:
        """Characters of `whole` that answer `index` adds to its inference prompt, up to and including the end mark."""
        prompt = self._render(messages[:index], True, where)
        if not whole.startswith(prompt):
            raise DataError(
                f"{where}: the chat template trains on prompts that inference never shows (answer {index} does not follow its generation prompt)",
                got=repr(whole[: len(prompt)][-40:]),
                expected=repr(prompt[-40:]),
                cure="choose another prompt, or a template without thinking marks and rewritten history",
            )
        content = messages[index]["content"]
        end = whole.index(content, len(prompt)) + len(content) if content else len(prompt)
        mark = self._controls.search(whole, end)
        following = _MARK.search(whole, end)
        if mark is not None and (following is None or mark.start() < following.start()):
            return len(prompt), mark.end()
        return len(prompt), end + 1 if whole[end : end + 1] == "\n" else end  # "plain" ends in a line break

    def _cut(self, whole: str, contents: list[str | Picture], spans: Sequence[tuple[int, int]]) -> list[_Piece]:
        """Control tokens, pictures and maximal stretches of plain text, broken at the edges of answers."""
        edges = {edge for span in spans for edge in span}
        pieces: list[_Piece] = []
        open_text = False

        def add(text: str, at: int, kind: Literal["control", "picture", "text"] = "text") -> None:
            nonlocal open_text
            supervised = any(start <= at < end for start, end in spans)
            if kind == "text" and open_text and at not in edges:
                pieces[-1] = _Piece(pieces[-1].text + text, "text", supervised)
            else:
                pieces.append(_Piece(text, kind, supervised))
            open_text = kind == "text"

        at = 0
        while at < len(whole):
            mark, control = _MARK.match(whole, at), self._controls.match(whole, at)
            if mark:
                part = contents[int(mark[2])]
                add(part if isinstance(part, str) else "", at, "text" if isinstance(part, str) else "picture")
                at = mark.end()
            elif control and control.end() > at:
                add(control[0], at, "control")
                at = control.end()
            else:
                add(whole[at], at)
                at += 1
        return pieces


def _refuse(message: str) -> Any:
    raise jinja2.TemplateError(message)
