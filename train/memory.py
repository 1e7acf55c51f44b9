"""Memory of a step: how much this process needed, and `micro_batch: auto`, how many of the longest rows fit, tried out before the first step."""

import json
import resource
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from vlm.errors import EnvironmentProblem
from vlm.train.engine import Engine, together
from vlm.train.log import Log
from vlm.train.steps import MicroBatch, StepData
from vlm.whole import write_whole

__all__ = ["find_micro_batch", "peak_memory"]

SHARE = 0.85
"""Of the memory that is free beside the model and its optimizer."""


def peak_memory() -> float:
    """Largest memory of this process so far, GiB: the GPU's where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def find_micro_batch(engine: Engine, data: StepData, file: Path, log: Log) -> int:
    """Rows per forward and rank. Written to `file`, so that a resumed run takes the number it began with.

    One row, then two, of the longest there are, forward and backward; from what the second one costs follows how many fit. Their loss is multiplied by 0, so that the gradient that the
    first step adds to is exactly 0, and the stage seeds its dropout afterwards: a run with this number written into its configuration takes the same steps, bit for bit.

    Raises EnvironmentProblem where one row does not fit.
    """
    if file.is_file():
        return int(json.loads(file.read_text(encoding="utf-8"))["micro_batch"])
    rows, most = data.longest()
    engine.model.train()
    free = _free(engine.device)
    _, one, two = (_cost(engine, data.micro_batch_of([rows] * count)) for count in (1, 1, min(2, most)))  # the first one loads libraries

    def check() -> None:
        if one is None or one > free:
            raise EnvironmentProblem(
                "one row does not fit into memory",
                got=f"{sum(map(len, rows)):,} tokens" + ("" if one is None else f", {one / 2**30:.2f} GiB of {free / 2**30:.2f} GiB"),
                cure="lower max_length or pack, set checkpointing: true, or choose a higher ZeRO stage",
            )

    together(check)
    assert one is not None
    count = most if two is not None and two <= one else 1 if two is None else int((SHARE * free - one) // (two - one)) + 1
    found = torch.tensor(max(1, min(count, most)), device=engine.device)
    dist.all_reduce(found, dist.ReduceOp.MIN)
    micro_batch = int(found)
    log.console.print(
        f"micro_batch: auto is {micro_batch} of at most {most} (a row of {sum(map(len, rows)):,} tokens takes {one / 2**30:.2f} GiB of {free / 2**30:.2f} GiB that are free)"
    )
    if dist.get_rank() == 0:
        write_whole(file, json.dumps({"micro_batch": micro_batch}))
    return micro_batch


def _cost(engine: Engine, micro: MicroBatch) -> int | None:
    """Bytes that a forward and a backward take at their peak; None: more than there are."""

    def run() -> None:
        engine.last(False)
        output = engine.forward(micro.to(engine.device))
        engine.backward(0.0 * (output.loss_sum + sum(extra.sum for extra in output.auxiliary.values())))
        engine.step()

    try:
        return _peak(engine.device, run)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None


def _peak(device: torch.device, run: Callable[[], None]) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak counter starts at what is used now
    before = _status("/proc/self/status", "VmRSS")
    run()
    return max(0, _status("/proc/self/status", "VmHWM") - before)


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _status("/proc/meminfo", "MemAvailable") // dist.get_world_size()


def _status(file: str, key: str) -> int:
    """Bytes that Linux names in KiB under a key."""
    line = next(line for line in Path(file).read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024
