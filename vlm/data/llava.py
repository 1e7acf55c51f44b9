"""LLaVA's format: a JSON array, or JSON lines, of conversations that name their pictures by path."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from vlm.data import register
from vlm.data.sample import Picture, Sample, Turn
from vlm.errors import DataError

__all__ = ["LlavaReader", "LlavaSource"]

MARK = "<image>"
ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "bot": "assistant"}
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
SPACE = re.compile(r"[ \t\n\r]*")
REMOTE = re.compile(r"[a-z][a-z0-9+.-]*://|data:", re.IGNORECASE)


@register("llava")
@dataclass(frozen=True, kw_only=True)
class LlavaSource:
    """A file of conversations and the folder of its pictures.

    file: a JSON array or JSON lines, UTF-8; told apart by content. images: the folder that the paths of pictures start from and may not leave; default: the file's own.
    samples: the number of samples, for planning where the file is not there.
    missing_placeholder: a sample with pictures and no `<image>` is an error, or gets one `<image>` and a newline per picture before its first question.
    on_bad: a bad record is an error when it is read; or `open` looks at every record, leaves out those that are bad or miss a picture, and lists them in `LlavaReader.bad`.
    """

    file: str
    images: str | None = None
    samples: int | None = None
    missing_placeholder: Literal["error", "prepend"] = "error"
    on_bad: Literal["error", "skip"] = "error"

    def open(self) -> "LlavaReader":
        """Finds the records. Raises DataError for a file that is missing, empty, not UTF-8 or not JSON."""
        return LlavaReader(self)


class LlavaReader:
    """Random access to the samples of one file.

    Keeps where the records lie, not the records: cheap to fork and to pickle. Each read opens the file.
    bad: what `on_bad: skip` left out, one error per record.
    """

    def __init__(self, source: LlavaSource):
        self.source, self.root = source, source.images if source.images is not None else os.path.dirname(source.file) or "."
        bad: list[DataError] = []
        spans, self._stamp = _find_records(source.file, bad if source.on_bad == "skip" else None)
        self._spans = np.array(spans, dtype=np.int64).reshape(-1, len(_Span._fields))
        if source.on_bad == "skip":
            self._spans = self._spans[[self._holds(span, bad) for span in spans]]
        self.bad = tuple(bad)
        if not len(self._spans):
            raise DataError(f"{source.file} holds no samples", got=f"{len(bad)} bad records, the first: {bad[0]}" if bad else "an empty file")

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Sample:
        """Sample `index`. Raises DataError with file, record, numbers and cure; IndexError beyond the end."""
        return self._sample(_Span(*self._spans[index].tolist()))

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def file_hash(self) -> str:
        """SHA-256 of the file, in hexadecimal."""
        with open(self.source.file, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _sample(self, span: "_Span") -> Sample:
        with open(self.source.file, "rb") as file:
            if _stamp(file.fileno()) != self._stamp:
                raise DataError(f"{self.source.file} was changed after it had been opened", cure="start again; a data file must not change during a run")
            file.seek(span.start)
            record = json.loads(file.read(span.stop - span.start).decode("utf-8"))
        where = f"{self.source.file}, sample {span.number}" + (f" (line {span.line})" if span.line else "")
        return _sample(record, span.number, where, self.root, self.source.missing_placeholder == "prepend")

    def _holds(self, span: "_Span", bad: list[DataError]) -> bool:
        try:
            sample = self._sample(span)
            for picture in sample.pictures:
                if not os.path.isfile(picture.path):
                    raise DataError(f"{sample.where}: the picture {picture.path} is not there")
        except DataError as error:
            bad.append(error)
            return False
        return True


class _Span(NamedTuple):
    """Where a record lies: bytes start to stop, its number in the file from 0, its line from 1 (0 in a JSON array)."""

    start: int
    stop: int
    number: int
    line: int


def _stamp(file: int | str) -> tuple[int, int]:
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


def _find_records(file: str, bad: list[DataError] | None) -> tuple[list[_Span], tuple[int, int]]:
    """Spans of all records, and the file's size and time. `bad` collects lines that are not JSON; None: they are raised."""
    try:
        stamp, raw = _stamp(file), Path(file).read_bytes()
    except OSError as error:
        raise DataError(f"the data file {file} cannot be read", got=error.strerror, cure="set `file` (or data_root) to where it lies") from error
    begin = _check_utf8(file, raw)
    # One character per byte: structure is the same as in UTF-8, and positions are byte offsets.
    text = raw.decode("latin-1")
    begin = _after_space(text, begin)
    if text.startswith("[", begin):
        return list(_array(file, text, begin)), stamp
    return list(_lines(file, raw, bad)), stamp


