"""Who may import whom: the arrows of docs/architecture.md, held by reading every file's imports, those inside functions too."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PARTS = ("encoders", "connectors", "llm", "objectives")
ABOVE = ("train", "eval")  # what the library never imports
TOP = ("", "cli", "__main__")  # vlm/__init__.py with its lazy names, and the command: only these look upward
EVAL_READS = ("vlm.train.config",)  # the schema of the config.yaml in a run's folder
TRAIN_READS = ("vlm.eval.scores", "vlm.eval.report_page")  # the files with a run's scores; the page with which a run ends


def modules(root: Path) -> dict[str, Path]:
    """Import name -> file of every module of the package `root/vlm`, through its links."""
    found = {}
    for folder, _, files in os.walk(root / "vlm", followlinks=True):
        for file in files:
            if file.endswith(".py"):
                path = Path(folder, file)
                parts = path.relative_to(root).with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(tree: ast.AST, name: str, is_package: bool, known: dict[str, Path]) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a module imports; `from package import module` counts as the module, any other name as `package:name`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, name, is_package)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node.lineno, full if full in known else f"{base}:{alias.name}"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield node.lineno, node.args[0].value


def _absolute(node: ast.ImportFrom, name: str, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    parents = name.split(".")
    package = parents[: len(parents) - node.level + is_package]
    return ".".join([*package, *([node.module] if node.module else [])])


def area(name: str) -> str:
    """The room of a module: "encoders" for vlm.encoders.clip, "model" for vlm.model, "" for vlm itself."""
    return name.split(":")[0].split(".")[1] if "." in name.split(":")[0] else ""


def forbidden(source: str, target: str) -> str | None:
    """Why the module `source` may not import `target` ("package.module" or "package.module:name"), None where it may."""
    first = target.split(":")[0].split(".")[0]
    if first in (*ABOVE, "configs"):
        return f"is shadowed by any user's own {first}; the name is vlm.{first}"
    if first != "vlm":
        return None
    here, there = area(source), area(target)
    if there == "cli" and here != "__main__":
        return "nothing imports cli"
    if here in TOP:
        return None
    if target.startswith("vlm:") and not target.startswith("vlm:__"):
        return "the lazy names of vlm/__init__.py are for users; import the module that defines the name"
    if here == "train" and there == "eval" and target.split(":")[0] not in TRAIN_READS:
        return f"train reads of eval only {' and '.join(TRAIN_READS)}"
    if here == "eval" and target.split(":")[0] in EVAL_READS:
        return None
    if there in ABOVE and here not in ("train", there):
        return "only cli.py and the lazy names of vlm/__init__.py look upward"
    if here in PARTS and there in PARTS and here != there:
        return f"{', '.join(PARTS)} never import one another"
    if here in PARTS and there == "model":
        return "parts do not know the model that they are put into"
    if here == "data" and there in PARTS:
        return "data is handed Specs"
    return None


def problems(root: Path) -> list[str]:
    """Every breach of the arrows in `root/vlm`, as sentences."""
    known = modules(root)
    found = []
    for name, path in sorted(known.items()):
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        is_package = path.name == "__init__.py"
        if is_package and not ast.get_docstring(tree):
            found.append(f"{name}: __init__.py has no docstring saying what may enter")
        for line, target in imports(tree, name, is_package, known):
            reason = forbidden(name, target)
            if reason:
                found.append(f"{name}, line {line}, imports {target}: {reason}")
        package = name if is_package else name.rpartition(".")[0]
        if package not in known:
            found.append(f"{name}: its folder has no __init__.py")
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and f"{package}.{node.name}" in known:
                found.append(f"{name}, line {node.lineno}: the function {node.name} is named like the module {package}.{node.name}")
    return found


def test_the_arrows_of_the_package_hold() -> None:
    assert {"vlm", "vlm.registry", "vlm.encoders.base"} <= set(modules(ROOT))
    assert problems(ROOT) == []


def test_rooms_above_the_library_are_reached_through_the_links() -> None:
    assert {"vlm.train", "vlm.eval"} <= set(modules(ROOT))


CLEAN = {
    "__init__.py": '"""The library."""\ndef __getattr__(name):\n    from vlm.train.stages import fit\n    return fit\n',
    "__main__.py": "from vlm.cli import app\n",
    "cli.py": "def train_command():\n    from vlm.train import stages\n    from vlm.eval import run\n",
    "model.py": "from vlm.encoders.base import Encoder\nfrom vlm.connectors import base\n",
    "errors.py": "",
    "train/__init__.py": '"""Training."""\n',
    "train/stages.py": "import torch\nfrom vlm import __version__\nfrom vlm.eval.scores import scored\nfrom vlm.eval.report_page import write_report\nfrom vlm.model import VLM\nfrom . import loop\n",
    "train/loop.py": "def run_stage(): ...\n",
    "eval/__init__.py": '"""Evaluation."""\n',
    "eval/run.py": "from .score import exact\nfrom vlm.model import VLM\n",
    "eval/score.py": "",
    "eval/scores.py": "",
    "eval/report_page.py": "",
    "eval/report_sections.py": "",
    "encoders/__init__.py": '"""Encoders."""\n',
    "encoders/base.py": "from vlm.errors import DataError\n",
    "encoders/clip.py": "from .base import Encoder\n",
    "connectors/__init__.py": '"""Connectors."""\n',
    "connectors/base.py": "",
    "data/__init__.py": '"""Data."""\n',
    "data/sample.py": "",
}


def plant(root: Path, files: dict[str, str]) -> Path:
    """A package `vlm` of the given files below `root`."""
    for name, text in files.items():
        path = root / "vlm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def test_a_clean_tree_has_no_problems(tmp_path: Path) -> None:
    assert problems(plant(tmp_path, CLEAN)) == []


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("encoders/clip.py", "from vlm.connectors.base import Connector", "vlm.encoders.clip, line 1, imports vlm.connectors.base:Connector: encoders, "),
        ("encoders/clip.py", "def build():\n    from ..connectors import base", "line 2, imports vlm.connectors.base: encoders"),
        ("encoders/clip.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import vlm.connectors.base", "line 3, imports vlm.connectors.base"),
        ("encoders/clip.py", "from vlm.model import VLM", "parts do not know the model"),
        ("connectors/base.py", 'import importlib\nimportlib.import_module("vlm.encoders.clip")', "line 2, imports vlm.encoders.clip"),
        ("data/sample.py", "from vlm.encoders.base import EncoderSpec", "data is handed Specs"),
        ("data/sample.py", "from vlm import encoders", "imports vlm.encoders: data is handed Specs"),
        ("errors.py", "from vlm.train.stages import fit", "only cli.py and the lazy names"),
        ("model.py", "from vlm import fit", "the lazy names of vlm/__init__.py are for users"),
        ("eval/run.py", "from vlm.train.loop import run_stage", "only cli.py and the lazy names"),
        ("train/loop.py", "from vlm.eval.run import evaluate", "train reads of eval only"),
        ("train/loop.py", "from vlm.eval.report_sections import speed", "train reads of eval only"),
        ("train/loop.py", "from vlm.eval import score", "train reads of eval only"),
        ("train/loop.py", "import vlm.cli", "nothing imports cli"),
        ("train/loop.py", "from train import stages", "shadowed by any user's own train"),
        ("train/loop.py", "def stages(): ...", "the function stages is named like the module vlm.train.stages"),
        ("__init__.py", '"""The library."""\ndef model(): ...', "the function model is named like the module vlm.model"),
        ("encoders/__init__.py", "", "vlm.encoders: __init__.py has no docstring"),
        ("serve/server.py", "", "vlm.serve.server: its folder has no __init__.py"),
    ],
)
def test_one_breach_is_one_problem(tmp_path: Path, file: str, text: str, said: str) -> None:
    found = problems(plant(tmp_path, CLEAN | {file: text}))
    assert len(found) == 1, found
    assert said in found[0]


def test_importing_vlm_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "peft", "deepspeed", "torchvision", "numpy", "matplotlib", "datasets")
    code = f"import sys, vlm; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
