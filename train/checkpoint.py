"""resume/: everything a run needs to go on bit for bit. Written beside and renamed, verified by hashes before it is read, the newest few kept."""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vlm.errors import CheckpointError
from vlm.train.engine import Engine

__all__ = ["Position", "latest", "read_position", "restore", "save", "tree_hash"]

ENGINE = "engine"


@dataclass(frozen=True)
class Position:
    """Where a run stands: `step` steps of stage number `stage` are done. total: steps of all stages so far, names the folder. fingerprint: of the resolved model and stages."""

    stage: int
    step: int
    total: int
    ranks: int
    zero: int
    fingerprint: str


def save(folder: Path, engine: Engine, position: Position, keep: int) -> Path:
    """Write resume/step-N; called on all ranks."""
    final = folder / f"step-{position.total}"
    partial = folder / f".partial-step-{position.total}"
    rank = dist.get_rank()
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    engine.save(str(partial), ENGINE)
    torch.save(_random_states(), partial / f"random-{rank}.pt")
    dist.barrier()
    if rank == 0:
        hashes = {str(file.relative_to(partial)): file_hash(file) for file in sorted(partial.rglob("*")) if file.is_file()}
        (partial / "position.json").write_text(json.dumps(asdict(position) | {"files": hashes}, indent=1), encoding="utf-8")
        _flush(partial)
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        _flush(folder)
        for old in sorted(_steps(folder))[:-keep]:
            shutil.rmtree(folder / f"step-{old}")
    dist.barrier()
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


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint."""
    steps = _steps(folder)
    return folder / f"step-{max(steps)}" if steps else None


def read_position(folder: Path, fingerprint: str) -> Position:
    """Where a checkpoint stands; raises CheckpointError where it belongs to another model or was changed."""
    data: dict[str, Any] = json.loads((folder / "position.json").read_text(encoding="utf-8"))
    files = data.pop("files")
    position = Position(**data)
    if position.fingerprint != fingerprint:
        raise CheckpointError(
            f"{folder} was written by a run with another model or other stages",
            got=f"fingerprint {fingerprint[:12]}",
            expected=position.fingerprint[:12],
            cure="resume with the run's own config.yaml, or start a new run under another name",
        )
    for name, expected in files.items():
        if not (folder / name).is_file() or file_hash(folder / name) != expected:
            raise CheckpointError(f"{folder / name} is not what was saved", cure=f"remove {folder.name}; the run then resumes from the checkpoint before it")
    return position


def restore(folder: Path, engine: Engine, position: Position, zero: int) -> None:
    """Weights, optimizer and random states; called on all ranks. The folder's hashes have been verified."""
    ranks = dist.get_world_size()
    if (ranks, zero) != (position.ranks, position.zero):
        raise CheckpointError(
            f"{folder} cannot be resumed in this form",
            got=f"{ranks} ranks at ZeRO {zero}",
            expected=f"{position.ranks} ranks at ZeRO {position.zero}",
            cure="start it as it was started before",
        )
    engine.load(str(folder), ENGINE)
    states = torch.load(folder / f"random-{dist.get_rank()}.pt", weights_only=True)
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def _random_states() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def file_hash(file: Path) -> str:
    """SHA-256, in hexadecimal."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def tree_hash(plain: Any) -> str:
    """SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()
