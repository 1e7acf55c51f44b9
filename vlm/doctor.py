"""`vlm doctor`: what this machine and its packages are, and what of it is known to keep a run from working."""

import contextlib
import importlib
import importlib.util
import logging
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["KNOWN_BAD", "Device", "Diagnosis", "Facts", "Finding", "KnownBad", "Package", "examine", "judge"]

Level = Literal["problem", "warning", "note"]
"""A problem keeps a run from working; a warning may, or makes it worse; a note says what one gets."""

GIB = 2**30
PROBES = {
    "torch": "torch:Tensor",
    "transformers": "transformers:LlavaForConditionalGeneration",  # transformers' own import is lazy and tells nothing
    "tokenizers": "tokenizers:Tokenizer",
    "safetensors": "safetensors.torch:load_file",
    "peft": "peft:LoraConfig",
    "deepspeed": "deepspeed:initialize",
    "omegaconf": "omegaconf:OmegaConf",
    "pillow": "PIL.Image:open",
    "matplotlib": "matplotlib.figure:Figure",
    "datasets": "datasets:load_dataset",
    "pyarrow": "pyarrow.parquet:ParquetFile",
    "webdataset": "webdataset:WebDataset",
    "open-clip-torch": "open_clip:create_model",
    "timm": "timm:create_model",
    "tensorboard": "torch.utils.tensorboard:SummaryWriter",
    "torchvision": "torchvision:transforms",
    "flash-attn": "flash_attn:flash_attn_func",
}
"""Package -> module:name that is imported to see whether it works."""
BESIDE = ("torchvision", "accelerate", "huggingface-hub", "numpy", "ninja", "tensorboard", "flash-attn")
"""Packages that are shown although pyproject.toml need not name them."""
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets, all of it."""


@dataclass(frozen=True)
class Package:
    """installed: its version, None where it is not there. tested: the range of pyproject.toml, empty for any. extra: the one that brings it, None for a core package. fault: why it cannot be
    imported."""

    installed: str | None
    tested: str = ""
    extra: str | None = None
    fault: str | None = None
    core: bool = False

    @property
    def within(self) -> bool:
        return self.installed is None or SpecifierSet(self.tested).contains(self.installed, prereleases=True)


@dataclass(frozen=True)
class Device:
    """memory: GiB. bf16: in hardware."""

    name: str
    memory: float
    bf16: bool


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What was found. Sizes in GiB.

    cuda: the version that torch was built for, None for a CPU build. backends: of torch.distributed. torchvision_compiled: whether its compiled half loads, None where it is not installed;
    torchvision_wants: the versions of torch that it asks for. threads: OMP_NUM_THREADS. shared: free in /dev/shm. disk: free where the runs go, None where nothing can be written.
    op_can_be_left_out: whether DeepSpeed has the switch by which train/engine.py keeps it from compiling on CPU. launched: of LAUNCHED, what is set.
    """

    packages: Mapping[str, Package]
    python: str = field(default_factory=platform.python_version)
    system: str = field(default_factory=platform.platform)
    devices: tuple[Device, ...] = ()
    cuda: str | None = None
    nccl: str | None = None
    backends: tuple[str, ...] = ("gloo",)
    attention: tuple[str, ...] = ("sdpa", "eager")
    torchvision_compiled: bool | None = None
    torchvision_wants: str = ""
    cores: int = 1
    threads: int | None = None
    memory: float = 0.0
    shared: float | None = None
    runs: str = "runs"
    disk: float | None = 0.0
    compiler: bool = True
    ninja: bool = True
    op_can_be_left_out: bool = True
    launched: tuple[str, ...] = ()

    @property
    def torchvision_fits(self) -> bool:
        installed = self.packages["torch"].installed if "torch" in self.packages else None
        return installed is None or SpecifierSet(self.torchvision_wants).contains(Version(installed).public, prereleases=True)

    def at_least(self, package: str, number: str) -> bool:
        """False where the package is not installed."""
        installed = self.packages[package].installed if package in self.packages else None
        return installed is not None and Version(installed) >= Version(number)

    def below(self, package: str, number: str) -> bool:
        """False where the package is not installed."""
        return package in self.packages and self.packages[package].installed is not None and not self.at_least(package, number)


@dataclass(frozen=True)
class Finding:
    level: Level
    what: str
    reason: str
    cure: str


