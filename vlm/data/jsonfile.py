"""Files of JSON records: where each record lies, and random access to them as samples. The readers `llava`, `messages` and `sharegpt` differ only in the forms of records that they take."""

import glob
import hashlib
import json
import os
import re
import sys
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from vlm.data.base import Reader, Source
from vlm.data.pictures import picture_below
from vlm.data.record import Form, form_of, sample_of
from vlm.data.sample import Sample
from vlm.errors import DataError, listed

__all__ = ["JsonReader", "JsonSource", "parsed"]

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
SPACE = re.compile(r"[ \t\n\r]*")
PAGE = re.compile(r"<(!doctype\s+html|html)\b", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class JsonSource(Source):
    """A file of conversations and the folder of its pictures.

    file: a JSON array or JSON lines, UTF-8, told apart by content; or a glob of such files, read in the order of their names. images: the folder that the paths of pictures start from and may not
    leave; default: the file's own.
    """

    form: ClassVar[Form | None] = None

    def parts(self) -> list[str]:
        return [self.file] if os.path.exists(self.file) else sorted(glob.glob(self.file)) or [self.file]

    def open(self) -> "JsonReader":
        """Finds the records. Raises DataError for a file that is missing, empty, not UTF-8 or not JSON."""
        return JsonReader(self)


class JsonReader(Reader[JsonSource]):
    """The records of one file, or of several one after the other. Each read opens one."""

    def __init__(self, source: JsonSource):
        self.source = source
        files = source.parts()
        self._picture = picture_below(source.images if source.images is not None else os.path.dirname(files[0]) or ".", remote=source.remote)
        bad: list[DataError] = []
        self._parts: list[_Part] = []
        found: list[np.ndarray] = []
        for file in files:
            spans, stamp = _find_records(file, bad if source.on_bad == "skip" else None)
            before = self._parts[-1] if self._parts else _Part("", (0, 0), 0, 0)
            self._parts.append(_Part(file, stamp, before.end + len(spans), before.numbers + (spans[-1].number + 1 if spans else 0)))
            found.append(np.array(spans, dtype=np.int64).reshape(-1, len(_Span._fields)))
        self._spans = np.concatenate(found)
        if empty := [part.file for part, spans in zip(self._parts, found, strict=True) if not len(spans)]:
            self.warnings = (f"{len(empty)} of {len(found)} files without records: {listed(empty)}",)
        self.keep(len(self._spans), bad, empty="no records")

    def file_hash(self) -> str:
        hashes: list[str] = []
        for part in self._parts:
            with open(part.file, "rb") as file:
                hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
        return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()

    def sample(self, record: int) -> Sample:
        place = bisect_right(self._parts, record, key=lambda part: part.end)
        part, span = self._parts[place], _Span(*self._spans[record].tolist())
        with open(part.file, "rb") as file:
            if _stamp(file.fileno()) != part.stamp:
                raise DataError(f"{part.file} was changed after it had been opened", kind="unreadable file", cure="start again; a data file must not change during a run")
            file.seek(span.start)
            text = file.read(span.stop - span.start).decode("utf-8")
        where = f"{part.file}, sample {span.number}" + (f" (line {span.line})" if span.line else "")
        number = span.number + (self._parts[place - 1].numbers if place else 0)
        return sample_of(parsed(text, where), number=number, where=where, picture=self._picture, prepend=self.source.missing_placeholder == "prepend", form=self.source.form)


def parsed(text: str, what: str) -> Any:
    """The value of a JSON text. Raises json.JSONDecodeError where it is not JSON, DataError where it is more than Python takes: nested too deeply, or an integer of thousands of digits.

    what: what the text is, as messages call it.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise _too_deep(what) from None
    except ValueError:
        raise DataError(
            f"{what} holds an integer of too many digits", kind="too large", expected=f"at most {sys.get_int_max_str_digits():,}", cure="write it as text, or take it out"
        ) from None


def _too_deep(what: str) -> DataError:
    return DataError(f"{what} is nested too deeply", kind="too large", cure="is it a record? Take it out")


class _Span(NamedTuple):
    """Where a record lies: bytes start to stop, its number in the file from 0, its line from 1 (0 in a JSON array)."""

    start: int
    stop: int
    number: int
    line: int


class _Part(NamedTuple):
    """One file: its size and time, the records up to its end, and the numbers that they have taken (lines that are no records have one too)."""

    file: str
    stamp: tuple[int, int]
    end: int
    numbers: int


def _stamp(file: int | str) -> tuple[int, int]:
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


def _find_records(file: str, bad: list[DataError] | None) -> tuple[list[_Span], tuple[int, int]]:
    """Spans of all records, and the file's size and time. `bad` collects lines that are not JSON; None: they are raised."""
    try:
        stamp, raw = _stamp(file), Path(file).read_bytes()
    except OSError as error:
        raise DataError(f"the data file {file} cannot be read", kind="unreadable file", got=error.strerror, cure="set `file` (or data_root) to where it lies") from error
    begin = _check_utf8(file, raw)
    # One character per byte: structure is the same as in UTF-8, and positions are byte offsets.
    text = raw.decode("latin-1")
    begin = _after_space(text, begin)
    if text.startswith("[", begin):
        return list(_array(file, text, begin)), stamp
    if PAGE.match(text, begin):
        cure = "fetch the data file itself: sites answer with a page where one must log in, or where nothing is there"
        raise DataError(
            f"{file} is a page of HTML, not JSON",
            kind="not JSON",
            got=raw[begin:][:60].decode("utf-8", "replace").split("\n")[0],
            expected="a JSON array, or JSON lines",
            cure=cure,
        )
    if text.startswith("{", begin):
        _check_alone(file, raw, text, begin)
    return list(_lines(file, raw, bad)), stamp


def _check_alone(file: str, raw: bytes, text: str, begin: int) -> None:
    """Raises DataError for a file of one object that is no line of JSON lines: it holds the list of records, or goes over several lines."""
    try:
        _, stop = json.JSONDecoder(parse_int=float).raw_decode(text, begin)
    except (json.JSONDecodeError, RecursionError):
        return
    if _after_space(text, stop) != len(text):
        return
    record = json.loads(raw[begin:stop], parse_int=float)
    lists = [key for key, inner in record.items() if isinstance(inner, list) and inner and isinstance(inner[0], dict)]
    expected = "a JSON array of records, or one whole record per line"
    if lists and form_of(record) is None:
        cure = f"if these are the records, write that list alone into a file: jq '.[{json.dumps(lists[0])}]' OLD > NEW"
        raise DataError(f"{file}: one object around a list", kind="not JSON", got=f"a list of objects under the key {' and '.join(map(repr, lists))}", expected=expected, cure=cure)
    if "\n" in text[begin:stop]:
        raise DataError(f"{file}: one object instead of a list", kind="not JSON", got="an object over several lines", expected=expected, cure="put it into [ ]")


def _check_utf8(file: str, raw: bytes) -> int:
    """The number of bytes to leave out at the start. Raises DataError for another encoding: a wrong guess would train on garbage."""
    encoding = json.detect_encoding(raw[:4])
    if not encoding.startswith("utf-8"):
        cure = f"re-save it as UTF-8: iconv -f {encoding.upper()} -t UTF-8 OLD > NEW"
        raise DataError(f"{file} is {encoding.upper()}, from byte 0 on", kind="not JSON", got=f"the bytes {raw[:4].hex(' ')}", expected="UTF-8", cure=cure)
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{file} is not UTF-8 at byte {error.start} (line {line})",
            kind="not JSON",
            got=f"0x{raw[error.start]:02x}, {error.reason}",
            expected="UTF-8",
            cure="re-save it as UTF-8, from GBK for instance: iconv -f GBK -t UTF-8 OLD > NEW; encodings are not guessed",
        ) from None
    return len(BYTE_ORDER_MARK) if raw.startswith(BYTE_ORDER_MARK) else 0


def _after_space(text: str, position: int) -> int:
    match = SPACE.match(text, position)
    return match.end() if match else position


def _array(file: str, text: str, begin: int) -> Iterator[_Span]:
    # Only where a value ends is asked here, and no float has too many digits.
    decoder, number = json.JSONDecoder(parse_int=float), 0
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
        raise DataError(f"{file}, sample {number}: not JSON at {where}", kind="not JSON", got=error.msg, cure="was the file cut? Mend it, or write it again") from None
    except RecursionError:
        raise _too_deep(f"{file}, sample {number}") from None


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
            problem = _fault(content.decode("utf-8"), f"{file}, line {line} (sample {number})")
            if problem is None:
                yield _Span(start, stop, number, line)
            elif bad is None:
                raise problem
            else:
                bad.append(problem)
            number += 1
        start = stop + 1


def _fault(text: str, where: str) -> DataError | None:
    """Why a line is no value."""
    try:
        parsed(text, where)
    except json.JSONDecodeError as error:
        got = f"{error.msg} at column {error.colno}"
        return DataError(f"{where}: not JSON", kind="not JSON", got=got, expected="one whole JSON object per line", cure="mend the line, or `on_bad: skip`")
    except DataError as error:
        return error
    return None
