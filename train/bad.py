"""bad_samples.jsonl: which samples were left out or replaced, and when they are too many."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm.errors import DataError
from vlm.whole import keep_records, records

__all__ = ["BadSamples", "allowed"]


def allowed(budget: float, samples: int) -> int:
    """How many of the samples may be bad. Rounded up, so that one in a small set does not stop a run."""
    return math.ceil(budget * samples)


class BadSamples:
    """The bad samples of one stage, over all ranks.

    Args:
        budget: share of the stage's `samples` that may be bad, rounded up (`allowed`).
    """

    def __init__(self, folder: Path, stage: str, rank: int, budget: float, samples: int):
        self.file, self.stage, self.rank, self.budget, self.samples = folder / "bad_samples.jsonl", stage, rank, budget, samples
        self.count = 0

    def opened(self, sources: Mapping[str, Any]) -> None:
        """Write down what readers left out when they were opened, as step 0. Raises DataError where that is above the budget."""
        for name, reader in sources.items():
            bad = [{"source": name, "kind": problem.kind, "reason": str(problem)} for problem in reader.bad]
            if self.rank == 0:
                self.add(0, bad)
            if len(bad) > allowed(self.budget, len(reader) + len(bad)):
                self._stop(f"source {name}", len(bad), len(reader) + len(bad), Counter(entry["kind"] for entry in bad))

    def rewind(self, step: int) -> None:
        """Forget this stage's lines but those of steps 1 to `step`, and count these. Called on all ranks, which then wait for one another."""
        self.count = sum(0 < record["step"] <= step for record in self._own())
        if self.rank == 0:
            keep_records(self.file, lambda record: record["stage"] != self.stage or 0 < record["step"] <= step)

    def add(self, step: int, entries: list[dict[str, Any]]) -> None:
        """Write down this rank's bad samples of a step."""
        if entries:
            with open(self.file, "a", encoding="utf-8") as file:
                file.writelines(json.dumps({"stage": self.stage, "step": step} | entry) + "\n" for entry in entries)

    def check(self, step: int, count: int) -> None:
        """count: bad samples of this step over all ranks. Raises DataError on every rank once they are more than the budget allows."""
        self.count += count
        if self.count > allowed(self.budget, self.samples):
            kinds = Counter(record["kind"] for record in self._own() if record["step"])
            self._stop(f"stage {self.stage} at step {step}", self.count, self.samples, kinds)

    def _own(self) -> list[dict[str, Any]]:
        return [record for record in records(self.file) if record["stage"] == self.stage]

    def _stop(self, where: str, count: int, samples: int, kinds: Counter[str]) -> None:
        raise DataError(
            f"too many bad samples in {where}",
            got=f"{count:,} ({', '.join(f'{number:,} {kind}' for kind, number in kinds.most_common())})",
            expected=f"at most {allowed(self.budget, samples):,} (bad_budget {self.budget:g} of {samples:,} samples)",
            cure=f"look at {self.file} and at the source with `vlm data check`, mend the data, or raise bad_budget",
        )