def _check_utf8(file: str, raw: bytes) -> int:
    """The number of bytes to leave out at the start. Raises DataError for another encoding: a wrong guess would train on garbage."""
    encoding = json.detect_encoding(raw[:4])
    if not encoding.startswith("utf-8"):
        cure = f"re-save it as UTF-8: iconv -f {encoding.upper()} -t UTF-8 OLD > NEW"
        raise DataError(f"{file} is {encoding.upper()}, from byte 0 on", got=f"the bytes {raw[:4].hex(' ')}", expected="UTF-8", cure=cure)
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{file} is not UTF-8 at byte {error.start} (line {line})",
            got=f"0x{raw[error.start]:02x}, {error.reason}",
            expected="UTF-8",
            cure="re-save it as UTF-8, from GBK for instance: iconv -f GBK -t UTF-8 OLD > NEW; encodings are not guessed",
        ) from None
    return len(BYTE_ORDER_MARK) if raw.startswith(BYTE_ORDER_MARK) else 0


def _after_space(text: str, position: int) -> int:
    match = SPACE.match(text, position)
    return match.end() if match else position


def _array(file: str, text: str, begin: int) -> Iterator[_Span]:
    decoder, number = json.JSONDecoder(), 0
    position = _after_space(text, begin + 1)
    closed = text.startswith("]", position)
    try:
        while not closed:
            _, stop = decoder.raw_decode(text, position)
            yield _Span(position, stop, number, 0)
            position, number = _after_space(text, stop), number + 1
            closed = text.startswith("]", position)
            if not closed and not text.startswith(",", position):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
            if not closed:
                position = _after_space(text, position + 1)
        end = _after_space(text, position + 1)
        if end != len(text):
            raise json.JSONDecodeError("Text after the array", text, end)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno} (byte {error.pos})"
        raise DataError(f"{file}, sample {number}: not JSON at {where}", got=error.msg, cure="was the file cut? Mend it, or write it again") from None


def _lines(file: str, raw: bytes, bad: list[DataError] | None) -> Iterator[_Span]:
    """Only \\n ends a line: U+2028, U+0085 and their like are text. A byte order mark at the start of a line comes from joined files."""
    start = number = line = 0
    while start < len(raw):
        stop = raw.find(b"\n", start)
        stop, line = len(raw) if stop < 0 else stop, line + 1
        if raw.startswith(BYTE_ORDER_MARK, start):
            start += len(BYTE_ORDER_MARK)
        content = raw[start:stop]
        if content.strip():
            try:
                json.loads(content.decode("utf-8"))
                yield _Span(start, stop, number, line)
            except json.JSONDecodeError as error:
                what, got = f"{file}, line {line} (sample {number}): not JSON", f"{error.msg} at column {error.colno}"
                problem = DataError(what, got=got, expected="one whole JSON object per line", cure="mend the line, or `on_bad: skip`")
                if bad is None:
                    raise problem from None
                bad.append(problem)
            number += 1
        start = stop + 1


def _sample(record: Any, number: int, where: str, root: str, prepend: bool) -> Sample:
    if not isinstance(record, dict):
        raise DataError(f"{where}: not an object", got=type(record).__name__, expected="an object with `conversations`")
    rows = _either(record, "conversations", "messages", where)
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{where}: no turns", got=f"the keys {', '.join(record)}", expected="a list called `conversations` or `messages`", cure="add turns, or take the record out")
    messages = [_message(row, turn, where) for turn, row in enumerate(rows)]
    if all(message.role != "assistant" for message in messages):
        roles = ", ".join(message.role for message in messages)
        raise DataError(f"{where}: no assistant turn", got=f"roles {roles}", expected="at least one answer to learn", cure="add the answer, or take the record out")
    pictures = [_picture(name, where, root) for name in _picture_names(record, where)]
    messages, notes = _match_marks(messages, len(pictures), where, prepend)
    independent = record.get("independent", False)
    if not isinstance(independent, bool):
        raise DataError(f"{where}: `independent` is neither true nor false", got=independent)
    if independent:
        _check_pairs(messages, where)
    if messages[-1].role != "assistant":
        notes += ("unsupervised trailing turn",)
    left = iter(pictures)
    turns = tuple(
        Turn(message.role, _parts(message, left), supervised=message.role == "assistant", kind=kind)
        for message, kind in zip(messages, _kinds(messages, _kind(record, where)), strict=True)
    )
    return Sample(str(number if record.get("id") is None else record["id"]), turns, where=where, independent=independent, notes=notes)


class _Message(NamedTuple):
    role: str
    text: str
    kind: str | None

    @property
    def marks(self) -> int:
        """The mark means a picture in user turns only; elsewhere it is text."""
        return self.text.count(MARK) if self.role == "user" else 0


