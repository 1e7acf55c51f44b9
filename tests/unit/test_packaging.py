"""The package as it was cloned and installed: links, version, command, versions that belong together."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
LINKS = ("train", "eval", "configs")
TARGETS = ["help", "setup", "demo", "test", "test-golden", "test-matrix", "lint", "train", "check", "eval", "chat", "export", "bench", "clean"]
HEAVY = {"torch", "transformers", "peft", "deepspeed", "torchvision", "tokenizers", "datasets", "matplotlib", "numpy"}


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def link_problem(root: Path, name: str) -> str | None:
    """What is wrong with the link `vlm/NAME`, and the cure; None where it leads to the folder NAME."""
    link = root / "vlm" / name
    if link.is_file():
        return (
            f"vlm/{name} arrived as a plain file instead of a link to ../{name}. `git config core.symlinks true && git checkout -- vlm/{name}` makes it a link "
            "(on Windows with developer mode on); an archive must be unpacked by a program that keeps links"
        )
    if not link.is_dir():
        return f"vlm/{name} is missing or leads nowhere. `ln -s ../{name} vlm/{name}`, run where pyproject.toml lies, makes it"
    if link.is_symlink() and link.readlink() != Path("..", name):
        return f"vlm/{name} leads to {link.readlink()} instead of ../{name}: another clone would not find it"
    return None


@pytest.mark.parametrize("name", LINKS)
def test_links_arrived(name: str) -> None:
    assert link_problem(ROOT, name) is None


def test_a_link_that_did_not_arrive_is_told(tmp_path: Path) -> None:
    (tmp_path / "vlm").mkdir()
    (tmp_path / "vlm" / "train").write_text("../train")
    (tmp_path / "vlm" / "eval").symlink_to("../eval")
    (tmp_path / "configs").mkdir()
    (tmp_path / "vlm" / "configs").symlink_to(tmp_path / "configs")
    assert "arrived as a plain file" in (link_problem(tmp_path, "train") or "")
    assert "leads nowhere" in (link_problem(tmp_path, "eval") or "")
    assert "another clone" in (link_problem(tmp_path, "configs") or "")


def test_version_is_readable() -> None:
    try:
        installed = version("vlm")
    except PackageNotFoundError:
        pytest.fail("the distribution vlm is not installed in this environment: run `make setup`")
    assert installed == project()["version"], "the installed metadata are older than pyproject.toml: run `make setup`"


def test_help_answers_without_heavy_imports(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text('raise RuntimeError("a user\'s own file was imported")')
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    command = [sys.executable, "-X", "importtime", "-m", "vlm", "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"train", "check", "eval", "chat", "export", "list", "demo"} <= set(re.findall(r"\w+", done.stdout))
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "vlm.cli" in imported
    assert not imported & HEAVY


def constraints() -> dict[str, str]:
    """Canonical name -> exact version, of constraints.txt."""
    lines = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line) for line in lines), "only exact versions, without a local suffix, build anywhere"
    return {re.sub(r"[-_.]+", "-", name).lower(): number for name, _, number in (line.partition("==") for line in lines)}


def test_constraints_hold_the_ranges_of_the_project() -> None:
    exact = constraints()
    ranges = [*project()["dependencies"], *(line for extra in project()["optional-dependencies"].values() for line in extra)]
    for requirement in map(Requirement, ranges):
        if requirement.name == "vlm":
            continue
        number = exact.get(re.sub(r"[-_.]+", "-", requirement.name).lower())
        assert number is not None, f"constraints.txt has no version of {requirement.name}"
        assert Version(number) in requirement.specifier, f"constraints.txt has {requirement.name} {number}, pyproject.toml wants {requirement.specifier}"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_alone_prints_every_target() -> None:
    done = subprocess.run(["make", "-C", str(ROOT), "--no-print-directory"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    told = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert told == TARGETS
