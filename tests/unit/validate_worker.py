"""What test_validate.py runs under torchrun: a run whose weights stand still, looked at after every step, with a part that no gradient reaches; and one of its steps again."""

import sys
from pathlib import Path

import tiny
from idle import IdleSpec

import vlm
from vlm import llm
from vlm.train.replay import replay_step

STILL = ("stages.align.train={connector: 0.0}", "stages.instruct.train={connector: 0.0, llm: {attention: 0.0, idle: 0.0}}", "model.adapt={idle: {since: instruct}}")
LOOKS = ("validate={every: 1, samples: 5, data: {held: heldout, mixed: questions}, keep_best: true}", "stages.align.prompt=chatml", "every_stage.micro_batch=1")


def main(root: Path, out: Path, zero: int) -> None:
    llm.registry._specs["idle"] = IdleSpec
    folder = vlm.fit(vlm.compose("llava_tiny", f"data_root={root}", f"runs={out}", "name=still", f"every_stage.deepspeed=zero{zero}", *STILL, *LOOKS))
    assert replay_step(folder, 7).exact


if __name__ == "__main__":
    tiny.seed(0)
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
