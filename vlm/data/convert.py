"""Any data that a reader opens -> any format that is written: one folder, one file or set of shards per split."""

import glob
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from vlm.data.sample import Picture, Sample, Turn
from vlm.data.sources import sources_at
from vlm.data.write import FORMATS, Written, write_split
from vlm.errors import ConfigurationError, DataError

__all__ = ["Question", "convert_data", "llava_record", "new_folder"]


class Question(NamedTuple):
    """A question, its answer, and what it asks for (`kind`), where that is known."""

    question: str
    answer: str
    kind: str | None = None


def convert_data(
    source: str | Path,
    out: Path,
    to: str = "llava",
    *,
    reader: str | None = None,
    images: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    group: bool = True,
    per_shard: int = 1000,
) -> dict[str, Written]:
    """Turns every split at `source` (see `vlm.data.sources.sources_at`) into the format `to` (see `vlm.data.write.write_split`), and says per split what was written.

    Pictures keep their bytes; ids, kinds, roles and the order of texts and pictures are kept, which is proved for each record. out: a folder that is not there yet; it is written beside and renamed.
    group: of Parquet sets with the columns image_id, question and answer: all questions about a picture of the split called train become one sample of independent pairs, called by the image_id, so that
    the picture is encoded once for all of them. Other splits keep one question per sample, because evaluation asks every question alone.

    Raises DataError with file and record for the first bad one, and for what the format cannot say; nothing is left then.
    """
    if to not in FORMATS:
        raise ConfigurationError(f"cannot convert to {to!r}", expected=f"one of {', '.join(FORMATS)}")
    sources = sources_at(source, reader=reader, images=images, columns=columns)
    with new_folder(out) as folder:
        return {split: _convert_split(spec, folder, split, to, group and split == "train", per_shard) for split, spec in sources.items()}


def llava_record(name: str, image: str, questions: list[Question], independent: bool = False) -> dict[str, Any]:
    """One record in LLaVA's format: a picture, and questions with answers about it."""
    turns: list[dict[str, str]] = []
    for question in questions:
        asked = {"from": "human", "value": question.question if turns else f"<image>\n{question.question}"}
        turns += [asked | ({} if question.kind is None else {"kind": question.kind}), {"from": "gpt", "value": question.answer}]
    return {"id": name, "image": image} | ({"independent": True} if independent else {}) | {"conversations": turns}


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


def _convert_split(spec: Any, folder: Path, split: str, to: str, group: bool, per_shard: int) -> Written:
    from rich.console import Console
    from rich.progress import track

    reader = spec.open()
    samples: Iterable[Sample] = reader
    count = len(reader)
    if group and spec.use == "hf" and (rows := _rows_of_pictures(spec)) is not None:
        samples, count = (_one_sample(picture, [reader[row] for row in numbers]) for picture, numbers in rows.items()), len(rows)
    console = Console(stderr=True)
    watched = track(samples, split, total=count, console=console, transient=True, disable=not console.is_terminal)
    written = write_split(watched, folder, split, to, per_shard=per_shard)
    bad = [f"{len(reader.bad):,} samples are left out, the first: {reader.bad[0]}"] if reader.bad else []
    return written._replace(warnings=(*getattr(reader, "warnings", ()), *bad))


def _rows_of_pictures(spec: Any) -> dict[str, list[int]] | None:
    """image_id -> its rows, for Parquet files with the columns of questions about pictures: an image_id, a question and an answer; None for others."""
    from pyarrow import parquet

    names = spec.columns or {"question": "question", "answer": "answer"}
    if not names.keys() >= {"question", "answer"}:
        return None
    needed = {"image_id", names["question"], names["answer"]}
    files = [spec.file] if os.path.isfile(spec.file) else sorted(glob.glob(spec.file))
    if not files or not all(name.endswith(".parquet") and set(parquet.read_schema(name).names) >= needed for name in files):
        return None
    rows: dict[str, list[int]] = {}
    shown = [str(name) for part in files for name in parquet.read_table(part, columns=["image_id"]).column("image_id").to_pylist()]
    for row, name in enumerate(shown):
        rows.setdefault(name, []).append(row)
    return rows


def _one_sample(picture: str, samples: list[Sample]) -> Sample:
    """Samples of one question each as one of independent pairs, with the picture in front of the first."""
    first = samples[0]
    shown = [picture.read() for picture in first.pictures]
    turns = list(first.turns)
    for sample in samples[1:]:
        if [picture.read() for picture in sample.pictures] != shown:
            raise DataError(
                f"{sample.where}: another picture under the same image_id", got=picture, expected="one picture per image_id", cure="give each an image_id of its own, or --no-group"
            )
        turns += [_without_picture(turn, sample.where) for turn in sample.turns]
    return replace(first, id=picture, turns=tuple(turns), independent=True)


def _without_picture(turn: Turn, where: str) -> Turn:
    """The question alone, of one with its picture on a line in front."""
    match turn.parts:
        case (str(),):
            return turn
        case (Picture(), str(text)) if text.startswith("\n"):
            return replace(turn, parts=(text[1:],))
    raise DataError(
        f"{where}: the question holds the placeholder <image>", got=turn.text[:80], expected="questions that share the picture in front of the first", cure="--no-group"
    )
