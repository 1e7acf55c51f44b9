"""A record of whatever file -> a Sample: the forms in which conversations about pictures are written down."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from vlm.data.sample import Picture, Sample, Turn
from vlm.errors import DataError

__all__ = ["KEYS", "MARK", "REFUSED", "Form", "check_text", "form_of", "refused_key", "sample_of"]

Form = Literal["conversations", "messages", "texts", "question", "caption"]
"""How a record is written, called by the key that tells it; see `sample_of`."""

KEYS = ("id", "image", "images", "conversations", "messages", "texts", "question", "answer", "caption", "text", "system", "kind", "independent")
"""All keys that are read of a record."""

TOOL_KEYS = ("tools", "functions", "tool_calls", "function_call")
REFUSED = ("video", "videos", "audio", "audios", *TOOL_KEYS, "reasoning_content")
"""Keys of records and turns that nothing here can learn from: what stands there would vanish without a word."""
LEARN = ("weight", "train", "train_on_turn")
"""Keys of an answer that say whether it is learnt: OpenAI's (0 or 1), and the two of Axolotl (true or false)."""

READERS: Mapping[Form, str] = {"conversations": "llava or sharegpt", "messages": "messages", "texts": "llava", "question": "llava", "caption": "llava"}
"""Which reader of JSON files takes a form; `llava` takes all."""

TURNS: tuple[Form, ...] = ("conversations", "messages", "texts")
MARK = "<image>"
ROLES = {
    "system": "system", "developer": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "bot": "assistant",
}  # fmt: skip
TOOLS = ("tool", "function", "function_call", "observation", "ipython")
NO_TOOLS = "conversations with tools cannot be trained on: take the record out"
ONE_OF_TWO = "take the one that is not meant out; or, with the reader hf, name the columns that are meant in `columns`"


# ---- records -------------------------------------------------------------------------------------------------------------


def sample_of(
    record: Mapping[str, Any],
    *,
    number: int,
    where: str,
    picture: Callable[[Any, str], Picture],
    prepend: bool = False,
    form: Form | None = None,
) -> Sample:
    """One record as a sample. Its form is told by its keys:

    - `conversations`: turns with `from` and `value`, of LLaVA and ShareGPT. `messages`: turns with `role` and `content`, of OpenAI; the content is a text, or a list of parts.
    - `texts`: pairs of `user` and `assistant`, of The Cauldron. `question` with `answer`. `caption`, or `text`, of a picture.

    The pictures are under `image` or `images`. Every `<image>` in a user's text, and every part {"type": "image"} without a source of its own, takes the next of them; in the forms that have no turns
    of their own, pictures without an `<image>` stand in front of the first question, each on a line. In a list of parts a text is a text, whatever is written in it.
    `system` is a system turn in front, `kind` what is asked (of the record, or of a turn), `independent` as in `Sample`. Keys with None count as not there.
    An answer with `weight: 0` (OpenAI's fine-tuning format), `train: false` or `train_on_turn: false` (Axolotl's) is read and not learnt. Keys in REFUSED must be empty.

    Args:
        number: of the record in its file; its id where it has none. where: file and record, as messages call them. picture: (what stands for a picture, where) -> Picture; raises DataError.
        prepend: pictures without any `<image>` stand in front of the first question in every form. form: the only one that is taken; None: any.

    Raises DataError with where, numbers and cure.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: not an object", kind="not JSON", got=type(record).__name__, expected="an object with `conversations` or `messages`")
    for key in record:
        check_text(str(key), f"{where}: a key")  # messages list the keys
    _check_refused(record, where)
    found = _form(record, where)
    if form is not None and found != form:
        raise DataError(f"{where}: the record is of another form", got=f"`{found}`", expected=f"`{form}`", cure=f"use the reader {READERS[found]}")
    messages = _messages(record, found, where, picture)
    if all(message.role != "assistant" for message in messages):
        roles = ", ".join(message.role for message in messages)
        raise DataError(f"{where}: no assistant turn", kind="role", got=f"roles {roles}", expected="at least one answer to learn", cure="add the answer, or take the record out")
    if not any(message.learnt for message in messages):
        raise DataError(
            f"{where}: no answer is to be learnt", kind="role", got="`weight` or `train` off in all of them", expected="at least one answer to learn", cure="take the record out"
        )
    pictures = [picture(name, where) for name in _picture_names(record, where)]
    turnless = found not in ("conversations", "messages")
    messages, notes = _match_marks(messages, len(pictures), where, prepend or turnless)
    independent = record.get("independent")
    if not isinstance(independent, bool | None):
        raise DataError(f"{where}: `independent` is neither true nor false", got=independent)
    if independent:
        _check_pairs(messages, where)
    notes = () if turnless else notes
    if messages[-1].role != "assistant":
        notes += ("unsupervised trailing turn",)
    if any(message.role == "assistant" and not message.learnt for message in messages):
        notes += ("unsupervised answer",)
    left = enumerate(pictures)
    turns = tuple(
        Turn(message.role, _filled(message, left, where), supervised=message.learnt, kind=kind)
        for message, kind in zip(messages, _kinds(messages, _kind(record, where)), strict=True)
    )
    name = str(number if record.get("id") is None else record["id"])
    check_text(name, f"{where}: `id`")
    return Sample(name, turns, where=where, independent=bool(independent), notes=notes)


def form_of(record: Mapping[str, Any]) -> Form | None:
    """The form that a record's keys tell, the first one where they tell several; None: it says nothing that could be learnt."""
    for form in TURNS:
        if record.get(form) is not None:
            return form
    if record.get("question") is not None and record.get("answer") is not None:
        return "question"
    return None if record.get("caption") is None and record.get("text") is None else "caption"


