"""What test_arcana_run.py runs under torchrun, once per ZeRO stage: one SGD step on fixed rows in every family of decoders, and an interrupted run, of a small Arcana."""

import json
import sys
from pathlib import Path

import tiny
from ranks_worker import interrupted, sgd_step

from vlm.train.engine import connect

LADDER = "model.connector={use: qladder, queries: 3, all_layers: true, then: {use: mlp, depth: 2}}"
MM_LORA = "model.adapt={mm_lora: {since: SINCE, rank: {vision: 3, language: 4}, dropout: DROPOUT}}"


def main(root: Path, out: Path, zero: int) -> None:
    rank, ranks, device = connect()
    arcana = (LADDER, MM_LORA.replace("SINCE", "align").replace("DROPOUT", "0.0"))
    for family in tiny.FAMILIES:
        (out / family).mkdir(exist_ok=True)
        sgd_step(root, out / family, zero, rank, ranks, device, options=(*arcana, f"model.llm.config={json.dumps(tiny.llm_config(family))}"))
    interrupted(root, out, zero, MM_LORA)


if __name__ == "__main__":
    tiny.seed(0)
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
