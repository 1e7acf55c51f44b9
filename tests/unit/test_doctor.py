"""`vlm doctor`: a healthy machine has nothing, each known fault is named with its cure, and a package that breaks while it is imported is a finding."""

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from vlm import doctor
from vlm.cli import app
from vlm.doctor import KNOWN_BAD, Device, Diagnosis, Facts, Package, examine, judge

CORE = {name: Package("1.5", ">=1,<2", core=True) for name in ("deepspeed", "peft")}
HEALTHY = Facts(
    packages={"torch": Package("2.13.0+cpu", "==2.13.*", core=True), "transformers": Package("5.23.0", ">=5.23,<5.24", core=True), **CORE, "timm": Package(None, "<2", "openclip")},
    system="Linux-6", torchvision_compiled=True, torchvision_wants="==2.13.0", cores=4, threads=2, memory=8.0, shared=1.0, disk=50.0,
)  # fmt: skip
A100, V100 = Device("A100", 80.0, True), Device("V100", 32.0, False)

FAULTS: list[tuple[str, str, dict[str, Any]]] = [
    ("problem", "transformers below 5", {"packages": {**HEALTHY.packages, "transformers": Package("4.57.1")}}),
    ("warning", "torchvision made for another torch", {"packages": {**HEALTHY.packages, "torch": Package("2.14.0")}}),
    ("note", "torchvision's compiled half does not load", {"torchvision_compiled": False}),
    ("warning", "a CUDA build of torch without a device", {"cuda": "13.0"}),
    ("problem", "GPUs without NCCL", {"devices": (A100,), "attention": ("sdpa", "flash_attention_2")}),
    ("problem", "no GPU and no gloo", {"backends": ()}),
    ("note", "bf16 at ZeRO 0", {"devices": (A100,), "backends": ("nccl", "gloo"), "attention": ("sdpa", "flash_attention_2")}),
    ("warning", "a GPU without bf16", {"devices": (V100,), "backends": ("nccl", "gloo"), "attention": ("sdpa", "flash_attention_2")}),
    ("note", "GPUs without flash attention", {"devices": (V100,), "backends": ("nccl", "gloo")}),
    ("problem", "DeepSpeed that compiles on CPU", {"op_can_be_left_out": False, "ninja": False}),
    ("note", "no g++ or no ninja on PATH", {"compiler": False}),
    ("warning", "more threads than cores", {"threads": 5}),
    ("problem", "half of a launcher's environment", {"launched": ("RANK", "WORLD_SIZE")}),
    ("problem", "a folder of runs that cannot be written", {"disk": None}),
    ("warning", "little disk space", {"disk": 1.0}),
    ("warning", "little shared memory", {"shared": 0.06}),
    ("warning", "no Linux", {"system": "macOS-15"}),
]


def test_a_healthy_machine_has_nothing() -> None:
    assert judge(HEALTHY) == []
    assert judge(replace(HEALTHY, launched=doctor.LAUNCHED, ninja=True, op_can_be_left_out=False, threads=None, shared=None)) == []


@pytest.mark.parametrize("level, what, changed", FAULTS)
def test_each_fault_is_named(level: str, what: str, changed: dict[str, Any]) -> None:
    found = {finding.what: finding for finding in judge(replace(HEALTHY, **changed))}
    assert found[what].level == level and found[what].reason and found[what].cure
    assert Diagnosis(HEALTHY, list(found.values())).ok == all(finding.level != "problem" for finding in found.values())


def test_every_known_fault_is_tested() -> None:
    assert [bad.what for bad in KNOWN_BAD] == [what for _, what, _ in FAULTS]


@pytest.mark.parametrize(
    "package, level, what",
    [
        (Package(None, "<2", core=True), "problem", "peft is missing"),
        (Package("2.5", "<2", core=True), "warning", "peft 2.5 was not tested"),
        (Package("1.5", "<2", core=True, fault="RuntimeError: no"), "problem", "peft 1.5 cannot be imported"),
        (Package("1.5", "<2", "data", fault="RuntimeError: no"), "warning", "peft 1.5 cannot be imported"),
    ],
)
def test_packages_that_do_not_fit(package: Package, level: str, what: str) -> None:
    (finding,) = judge(replace(HEALTHY, packages={**HEALTHY.packages, "peft": package}))
    assert (finding.level, finding.what) == (level, what)
    assert 'pip install "peft<2"' in finding.cure


def test_a_package_that_breaks_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_timm.py").write_text('print("loud")\nraise RuntimeError("operator torchvision::nms\\n does not exist")')
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(doctor.PROBES, "timm", "broken_timm:create_model")
    monkeypatch.setitem(sys.modules, "peft", None)
    diagnosis = examine(tmp_path / "runs" / "deep")
    found = {finding.what.split()[0]: finding for finding in diagnosis.findings}
    assert found["timm"].level == "warning" and found["timm"].reason == "RuntimeError: operator torchvision::nms does not exist"
    assert found["peft"].level == "problem" and not diagnosis.ok
    out = io.StringIO()
    diagnosis.print(Console(file=out, width=200))
    assert "timm" in out.getvalue() and "cannot be imported" in out.getvalue() and "1 problem" in out.getvalue().splitlines()[-1]


def test_the_command(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["doctor", "--json", "--runs", str(tmp_path)])
    told = json.loads(done.stdout)
    assert told["packages"]["torch"]["tested"] == "==2.13.*" and told["packages"]["webdataset"]["extra"] == "data" and "ruff" not in told["packages"]
    assert told["packages"]["torch"]["core"] and not told["packages"]["webdataset"]["core"]
    assert done.exit_code == (0 if told["ok"] else 1)
    (tmp_path / "file").touch()
    done = CliRunner().invoke(app, ["doctor", "--runs", str(tmp_path / "file" / "runs")])
    assert done.exit_code == 1 and "a folder of runs that cannot be written" in done.stdout
