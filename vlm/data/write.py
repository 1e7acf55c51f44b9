"""Samples -> the files of each format. Each record is proved to read back as the same sample before it is written."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vlm.data.record import MARK, sample_of
from vlm.data.sample import Picture, Sample, Turn
from vlm.errors import ConfigurationError, DataError, EnvironmentProblem

__all__ = ["FORMATS", "Written", "picture_suffix", "write_records", "write_split"]

SUFFIXES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"GIF8": ".gif", b"BM": ".bmp", b"II*\0": ".tif", b"MM\0*": ".tif", b"\0\0\0\x0cjP  ": ".jp2"}
PORTABLE = {b"P%d" % number: ".ppm" for number in range(1, 7)}
LINE_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}
"""JSON leaves these as they are within texts, and readers that cut a file by str.splitlines would cut there."""
ROWS, ROW_BYTES = 100, 2**26
"""What a row group of Parquet holds at most: it is written, and often read, as a whole."""


class Written(NamedTuple):
    """What a split became. pictures: a picture of several samples counts for each. reader, file: what opens it; the file, or the glob of shards, is below the folder.
    warnings: what the source's reader left out.
    """

    samples: int
    answers: int
    pictures: int
    reader: str
    file: str
    warnings: tuple[str, ...] = ()


def write_split(samples: Iterable[Sample], folder: Path, split: str, to: str, *, per_shard: int = 1000) -> Written:
    """Writes one split into `folder`, which is there. Pictures keep their bytes.

    to: llava, sharegpt (SPLIT.json), messages (SPLIT.jsonl), each with the pictures as files in pictures/SPLIT/, called by what they hold, so that a picture of several samples is written once;
    parquet (SPLIT.parquet, with columns that `datasets` knows); tar (SPLIT-000000.tar, ..., of `per_shard` samples each).

    Raises DataError, with the record, for a picture that cannot be read or is none, and for what the format cannot say (a literal `<image>` in a question, where it would be read as a picture);
    ConfigurationError for another format; EnvironmentProblem without pyarrow or datasets.
    """
    if to not in FORMATS:
        raise ConfigurationError(f"cannot write {to!r}", expected=f"one of {', '.join(FORMATS)}")
    count = _Count()
    match to:
        case "parquet":
            reader, file = "hf", _write_parquet(count.all(samples), folder, split)
        case "tar":
            reader, file = "tar", _write_tar(count.all(samples), folder, split, per_shard)
        case _:
            reader, file = to, _write_json(count.all(samples), folder, split, to)
    if not count.samples:
        raise DataError(f"the split {split} holds no samples", kind="empty")
    return Written(count.samples, count.answers, count.pictures, reader, file)


def write_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Writes a JSON array with one record per line, so that it can be searched and compared line by line; or, for a name in .jsonl, JSON lines."""
    begin, between, end = ("", "\n", "\n") if path.suffix == ".jsonl" else ("[\n", ",\n", "\n]\n")
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(begin)
        for number, record in enumerate(records):
            file.write((between if number else "") + _json(record))
        file.write(end)


