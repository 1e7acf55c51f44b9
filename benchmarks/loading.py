"""How long a training step waits for its data: `wait` against `seconds` in the metrics of a real run on pictures, with the samples made by the training process itself and by 2 workers."""

import contextlib
import io
import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from _corpus import corpus
from _paired import Result, run
from _sides import NARROW, Width, run_of

import vlm

WANTED = 0.02


@dataclass(frozen=True)
class Sizes:
    """skipped: steps at the start that are not counted: the first ones wait for workers to be started, and pay what first calls pay."""

    per_set: int = 48
    batch: int = 16
    steps: int = 24
    skipped: int = 6
    width: Width = field(default_factory=Width)


TINY = Sizes(per_set=4, batch=4, steps=4, skipped=1, width=NARROW)


def measure(sizes: Sizes) -> Iterator[Result]:
    with tempfile.TemporaryDirectory() as scratch:
        samples = corpus(Path(scratch), sizes.per_set)
        for workers in (2, 0):
            folder = samples.root / f"workers-{workers}"
            folder.mkdir()
            settings = {"batch": sizes.batch, "micro_batch": 2, "pack": 512, "max_length": 512, "steps": sizes.steps}
            with contextlib.redirect_stdout(io.StringIO()):
                made = vlm.fit(run_of(samples, sizes.width, folder, workers=workers, **settings))
            lines = (made / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            records = [json.loads(line) for line in lines][sizes.skipped :]
            share = sum(record["wait"] for record in records) / sum(record["seconds"] for record in records)
            facts = {
                "steps": f"{len(records)} of {sizes.batch} samples, {statistics.median(record['seconds'] for record in records):.2f} s each",
                "longest wait": f"{max(record['wait'] for record in records):.4f} s",
            }
            yield Result(f"share of a step that waits for data, {workers} workers", share, wanted=("<=", WANTED) if workers else None, facts=facts)


if __name__ == "__main__":
    run(measure, Sizes(), TINY)
