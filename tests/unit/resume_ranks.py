"""What test_drills.py runs under torchrun: a run of 4 + 4 steps that is stopped behind step 6, or goes on from there. Called as ROOT OUT ZERO (cut | resume | whole)."""

import sys
from contextlib import nullcontext
from pathlib import Path

import tiny
import torch
from interrupted import stopped_at

import vlm

LORA = "model.adapt={lora: {since: instruct, rank: 4, dropout: 0.0}}"


def main(root: Path, out: Path, zero: int, part: str) -> None:
    run = vlm.compose("llava_tiny", f"data_root={root}", f"every_stage.deepspeed=zero{zero}", LORA, f"runs={out}", "name=run", "save.every=1", "every_stage.batch=8", "workers=0")
    torch.manual_seed(7)
    with stopped_at(6) if part == "cut" else nullcontext():
        vlm.fit(run, resume=part == "resume")


if __name__ == "__main__":
    tiny.seed(0)
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
