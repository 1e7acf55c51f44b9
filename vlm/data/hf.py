"""Hugging Face data sets on disk: Parquet and Arrow files, and folders written by `save_to_disk`; memory-mapped, with pictures in every layout of the hub."""

import glob
import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vlm.data import register
from vlm.data.base import Reader, Source
from vlm.data.pictures import check_pictures, picture_below
from vlm.data.record import KEYS, REFUSED, form_of, sample_of
from vlm.data.sample import Sample
from vlm.errors import ConfigurationError, DataError, EnvironmentProblem

__all__ = ["HfReader", "HfSource"]

SPLIT = re.compile(r"(?<![a-z])(train|val|validation|dev|test)(?![a-z])", re.IGNORECASE)
ARROW_FILE = b"ARROW1"


@register("hf")
@dataclass(frozen=True, kw_only=True)
class HfSource(Source):
    """Rows of a Hugging Face data set; each is a record as `vlm.data.record.sample_of` describes them.

    Parquet is turned once into Arrow files, which are mapped into memory: a row is read without its neighbours. They go where the `datasets` library keeps its cache (HF_DATASETS_CACHE, else below
    HF_HOME), uncompressed, a picture that stands in several rows as often. Arrow files are mapped where they lie.

    file: a .parquet or .arrow file, a folder or a glob of them, in the order of their names; or a folder that `Dataset.save_to_disk` wrote.
    images: the folder that paths of pictures start from and may not leave; default: that of the file which the row stands in. Pictures may as well be embedded: structs of bytes and path, or plain bytes.
    columns: our names for the file's, as {image: picture, question: prompt, answer: response}; where given, no other column is read.
    """

    columns: Mapping[str, str] | None = None

    def parts(self) -> list[str]:
        return _found(self.file)

    def open(self) -> "HfReader":
        """Maps the rows. Raises DataError for files that are missing, empty or damaged, and for columns that are not there; EnvironmentProblem without the package `datasets`."""
        return HfReader(self)


class HfReader(Reader[HfSource]):
    """The rows as samples, from a map of files. A picture whose file is not there makes a row bad when it is read.

    columns: our names -> the file's, of what is read.
    """

    records = "rows"

    def __init__(self, source: HfSource):
        self.source = source
        self._shards, table = _opened(source.file)
        self._ends = np.cumsum([rows for _, rows in self._shards])
        self._pictures = {
            folder: picture_below(source.images if source.images is not None else folder, remote=source.remote) for folder in {_folder(file) for file, _ in self._shards}
        }
        self.columns = _columns(source, table.column_names)
        self._table = table.with_format("arrow")
        self._rows = self._table.select_columns(list(self.columns.values()))
        self._features = _undecoded(self._rows.features)
        self.keep(int(self._ends[-1]), empty="no rows")

    def file_hash(self) -> str:
        """SHA-256 of the file, in hexadecimal; of several, of their hashes in order."""
        hashes = []
        for name in _contents([file for file, _ in self._shards]):
            with open(name, "rb") as file:
                hashes.append(hashlib.file_digest(file, "sha256"))
        return hashes[0].hexdigest() if len(hashes) == 1 else hashlib.sha256(b"".join(one.digest() for one in hashes)).hexdigest()

    def values(self, column: str) -> list[Any] | None:
        """What the file's `column` holds, row by row, whether or not samples are made of it; None where there is no such column."""
        return self._table.select_columns(column)[:][column].to_pylist() if column in self._table.column_names else None

    def sample(self, record: int) -> Sample:
        shard = int(np.searchsorted(self._ends, record, side="right"))
        file, rows = self._shards[shard]
        where = f"{file}, row {record - int(self._ends[shard]) + rows}"
        values = self._features.decode_example(self._rows[record].to_pylist()[0])
        columns = {name: values[column] for name, column in self.columns.items()}
        sample = sample_of(columns, number=record, where=where, picture=self._pictures[_folder(file)], prepend=self.source.missing_placeholder == "prepend")
        check_pictures(sample)
        return sample


def _folder(file: str) -> str:
    return file if os.path.isdir(file) else os.path.dirname(file) or "."