@dataclass(frozen=True)
class KnownBad:
    """Things that do not go together. holds: whether they are what was found."""

    level: Level
    what: str
    holds: Callable[[Facts], bool]
    reason: str
    cure: str


KNOWN_BAD = (
    KnownBad(
        "problem", "transformers below 5", lambda f: f.below("transformers", "5"),
        "decoder layers, image processors and the names of stored tensors are those of transformers 5", 'pip install "transformers>=5.23,<5.24"',
    ),
    KnownBad(
        "warning", "torchvision made for another torch", lambda f: not f.torchvision_fits,
        "its compiled half belongs to one version of torch, and a torchvision that cannot be imported takes transformers, peft, timm and open_clip with it",
        "install the pair in one command, with the versions of constraints.txt, or take torchvision off: vlm does without it",
    ),
    KnownBad(
        "note", "torchvision's compiled half does not load", lambda f: f.torchvision_compiled is False,
        "as with the public wheel of torchvision beside a CPU build of torch; vlm/compat.py makes its Python half importable, and pictures are read with Pillow",
        "nothing to do; torchvision.io and torchvision.ops.nms stay without function",
    ),
    KnownBad(
        "warning", "a CUDA build of torch without a device", lambda f: f.cuda is not None and not f.devices,
        "runs go to the CPU", "look at nvidia-smi, the driver's version and CUDA_VISIBLE_DEVICES; nothing to do where there is no GPU",
    ),
    KnownBad(
        "problem", "GPUs without NCCL", lambda f: bool(f.devices) and "nccl" not in f.backends,
        "every run on a GPU joins an NCCL group", "install a torch with NCCL, or hide the GPUs: CUDA_VISIBLE_DEVICES=",
    ),
    KnownBad("problem", "no GPU and no gloo", lambda f: not f.devices and "gloo" not in f.backends, "every run on a CPU joins a gloo group", "install a torch with gloo"),
    KnownBad(
        "note", "bf16 at ZeRO 0", lambda f: any(device.bf16 for device in f.devices),
        "DeepSpeed rounds differently there, so it is refused, and `precision: auto` at ZeRO 0 is fp32", "write deepspeed: zero1 to zero3 for bf16",
    ),
    KnownBad(
        "warning", "a GPU without bf16", lambda f: any(not device.bf16 for device in f.devices),
        "`precision: auto` is bf16 on GPUs at ZeRO 1 to 3, which this one only emulates", "write precision: fp32",
    ),
    KnownBad(
        "note", "GPUs without flash attention", lambda f: bool(f.devices) and "flash_attention_2" not in f.attention,
        "attention is torch's own (sdpa)", "install flash-attn for this torch if packed rows are what takes the time",
    ),
    KnownBad(
        "problem", "DeepSpeed that compiles on CPU", lambda f: not f.devices and not f.op_can_be_left_out and not (f.compiler and f.ninja),
        "this version has no switch for its all-reduce on CPU, and there is no compiler or no ninja on PATH", 'pip install "deepspeed>=0.19.8,<0.20", or install g++ and ninja',
    ),
    KnownBad(
        "note", "no g++ or no ninja on PATH", lambda f: not (f.compiler and f.ninja),
        "DeepSpeed compiles some of its own parts when they are asked for (an optimizer in its configuration, offloading); vlm's configurations ask for none",
        "activate the virtual environment, whose bin holds ninja, and install g++",
    ),
    KnownBad(
        "warning", "more threads than cores", lambda f: f.threads is not None and f.threads > f.cores,
        "OpenMP threads that wait for a core slow everything", "lower OMP_NUM_THREADS",
    ),
    KnownBad(
        "problem", "half of a launcher's environment", lambda f: "RANK" in f.launched and set(f.launched) != set(LAUNCHED),
        "with RANK set a run waits for other processes, and cannot find them", f"unset RANK, or start through `vlm train --nproc N`, which sets {', '.join(LAUNCHED)}",
    ),
    KnownBad("problem", "a folder of runs that cannot be written", lambda f: f.disk is None, "a run writes its folder there", "change its rights, or set runs=FOLDER"),
    KnownBad(
        "warning", "little disk space", lambda f: f.disk is not None and f.disk < 5,
        "a checkpoint holds weights and twice as much for the optimizer, and `save.keep` of them stay", "make room, set runs=FOLDER on another disk, or save.keep=1",
    ),
    KnownBad(
        "warning", "little shared memory", lambda f: f.shared is not None and f.shared < 0.25,
        "data workers hand batches over through /dev/shm, and die of a bus error where it is full", "give the container more (--shm-size), or set workers=0",
    ),
    KnownBad("warning", "no Linux", lambda f: not f.system.startswith("Linux"), "nothing else was tried", "use Linux, or a container"),
)  # fmt: skip
"""What is known not to go together, beside versions outside of the tested ranges. Each entry has a case in tests/unit/test_doctor.py."""


