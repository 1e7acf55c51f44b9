"""A run is killed at random moments, again and again, and resumed each time: SIGKILL, SIGTERM, a full disk. No checkpoint is lost, and the final weights equal those of an undisturbed run bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from interrupted import kept, records
from safetensors.torch import load_file

import vlm
from vlm.train.checkpoint import file_hash, latest

KILLS = 30
FULL = Path(__file__).with_name("full_disk.py")
OVERRIDES = ("every_stage.steps=40", "save.every=2", "save.keep=2", "workers=1", "log_every=5", "model.llm.config.attention_dropout=0.1")


def start(root: Path, runs: Path, name: str, kind: str, draw: random.Random) -> subprocess.Popen[str]:
    begun = (runs / name / "config.yaml").is_file()
    command = [str(FULL)] if kind == "full disk" else ["-m", "vlm"]
    arguments = ["train", "llava_tiny", f"data_root={root}", f"runs={runs}", f"name={name}", *OVERRIDES, *(["--resume"] if begun else [])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FULL_AT": str(draw.randint(1, 12))}
    return subprocess.Popen([sys.executable, *command, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def steps_done(folder: Path) -> int:
    """Of the newest checkpoint, whose files are all there as they were written; of finished stages."""
    found = latest(folder / "resume")
    if found is None:
        return 0
    import json

    position = json.loads((found / "position.json").read_text())
    assert all(file_hash(found / name) == value for name, value in position["files"].items()), f"{found} is damaged"
    return int(position["total"])


def test_thirty_kills_lose_nothing(root: Path, tmp_path: Path) -> None:
    whole = vlm.fit(vlm.compose("llava_tiny", f"data_root={root}", f"runs={tmp_path}", "name=whole", *OVERRIDES))
    expected, lines = load_file(whole / "export" / "model.safetensors"), [kept(record) for record in records(whole)]
    draw = random.Random(0)
    kills = runs = done = 0
    told: dict[str, int] = {}
    while kills < KILLS or done:  # the last run is seen to its end
        name = f"run{runs}"
        kind = draw.choice(["SIGKILL", "SIGKILL", "SIGTERM", "full disk"]) if kills < KILLS else "none"
        process = start(root, tmp_path, name, kind, draw)
        if kind in ("SIGKILL", "SIGTERM"):
            until = time.monotonic() + draw.uniform(0, 4)
            while process.poll() is None and not (tmp_path / name / "metrics.jsonl").is_file():
                time.sleep(0.05)  # so that most kills meet a run, not its imports
            while process.poll() is None and time.monotonic() < until + 2:
                time.sleep(0.01)
            if process.poll() is None:
                if kind == "SIGKILL":
                    os.killpg(process.pid, signal.SIGKILL)
                else:
                    process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=300)[0]
        now = steps_done(tmp_path / name)
        assert now >= done, f"{name}: checkpoint {done} is lost, {now} is there"
        done = now
        ended = {0: "finished", -signal.SIGKILL: "SIGKILL", -signal.SIGTERM: "SIGTERM before the run", 75: "SIGTERM, saved", 1: "full disk"}.get(process.returncode)
        assert ended and (ended != "full disk" or "the disk is full" in output), (process.returncode, output[-2000:])
        told[ended] = told.get(ended, 0) + 1
        if process.returncode:
            kills += 1
            continue
        finished = tmp_path / name
        found = load_file(finished / "export" / "model.safetensors")
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected), name
        assert [kept(record) for record in records(finished)] == lines, name
        runs, done = runs + 1, 0
    print(f"\n{kills} kills over {runs} runs: {told}")
    assert {"SIGKILL", "SIGTERM, saved", "full disk"} <= told.keys()
