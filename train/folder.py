"""A run's folder: what lies in it before the first step and after the last, and whether it may be gone on with."""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from vlm.composition import resolved
from vlm.connectors.base import ConnectorSpec
from vlm.errors import CheckpointError, ConfigurationError, DataError
from vlm.processor import load_tokenizer
from vlm.train.config import RunSpec
from vlm.weights.files import read_json
from vlm.whole import write_whole

__all__ = ["absolute", "check_same", "fingerprint", "open_folder", "steps_of", "write_export"]


def absolute(run: RunSpec) -> RunSpec:
    """The run with the local paths that it names made absolute, so that its folder can be read from any directory. Hub names stay."""

    def of(spec: Any, *names: str, only_folders: bool = False) -> Any:
        paths = {name: value for name in names if isinstance(value := getattr(spec, name, None), str) and "://" not in value and (not only_folders or Path(value).is_dir())}
        return replace(spec, **{name: os.path.abspath(value) for name, value in paths.items()}) if paths else spec

    def connector(spec: ConnectorSpec) -> ConnectorSpec:
        return replace(of(spec, "path"), then=None if spec.then is None else connector(spec.then))

    def folders(spec: Any, *names: str) -> Any:
        return of(spec, *names, only_folders=True)

    adapt = {name: folders(spec, "path") for name, spec in run.model.adapt.items()}
    encoder = run.model.encoder.with_towers(lambda tower: folders(tower, "path"))
    model = replace(run.model, encoder=encoder, connector=connector(run.model.connector), llm=folders(run.model.llm, "path", "tokenizer"), adapt=adapt)
    return replace(of(run, "data_root", "runs", "start"), model=model, data={name: spec.absolute() for name, spec in run.data.items()})


def fingerprint(run: RunSpec) -> str:
    """Hash of what a resumed run must share with the one that was interrupted: model, stages, data, seed and precision."""
    return _tree_hash({key: value for key, value in resolved(run).items() if key in ("model", "start", "stages", "data", "seed", "precision")})


def open_folder(run: RunSpec, folder: Path, resume: bool) -> None:
    """Make the folder of a new run, or see that the run that lies there is this one. Called on rank 0.

    Raises ConfigurationError for an existing run without resume, CheckpointError for another run, DataError for data that changed.
    """
    if not (folder / "config.yaml").is_file() or (not resume and not _begun(folder)):
        (folder / "resume").mkdir(parents=True, exist_ok=True)
        (folder / "warnings.jsonl").unlink(missing_ok=True)
        write_whole(folder / "environment.json", json.dumps(_environment(), indent=1))
        write_whole(folder / "manifest.json", json.dumps(_manifest(run), indent=1))
        write_whole(folder / "config.yaml", yaml.safe_dump(resolved(run), sort_keys=False, allow_unicode=True))
        return
    if not resume:
        raise ConfigurationError(f"the run folder {folder} exists already", cure="add --resume to go on, or give the run another name (name=NAME)")
    check_same(run, folder)


def check_same(run: RunSpec, folder: Path) -> None:
    """See that a folder is of this run, and that its data are what they were. Raises CheckpointError for another run, DataError for data that changed."""
    written, now = read_json(folder / "manifest.json", "restore it, or start a new run under another name"), _manifest(run)
    if written.keys() != now.keys():
        raise CheckpointError(
            f"{folder} was begun by another version of vlm", cure="finish it with that version (environment.json names it), or start a new run under another name"
        )
    if written["fingerprint"] != now["fingerprint"]:
        raise CheckpointError(
            f"{folder} was written by a run with another model or other stages, data, seed or precision",
            got=f"fingerprint {now['fingerprint'][:12]}",
            expected=written["fingerprint"][:12],
            cure=f"resume with {folder / 'config.yaml'}, or start a new run under another name",
        )
    if written["tokenizer"] != now["tokenizer"]:
        raise CheckpointError(
            f"the tokenizer of {folder} changed since the run began, so words would have other ids",
            cure="bring back the folder that llm.tokenizer or llm.path names, or start a new run",
        )
    changed = [name for name, source in written["sources"].items() if source["sha256"] != now["sources"][name]["sha256"]]
    if changed:
        raise DataError(
            f"data of {folder} changed since the run began, so its order of samples would be another", got=", ".join(changed), cure="bring the old file back, or start a new run"
        )


def _begun(folder: Path) -> bool:
    """Whether a step of the run was ever made. One that failed before, for want of a tokenizer say, leaves its name free."""
    metrics = folder / "metrics.jsonl"
    return any((folder / "stages").glob("*")) or any((folder / "resume").glob("step-*")) or (metrics.is_file() and metrics.stat().st_size > 0)


def _manifest(run: RunSpec) -> dict[str, Any]:
    """Which data in which order: files, hashes, sizes, the seed of the order; and whose run it is."""
    used = dict.fromkeys(source for stage in run.stages.values() for source in stage.sources)
    readers = {name: run.data[name].open() for name in used}
    sources = {name: {"file": run.data[name].file, "sha256": reader.file_hash(), "samples": len(reader)} for name, reader in readers.items()}
    words = load_tokenizer(run.model)
    return {"fingerprint": fingerprint(run), "seed": run.seed, "tokenizer": _tree_hash([words.get_vocab(), words.special_tokens_map]), "sources": sources}


def _tree_hash(plain: Any) -> str:
    """SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()


def _environment() -> dict[str, Any]:
    versions: dict[str, str] = {}
    for package in ("vlm", "torch", "transformers", "tokenizers", "peft", "deepspeed", "safetensors", "omegaconf", "numpy", "pillow", "datasets", "webdataset"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "commit": _commit(),
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "ranks": int(os.environ.get("WORLD_SIZE", "1")),
        "command": sys.argv,
    }


def _commit() -> str | None:
    """The commit of the checkout that this code lies in; None for an installed package or where there is no git."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def steps_of(folder: Path, stage: str) -> int:
    """Steps of a finished stage."""
    return int(read_json(folder / "stages" / stage / "stage.json", f"remove stages/{stage}; --resume then trains it again")["steps"])


def write_export(folder: Path, last: str) -> None:
    """export/ is the last stage's folder under its public name; hard links where the disk has them."""
    final, partial = folder / "export", folder / ".partial-export"
    if final.exists():
        return
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(folder / "stages" / last, partial, copy_function=os.link)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(folder / "stages" / last, partial)
    os.replace(partial, final)