def _opened(file: str) -> tuple[list[tuple[str, int]], Any]:
    """Files (or the one saved folder) with their numbers of rows, and all rows as a `datasets.Dataset`."""
    try:
        import datasets
        import pyarrow
        from datasets.exceptions import DatasetsError
        from pyarrow import parquet
    except ImportError as error:
        raise EnvironmentProblem("data sets of Hugging Face need the package datasets", cure="pip install 'vlm[data]'") from error
    if os.path.isfile(os.path.join(file, "dataset_dict.json")):
        splits = sorted(path.parent.name for path in Path(file).glob("*/state.json"))
        raise DataError(
            f"{file} holds several splits", got=", ".join(splits), expected="one split", cure=f"set `file` to one of them, as {os.path.join(file, max(splits, default='train'))}"
        )
    files = _found(file)
    try:
        if _saved(file):
            table: Any = datasets.load_from_disk(file)
            inside = os.path.join(os.path.realpath(file), "")
            if outside := [name for one in table.cache_files if not os.path.realpath(name := one["filename"]).startswith(inside)]:
                raise DataError(f"{file} names data outside of itself", got=outside[0], cure="write it again with save_to_disk")
            return [(file, len(table))], table
        if files[0].endswith(".arrow"):
            tables = [datasets.Dataset.from_file(_stream(name)) for name in files]
            return [(name, len(table)) for name, table in zip(files, tables, strict=True)], datasets.concatenate_datasets(tables)
        shards = [(name, rows) for name in files if (rows := parquet.read_metadata(name).num_rows)]  # the library stops at files without rows
        if not shards:
            raise DataError(f"{file} holds no samples", kind="empty", got="no rows")
        # Escaped: the library takes every path for a pattern.
        return shards, datasets.load_dataset("parquet", data_files=[glob.escape(os.path.abspath(name)) for name, _ in shards], split="train")
    except (OSError, ValueError, TypeError, KeyError, pyarrow.ArrowException, DatasetsError) as error:
        cause = error.__cause__ or error
        raise DataError(
            f"{file} cannot be read", kind="unreadable file", got=f"{type(cause).__name__}: {cause}", expected="whole Parquet or Arrow files with the same columns"
        ) from error


def _saved(file: str) -> bool:
    """Whether it is a folder that `save_to_disk` wrote."""
    return os.path.isfile(os.path.join(file, "state.json"))


def _found(file: str) -> list[str]:
    """Parquet or Arrow files below a folder, of a glob, or the one file or saved folder. Raises DataError for none, both kinds, and a folder with several splits: tests would be trained on."""
    if _saved(file):
        return [file]
    if os.path.isdir(file):
        files = sorted(str(path) for path in Path(file).rglob("*") if path.suffix in (".parquet", ".arrow"))
        splits = {match[1].lower(): name for name in reversed(files) if (match := SPLIT.search(os.path.relpath(name, file)))}
        if len(splits) > 1:
            one = splits.get("train", files[0])
            raise DataError(f"{file} holds files of several splits", got=", ".join(sorted(splits)), expected="one split", cure=f"set `file` to one of them, as {one}, or to a glob")
    else:
        files = [file] if os.path.isfile(file) else sorted(glob.glob(file, recursive=True))
    if not files:
        raise DataError(f"there is no data at {file}", expected="a .parquet or .arrow file, a folder or a glob of them", cure="set `file` (or data_root) to where it lies")
    kinds = {os.path.splitext(name)[1] for name in files}
    if len(kinds) > 1 or not kinds <= {".parquet", ".arrow"}:
        raise DataError(f"{file} is of another kind", got=", ".join(sorted(kinds)), expected=".parquet files, or .arrow files")
    return files


def _stream(file: str) -> str:
    """The file, where it is of the kind that `datasets` writes."""
    with open(file, "rb") as opened:
        if opened.read(len(ARROW_FILE)) == ARROW_FILE:
            raise DataError(f"{file} is of Arrow's file format", expected="the stream format, which `datasets` writes", cure="write it as Parquet")
    return file


def _contents(files: list[str]) -> list[str]:
    """The files, those inside for a saved folder."""
    return [str(inner) for file in files for inner in (sorted(Path(file).glob("*.*")) if os.path.isdir(file) else [file])]


def _columns(source: HfSource, there: list[str]) -> dict[str, str]:
    """Our names of what is read -> the file's. Raises DataError where no row could be of a form that `sample_of` knows."""
    for name, column in (source.columns or {}).items():
        if name not in KEYS:
            raise ConfigurationError(f"columns: {name!r} is not a name of ours", expected=f"one of {', '.join(KEYS)}")
        if column not in there:
            raise DataError(f"{source.file} has no column {column!r}", got=", ".join(there), cure=f"set columns.{name} to one of them")
    names = dict(source.columns or {name: name for name in (*KEYS, *REFUSED) if name in there})
    form = form_of(names)
    if form is None or (form == "caption" and not names.keys() & {"image", "images"}):
        expected = "`conversations`, `messages` or `texts`; or `question` and `answer`; or `image` and `caption`"
        cure = "say which is which: `columns: {image: ..., question: ..., answer: ...}` in the source, or --columns of `vlm data`"
        raise DataError(f"{source.file} has not the columns of any form that is read", got=f"the columns {', '.join(there)}", expected=expected, cure=cure)
    return names


def _undecoded(features: Any) -> Any:
    """The features with pictures left as they are stored: bytes are opened by `vlm.images` alone, and paths by us. Sound and video too: they are refused, without a decoder."""
    import datasets

    def plain(feature: Any) -> Any:
        if isinstance(feature, datasets.Image | datasets.Audio | datasets.Video):
            return replace(feature, decode=False)
        if isinstance(feature, dict):
            return {name: plain(inner) for name, inner in feature.items()}
        if isinstance(feature, datasets.List | datasets.LargeList):
            return replace(feature, feature=plain(feature.feature))
        return feature

    return datasets.Features({name: plain(feature) for name, feature in features.items()})
