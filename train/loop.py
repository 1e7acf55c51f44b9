"""The steps of a stage: fetch, count, forward, backward, step, write down."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch

from vlm.errors import DataError, NumericsError
from vlm.llm.context import Unit
from vlm.train.bad import BadSamples
from vlm.train.config import StageSpec
from vlm.train.engine import Engine
from vlm.train.log import Log, peak_memory
from vlm.train.schedule import factor
from vlm.train.steps import MicroBatch, Step

__all__ = ["one_step", "run_steps"]

UNITS: tuple[Unit, ...] = ("token", "vision_token", "document")


def run_steps(
    engine: Engine,
    steps: Iterator[Step],
    stage: StageSpec,
    *,
    name: str,
    start: int,
    total_before: int,
    count: int,
    sources: tuple[str, ...],
    log: Log,
    bad: BadSamples,
    after: Callable[[int], None],
) -> None:
    """Train steps `start`.. `count` - 1 of a stage; after(number of steps done) is called behind each step, for saving."""
    engine.model.train()
    _freeze_idle(engine.model)
    log.begin(name, start, count)
    try:
        before = time.perf_counter()
        for step in steps:
            fetched = time.perf_counter()
            record = one_step(engine, step, stage, count, sources)
            bad.add(step.number + 1, step.skipped)
            done = time.perf_counter()
            head = {"stage": name, "step": step.number + 1, "total": total_before + step.number + 1}
            log.step(head | record | {"seconds": round(done - before, 4), "wait": round(fetched - before, 4), "memory": round(peak_memory(), 3)})
            before = done
            bad.check(step.number + 1, record.get("skipped", 0))
            after(step.number + 1)
    finally:
        log.end()


def one_step(engine: Engine, step: Step, stage: StageSpec, count: int, sources: tuple[str, ...]) -> dict[str, Any]:
    """One optimizer update. The loss is summed over the step's supervised tokens and divided by their number over all ranks and micro-batches. Returns what is written down."""
    micro_batches = step.micro_batches
    plan = float(step.plan)
    counts = engine.sum([plan, plan**2, float(sum(micro.supervised for micro in micro_batches)), *(float(sum(micro.units[unit] for micro in micro_batches)) for unit in UNITS)])
    if engine.ranks * counts[1] != counts[0] ** 2:  # equality holds for equal numbers only
        raise DataError(
            f"the ranks do not see the same samples at step {step.number + 1}, so they would pack different rows",
            expected="data files that every rank can read, with the same content",
            cure="look for files that are missing or cut on one machine; addresses may answer once and not the next time: fetch such pictures first",
        )
    supervised, units = counts[2], dict(zip(UNITS, counts[3:], strict=True))
    if not supervised:
        raise DataError(f"step {step.number + 1} has no supervised token on any rank", cure="check the data with `vlm check`, and max_length")
    share = factor(stage.schedule, step.number, count)
    engine.set_rates(share)
    sums = {source: [0.0, 0.0, 0.0] for source in sources}
    modality = {"vision": 0.0, "text": 0.0}
    auxiliary: dict[str, float] = {}
    for micro in micro_batches:
        engine.last(micro is micro_batches[-1])
        output = engine.forward(micro.to(engine.device))
        loss = output.loss_sum / supervised
        for (part, _), extra in output.auxiliary.items():
            term = extra.coefficient * extra.sum / max(1.0, units[extra.unit])
            auxiliary[part] = auxiliary.get(part, 0.0) + float(term.detach())
            loss = loss + term
        _check_finite(loss, output, micro, step.number)
        engine.backward(loss)
        engine.step()
        for source, kind, row_loss, row_count in zip(micro.sources, micro.modalities, output.document_losses.tolist(), output.document_counts.tolist(), strict=False):
            sums[source] = [have + new for have, new in zip(sums[source], (row_loss, row_count, 1.0), strict=True)]
            modality[kind] += 1
    return _record(engine, step, sums, modality, auxiliary, units, supervised, share)


def _record(
    engine: Engine, step: Step, sums: dict[str, list[float]], modality: dict[str, float], auxiliary: dict[str, float], units: dict[Unit, float], supervised: float, share: float
) -> dict[str, Any]:
    flat = engine.sum([*(value for triple in sums.values() for value in triple), *modality.values(), *auxiliary.values(), float(len(step.skipped)), float(len(step.notes))])
    triples = [flat[index : index + 3] for index in range(0, 3 * len(sums), 3)]
    rest = flat[3 * len(sums) :]
    samples = sum(rows for _, _, rows in triples)
    record: dict[str, Any] = {
        "loss": sum(loss for loss, _, _ in triples) / supervised,
        "tokens": int(units["token"]),
        "vision_tokens": int(units["vision_token"]),
        "supervised": int(supervised),
        "samples": int(samples),
        "sources": {
            name: {"loss": loss / number if number else None, "samples": int(rows), "share": rows / samples}
            for name, (loss, number, rows) in zip(sums, triples, strict=True)
            if rows
        },
        "modality": {kind: int(rows) for kind, rows in zip(modality, rest, strict=False)},
        "rates": {path: peak * share for path, peak in zip(engine.paths, engine.peaks, strict=True)},
        "gradient_norm": engine.gradient_norm(),
    }
    if auxiliary:
        record["auxiliary"] = dict(zip(auxiliary, rest[2:-2], strict=True))
    if rest[-2]:
        record["skipped"] = int(rest[-2])
    if rest[-1]:
        record["notes"] = dict(sum((Counter(notes) for notes in engine.gather(dict(step.notes))), Counter()))
    return record


def _check_finite(loss: torch.Tensor, output: Any, micro: MicroBatch, step: int) -> None:
    value = float(loss.detach())
    if math.isfinite(value):
        return
    rows = [name for name, row in zip(micro.ids, output.document_losses.tolist(), strict=False) if not math.isfinite(row)]
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    raise NumericsError(
        f"the loss is not finite on rank {rank} at step {step + 1}",
        got=f"{value} with samples {', '.join(rows or micro.ids)}",
        cure="lower the rate, clip gradients, look at these samples; the run resumes from its last checkpoint with --resume",
    )


def _freeze_idle(model: torch.nn.Module) -> None:
    """A frozen tower runs as at inference, without dropout."""
    encoder: torch.nn.Module = model.encoder  # type: ignore[assignment]
    if not any(parameter.requires_grad for parameter in encoder.parameters()):
        encoder.eval()