def picture_suffix(data: bytes, where: str) -> str:
    """ ".png" and the like, from the first bytes of a picture file. Raises DataError for anything else."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return ".webp"
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return ".avif"
    for start, suffix in (SUFFIXES | PORTABLE).items():
        if data.startswith(start):
            return suffix
    got = f"{len(data)} bytes, the first: {data[:8].hex(' ')}" if data else "0 bytes"
    raise DataError(f"{where}: not a picture file", kind="unreadable picture" if data else "empty", got=got, expected="PNG, JPEG, WebP, GIF, BMP, TIFF, PPM, AVIF or JPEG 2000")


class _Count:
    """Counts samples on their way."""

    def __init__(self) -> None:
        self.samples = self.answers = self.pictures = 0

    def all(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        for sample in samples:
            self.samples += 1
            self.answers += sum(turn.supervised for turn in sample.turns)
            self.pictures += len(sample.pictures)
            yield sample


# ---- records -------------------------------------------------------------------------------------------------------------

Form = Callable[[Sample, list[Any]], dict[str, Any]]
"""(sample, what stands for each of its pictures) -> record."""


def _llava(sample: Sample, pictures: list[Any]) -> dict[str, Any]:
    named = {"image": pictures[0] if len(pictures) == 1 else pictures} if pictures else {}
    return _head(sample) | named | {"conversations": [{"from": _FROM[turn.role], "value": _marked(turn)} | kind for turn, kind in _with_kinds(sample.turns)]}


def _sharegpt(sample: Sample, pictures: list[Any]) -> dict[str, Any]:
    """One system turn in front, with text, stands beside the conversation, where ShareGPT has it."""
    turns, system = sample.turns, {}
    if [turn.role for turn in turns[:2]] in (["system", "user"], ["system", "assistant"]) and turns[0].text:
        turns, system = turns[1:], {"system": turns[0].text}
    named = {"images": pictures} if pictures else {}
    return _head(sample) | named | system | {"conversations": [{"from": _FROM[turn.role], "value": _marked(turn)} | kind for turn, kind in _with_kinds(turns)]}


def _messages(sample: Sample, pictures: list[Any]) -> dict[str, Any]:
    """Content is a text where it can be; with pictures, or a literal mark that is none, a list of parts."""
    named = {"images": pictures} if pictures else {}
    rows = []
    for turn, kind in _with_kinds(sample.turns):
        plain = not _pictured(turn) and not (turn.role == "user" and MARK in turn.text)
        rows.append({"role": turn.role, "content": turn.text if plain else _content(turn)} | kind | _unlearnt(turn))
    return _head(sample) | named | {"messages": rows}


def _columns(sample: Sample, pictures: list[Any]) -> dict[str, Any]:
    """As `_messages`, but alike for every row, as columns must be."""
    rows = [{"role": turn.role, "content": _content(turn), "kind": kind.get("kind")} for turn, kind in _with_kinds(sample.turns)]
    return {"id": sample.id, "images": pictures, "messages": rows, "independent": sample.independent}


_FROM = {"system": "system", "user": "human", "assistant": "gpt"}
FORMATS: dict[str, Form] = {"llava": _llava, "messages": _messages, "sharegpt": _sharegpt, "parquet": _columns, "tar": _messages}
"""Format -> how its records are written."""


def _head(sample: Sample) -> dict[str, Any]:
    return {"id": sample.id} | ({"independent": True} if sample.independent else {})


def _with_kinds(turns: tuple[Turn, ...]) -> Iterator[tuple[Turn, dict[str, str]]]:
    """Turns with what they say of their kind: an answer has its question's."""
    before = None
    for turn in turns:
        known = before is not None and (before.role, turn.role, before.kind) == ("user", "assistant", turn.kind)
        yield turn, {} if turn.kind is None or known else {"kind": turn.kind}
        before = turn


def _unlearnt(turn: Turn) -> dict[str, int]:
    """OpenAI's mark of an answer that is not learnt. Only `messages` have a place for it."""
    return {"weight": 0} if turn.role == "assistant" and not turn.supervised else {}


def _pictured(turn: Turn) -> bool:
    return any(isinstance(part, Picture) for part in turn.parts)


def _marked(turn: Turn) -> str:
    return "".join(MARK if isinstance(part, Picture) else part for part in turn.parts)


def _content(turn: Turn) -> list[dict[str, str | None]]:
    return [{"type": "image"} if isinstance(part, Picture) else {"type": "text", "text": part} for part in turn.parts]


def _proved(sample: Sample, to: str) -> None:
    """Raises DataError where the record would not read back as the sample."""
    what = f"{sample.where}: cannot be written as {to} without a change"
    cure = "choose another format, such as messages or tar, or take the record out"
    try:
        back = sample_of(FORMATS[to](sample, list(sample.pictures)), number=0, where=sample.where, picture=lambda picture, _: picture)
    except DataError as error:
        raise DataError(what, kind=error.kind, got=error.what.removeprefix(f"{sample.where}: ") + (f", {error.got}" if error.got is not None else ""), cure=cure) from error
    for turn, (one, other) in enumerate(zip(_said(sample), _said(back), strict=False)):
        if one != other:
            raise DataError(what, got=f"turn {turn}: {repr(other)[:80]}", expected=repr(one)[:80], cure=cure)
    if (sample.id, sample.independent, len(sample.turns)) != (back.id, back.independent, len(back.turns)):
        raise DataError(what, got=(back.id, back.independent, len(back.turns)), expected=(sample.id, sample.independent, len(sample.turns)), cure=cure)