def refused_key(record: Mapping[str, Any]) -> str | None:
    """The first of REFUSED under which something is said. Parquet writes what is absent as an object of nothing but nulls, other programs as an empty list in a text."""
    for key in REFUSED:
        value = record.get(key)
        values = value.values() if isinstance(value, Mapping) else [value]
        if any(one not in (None, "", "[]", [], {}) for one in values):
            return key
    return None


def _check_refused(record: Mapping[str, Any], where: str) -> None:
    key = refused_key(record)
    if key is None:
        return
    if key in TOOL_KEYS:
        raise DataError(f"{where}: `{key}` is not taken", kind="role", expected="turns of system, user and assistant", cure=NO_TOOLS)
    cure = "write it into the answer, or take it out" if key == "reasoning_content" else "take the record out; or, with the reader hf, name the columns that are meant in `columns`"
    raise DataError(f"{where}: `{key}` is not taken", kind="unsupported", expected="texts and pictures", cure=cure)


def _form(record: Mapping[str, Any], where: str) -> Form:
    for one, other in pairwise(form for form in TURNS if record.get(form) is not None):
        raise DataError(f"{where}: both `{one}` and `{other}`", expected="one of them", cure=ONE_OF_TWO)
    form = form_of(record)
    if form is not None and (form != "caption" or _picture_names(record, where)):
        return form
    expected = "a list called `conversations`, `messages` or `texts`; or `question` and `answer`; or `image` and `caption`"
    raise DataError(f"{where}: no turns", kind="empty", got=f"the keys {', '.join(map(str, record))}", expected=expected, cure="add turns, or take the record out")


def _messages(record: Mapping[str, Any], form: Form, where: str, picture: Callable[[Any, str], Picture]) -> list["_Message"]:
    match form:
        case "question":
            rows = [{"role": "user", "content": record["question"]}, {"role": "assistant", "content": record["answer"]}]
        case "caption":
            rows = [{"role": "assistant", "content": _either(record, "caption", "text", where)}]
        case _:
            rows = record[form]
    if not isinstance(rows, list) or not rows:
        got = f"the keys {', '.join(map(str, record))}" if isinstance(rows, list) else f"`{form}` is {type(rows).__name__}"
        raise DataError(f"{where}: no turns", kind="empty", got=got, expected=f"a list called `{form}` that is not empty", cure="add turns, or take the record out")
    if form == "texts":
        rows = [row for pair in rows for row in _pair(pair, where)]
    messages = [_message(row, turn, where, picture if form == "messages" else None) for turn, row in enumerate(rows)]
    if form == "caption":
        messages.insert(0, _Message("user", (), None, False))
    return _with_system(messages, record.get("system"), where)


