"""Folders with weights of others: where they are, and their tensors one at a time."""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from vlm.errors import CheckpointError

__all__ = ["find_folder", "read_tensors"]


def find_folder(path: str) -> Path:
    """A local folder, or the cached snapshot of a hub repository; never fetched. Raises CheckpointError."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError) as problem:
        raise CheckpointError(
            f"no weights at {path!r}", got="neither a folder nor a cached hub snapshot", cure="download the repository first, and give its folder as path, or set weights: random"
        ) from problem


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint folder by name, one at a time: safetensors, single or sharded, else .bin through `weights_only`. Raises CheckpointError."""
    for index, single in (("model.safetensors.index.json", "model.safetensors"), ("pytorch_model.bin.index.json", "pytorch_model.bin")):
        if (folder / single).is_file():
            yield from _file_tensors(folder / single)
            return
        if (folder / index).is_file():
            yield from _sharded(folder, index)
            return
    raise CheckpointError(f"{folder} holds no weights", expected="model.safetensors, its sharded form with an index file, or pytorch_model.bin", cure="check the path")


def _sharded(folder: Path, index: str) -> Iterator[tuple[str, Tensor]]:
    weight_map: dict[str, str] = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"]
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise CheckpointError(f"{index} in {folder} names a file outside of its folder", got=shard, expected="a file name", cure="fetch the checkpoint again")
        if not (folder / shard).is_file():
            raise CheckpointError(f"shard {shard} named by {index} is not in {folder}", cure="fetch the checkpoint again")
        wanted = {name for name, file in weight_map.items() if file == shard}
        for name, tensor in _file_tensors(folder / shard):
            if name in wanted:
                wanted.discard(name)
                yield name, tensor
        if wanted:
            raise CheckpointError(
                f"shard {shard} of {folder} lacks tensors that {index} places there", got=f"{len(wanted)} missing, such as {min(wanted)}", cure="fetch the checkpoint again"
            )


def _file_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  a safe_open is no mapping
                    yield name, opened.get_tensor(name)
        except SafetensorError as problem:
            raise CheckpointError(f"{file} is damaged: {problem}", cure="fetch the file again") from problem
        return
    try:
        yield from torch.load(file, map_location="cpu", weights_only=True).items()
    except (pickle.UnpicklingError, RuntimeError, EOFError) as problem:
        raise CheckpointError(
            f"{file} is damaged, or holds more than tensors: {problem}", cure="fetch the file again, or a safetensors form of it; code in checkpoints is never run"
        ) from problem