def _said(sample: Sample) -> list[tuple[Any, ...]]:
    return [(turn.role, turn.supervised, turn.kind, *(part for part in turn.parts if part != "")) for turn in sample.turns]


# ---- files ---------------------------------------------------------------------------------------------------------------


def _write_json(samples: Iterable[Sample], folder: Path, split: str, to: str) -> str:
    path = folder / f"{split}{'.jsonl' if to == 'messages' else '.json'}"
    pictures = _PictureFiles(folder, split)

    def records() -> Iterator[dict[str, Any]]:
        for sample in samples:
            _proved(sample, to)
            yield FORMATS[to](sample, [pictures.name(picture, sample.where) for picture in sample.pictures])

    write_records(path, records())
    return path.name


class _PictureFiles:
    """pictures/SPLIT/ab/abcdef....jpg, called by what it holds."""

    def __init__(self, folder: Path, split: str):
        self.folder, self.split, self.known = folder, split, set[str]()

    def name(self, picture: Picture, where: str) -> str:
        """The path below the folder; the file is written where it is new."""
        data = _bytes(picture, where)
        digest = hashlib.sha256(data).hexdigest()[:32]
        name = f"pictures/{self.split}/{digest[:2]}/{digest}{picture_suffix(data, f'{where}, {picture.name}')}"
        if name not in self.known:
            self.known.add(name)
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_bytes(data)
        return name


def _write_tar(samples: Iterable[Sample], folder: Path, split: str, per_shard: int) -> str:
    """Keys are numbers: an id may hold dots and slashes, which mean something in the names of members."""
    from vlm.data.shards import ShardWriter

    with ShardWriter(folder, prefix=split, per_shard=per_shard) as out:
        for number, sample in enumerate(samples):
            _proved(sample, "tar")
            members = {"json": _json(FORMATS["tar"](sample, [])).encode("utf-8")}
            for place, picture in enumerate(sample.pictures):
                data = _bytes(picture, sample.where)
                members[f"{place}{picture_suffix(data, f'{sample.where}, {picture.name}')}"] = data
            out.write(f"{number:08d}", members)
    return f"{split}-*.tar"


def _write_parquet(samples: Iterable[Sample], folder: Path, split: str) -> str:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
        from datasets import Features, Image, List, Value
    except ImportError as error:
        raise EnvironmentProblem("writing Parquet needs the packages pyarrow and datasets", cure="pip install 'vlm[data]'") from error
    text = Value("string")
    messages = List({"role": text, "content": List({"type": text, "text": text}), "kind": text})
    schema = Features({"id": text, "images": List(Image()), "messages": messages, "independent": Value("bool")}).arrow_schema
    path = folder / f"{split}.parquet"
    with parquet.ParquetWriter(path, schema, compression="zstd") as out:
        for group in _row_groups(samples):
            out.write_table(pyarrow.Table.from_pylist(group, schema=schema))
    return path.name


def _row_groups(samples: Iterable[Sample]) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    size = 0
    for sample in samples:
        rows.append(_row(sample))
        size += sum(len(picture["bytes"]) for picture in rows[-1]["images"])
        if len(rows) == ROWS or size >= ROW_BYTES:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows


def _row(sample: Sample) -> dict[str, Any]:
    _proved(sample, "parquet")
    pictures = []
    for place, picture in enumerate(sample.pictures):
        data = _bytes(picture, sample.where)
        pictures.append({"bytes": data, "path": f"{place}{picture_suffix(data, f'{sample.where}, {picture.name}')}"})
    return FORMATS["parquet"](sample, pictures)


def _bytes(picture: Picture, where: str) -> bytes:
    try:
        return picture.read()
    except OSError as error:
        raise DataError(
            f"{where}: the picture {picture.name} cannot be read", kind="missing picture", got=error.strerror or error, cure="put it there, or take the record out"
        ) from error


def _json(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False).translate(LINE_ENDS)
