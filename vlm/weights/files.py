"""Folders with weights of others: where they are, and their tensors one at a time."""

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm.errors import CheckpointError, listed

__all__ = ["find_folder", "read_file", "read_json", "read_shapes", "read_tensors"]

FORMS = (("model.safetensors", "model.safetensors.index.json"), ("pytorch_model.bin", "pytorch_model.bin.index.json"))
"""A checkpoint in one file, or the index of its shards; the first that is there is read. `adapter_model`, `consolidated` and training states beside it are no weights of a model."""

_SHARD = re.compile(r"(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)")
_AGAIN = "fetch the checkpoint again"


def find_folder(path: str) -> Path:
    """A local folder (or weights file), or the cached snapshot of a hub repository; never fetched. Raises CheckpointError."""
    folder = Path(path).expanduser()
    if folder.exists():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError) as problem:
        raise CheckpointError(f"no weights at {path!r}", got="neither a folder nor a cached hub snapshot", cure="download the repository first, and give its folder") from problem


def read_json(file: Path, cure: str = "fetch it again") -> dict[str, Any]:
    """The object in a file of a folder. cure: of one that is damaged. Raises CheckpointError."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as problem:
        raise CheckpointError(f"{file} cannot be read: {problem.strerror}", cure=cure) from problem
    except ValueError as problem:
        raise CheckpointError(f"{file} is damaged: {problem}", cure=cure) from problem
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} is damaged", got=type(found).__name__, expected="a JSON object", cure=cure)
    return found


# ---- a folder ------------------------------------------------------------------------------------------------------------


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint folder (or file) by name, one at a time: safetensors, single or sharded, else .bin through `weights_only`.

    The index decides which shard a tensor comes from; files that it does not name are left alone and named in a warning. Raises CheckpointError.
    """
    yield from _folder_tensors(folder, values=True)


def read_shapes(folder: Path) -> dict[str, Tensor]:
    """The same tensors on the meta device: shapes and dtypes without values. Raises CheckpointError."""
    return dict(_folder_tensors(folder, values=False))


def _folder_tensors(folder: Path, values: bool) -> Iterator[tuple[str, Tensor]]:
    if folder.is_file():
        yield from _file_tensors(folder, values)
        return
    for single, index in FORMS:
        if (folder / single).is_file():
            if values and (folder / index).is_file():
                warnings.warn(f"{folder} holds both {single}, which is read, and {index}, which is not", stacklevel=3)
            yield from _file_tensors(folder / single, values)
            return
        if (folder / index).is_file():
            yield from _sharded(folder, index, values)
            return
    shards = [file.name for file in _shards(folder)]
    raise CheckpointError(
        f"{folder} holds shards without {FORMS[0 if shards[0].endswith('.safetensors') else 1][1]}, which says what belongs to them" if shards else f"{folder} holds no weights",
        got=", ".join((shards or sorted(file.name for suffix in ("safetensors", "bin") for file in folder.glob(f"*.{suffix}")))[:3]) or None,
        expected="model.safetensors, its sharded form with an index file, or pytorch_model.bin",
        cure=_AGAIN if shards else "check the path",
    )


def _shards(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if _SHARD.fullmatch(file.name)) if folder.is_dir() else []


def _sharded(folder: Path, index: str, values: bool) -> Iterator[tuple[str, Tensor]]:
    weight_map = _weight_map(folder / index)
    named = sorted(set(weight_map.values()))
    for shard in named:
        if Path(shard).name != shard:
            raise CheckpointError(f"{index} in {folder} names a file outside of its folder", got=shard, expected="a file name", cure=_AGAIN)
        if not (folder / shard).is_file():
            raise CheckpointError(f"shard {shard} named by {index} is not in {folder}", cure=_AGAIN)
    stray = [file.name for file in _shards(folder) if file.suffix == Path(named[0]).suffix and file.name not in named]
    if stray and values:
        warnings.warn(f"{', '.join(stray)} in {folder}: {index} does not name it, so it is not read (a shard of another save?)", stacklevel=4)
    for shard in named:
        yield from _shard_tensors(folder / shard, weight_map, index, values)


def _weight_map(file: Path) -> dict[str, str]:
    found = read_json(file).get("weight_map")
    if found and isinstance(found, dict) and all(isinstance(shard, str) for shard in found.values()):
        return found
    raise CheckpointError(f"{file} has no weight_map of tensor names to file names", cure=_AGAIN)


def _shard_tensors(shard: Path, weight_map: dict[str, str], index: str, values: bool) -> Iterator[tuple[str, Tensor]]:
    """Tensors that the index places here, and those that it forgot."""
    wanted = {name for name, file in weight_map.items() if file == shard.name}
    forgotten: list[str] = []
    for name, tensor in _file_tensors(shard, values):
        if name in weight_map and name not in wanted:
            continue
        if name not in wanted:
            forgotten.append(name)
        wanted.discard(name)
        yield name, tensor
    if wanted:
        raise CheckpointError(f"shard {shard.name} of {shard.parent} lacks tensors that {index} places there", got=f"{len(wanted)} missing, such as {min(wanted)}", cure=_AGAIN)
    if forgotten and values:
        warnings.warn(f"{index} of {shard.parent} does not name {listed(forgotten)} of {shard.name}; read all the same", stacklevel=5)


# ---- a file --------------------------------------------------------------------------------------------------------------


def read_file(path: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of one file (.safetensors, else a torch file through `weights_only`). Raises CheckpointError."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise CheckpointError(f"there is no file {path}", expected="a .safetensors or .bin file with tensors", cure="check the path")
    yield from _file_tensors(file, values=True)


def _file_tensors(file: Path, values: bool) -> Iterator[tuple[str, Tensor]]:
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  a safe_open is no mapping
                    yield name, opened.get_tensor(name) if values else _shape(opened, name)
        except SafetensorError as problem:
            raise CheckpointError(f"{file} is damaged, truncated or incomplete: {problem}", cure="fetch the file again") from problem
        return
    try:
        # Mapped where the form allows it, so that a file of any size is never whole in memory.
        found = torch.load(file, map_location="cpu" if values else "meta", weights_only=True, mmap=values and zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile) as problem:
        raise CheckpointError(
            f"{file} is damaged, truncated or incomplete, or holds more than tensors: {problem}",
            cure="fetch the file again, or a safetensors form of it; code in checkpoints is never run",
        ) from problem
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise CheckpointError(f"{file} holds something else than tensors by name", got=type(found).__name__, cure="give the file of a state dict")
    yield from found.items()


def _shape(opened: object, name: str) -> Tensor:
    part = opened.get_slice(name)  # type: ignore[attr-defined]
    shape = part.get_shape()
    dtype = part[:0].dtype if shape else opened.get_tensor(name).dtype  # type: ignore[attr-defined]
    return torch.empty(shape, dtype=dtype, device="meta")
