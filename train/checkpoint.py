"""resume/: everything a run needs to go on bit for bit, but for frozen weights, which come from where they came from. Written beside and renamed, verified by hashes before it is read, the newest few kept."""

import hashlib
import json
import math
import os
import shutil
from argparse import Namespace
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from vlm.errors import CheckpointError
from vlm.train.engine import Engine, together
from vlm.train.space import check_room, writing
from vlm.weights.files import read_json

__all__ = ["Position", "check_ranks", "file_hash", "frozen_hash", "latest", "read_position", "restore", "save", "universal"]

ENGINE = "engine"


@dataclass(frozen=True)
class Position:
    """Where a run stands: `step` steps of stage number `stage` are done. total: steps of all stages so far, names the folder. fingerprint: of the resolved model and stages. frozen: `frozen_hash` of each rank."""

    stage: int
    step: int
    total: int
    ranks: int
    zero: int
    fingerprint: str
    frozen: tuple[str, ...]


def save(folder: Path, engine: Engine, position: Position, keep: int, needed: int) -> Path:
    """Write resume/step-N; called on all ranks. needed: bytes that it takes, by reckoning.

    Raises EnvironmentProblem on all ranks where the disk has no room; the checkpoints before stay.
    """
    final = folder / f"step-{position.total}"
    partial = folder / f".partial-step-{position.total}"
    rank = dist.get_rank()

    def begin() -> None:
        for left in folder.glob(".partial-*"):
            shutil.rmtree(left)
        check_room(folder, needed, "a checkpoint")
        partial.mkdir(parents=True)

    def write() -> None:
        with writing("a checkpoint"):
            engine.save(str(partial), ENGINE)
            torch.save(_random_states(), partial / f"random-{rank}.pt")

    def finish() -> None:
        with writing("a checkpoint"):
            hashes = {str(file.relative_to(partial)): file_hash(file) for file in sorted(partial.rglob("*")) if file.is_file()}
            (partial / "position.json").write_text(json.dumps(asdict(position) | {"files": hashes}, indent=1), encoding="utf-8")
            _flush(partial)
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        _flush(folder)
        for old in sorted(_steps(folder))[:-keep]:
            shutil.rmtree(folder / f"step-{old}")

    try:
        together(begin, rank == 0)
        together(write)
        together(finish, rank == 0)
    except Exception:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def _flush(folder: Path) -> None:
    """What was written reaches the disk before the rename makes it count."""
    for file in [*(file for file in folder.rglob("*") if file.is_file()), folder]:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _steps(folder: Path) -> list[int]:
    return [int(entry.name.removeprefix("step-")) for entry in folder.glob("step-*") if (entry / "position.json").is_file()]


def latest(folder: Path, at_most: float = math.inf) -> Path | None:
    """The newest whole checkpoint, of step `at_most` or an earlier one."""
    steps = [step for step in _steps(folder) if step <= at_most]
    return folder / f"step-{max(steps)}" if steps else None


def read_position(folder: Path, fingerprint: str) -> Position:
    """Where a checkpoint stands; raises CheckpointError where it belongs to another model or was changed."""
    cure = f"remove {folder.name}; the run then resumes from the checkpoint before it"
    data = read_json(folder / "position.json", cure)
    try:
        files, frozen = data.pop("files"), tuple(data.pop("frozen"))
        position = Position(**data, frozen=frozen)
    except (KeyError, TypeError) as problem:
        raise CheckpointError(f"{folder / 'position.json'} is damaged: {problem!r}", cure=cure) from problem
    if position.fingerprint != fingerprint:
        raise CheckpointError(
            f"{folder} was written by a run with another model or other stages",
            got=f"fingerprint {fingerprint[:12]}",
            expected=position.fingerprint[:12],
            cure="resume with the run's own config.yaml, or start a new run under another name",
        )
    for name, expected in files.items():
        if not (folder / name).is_file() or file_hash(folder / name) != expected:
            raise CheckpointError(f"{folder / name} is not what was saved", cure=cure)
    return position


def check_ranks(folder: Path, position: Position, ranks: int) -> None:
    """Raise CheckpointError where a checkpoint cannot be resumed by so many ranks."""
    if ranks == position.ranks or position.zero < 3:
        return
    raise CheckpointError(
        f"{folder} cannot be resumed in this form: at ZeRO 3 the optimizer cannot be dealt out to another number of ranks",
        got=f"{ranks} {'rank' if ranks == 1 else 'ranks'}",
        expected=f"{position.ranks} {'rank' if position.ranks == 1 else 'ranks'}",
        cure=f"start it as it was started before (one machine: --nproc {position.ranks}), or begin a new run from the last finished stage (start: RUN/stages/NAME)",
    )


def universal(folder: Path, scratch: Path) -> Path:
    """A checkpoint of ZeRO 1 or 2 in the form that any number of ranks loads, written to `scratch`; called on all ranks. The folder's hashes have been verified."""

    def convert() -> None:
        from deepspeed.checkpoint.ds_to_universal import main

        shutil.rmtree(scratch, ignore_errors=True)
        options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True, "inject_missing_state": False}
        with writing("the checkpoint for another number of ranks"), redirect_stdout(StringIO()):
            main(Namespace(input_folder=str(folder / ENGINE), output_folder=str(scratch / ENGINE), **options))

    together(convert, dist.get_rank() == 0)
    return scratch


def restore(folder: Path, engine: Engine, position: Position, converted: Path | None = None) -> None:
    """Weights, optimizer and random states; called on all ranks. The folder's hashes have been verified. converted: the same in `universal` form, for another number of ranks, whose random states are new.

    Raises CheckpointError where the frozen weights are not those that the run had.
    """
    held = position.frozen[dist.get_rank() if position.zero == 3 else 0]
    if not all(engine.gather(frozen_hash(engine.model) == held)):
        raise CheckpointError(
            f"the frozen weights are not those with which {folder} was written", cure="restore the folders that model.encoder.path, model.llm.path and start name, as they were"
        )
    engine.load(str(converted or folder), ENGINE)
    if position.ranks != engine.ranks:
        return
    states = torch.load(folder / f"random-{dist.get_rank()}.pt", weights_only=True)
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def frozen_hash(model: nn.Module) -> str:
    """SHA-256 of the frozen parameters as this rank holds them (at ZeRO 3 its share of them): names, types, bytes."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            held = getattr(parameter, "ds_tensor", parameter).detach().cpu().contiguous()
            digest.update(f"{name} {held.dtype} {tuple(held.shape)}".encode())
            digest.update(held.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _random_states() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def file_hash(file: Path) -> str:
    """SHA-256, in hexadecimal."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
