"""The steps of a stage: fetch, count, forward, backward, step, write down."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, cast

import torch

from vlm.errors import DataError, NumericsError
from vlm.llm.context import Unit
from vlm.model import VLM
from vlm.train.bad import BadSamples
from vlm.train.config import StageSpec
from vlm.train.engine import Engine
from vlm.train.flops import arithmetic_of, peak_of
from vlm.train.gradients import reached, unreached
from vlm.train.log import Log
from vlm.train.memory import peak_memory
from vlm.train.schedule import factor
from vlm.train.steps import MicroBatch, Step

__all__ = ["one_step", "run_steps", "train_mode"]

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
    log: Log,
    bad: BadSamples,
    after: Callable[[int], None],
) -> None:
    """Train steps `start`.. `count` - 1 of a stage; after(number of steps done) is called behind each step, for saving."""
    train_mode(engine.model)
    arithmetic, peak = arithmetic_of(cast(VLM, engine.model)), peak_of(engine.device)
    log.begin(name, start, count)
    try:
        before = time.perf_counter()
        for step in steps:
            fetched = time.perf_counter()
            with reached(engine.model) if step.number == start else nullcontext() as found:
                record = one_step(engine, step, stage, count, stage.sources)
            for warning in unreached(engine, found) if found is not None else ():
                log.warn(f"stage {name}: {warning}")
            bad.add(step.number + 1, step.skipped)
            done = time.perf_counter()
            head = {"stage": name, "step": step.number + 1, "total": total_before + step.number + 1, "ranks": engine.ranks}
            timed = {"seconds": round(done - before, 4), "wait": round(fetched - before, 4), "memory": round(peak_memory(), 3)}
            log.step(head | record | timed | arithmetic.speed(record, (done - before) * engine.ranks, peak))
            bad.check(step.number + 1, record.get("skipped", 0))
            after(step.number + 1)
            before = time.perf_counter()
    finally:
        log.end()


def one_step(engine: Engine, step: Step, stage: StageSpec, count: int, sources: tuple[str, ...]) -> dict[str, Any]:
    """One optimizer update. The loss is summed over the step's supervised tokens and divided by their number over all ranks and micro-batches. Returns what is written down."""
    micro_batches = step.micro_batches
    plan = float(step.plan)
    units = {unit: float(sum(micro.units[unit] for micro in micro_batches)) for unit in UNITS}
    pictures = float(sum(picture.cut.pieces if picture.cut else 1 for micro in micro_batches for picture in micro.inputs.get("images") or ()))
    counts = engine.sum({"pictures": pictures, "plan": plan, "plan_squared": plan**2, "supervised": float(sum(micro.supervised for micro in micro_batches)), **units})
    if engine.ranks * counts["plan_squared"] != counts["plan"] ** 2:  # equality holds for equal numbers only
        raise DataError(
            f"the ranks do not see the same samples at step {step.number + 1}, so they would pack different rows",
            expected="data files that every rank can read, with the same content",
            cure="look for files that are missing or cut on one machine; addresses may answer once and not the next time: fetch such pictures first",
        )
    supervised = counts["supervised"]
    if not supervised:
        raise DataError(f"step {step.number + 1} has no supervised token on any rank", cure="check the data with `vlm check`, and max_length")
    share = factor(stage.schedule, step.number, count)
    engine.set_rates(share)
    names = [f"{figure}/{source}" for figure in ("loss", "supervised", "samples") for source in sources]
    figures = dict.fromkeys([*names, "modality/vision", "modality/text"], 0.0)
    for micro in micro_batches:
        engine.last(micro is micro_batches[-1])
        output = engine.forward(micro.to(engine.device))
        loss = output.loss_sum / supervised
        for (part, _), extra in output.auxiliary.items():
            term = extra.coefficient * extra.sum / max(1.0, counts[extra.unit])
            figures[f"auxiliary/{part}"] = figures.get(f"auxiliary/{part}", 0.0) + float(term.detach())
            loss = loss + term
        _check_finite(loss, output, micro, step.number)
        engine.backward(loss)
        engine.step()
        for source, kind, row_loss, row_count in zip(micro.sources, micro.modalities, output.document_losses.tolist(), output.document_counts.tolist(), strict=False):
            for figure, value in ((f"loss/{source}", row_loss), (f"supervised/{source}", row_count), (f"samples/{source}", 1.0), (f"modality/{kind}", 1.0)):
                figures[figure] += value
    return _record(engine, step, figures, counts, share)


def _record(engine: Engine, step: Step, figures: Mapping[str, float], counts: Mapping[str, float], share: float) -> dict[str, Any]:
    """figures: this rank's sums, `samples/SOURCE` and the like; counts: over all ranks."""
    total = engine.sum({**figures, "skipped": float(len(step.skipped)), "notes": float(len(step.notes))})
    loss, supervised, samples, modality, auxiliary = (_below(total, name) for name in ("loss", "supervised", "samples", "modality", "auxiliary"))
    drawn = sum(samples.values())
    record: dict[str, Any] = {
        "loss": sum(loss.values()) / counts["supervised"],
        "tokens": int(counts["token"]),
        "vision_tokens": int(counts["vision_token"]),
        "supervised": int(counts["supervised"]),
        "samples": int(drawn),
        "pictures": int(counts["pictures"]),
        "sources": {
            name: {"loss": loss[name] / supervised[name] if supervised[name] else None, "samples": int(count), "share": count / drawn} for name, count in samples.items() if count
        },
        "modality": {kind: int(count) for kind, count in modality.items()},
        "rates": {path: peak * share for path, peak in zip(engine.paths, engine.peaks, strict=True)},
        "gradient_norm": engine.gradient_norm(),
    }
    if auxiliary:
        record["auxiliary"] = auxiliary
    if total["skipped"]:
        record["skipped"] = int(total["skipped"])
    if total["notes"]:
        record["notes"] = dict(sum((Counter(notes) for notes in engine.gather(dict(step.notes))), Counter()))
    return record


def _below(figures: Mapping[str, float], name: str) -> dict[str, float]:
    """The figures called `NAME/...`."""
    return {key.removeprefix(f"{name}/"): value for key, value in figures.items() if key.startswith(f"{name}/")}


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


def train_mode(model: torch.nn.Module) -> None:
    """For training; a frozen tower runs as at inference, without dropout."""
    model.train()
    encoder: torch.nn.Module = model.encoder  # type: ignore[assignment]
    if not any(parameter.requires_grad for parameter in encoder.parameters()):
        encoder.eval()
