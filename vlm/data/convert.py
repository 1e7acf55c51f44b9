"""Any data that a reader opens -> any format that is written: one folder, one file or set of shards per split."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlm.data.hf import HfReader
from vlm.data.sample import Picture, Sample, Turn
from vlm.data.sources import sources_at
from vlm.data.write import FORMATS, Written, write_split
from vlm.errors import ConfigurationError, DataError
from vlm.folders import new_folder

__all__ = ["convert_data"]


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

    Raises DataError with file and record for the first bad one, and for what the format cannot say; nothing is left then. ConfigurationError where `out` holds something.
    """
    if to not in FORMATS:
        raise ConfigurationError(f"cannot convert to {to!r}", expected=f"one of {', '.join(FORMATS)}")
    sources = sources_at(source, reader=reader, images=images, columns=columns)
    with new_folder(out) as folder:
        return {split: _convert_split(spec, folder, split, to, group and split == "train", per_shard) for split, spec in sources.items()}


def _convert_split(spec: Any, folder: Path, split: str, to: str, group: bool, per_shard: int) -> Written:
    from rich.console import Console
    from rich.progress import track

    reader = spec.open()
    samples: Iterable[Sample] = reader
    count = len(reader)
    if group and isinstance(reader, HfReader) and (rows := _rows_of_pictures(reader)) is not None:
        samples, count = (_one_sample(picture, [reader[row] for row in numbers]) for picture, numbers in rows.items()), len(rows)
    console = Console(stderr=True)
    watched = track(samples, split, total=count, console=console, transient=True, disable=not console.is_terminal)
    written = write_split(watched, folder, split, to, per_shard=per_shard)
    bad = [f"{len(reader.bad):,} samples are left out, the first: {reader.bad[0]}"] if reader.bad else []
    return written._replace(warnings=(*reader.warnings, *bad))


def _rows_of_pictures(reader: HfReader) -> dict[str, list[int]] | None:
    """image_id -> its rows, for Parquet files with the columns of questions about pictures: an image_id, a question and an answer; None for others."""
    if not reader.columns.keys() >= {"question", "answer"} or not all(part.endswith(".parquet") for part in reader.source.parts()):
        return None
    names = reader.values("image_id")
    if names is None:
        return None
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(str(name), []).append(row)
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
