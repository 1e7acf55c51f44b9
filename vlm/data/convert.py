"""Writes folders in LLaVA's format (a JSON file per split, pictures as files), and fills them from Parquet sets of questions about pictures."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from vlm.errors import ConfigurationError, DataError, EnvironmentProblem

__all__ = ["Question", "convert_parquet", "llava_record", "new_folder", "write_records"]

NEEDED = ("id", "image", "image_id", "question", "answer")
TEXTS = tuple(column for column in NEEDED if column != "image")
SUFFIXES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"GIF8": ".gif", b"BM": ".bmp", b"II*\0": ".tif", b"MM\0*": ".tif"}


class Question(NamedTuple):
    """A question, its answer, and what it asks for (`kind`), where that is known."""

    question: str
    answer: str
    kind: str | None = None


def convert_parquet(source: Path, out: Path, to: str = "llava", *, group: bool = True) -> dict[str, dict[str, int]]:
    """Turns Parquet files of (id, image, image_id, question, answer, kind) into a folder of LLaVA JSON and picture files. Other columns are left out.

    source: one Parquet file, or a folder with one file per split: train.parquet becomes train.json. out: a folder that is not there yet.
    Pictures keep their bytes: one file per image_id in pictures/SPLIT/. `kind` is kept, on the question's turn.
    group: all questions about a picture of the split called train become one sample of independent pairs, called by the image_id: the picture is encoded once for all of them.
    The other splits always keep one question per sample, under the row's id, because evaluation asks every question alone.

    Returns the numbers of samples, questions and pictures per split. Raises DataError with file and row, EnvironmentProblem without pyarrow.
    """
    if to != "llava":
        raise ConfigurationError(f"cannot convert to {to!r}", expected="llava")
    files = sorted(source.glob("*.parquet")) if source.is_dir() else [source]
    if not files:
        raise DataError(f"{source} holds no Parquet file", expected="train.parquet, val.parquet, ... in it")
    with new_folder(out) as folder:
        return {file.stem: _convert_split(file, folder, group and file.stem == "train") for file in files}


def llava_record(name: str, image: str, questions: list[Question], independent: bool = False) -> dict[str, Any]:
    """One record in LLaVA's format: a picture, and questions with answers about it."""
    turns: list[dict[str, str]] = []
    for question in questions:
        asked = {"from": "human", "value": question.question if turns else f"<image>\n{question.question}"}
        turns += [asked | ({} if question.kind is None else {"kind": question.kind}), {"from": "gpt", "value": question.answer}]
    return {"id": name, "image": image} | ({"independent": True} if independent else {}) | {"conversations": turns}


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes a JSON array with one record per line, so that it can be searched and compared line by line."""
    path.write_text("[\n" + ",\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n]\n", encoding="utf-8")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to be filled beside `folder`, which it becomes when all went well; else nothing is left. Raises DataError where `folder` holds something."""
    folder = Path(os.path.abspath(folder))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} is there already", cure="name another folder, or delete it")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial)
        raise


def _convert_split(file: Path, folder: Path, group: bool) -> dict[str, int]:
    pictures: dict[str, tuple[str, bytes]] = {}
    asked: dict[str, list[tuple[str, Question]]] = {}
    for row, values in enumerate(_rows(file)):
        where = f"{file}, row {row}"
        if "<image>" in values["question"]:
            raise DataError(f"{where}: the question holds the placeholder <image>", got=values["question"][:80], cure="word it differently")
        _keep_picture(values["image"], values["image_id"], where, folder, file.stem, pictures)
        asked.setdefault(values["image_id"], []).append((values["id"], Question(values["question"], values["answer"], values.get("kind"))))
    if not asked:
        raise DataError(f"{file} holds no rows")
    if group:
        records = [llava_record(image, pictures[image][0], [question for _, question in rows], independent=True) for image, rows in asked.items()]
    else:
        records = [llava_record(name, pictures[image][0], [question]) for image, rows in asked.items() for name, question in rows]
    write_records(folder / f"{file.stem}.json", records)
    return {"samples": len(records), "questions": sum(map(len, asked.values())), "pictures": len(pictures)}


def _keep_picture(data: bytes, image: str, where: str, folder: Path, split: str, pictures: dict[str, tuple[str, bytes]]) -> None:
    """Writes the picture where it is new. `pictures`: image_id -> (path below the folder, hash)."""
    digest = hashlib.sha256(data).digest()
    if image not in pictures:
        # quote: an image_id may hold slashes, and two ids never share a file.
        path = folder / "pictures" / quote(split, safe="") / (quote(image, safe="") + _suffix(data, where))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        pictures[image] = path.relative_to(folder).as_posix(), digest
    elif pictures[image][1] != digest:
        raise DataError(f"{where}: another picture under the same image_id", got=image, expected="one picture per image_id", cure="give each picture an image_id of its own")


def _suffix(data: bytes, where: str) -> str:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return ".webp"
    for start, suffix in SUFFIXES.items():
        if data.startswith(start):
            return suffix
    raise DataError(f"{where}: `image` is not a picture file", got=f"{len(data)} bytes, the first: {data[:8].hex(' ')}", expected="PNG, JPEG, WebP, GIF, BMP or TIFF")


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise EnvironmentProblem("Parquet files need the package pyarrow", cure="pip install 'vlm[data]'") from error
    try:
        table = parquet.ParquetFile(file)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise DataError(f"{file} cannot be read as Parquet", got=error) from error
    with table:
        columns = table.schema_arrow.names
        if missing := [column for column in NEEDED if column not in columns]:
            raise DataError(f"{file} lacks the columns {', '.join(missing)}", got=", ".join(columns), expected=", ".join(NEEDED) + " and, if known, kind")
        row = 0
        for batch in table.iter_batches(512, columns=[*NEEDED, *(["kind"] if "kind" in columns else [])]):
            for values in batch.to_pylist():
                _check_row(values, f"{file}, row {row}")
                row += 1
                yield values


def _check_row(values: dict[str, Any], where: str) -> None:
    for column in TEXTS:
        if not isinstance(values[column], str):
            raise DataError(f"{where}: `{column}` is not text", got=repr(values[column])[:80], expected="a string")
    if not isinstance(values["image"], bytes):
        raise DataError(f"{where}: `image` does not hold a picture's bytes", got=type(values["image"]).__name__, expected="bytes of a PNG, JPEG or WebP file")
