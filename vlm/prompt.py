"""Conversations -> token ids and what of them is supervised. Templates are data: the same Jinja text renders training, inference and the exported chat template.

A template is rendered over marks that stand for the turns' texts and pictures. Its own text may hold control tokens; what users wrote never meets the tokenizer's control tokens, it is
encoded piece by piece as plain text. An answer begins where the inference prompt ends, and the row begins with exactly the ids of that prompt.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise, product
from typing import Any, Literal

import jinja2.ext
import jinja2.sandbox
from transformers import PreTrainedTokenizerBase

from vlm import prompt_official
from vlm.data.record import check_text
from vlm.data.sample import Picture, Turn
from vlm.errors import ConfigurationError, DataError
from vlm.plain_text import PlainText

__all__ = ["GIVEN_UP", "PICTURE", "TEMPLATES", "Encoded", "Prompt", "PromptSpec", "Template"]

PICTURE = -1
"""Stands in `Encoded.ids` where the tokens of one picture go."""

Ends = Literal["left", "right", "both"]

GIVEN_UP = "given up by the released label walk"
"""Note of a conversation that `official` leaves without any label."""


@dataclass(frozen=True)
class Template:
    """chat: Jinja text over `messages`. needs: control tokens that the tokenizer must have. system: the text of a conversation that brings none. pictures_only: user turns keep their pictures and lose their text.
    strip: role -> the ends at which its turns lose their blanks.
    """

    chat: str
    needs: tuple[str, ...] = ()
    system: str | None = None
    pictures_only: bool = False
    strip: Mapping[str, Ends] = field(default_factory=dict)


_VICUNA_SYSTEM = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's questions."
_DEEPSEEK_VL_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
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
    # DeepSeek-VL: separators by role (the official program's, by position, are the same where users begin), none behind a last question.
    "deepseek_vl": Template(
        "{{ bos_token }}{% for m in messages %}{% set said = m['content'].lstrip() if m['role'] == 'system' else m['content'] | trim %}"
        "{% if m['role'] == 'system' %}{% if said %}{{ said + '\n\n' }}{% endif %}"
        "{% elif not said %}{{ 'User:' if m['role'] == 'user' else 'Assistant:' }}"
        "{% elif m['role'] == 'user' %}{{ 'User: ' + said }}{% if add_generation_prompt or not loop.last %}{{ '\n\n' }}{% endif %}"
        "{% else %}{{ 'Assistant: ' + said + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
        system=_DEEPSEEK_VL_SYSTEM,
        strip={"system": "left", "user": "both", "assistant": "both"},
    ),
}
"""Prompt name -> template. The name "tokenizer" means the tokenizer's own chat template."""


@dataclass(frozen=True, kw_only=True)
class PromptSpec:
    """use: a name of TEMPLATES, or "tokenizer". system: text in front of conversations that bring none (None: the template's own, "" for none).

    fold_system: what happens to a system turn that the template refuses or loses: it is put in front of the first user turn ("fold", counted) or is an error.
    word_marks: tokenizers that put a mark in front of a text's first word (SentencePiece-like ones) also put one behind a picture, and legacy ones behind control tokens, as LLaVA's and Arcana's
    programs do. official: training rows by the released walk (prompt_official.py), for the prompts plain and vicuna_v1; word marks are part of it.
    """

    use: str
    system: str | None = None
    fold_system: Literal["fold", "error"] = "fold"
    word_marks: bool = False
    official: bool = False


@dataclass
class Encoded:
    """One rendered conversation. ids: token ids, PICTURE for each picture. supervised: per id. notes: what should be counted ("system text folded")."""

    ids: list[int]
    supervised: list[bool]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Piece:
    """A stretch of the rendered row: one control token, one picture, or text that is encoded at once."""

    text: str
    kind: Literal["control", "picture", "text"]
    supervised: bool


_MARK = "\ue000{}\ue001"
"""Stands in a template's output for one part of the conversation: private characters around its index."""
_MARKS = re.compile(_MARK.format("(?P<index>\\d+)"))