def _message(row: Any, turn: int, where: str) -> _Message:
    if not isinstance(row, dict):
        raise DataError(f"{where}: turn {turn} is not an object", got=type(row).__name__, expected="an object with `from` and `value`, or `role` and `content`")
    name = _either(row, "from", "role", where)
    role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        raise DataError(f"{where}: turn {turn} has the unknown role {name!r}", expected=f"one of {', '.join(ROLES)}, in any case", cure="rename the role, or take the record out")
    text = _either(row, "value", "content", where)
    if not isinstance(text, str) or (role != "system" and not text.strip()):
        raise DataError(f"{where}: turn {turn} has no text", got=repr(text)[:80], expected="a string", cure="fill it in, or take the record out")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        got = ascii(text[error.start])
        raise DataError(f"{where}: turn {turn} holds half a character at position {error.start}", got=got, cure="the text was cut within an emoji: mend it") from None
    return _Message(role, text, _kind(row, where))


def _either(record: dict[str, Any], one: str, other: str, where: str) -> Any:
    """The value under one of two spellings of a key, None without either."""
    first, second = record.get(one), record.get(other)
    if first is not None and second is not None:
        raise DataError(f"{where}: both `{one}` and `{other}`", expected="one of them", cure="take the one that is not meant out")
    return second if first is None else first


def _kind(record: dict[str, Any], where: str) -> str | None:
    kind = record.get("kind")
    if kind is not None and not isinstance(kind, str):
        raise DataError(f"{where}: `kind` is not a word", got=repr(kind)[:80])
    return kind


def _kinds(messages: list[_Message], default: str | None) -> list[str | None]:
    """A question and its answer share the kind that either of them names."""
    kinds = [message.kind for message in messages]
    for turn in range(1, len(messages)):
        if (messages[turn - 1].role, messages[turn].role) == ("user", "assistant"):
            kinds[turn - 1] = kinds[turn] = kinds[turn] or kinds[turn - 1]
    return [None if message.role == "system" else kind or default for message, kind in zip(messages, kinds, strict=True)]


def _match_marks(messages: list[_Message], images: int, where: str, prepend: bool) -> tuple[list[_Message], tuple[str, ...]]:
    """The messages with as many marks as images, and what was done for it. Raises DataError where the numbers differ."""
    marks = sum(message.marks for message in messages)
    if marks == images:
        return messages, ()
    first = next((turn for turn, message in enumerate(messages) if message.role == "user"), None)
    if marks == 0 and prepend and first is not None:
        question = messages[first]
        return [*messages[:first], question._replace(text=f"{MARK}\n" * images + question.text), *messages[first + 1 :]], ("placeholder prepended",)
    cure = f"write one {MARK} per picture in the user turns" + (", or set `missing_placeholder: prepend`" if marks == 0 and not prepend else "")
    got = f"images {images}, placeholders {marks} ({MARK} in user turns)"
    raise DataError(f"{where}: pictures and placeholders differ", got=got, expected="as many of one as of the other", cure=cure)


def _check_pairs(messages: list[_Message], where: str) -> None:
    """Independent pairs: system turns, then questions and answers by turns, the pictures all in the first question."""
    cure = "set `independent` to false, or mend the turns"
    dialogue = [(turn, message) for turn, message in enumerate(messages) if message.role != "system"]
    for place, (turn, message) in enumerate(dialogue):
        if turn != place + len(messages) - len(dialogue) or message.role != ("user", "assistant")[place % 2]:
            raise DataError(
                f"{where}: independent turns are not pairs at turn {turn}", got=message.role, expected="system turns first, then user and assistant by turns", cure=cure
            )
        if place and message.marks:
            raise DataError(f"{where}: turn {turn} brings pictures of its own", expected="independent questions share the pictures of the first one", cure=cure)
    if len(dialogue) % 2:
        raise DataError(f"{where}: the last independent question (turn {len(messages) - 1}) has no answer", cure="add the answer, or take the question out")


def _parts(message: _Message, pictures: Iterator[Picture]) -> tuple[str | Picture, ...]:
    if message.role != "user":
        return (message.text,)
    parts: list[str | Picture] = []
    for place, text in enumerate(message.text.split(MARK)):
        if place:
            parts.append(next(pictures))
        if text:
            parts.append(text)
    return tuple(parts)


def _picture_names(record: dict[str, Any], where: str) -> list[Any]:
    names = _either(record, "image", "images", where)
    if names is None:
        return []
    return names if isinstance(names, list) else [names]


def _picture(name: Any, where: str, root: str) -> Picture:
    if not isinstance(name, str) or not name or "\0" in name:
        raise DataError(f"{where}: a picture is not a path", got=repr(name)[:80], expected="a path, or a list of paths")
    if REMOTE.match(name):
        raise DataError(f"{where}: the picture {name[:80]} is not a file", expected=f"a path below {root}", cure="fetch the pictures before training and name them by path")
    path = os.path.join(root, name)
    inside, real = os.path.realpath(root), os.path.realpath(path)
    if os.path.commonpath((inside, real)) != inside:
        raise DataError(
            f"{where}: the picture {name} leads out of the folder of pictures", got=real, expected=f"a path below {root}", cure="set `images` to the folder that holds all"
        )
    return Picture(path)
