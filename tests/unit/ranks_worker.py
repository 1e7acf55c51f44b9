"""What test_ranks.py runs under torchrun, once per ZeRO stage: one SGD step on fixed rows, a curve of 20 steps, and the run of tests/extension."""

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tiny
import torch
from interrupted import stopped_at
from safetensors.torch import save_file

import vlm
from vlm.data.sample import Sample
from vlm.initial import gathered
from vlm.llm import head as heads
from vlm.loading import first_model
from vlm.processor import VLMProcessor, load_tokenizer
from vlm.row import IGNORE, Row, collate
from vlm.train.config import RunSpec
from vlm.train.engine import Engine, connect, deepspeed_config
from vlm.train.optim import adamw, plan
from vlm.train.stages import whole_tensors
from vlm.train.steps import MicroBatch, Step

CURVE = ("every_stage.steps=20", "every_stage.batch=8", "every_stage.micro_batch=2", "stages.instruct.train={encoder: 1.0e-3, connector: 1.0e-3, llm: 1.0e-3}", "workers=0")
LORA = "model.adapt={lora: {since: SINCE, rank: 4, dropout: DROPOUT, targets: ['*_proj', lm_head, embed_tokens]}, tower_lora: {use: lora, part: encoder, rank: 2}}"
ADAPTED = (LORA.replace("SINCE", "align").replace("DROPOUT", "0"),)
heads.CHUNK = 8 * 512  # eight rows: the number of chunks differs between the ranks


def compose(root: Path, zero: int, *more: str) -> RunSpec:
    return vlm.compose("llava_tiny", f"data_root={root}", f"every_stage.deepspeed=zero{zero}", *more)


def fixed_rows(processor: VLMProcessor, run: RunSpec) -> list[list[list[Row]]]:
    """Rows by rank and micro-batch: rank 0 holds text only in the first and two pictures a row in the second, rank 1 the other way round; unequal numbers of pictures and of supervised tokens."""
    reader = run.data["questions"].open()
    kinds: dict[int, list[Sample]] = {number: [reader[index] for index in range(len(reader)) if index % 4 == number] for number in range(4)}
    row = [[processor.row(sample) for sample in kinds[number]] for number in range(4)]
    return [[[row[1][0]], [row[2][0], row[0][0]]], [[row[2][1], row[3][0]], [row[1][1], row[1][2]]]]


def micro(rows: list[Row]) -> MicroBatch:
    empty = rows or [Row("", "", [0], [IGNORE], [0], [-1], [0], [0], [])]
    units: Any = {"token": sum(map(len, rows)), "vision_token": 0, "document": len(rows)}
    return MicroBatch(collate(empty, pad_id=0), sum(row.supervised for row in rows), units, [row.id for row in rows], ["questions"] * len(rows), ["vision"] * len(rows))


def sgd_step(root: Path, out: Path, zero: int, rank: int, ranks: int, device: torch.device, accumulate: int = 4, options: Sequence[str] = ADAPTED) -> None:
    """One SGD step of rate 1, so that the difference of the weights is the gradient."""
    from vlm.train.loop import one_step

    run = compose(root, zero, *options)
    stage = run.stages["instruct"]
    tokenizer = load_tokenizer(run.model)
    processor = VLMProcessor(run.model, 32, tokenizer, stage.prompt, stage.images.use, tiling=stage.images.tiling)
    config = deepspeed_config(stage, torch.float32) | {"gradient_clipping": 0.0}
    torch.manual_seed(0)
    model = first_model(run.model, processor.image_token_id, config)
    updated = [parameter for name, parameter in model.named_parameters() if ".lora_" in name]
    with gathered(updated), torch.no_grad():  # B begins as zero, and A would have no gradient
        for parameter in updated:
            parameter.normal_(std=0.1)
    tree = {"encoder": 1.0, "connector": 1.0, "llm": 1.0}
    optimizer: Any = adamw(plan(dict(model.named_parameters()), model.groups(), tree, stage.optimizer, model.unused()), stage.optimizer)
    sgd = torch.optim.SGD([{**group, "lr": 1.0, "weight_decay": 0.0} for group in optimizer.param_groups], lr=1.0)
    engine = Engine(model, sgd, config, device)
    rows = fixed_rows(processor, run)
    batches = rows[rank] if ranks == 2 else [batch for of_rank in rows for batch in of_rank]
    if ranks == 1 and accumulate != 4:  # the same rows in another number of micro-batches
        flat = [row for batch in batches for row in batch]
        batches = [flat[part::accumulate] for part in range(accumulate)]
    model.train()
    one = vlm.compose("llava_tiny", f"data_root={root}", "every_stage.schedule={kind: constant, warmup: 0}").stages["instruct"]
    record = one_step(engine, Step(0, [micro(batch) for batch in batches]), one, 1, ("questions",))
    tensors = whole_tensors(model)
    if rank == 0:
        save_file(tensors, out / "sgd.safetensors")
        (out / "sgd.json").write_text(json.dumps(record["loss"]))


def interrupted(root: Path, out: Path, zero: int, adapted: str = LORA) -> None:
    """A run of 4 + 4 steps with an adaptation that enters in its second stage, and the same one stopped there and resumed."""
    run = (adapted.replace("SINCE", "instruct").replace("DROPOUT", "0.1"), f"runs={out}", "save.every=1", "workers=0")
    vlm.fit(compose(root, zero, *run, "name=whole"))
    with stopped_at(6):
        vlm.fit(compose(root, zero, *run, "name=cut"))
    torch.manual_seed(7)
    vlm.fit(compose(root, zero, *run, "name=cut"), resume=True)


def main(root: Path, out: Path, zero: int) -> None:
    rank, ranks, device = connect()
    sgd_step(root, out, zero, rank, ranks, device)
    if ranks == 1:
        for accumulate in (1, 8):
            (out / str(accumulate)).mkdir()
            sgd_step(root, out / str(accumulate), zero, rank, ranks, device, accumulate)
    interrupted(root, out, zero)
    vlm.fit(compose(root, zero, *CURVE, f"runs={out}", "name=curve"))
    vlm.fit(compose(root, zero, *CURVE, f"runs={out}", "name=packed", "every_stage.pack=120", "every_stage.max_length=120", "every_stage.micro_batch=1"))
    extension = Path(__file__).parents[1] / "extension" / "run.yaml"
    if zero in (0, 3):
        vlm.fit(vlm.compose(str(extension), f"data_root={root}", f"runs={out}", "name=extension", f"every_stage.deepspeed=zero{zero}"))


if __name__ == "__main__":
    random.seed(0)
    tiny.seed(0)
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