def _pair(pair: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(pair, Mapping):
        raise DataError(f"{where}: a pair of `texts` is not an object", kind="not JSON", got=type(pair).__name__, expected="an object with `user` and `assistant`")
    both = {key: pair.get(key) for key in ("kind", *LEARN, *REFUSED)}
    return [both | {"role": role, "content": pair.get(role)} for role in ("user", "assistant")]


def _with_system(messages: list["_Message"], system: Any, where: str) -> list["_Message"]:
    if system is None or system == "":
        return messages
    if messages[0].role == "system":
        raise DataError(f"{where}: both `system` and a system turn", expected="one of them", cure="take the one that is not meant out")
    if not isinstance(system, str):
        raise DataError(f"{where}: `system` is not text", got=repr(system)[:80], expected="a string")
    check_text(system, f"{where}: `system`")
    return [_Message("system", (system,), None, False), *messages]


# ---- turns ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Slot:
    """The place of the next of the record's pictures. index: which one it says it is."""

    index: int | None = None


Part = str | Picture | _Slot


class _Message(NamedTuple):
    role: str
    parts: tuple[Part, ...]
    kind: str | None
    learnt: bool

    @property
    def slots(self) -> int:
        return sum(isinstance(part, _Slot) for part in self.parts)


def _message(row: Any, turn: int, where: str, picture: Callable[[Any, str], Picture] | None) -> _Message:
    """picture: resolves the pictures in lists of parts; None where a turn may not be such a list."""
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: turn {turn} is not an object", kind="not JSON", got=type(row).__name__, expected="an object with `from` and `value`, or `role` and `content`")
    role = _role(_either(row, "from", "role", where), turn, where)
    _check_refused(row, f"{where}: turn {turn}")
    content = _either(row, "value", "content", where)
    if picture is not None and isinstance(content, list):
        parts = _joined(_part(part, place, f"{where}: turn {turn}", role, picture) for place, part in enumerate(content))
    elif isinstance(content, str):
        # The mark means a picture in user turns only; elsewhere it is text.
        parts = _split(content) if role == "user" else (content,)
    else:
        parts = None
    if parts is None or (role != "system" and not any(not isinstance(part, str) or part.strip() for part in parts)):
        expected = "a string" if picture is None else "a string, or a list of parts with text"
        raise DataError(f"{where}: turn {turn} has no text", kind="empty", got=repr(content)[:80], expected=expected, cure="fill it in, or take the record out")
    for part in parts:
        if isinstance(part, str):
            check_text(part, f"{where}: turn {turn}")
    return _Message(role, parts, _kind(row, f"{where}: turn {turn}"), _learnt(row, role, f"{where}: turn {turn}"))


def _learnt(row: Mapping[str, Any], role: str, where: str) -> bool:
    """Whether a turn is learnt: an answer that none of its LEARN keys takes out. where: file, record and turn."""
    marks = {key: row[key] for key in LEARN if row.get(key) is not None}
    for key, mark in marks.items():
        if mark not in (0, 1):
            raise DataError(f"{where}: `{key}` is neither 0 nor 1, false nor true", got=repr(mark)[:80], cure="an answer is learnt or not: round it, or take it out")
    return role == "assistant" and all(marks.values())


def _role(name: Any, turn: int, where: str) -> str:
    word = name.strip().lower() if isinstance(name, str) else None
    if word in ROLES:
        return ROLES[word]
    cure = NO_TOOLS if word in TOOLS else "rename the role, or take the record out"
    raise DataError(f"{where}: turn {turn} has the unknown role {name!r}", kind="role", expected=f"one of {', '.join(ROLES)}, in any case", cure=cure)


def check_text(text: str, what: str) -> None:
    """Raises DataError for half a character, which no file and no tokenizer takes. what: what the text is, as messages call it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        got = ascii(text[error.start])
        raise DataError(f"{what} holds half a character at position {error.start}", kind="not JSON", got=got, cure="the text was cut within an emoji: mend it") from None


def _split(text: str) -> tuple[Part, ...]:
    first, *others = text.split(MARK)
    return _joined([first, *(part for other in others for part in (_Slot(), other))])


def _joined(parts: Iterator[Part] | Sequence[Part]) -> tuple[Part, ...]:
    """Neighbouring texts are one, empty ones none."""
    joined: list[Part] = []
    for part in parts:
        before = joined[-1] if joined else None
        if isinstance(part, str) and isinstance(before, str):
            joined[-1] = before + part
        elif part != "":
            joined.append(part)
    return tuple(joined)


def _part(part: Any, place: int, where: str, role: str, picture: Callable[[Any, str], Picture]) -> Part:
    """One part of a message's content. where: file, record and turn."""
    if not isinstance(part, Mapping):
        raise DataError(f"{where}, part {place} is not an object", kind="not JSON", got=repr(part)[:80], expected='an object with a `type`, as {"type": "text", "text": "..."}')
    kind = part.get("type")
    if kind in ("text", "input_text", "output_text"):
        if not isinstance(part.get("text"), str):
            raise DataError(f"{where}, part {place} has no text", kind="empty", got=repr(part.get("text"))[:80], expected="a string", cure="fill it in, or take the part out")
        return part["text"]
    if kind not in ("image", "image_url", "input_image"):
        expected = "text, input_text, output_text, image, image_url or input_image"
        raise DataError(f"{where}, part {place} is of the unknown type {kind!r}", expected=expected, cure="take the part, or the record, out")
    if role != "user":
        raise DataError(f"{where}, part {place} is a picture in a turn of the {role}", kind="role", expected="pictures in user turns", cure="take the part, or the record, out")
    source = part.get("image_url")
    source = source.get("url") if isinstance(source, Mapping) else source
    if kind == "image":
        source = next((part[key] for key in ("image", "path", "url") if part.get(key) is not None), source)
        if source is None:
            return _Slot(part.get("index"))
    return picture(source, where)


def _match_marks(messages: list[_Message], images: int, where: str, prepend: bool) -> tuple[list[_Message], tuple[str, ...]]:
    """The messages with as many slots as images, and what was done for it. Raises DataError where the numbers differ."""
    slots = sum(message.slots for message in messages)
    if slots == images:
        return messages, ()
    first = next((turn for turn, message in enumerate(messages) if message.role == "user"), None)
    if slots == 0 and prepend and first is not None:
        question = messages[first]
        lines: list[Part] = [part for _ in range(images) for part in (_Slot(), "\n")]
        parts = _joined([*lines, *question.parts]) if question.parts else tuple(lines[:-1])
        return [*messages[:first], question._replace(parts=parts), *messages[first + 1 :]], ("placeholder prepended",)
    cure = f"write one {MARK} per picture in the user turns" + (", or set `missing_placeholder: prepend`" if slots == 0 and not prepend else "")
    got = f"images {images}, placeholders {slots} ({MARK} in user turns)"
    raise DataError(f"{where}: pictures and placeholders differ", kind="placeholder count", got=got, expected="as many of one as of the other", cure=cure)


def _filled(message: _Message, pictures: Iterator[tuple[int, Picture]], where: str) -> tuple[str | Picture, ...]:
    parts: list[str | Picture] = []
    for part in message.parts:
        if not isinstance(part, _Slot):
            parts.append(part)
            continue
        place, picture = next(pictures)
        if part.index is not None and part.index != place:
            raise DataError(
                f"{where}: the pictures are not in reading order",
                kind="placeholder count",
                got=f"index {part.index}",
                expected=f"index {place}",
                cure="put `images` in the order of the parts",
            )
        parts.append(picture)
    return tuple(parts)


def _check_pairs(messages: list[_Message], where: str) -> None:
    """Independent pairs: system turns, then questions and answers by turns, the pictures all in the first question."""
    cure = "set `independent` to false, or mend the turns"
    dialogue = [(turn, message) for turn, message in enumerate(messages) if message.role != "system"]
    for place, (turn, message) in enumerate(dialogue):
        if turn != place + len(messages) - len(dialogue) or message.role != ("user", "assistant")[place % 2]:
            expected = "system turns first, then user and assistant by turns"
            raise DataError(f"{where}: independent turns are not pairs at turn {turn}", kind="role", got=message.role, expected=expected, cure=cure)
        if place and not all(isinstance(part, str) for part in message.parts):
            raise DataError(f"{where}: turn {turn} brings pictures of its own", kind="role", expected="independent questions share the pictures of the first one", cure=cure)
    if len(dialogue) % 2:
        raise DataError(f"{where}: the last independent question (turn {len(messages) - 1}) has no answer", kind="role", cure="add the answer, or take the question out")


def _either(record: Mapping[str, Any], one: str, other: str, where: str) -> Any:
    """The value under one of two spellings of a key, None without either."""
    first, second = record.get(one), record.get(other)
    if first is not None and second is not None:
        raise DataError(f"{where}: both `{one}` and `{other}`", expected="one of them", cure=ONE_OF_TWO)
    return second if first is None else first


def _kind(record: Mapping[str, Any], where: str) -> str | None:
    kind = record.get("kind")
    if kind is not None and not isinstance(kind, str):
        raise DataError(f"{where}: `kind` is not a word", got=repr(kind)[:80])
    check_text(kind or "", f"{where}: `kind`")
    return kind


def _kinds(messages: list[_Message], default: str | None) -> list[str | None]:
    """A question and its answer share the kind that either of them names."""
    kinds = [message.kind for message in messages]
    for turn in range(1, len(messages)):
        if (messages[turn - 1].role, messages[turn].role) == ("user", "assistant"):
            kinds[turn - 1] = kinds[turn] = kinds[turn] or kinds[turn - 1]
    return [None if message.role == "system" else kind or default for message, kind in zip(messages, kinds, strict=True)]


def _picture_names(record: Mapping[str, Any], where: str) -> list[Any]:
    names = _either(record, "image", "images", where)
    if names is None:
        return []
    return names if isinstance(names, list) else [names]
