"""Two things timed in one process, by turns, so that whatever else the machine does meets both. Ratios are what a bench claims, never milliseconds."""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Block", "Result", "compare", "noise", "run"]

THREADS = 2
SETTINGS = {"OMP_NUM_THREADS": str(THREADS), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
"""Read when a process starts."""

Block = Callable[[int], tuple[float, float] | None]
"""The work that is timed. It is handed the number of the pair, so that both sides of a pair work on the same samples.

It may say itself how many seconds and CPU seconds it took, where not all that it does should count.
"""


@dataclass(frozen=True)
class Result:
    """A line of a bench. value: mostly a ratio, as `claim` says. quartiles: of the value over the pairs. cpu: the same ratio in CPU time of the process. wanted: what was aimed at, e.g. (">=", 1.1)."""

    claim: str
    value: float
    quartiles: tuple[float, float] | None = None
    cpu: float | None = None
    wanted: tuple[str, float] | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        spread = f" [{self.quartiles[0]:.2f}..{self.quartiles[1]:.2f}]" if self.quartiles else ""
        cpu = f", in CPU time {self.cpu:.2f}" if self.cpu is not None else ""
        verdict = ""
        if self.wanted:
            sign, bound = self.wanted
            met = self.value >= bound if sign == ">=" else self.value <= bound
            verdict = f"; wanted {sign} {bound:g}: {'met' if met else 'MISSED'}"
        facts = "".join(f"\n      {name}: {value}" for name, value in self.facts.items())
        return f"   {self.claim}: {self.value:.3g}{spread}{cpu}{verdict}{facts}"


def compare(claim: str, ours: Block, theirs: Block, *, pairs: int, wanted: tuple[str, float] | None = None, warm: int = 2, per: float = 1.0, unit: str = "") -> Result:
    """How many times as fast `ours` is: time of theirs / time of ours per pair, in the order ours, theirs, theirs, ours, ...; the median and the quartiles over the pairs.

    warm: untimed calls of each before. per: units of work in a block, for the speeds that are told beside the ratio (medians over the pairs; they mean little on a shared machine).
    """
    for number in range(warm):
        ours(number)
        theirs(number)
    walls: list[tuple[float, float]] = []
    cpus: list[tuple[float, float]] = []
    for number in range(pairs):
        order = (ours, theirs) if number % 2 == 0 else (theirs, ours)
        timed = [_timed(block, number) for block in order]
        mine, other = timed if number % 2 == 0 else timed[::-1]
        walls.append((mine[0], other[0]))
        cpus.append((mine[1], other[1]))
    ratios = [other / mine for mine, other in walls]
    facts = {"pairs": pairs} | ({unit: " against ".join(f"{per / statistics.median(side):.1f}" for side in zip(*walls, strict=True))} if unit else {})
    return Result(claim, statistics.median(ratios), _quartiles(ratios), statistics.median(other / mine for mine, other in cpus), wanted, facts)


def noise(block: Block, *, pairs: int) -> Result:
    """The same thing on both sides: how far a ratio is from 1 by chance."""
    return compare("the same on both sides (noise)", block, block, pairs=pairs)


def run(measure: Callable[[Any], Iterable[Result]], sizes: Any, tiny: Any) -> None:
    """The command line of a bench file: prints its results; --tiny: sizes at which numbers mean nothing; --json: also written to benchmarks/results/."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--tiny", action="store_true", help="miniature sizes, to see that it runs")
    parser.add_argument("--json", action="store_true", help="write benchmarks/results/NAME.json as well")
    options = parser.parse_args()
    _restart()
    sizes = tiny if options.tiny else sizes
    import torch
    import transformers

    from vlm.train.engine import keep_memory  # vlm puts the torchvision cure in place before transformers imports it

    keep_memory()  # for both sides, as training has it
    torch.set_num_threads(THREADS)
    setting = {"torch": torch.__version__, "transformers": transformers.__version__, "threads": THREADS, "dtype": "float32", "sizes": asdict(sizes)}
    print("  ", ", ".join(f"{name} {value}" for name, value in setting.items()), flush=True)
    results = []
    for result in measure(sizes):
        print(result, flush=True)
        results.append(asdict(result))
    if options.json:
        file = Path(sys.argv[0]).resolve()
        target = file.parent / "results" / f"{file.stem}.json"
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(setting | {"results": results}, indent=1) + "\n", encoding="utf-8")


def _timed(block: Block, number: int) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    own = block(number)
    return own or (time.perf_counter() - wall, time.process_time() - cpu)


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def _restart() -> None:
    """This process once more under the settings that are read at its start."""
    if any(os.environ.get(name) != value for name, value in SETTINGS.items()):
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | SETTINGS)
