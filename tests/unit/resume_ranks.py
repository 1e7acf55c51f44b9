"""What test_drills.py runs under torchrun: a run of 4 + 4 steps that is stopped behind step 6, or goes on from there, or whose rank 0 finds the disk full at its third checkpoint. Called as ROOT OUT ZERO (cut | resume | whole | full)."""

import errno
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import tiny
import torch
from interrupted import stopped_at

import vlm

LORA = "model.adapt={lora: {since: instruct, rank: 4, dropout: 0.0}}"


def full(content: Any, file: Any, *more: Any, **options: Any) -> None:
    if "model_states" in str(file) and "step-3" in str(file):  # which rank 0 alone writes below ZeRO 3
        raise OSError(errno.ENOSPC, "No space left on device")
    save(content, file, *more, **options)


save = torch.save


def main(root: Path, out: Path, zero: int, part: str) -> None:
    run = vlm.compose("llava_tiny", f"data_root={root}", f"every_stage.deepspeed=zero{zero}", LORA, f"runs={out}", "name=run", "save.every=1", "every_stage.batch=8", "workers=0")
    torch.manual_seed(7)
    if part == "full":
        torch.save = full  # type: ignore[assignment]
    with stopped_at(6) if part == "cut" else nullcontext():
        vlm.fit(run, resume=part == "resume")


if __name__ == "__main__":
    tiny.seed(0)
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