@dataclass(frozen=True)
class Diagnosis:
    """What `vlm doctor` says. ok: nothing that was found keeps a run from working."""

    facts: Facts
    findings: list[Finding]

    @property
    def ok(self) -> bool:
        return not any(finding.level == "problem" for finding in self.findings)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {"ok": self.ok, **asdict(self.facts), "findings": [asdict(finding) for finding in self.findings]}

    def print(self, console: Console | None = None) -> None:
        console = console or Console()
        table = Table(title=f"Python {self.facts.python}, {self.facts.system}", title_justify="left")
        for column in ("package", "installed", "tested with", ""):
            table.add_column(column)
        for name, package in self.facts.packages.items():
            table.add_row(name, package.installed or "-", package.tested, _state(package))
        console.print(table)
        for line in _machine(self.facts):
            console.print(Text(line), soft_wrap=True)
        styles = {"problem": "bold red", "warning": "yellow", "note": "cyan"}
        for finding in self.findings:
            text = f"{finding.what}. {finding.reason}. {finding.cure}"
            console.print(Text(f"{finding.level}: ", style=styles[finding.level]).append(text, style="default"), soft_wrap=True)
        count = sum(finding.level == "problem" for finding in self.findings)
        console.print(Text(f"{count or 'no'} {'problem' if count == 1 else 'problems'}", style="bold red" if count else "bold green"))


def _state(package: Package) -> str:
    if package.installed is None:
        return "missing" if package.core else f"not installed, extra {package.extra}" if package.extra else "not installed"
    return "cannot be imported" if package.fault else "" if package.within else "not tested"


def _machine(facts: Facts) -> Iterator[str]:
    for number, device in enumerate(facts.devices):
        yield f"GPU {number}: {device.name}, {device.memory:.1f} GiB, {'bf16' if device.bf16 else 'no bf16'}"
    yield f"torch: {f'CUDA {facts.cuda}' if facts.cuda else 'CPU build'}, {len(facts.devices)} GPUs, {', '.join(facts.backends)}{f' (NCCL {facts.nccl})' if facts.nccl else ''}"
    yield f"attention: {', '.join(facts.attention)}"
    threads = "not set" if facts.threads is None else str(facts.threads)
    shared = "" if facts.shared is None else f", {facts.shared:.1f} GiB of shared memory free"
    yield f"CPU: {facts.cores} cores, OMP_NUM_THREADS {threads}, {facts.memory:.1f} GiB of memory free{shared}"
    yield f"disk: {facts.runs}: " + ("cannot be written" if facts.disk is None else f"{facts.disk:.1f} GiB free")
    yield f"DeepSpeed's compiler: g++ {'found' if facts.compiler else 'not found'}, ninja {'found' if facts.ninja else 'not on PATH'}"


def examine(runs: str | Path = "runs") -> Diagnosis:
    """Look at packages, devices, memory, disk and environment, and compare with what is known. Imports every package that it judges; one that fails is a finding. runs: where run folders go."""
    with contextlib.redirect_stdout(sys.stderr):  # what libraries say while they are imported is not part of the answer
        facts = _facts(Path(runs))
    return Diagnosis(facts, judge(facts))


def judge(facts: Facts) -> list[Finding]:
    """What is wrong with the packages, one by one, and which known-bad pairs are there."""
    found = [*_package_findings(facts.packages), *(Finding(bad.level, bad.what, bad.reason, bad.cure) for bad in KNOWN_BAD if bad.holds(facts))]
    order: tuple[Level, ...] = ("problem", "warning", "note")
    return sorted(found, key=lambda finding: order.index(finding.level))


