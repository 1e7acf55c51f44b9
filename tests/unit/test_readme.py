"""The README's commands and code run, in its order, in an empty folder, on the configuration of a few thousand parameters."""

import os
import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(bash|python|yaml)(?: title=(\S+))?\n(.*?)^```", re.MULTILINE | re.DOTALL)
MADE_ELSEWHERE = ("make ", "git clone", "cd vlm", "pip install", "python -m venv", ". .venv")


def test_every_block_runs(tmp_path: Path) -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    ran = 0
    for language, title, text in BLOCK.findall(README):
        if title:
            (tmp_path / title).write_text(text, encoding="utf-8")
        if language == "yaml" or (language == "python" and title and not text.startswith("# run me")):
            continue
        if language == "bash" and any(line.startswith(MADE_ELSEWHERE) for line in text.splitlines()):
            continue
        command = ["bash", "-e", "-c", text] if language == "bash" else [sys.executable, "-c", text]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=600)
        assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
        ran += 1
    assert ran >= 3