_NO_LIMIT = 2**31


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, which transformers' templates put around answers: here it is only its body."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Prompt:
    """One prompt template on one tokenizer.

    end_ids: the end mark behind answers, one id. marked: ids (PICTURE, control tokens) behind which a text's first word has a mark.

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
        self.marked = self._marked()
        self._compiled = self._compile()
        if spec.use == "tokenizer":
            self.template = replace(self.template, strip=self._strips())
        self._atoms = re.compile(f"{_MARKS.pattern}|(?P<control>{self._control_pattern()})")
        self.end_ids = self._end_ids()
        if spec.official:
            self._check_official()

    def _marked(self) -> frozenset[int]:
        """Ids behind which a text begins anew, with a word mark."""
        if not (self.spec.word_marks or self.spec.official) or not self.text.marks_start:
            return frozenset()
        return frozenset({PICTURE, *self.text.control.values()} if self.text.marks_control else {PICTURE})

    def _compile(self) -> jinja2.Template:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation])
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: ""
        try:
            return environment.from_string(self.template.chat)
        except jinja2.TemplateSyntaxError as problem:
            raise ConfigurationError(
                f"the template of prompt {self.spec.use!r} is not Jinja: {problem}", cure="mend the tokenizer's chat template, or choose another prompt"
            ) from problem

    def _strips(self) -> dict[str, Ends]:
        """What the template does to the blanks at the ends of turns. Raises ConfigurationError where it does more to them: rows are made of the turns as they are."""
        roles = ("system", "user", "assistant") if self.keeps_system else ("user", "assistant")
        said = [f" \n{role}, Said  once \n" for role in roles]

        def rendered(texts: Iterable[str]) -> str:
            return self._render([{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)], False, "")

        try:
            shown, whole = rendered(_MARK.format(place) for place in range(len(roles))), rendered(said)
        except DataError:
            return {}  # the trial conversation says so
        choices: Sequence[Ends | None] = (None, "left", "right", "both")
        for ends in product(choices, repeat=len(roles)):
            kept = ["".join(map(str, _stripped([text], end))) for text, end in zip(said, ends, strict=True)]
            if whole == _MARKS.sub(lambda mark, kept=kept: kept[int(mark["index"])], shown):
                return {role: end for role, end in zip(roles, ends, strict=True) if end}
        raise ConfigurationError(
            "the tokenizer's chat template changes the text of turns", got=repr(whole[:200]), cure="choose another prompt, or take the filters out of the template"
        )

    def _control_pattern(self) -> str:
        """Control tokens, the longest first. Some tokens swallow the blanks beside them, as the tokenizer has it for rendered text."""
        tokens = self.tokenizer.added_tokens_decoder

        def pattern(token: str, index: int) -> str:
            before, behind = (index in tokens and getattr(tokens[index], side) for side in ("lstrip", "rstrip"))
            return r"\s*" * before + re.escape(token) + r"\s*" * behind

        return "|".join(pattern(*item) for item in sorted(self.text.control.items(), key=lambda item: -len(item[0]))) or "(?!)"

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
        """The end mark's id; a trial conversation also proves that training shows what inference prompts, and every answer in the same form."""
        trial = (Turn("user", ("q",)), Turn("assistant", ("a",), supervised=True), Turn("user", ("r",)), Turn("assistant", ("b",), supervised=True))
        if self.template.pictures_only:
            trial = (Turn("user", (Picture(""),)), trial[1])
        try:
            whole, first = self._encode(trial), self._encode(trial[:2])
        except DataError as problem:
            raise ConfigurationError(
                f"prompt {self.spec.use!r} does not fit the tokenizer: {problem.what}", got=problem.got, expected=problem.expected, cure=problem.cure
            ) from problem
        end = max(place for place, supervised in enumerate(first.supervised) if supervised)
        if len(self.text.ids("a", False)) >= sum(first.supervised) or (first.ids[end] not in self.text.control.values() and not self.template.pictures_only):
            raise ConfigurationError(
                f"prompt {self.spec.use!r} writes no end mark behind an answer, so the model would never learn to stop",
                got=f"eos_token {self.tokenizer.eos_token!r}",
                cure="give the tokenizer an end token, or choose another prompt",
            )
        if first.ids[: end + 1] != whole.ids[: end + 1]:
            raise ConfigurationError(
                f"prompt {self.spec.use!r} writes an answer otherwise when it is the last than when the talk goes on, so training would show what inference never does",
                cure="choose another prompt, or a template without thinking marks and rewritten history",
            )
        return (first.ids[end],)

    def _check_official(self) -> None:
        if self.spec.use not in ("plain", "vicuna_v1"):
            raise ConfigurationError(f"no label walk was released for prompt {self.spec.use!r}", expected="plain or vicuna_v1", cure="leave `official` out")
        if self.spec.system is not None:
            raise ConfigurationError("an official prompt has its own system text", got=f"system {self.spec.system!r}", cure="leave `system` or `official` out")
        start, stop = self.tokenizer("a")["input_ids"][0], prompt_official.TEMPLATES["vicuna_v1"].stop  # type: ignore[index]
        if start != self.tokenizer.bos_token_id or stop not in self.text.control:
            raise ConfigurationError(
                "the released label walk needs a tokenizer that puts its start token in front of every string and ends answers in </s>, as Vicuna's does",
                got=f"bos_token {self.tokenizer.bos_token!r}, eos_token {self.tokenizer.eos_token!r}",
                cure="leave `official` out",
            )

    # ---- rendering -------------------------------------------------------------------------------------------------------

    def encode(self, turns: Sequence[Turn], *, generate: bool = False, where: str = "", max_length: int | None = None) -> Encoded:
        """Ids and supervision of a conversation; generate: end with the prompt for the next answer.

        max_length: where the row will be cut, which the released walk asks about; nothing is cut here.
        Raises DataError with `where`: the template cannot render the turns (with its own sentence), or an answer to be learned has no text.
        """
        for index, turn in enumerate(turns):
            check_text(turn.text, _at(where, f"turn {index}"))
            if turn.supervised and not turn.text.strip():
                raise DataError(_at(where, f"turn {index} is to be learned and has no text, so it would teach to stop at once"), kind="empty", cure="fill it in, or take it out")
        if self.spec.official:
            return self._released_question(turns, where) if generate else self._released(turns, where, max_length)
        return self._encode(turns, generate, where)

    def _encode(self, turns: Sequence[Turn], generate: bool = False, where: str = "") -> Encoded:
        turns, notes = self._with_system(tuple(turns), where)
        ids: list[int] = []
        supervised: list[bool] = []
        for piece in self._pieces(turns, generate, where):
            if piece.kind == "picture":
                new: Sequence[int] = (PICTURE,)
            elif piece.kind == "control":
                new = (self.text.control[piece.text],)
            else:
                new = self.text.ids(piece.text, ids in ([], [self.tokenizer.bos_token_id]) or ids[-1] in self.marked)
            ids.extend(new)
            supervised.extend([piece.supervised] * len(new))
        return Encoded(ids, supervised, notes)

    def _released(self, turns: Sequence[Turn], where: str, max_length: int | None) -> Encoded:
        """The released label walk. Raises DataError for what the release could not express."""
        senders, mark = {"user": "human", "assistant": "gpt"}, prompt_official.PLACEHOLDER
        pictures = sum(isinstance(part, Picture) for turn in turns for part in turn.parts)
        if any(turn.role not in senders or mark in turn.text or turn.supervised != (turn.role == "assistant") for turn in turns):
            raise DataError(_at(where, f"an official prompt knows no system turns, no {mark} in text and no unsupervised answers"), cure="leave `official` out, or mend the turns")
        said = [{"from": senders[turn.role], "value": "".join(part if isinstance(part, str) else mark for part in turn.parts)} for turn in turns]
        legacy = bool(getattr(self.tokenizer, "legacy", False))

        def walk(limit: int) -> prompt_official.Labelled:
            return prompt_official.train_ids_and_labels(said, self.tokenizer, self.spec.use, has_image=pictures > 0, model_max_length=limit, legacy=legacy)

        try:
            whole = walk(_NO_LIMIT)
            # The release does not compare the counts of a sample that it cuts.
            labels, ignored = (whole if not whole.ignored or max_length is None else walk(max_length))[2:]
        except DataError as problem:
            raise problem.changed(what=_at(where, problem.what)) from problem
        ids = [PICTURE if index == prompt_official.IMAGE else index for index in whole.input_ids]
        if (kept := ids.count(PICTURE)) != pictures:
            raise DataError(_at(where, "an official prompt keeps one picture per turn"), got=f"{kept} kept", expected=f"{pictures}", cure="leave `official` out")
        notes = (GIVEN_UP,) * bool(ignored) + ("opening answer left out",) * (self.spec.use != "plain" and said[0]["from"] == "gpt")
        supervised = [label not in (prompt_official.IGNORE, prompt_official.IMAGE) for label in labels]
        return Encoded(ids, supervised + [False] * (len(ids) - len(supervised)), notes)

    def _released_question(self, turns: Sequence[Turn], where: str) -> Encoded:
        """What the released program shows for the next answer; a system turn takes the place of its system text. Raises DataError for text that its tokenizer would take for a mark."""
        form, mark = prompt_official.TEMPLATES[self.spec.use], prompt_official.PLACEHOLDER
        system = "\n\n".join(turn.text for turn in turns if turn.role == "system") or None
        found = next((token for turn in turns for token in (mark, *self.text.control) if token in turn.text), None)
        if found is not None:
            raise DataError(_at(where, f"an official prompt cannot show {found!r} as text"), cure="leave `official` out, or the mark")
        said = [(form.roles[turn.role == "assistant"], "".join(part if isinstance(part, str) else mark for part in turn.parts)) for turn in turns if turn.role != "system"]
        pictures = sum(isinstance(part, Picture) for turn in turns for part in turn.parts)
        text = mark * pictures if self.template.pictures_only else prompt_official.prompt_text([*said, (form.roles[1], None)], self.spec.use, system)
        ids = [PICTURE if index == prompt_official.IMAGE else index for index in prompt_official.prompt_ids(text, self.tokenizer)]
        return Encoded(ids, [False] * len(ids))

    def _with_system(self, turns: tuple[Turn, ...], where: str) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
        """The turns with the default system text, or with a system text folded into the first question where the template refuses or loses it."""
        if self.template.pictures_only:
            return tuple(turn for turn in turns if turn.role != "system"), ("system turn left out",) if any(turn.role == "system" for turn in turns) else ()
        if not any(turn.role == "system" for turn in turns):
            system = self.template.system if self.spec.system is None else self.spec.system
            return (Turn("system", (system,)), *turns) if system else turns, ()
        if self.keeps_system:
            return turns, ()
        if self.spec.fold_system == "error":
            raise DataError(_at(where, f"the chat template refuses or loses the system turn{self._refusal}"), cure="set fold_system: fold in the prompt, or choose another prompt")
        folded, text = [], "\n\n".join(turn.text for turn in turns if turn.role == "system")
        for turn in turns:
            if turn.role == "user" and text:
                turn, text = Turn("user", (text + "\n\n", *turn.parts), kind=turn.kind), ""
            if turn.role != "system":
                folded.append(turn)
        if text:
            raise DataError(_at(where, "a system turn has no question to be put in front of"), cure="add a question, or take the system turn out")
        return tuple(folded), ("system text folded into the first question",)

    @property
    def keeps_system(self) -> bool:
        """Whether the template writes the text of a system turn."""
        return self._refusal is None

    @cached_property
    def _refusal(self) -> str | None:
        """None where the template writes system texts; else its own sentence, if it has one, behind a colon."""
        try:
            return None if _MARK.format(0) in self._render([{"role": "system", "content": _MARK.format(0)}, {"role": "user", "content": "q"}], False, "") else ""
        except DataError as problem:
            return f": {problem.__cause__}"

    def _render(self, messages: list[dict[str, str]], generate: bool, where: str) -> str:
        names = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "") | self.tokenizer.special_tokens_map
        try:
            return self._compiled.render(messages=messages, add_generation_prompt=generate, **names)
        except Exception as problem:  # somebody else's program: nearly every built-in kind
            raise DataError(_at(where, f"the chat template cannot render this conversation: {problem}"), cure="mend the turns, or choose another prompt") from problem

    def _pieces(self, turns: Sequence[Turn], generate: bool, where: str) -> Iterator[_Piece]:
        """Control tokens, pictures and maximal stretches of plain text, broken at the edges of answers."""
        contents: list[str | Picture] = []
        messages: list[dict[str, str]] = []
        for turn in turns:
            lost = str if self.template.pictures_only and turn.role == "user" else ()
            parts = [part for part in _stripped(turn.parts, self.template.strip.get(turn.role)) if part != "" and not isinstance(part, lost)]
            messages.append({"role": turn.role, "content": "".join(_MARK.format(len(contents) + place) for place in range(len(parts)))})
            contents += parts
        whole = self._render(messages, generate, where)
        found = [int(mark["index"]) for mark in _MARKS.finditer(whole)]
        if found != list(range(len(contents))):
            got, expected = f"{len(found)} parts in the prompt", f"{len(contents)}, each once and in order"
            raise DataError(
                _at(where, "the chat template loses, repeats or reorders parts of the conversation"), got=got, expected=expected, cure="mend the turns, or choose another prompt"
            )
        answers = [self._answer(messages, whole, index, where) for index, turn in enumerate(turns) if turn.role == "assistant" and turn.supervised]
        learned = {start for start, _ in answers}
        for start, end in pairwise(sorted({0, len(whole), *(edge for answer in answers for edge in answer)})):
            yield from self._cut(whole[start:end], contents, start in learned)

    def _answer(self, messages: list[dict[str, str]], whole: str, index: int, where: str) -> tuple[int, int]:
        """Characters of `whole` that the answer in turn `index` adds to its inference prompt, up to and including the end mark."""
        prompt, content = self._render(messages[:index], True, where), messages[index]["content"]
        begin = whole.find(content, len(prompt)) if whole.startswith(prompt) else -1
        if begin < 0:
            raise DataError(
                _at(where, f"the chat template trains on prompts that inference never shows (turn {index} does not follow its generation prompt)"),
                got=repr(_MARKS.sub("...", whole[: len(prompt)])[-60:]),
                expected=repr(_MARKS.sub("...", prompt)[-60:]),
                cure="choose another prompt, or a template without thinking marks and rewritten history",
            )
        end = begin + len(content)
        following = self._atoms.search(whole, end)
        if following is not None and following["control"] is not None:
            return len(prompt), following.end()
        return len(prompt), end + (whole[end : end + 1] == "\n")  # "plain" ends in a line break

    def _cut(self, rendered: str, contents: Sequence[str | Picture], supervised: bool) -> Iterator[_Piece]:
        text, at = "", 0
        for atom in self._atoms.finditer(rendered):
            text += rendered[at : atom.start()]
            at, part = atom.end(), contents[int(atom["index"])] if atom["index"] else None
            if isinstance(part, str):
                text += part
                continue
            if text:
                yield _Piece(text, "text", supervised)
            text, token = "", atom["control"]
            yield _Piece("", "picture", False) if part is not None else _Piece(token if token in self.text.control else token.strip(), "control", supervised)
        if text + rendered[at:]:
            yield _Piece(text + rendered[at:], "text", supervised)


def _stripped(parts: Sequence[str | Picture], ends: Ends | None) -> list[str | Picture]:
    """A turn without the blanks before its first word or picture (left), behind its last (right), or both."""
    kept = list(parts)
    for side, end, strip in (("left", 0, str.lstrip), ("right", -1, str.rstrip)):
        while ends in (side, "both") and kept and isinstance(part := kept[end], str):
            kept[end] = strip(part)
            if kept[end]:
                break
            kept.pop(end)
    return kept


def _refuse(message: str) -> Any:
    raise jinja2.TemplateError(message)


def _at(where: str, what: str) -> str:
    return f"{where}: {what}" if where else what