def _package_findings(packages: Mapping[str, Package]) -> Iterator[Finding]:
    if not any(package.core for package in packages.values()):
        yield Finding("problem", "vlm is not installed", "its version and the tested ranges are read from the installed package", "run `make setup`, or pip install -e .")
    for name, package in packages.items():
        wanted = f'pip install "{name}{package.tested}"'
        if package.installed is None and package.core:
            yield Finding("problem", f"{name} is missing", "every run needs it", wanted)
        elif package.installed is not None and package.fault:
            yield Finding("problem" if package.core else "warning", f"{name} {package.installed} cannot be imported", package.fault, f"install it again: {wanted}")
        if not package.within:
            yield Finding("warning", f"{name} {package.installed} was not tested", f"tested: {package.tested}", wanted)


# ---- what is found -------------------------------------------------------------------------------------------------------


def _facts(runs: Path) -> Facts:
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    packages = _packages()
    works = packages["torch"].installed is not None and packages["torch"].fault is None
    return Facts(
        packages=packages,
        **(_torch() if works else {}),
        attention=("sdpa", "eager", *(["flash_attention_2"] if packages["flash-attn"].installed and not packages["flash-attn"].fault else [])),
        torchvision_compiled=_torchvision_compiled() if works else None,
        torchvision_wants=_torchvision_wants(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=int(threads) if (threads := os.environ.get("OMP_NUM_THREADS", "")).isdecimal() else None,
        memory=os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB,
        shared=shutil.disk_usage("/dev/shm").free / GIB if Path("/dev/shm").is_dir() else None,
        runs=str(runs),
        disk=_free(runs),
        compiler=shutil.which(os.environ.get("CXX", "g++")) is not None,
        ninja=shutil.which("ninja") is not None,
        op_can_be_left_out=packages["deepspeed"].fault is not None or _op_can_be_left_out(),
        launched=tuple(name for name in LAUNCHED if name in os.environ),
    )


def _packages() -> dict[str, Package]:
    """What pyproject.toml names (but the tools of development), and BESIDE."""
    try:
        needed = [Requirement(line) for line in requires("vlm") or ()]
    except PackageNotFoundError:
        needed = []
    ranges: dict[str, tuple[str, str | None, bool]] = {}
    for requirement in needed:
        extra = next((name for name in metadata("vlm").get_all("Provides-Extra") or () if requirement.marker and requirement.marker.evaluate({"extra": name})), None)
        if requirement.name != "vlm" and extra not in ("dev", "all"):
            ranges[requirement.name.replace("_", "-").lower()] = str(requirement.specifier), extra, extra is None
    for name in ("torch", "deepspeed", *BESIDE):
        ranges.setdefault(name, ("", None, False))
    return {name: Package(_version(name), tested, extra, _fault(name), core) for name, (tested, extra, core) in ranges.items()}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _fault(package: str) -> str | None:
    """Why an installed package cannot be imported."""
    if package not in PROBES or _version(package) is None:
        return None
    module, _, name = PROBES[package].partition(":")
    try:
        getattr(importlib.import_module(module), name)
    except Exception as error:  # a broken package may raise anything
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None


def _torch() -> dict[str, Any]:
    import torch
    import torch.distributed as dist
    from torch.cuda import nccl

    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(index)
        devices.append(Device(about.name, about.total_memory / GIB, about.major >= 8))  # bf16 came with compute capability 8
    backends = [name for name, there in (("nccl", dist.is_nccl_available()), ("gloo", dist.is_gloo_available())) if there]
    number = ".".join(map(str, nccl.version())) if devices and "nccl" in backends else None
    return {"devices": tuple(devices), "cuda": torch.version.cuda, "backends": tuple(backends), "nccl": number}


def _torchvision_compiled() -> bool | None:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    import torch

    try:
        torch.ops.load_library(str(Path(spec.origin).parent / "_C.so"))
    except OSError:
        return False
    return True


def _torchvision_wants() -> str:
    try:
        return next((str(found.specifier) for line in requires("torchvision") or () if (found := Requirement(line)).name == "torch"), "")
    except PackageNotFoundError:
        return ""


def _op_can_be_left_out() -> bool:
    try:
        return "deepspeed_shm_comm" in importlib.import_module("deepspeed.ops").__compatible_ops__
    except (ImportError, AttributeError):
        return False


def _free(runs: Path) -> float | None:
    """GiB where a folder is or would be made; None where it cannot be."""
    place = next(folder for folder in (runs.absolute(), *runs.absolute().parents) if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        return None
    return shutil.disk_usage(place).free / GIB
