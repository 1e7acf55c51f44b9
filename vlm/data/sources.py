"""What data lie at a path, and which reader takes them: by extension and by what a folder holds, never by what a file is called."""

import dataclasses
import glob
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from vlm.data import readers
from vlm.errors import ConfigurationError, DataError

__all__ = ["columns_of", "sources_at"]

SUFFIXES = {".json": "llava", ".jsonl": "llava", ".parquet": "hf", ".arrow": "hf", ".tar": "tar"}
"""Extension -> the reader that takes it in every form."""
ALIKE = {"messages": "llava", "sharegpt": "llava"}
"""Readers of the same files."""
NUMBER = re.compile(r"[-_]\d{4,}(-of-\d{4,})?$")
"""What tells the parts of one split: train-00000-of-00002.parquet, train-000000.tar."""
PATTERN = re.compile(r"[*?\[{]")


def sources_at(path: str | Path, *, reader: str | None = None, images: str | Path | None = None, columns: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Split -> the data source (not opened) of what lies at `path`.

    path: a file (its split is what it is called), a glob of the parts of one split; a folder with one file, or several numbered parts, per split; a folder that `save_to_disk` wrote.
    reader: default: told by the extension. images: the folder that paths of pictures start from. columns: our names for the file's, of the reader hf.

    Raises DataError where nothing lies; ConfigurationError where the reader is not clear, or takes no `images` or `columns`.
    """
    path = str(path)
    if Path(path).is_dir():
        found = _in_folder(Path(path), reader)
    elif Path(path).is_file() or PATTERN.search(path):
        found = {_split(PATTERN.split(path)[0] if PATTERN.search(path) else path): path}
    else:
        raise DataError(f"there is nothing at {path}", expected="a data file, a folder or a glob of them")
    return {split: _source(file, reader, images, columns) for split, file in found.items()}


def columns_of(text: str | None) -> dict[str, str] | None:
    """What `--columns` says: YAML, our names for the file's. Raises ConfigurationError for anything but names."""
    if text is None:
        return None
    expected = "our names for the file's, as {image: picture, question: prompt, answer: response}"
    try:
        columns = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigurationError("--columns is not YAML", got=text, expected=expected) from error
    if not isinstance(columns, dict) or not columns or not all(isinstance(name, str) for both in columns.items() for name in both):
        raise ConfigurationError("--columns does not name columns", got=text, expected=expected, cure="mind the space behind each colon")
    return columns


def _source(file: str, reader: str | None, images: str | Path | None, columns: Mapping[str, str] | None) -> Any:
    spec = readers.get(reader or _reader(file))
    settings = {"file": file} | ({} if images is None else {"images": str(images)}) | ({} if columns is None else {"columns": columns})
    if unknown := set(settings) - {field.name for field in dataclasses.fields(spec)}:
        raise ConfigurationError(
            f"the reader {spec.use} takes no {', '.join(sorted(unknown))}", cure="leave it away" if unknown <= {"images", "columns"} else "choose another --reader"
        )
    return spec(**settings)


def _reader(file: str) -> str:
    name = SUFFIXES.get(Path(file).suffix.lower(), "hf" if Path(file).is_dir() else None)
    if name is None:
        raise ConfigurationError(f"nothing tells which reader takes {file}", expected=f"a name in {', '.join(SUFFIXES)}", cure=f"name it: --reader {' | '.join(readers.names())}")
    return name


def _split(file: str) -> str:
    return NUMBER.sub("", Path(file).name.removesuffix(Path(file).suffix)).rstrip("-_.") or "data"


def _in_folder(folder: Path, reader: str | None) -> dict[str, str]:
    if (folder / "dataset_dict.json").is_file():
        return {state.parent.name: str(state.parent) for state in sorted(folder.glob("*/state.json"))}
    if (folder / "state.json").is_file():
        return {folder.name: str(folder)}
    wanted = ALIKE.get(reader or "", reader)
    if wanted is not None and wanted not in SUFFIXES.values():
        return {folder.name: str(folder)}
    files = [file for file in sorted(folder.iterdir()) if file.suffix.lower() in SUFFIXES and (wanted or SUFFIXES[file.suffix.lower()]) == SUFFIXES[file.suffix.lower()]]
    if not files:
        raise DataError(f"{folder} holds no data", expected=f"train.parquet, val.parquet and the like in it: {', '.join(SUFFIXES)}", cure="name the files themselves")
    if len(several := sorted({file.suffix for file in files})) > 1:
        raise ConfigurationError(f"{folder} holds files of several kinds", got=", ".join(several), cure="name the reader with --reader, or the files themselves")
    parts: dict[str, list[Path]] = {}
    for file in files:
        parts.setdefault(_split(file.name), []).append(file)
    return {split: str(part[0]) if len(part) == 1 else _pattern(part[0]) for split, part in parts.items()}


def _pattern(part: Path) -> str:
    """A glob of all parts, from the first one's name."""
    number = NUMBER.search(part.stem)
    if number is None:
        raise DataError(f"{part.parent} holds several files of the split {part.stem}", got=part.name, cure="name one of them")
    return f"{glob.escape(str(part.parent))}/{glob.escape(part.stem[: number.start()])}{re.sub('[0-9]', '?', number[0])}{part.suffix}"
