"""The package as a user of PyPI gets it: an sdist, the wheel that is built from it, and the command in a folder that holds a train.py and an eval/."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOT_SOURCE = shutil.ignore_patterns(".git", ".venv", "runs", "demo_data", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Output of a command that must succeed."""
    done = subprocess.run([str(word) for word in command], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel built from the sdist. Both are built from a copy, so that no build folder is left in the repository."""
    source = tmp_path_factory.mktemp("source") / "vlm"
    shutil.copytree(ROOT, source, symlinks=True, ignore=NOT_SOURCE)
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source, cwd=out)
    assert len(list(out.glob("vlm-*.tar.gz"))) == 1
    (found,) = out.glob("vlm-*.whl")
    return found


def test_wheel_holds_every_module_and_configuration_once(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    wanted = {f"vlm/{path.relative_to(ROOT)}" for folder in ("train", "eval") for path in (ROOT / folder).rglob("*.py")}
    wanted |= {f"vlm/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    wanted |= {str(path.relative_to(ROOT)) for path in (ROOT / "vlm").rglob("*.py")} | {"vlm/py.typed"}
    assert wanted - set(names) == set()
    assert len(names) == len(set(names))
    assert {name.split("/")[0].split("-")[0] for name in names} == {"vlm"}
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_wheel_checks_a_run_beside_a_users_own_train_and_eval(wheel: Path, tmp_path: Path) -> None:
    installed, here = tmp_path / "installed", tmp_path / "here"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", installed, wheel, cwd=tmp_path)
    (here / "eval").mkdir(parents=True)
    for file in ("train.py", "eval/__init__.py"):
        (here / file).write_text('raise RuntimeError("a user\'s own file was imported")')
    told = run(sys.executable, "-c", "import vlm; print(vlm.__file__)", cwd=here, PYTHONPATH=str(installed))
    assert Path(told.strip()).is_relative_to(installed), "the installed wheel is not what answers"
    assert "llava_tiny" in run(sys.executable, installed / "bin" / "vlm", "check", "llava_tiny", cwd=here, PYTHONPATH=str(installed))
    run(sys.executable, "-m", "vlm", "check", "llava_tiny", cwd=here, PYTHONPATH=str(installed))  # with the folder itself on sys.path
