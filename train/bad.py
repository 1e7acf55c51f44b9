"""bad_samples.jsonl: which samples were left out or replaced, and when they are too many."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vlm.data.problems import kind_of
from vlm.errors import DataError

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
            left_out: Iterable[DataError] = getattr(reader, "bad", ())
            bad = [{"source": name, "kind": kind_of(problem), "reason": str(problem)} for problem in left_out]
            if self.rank == 0:
                self.add(0, bad)
            if len(bad) > allowed(self.budget, len(reader) + len(bad)):
                self._stop(f"source {name}", len(bad), len(reader) + len(bad), Counter(entry["kind"] for entry in bad))

    def rewind(self, step: int) -> None:
        """Forget this stage's lines but those of steps 1 to `step`, and count these. Called on all ranks, which then wait for one another."""
        kept = [line for line in self._lines() if line["stage"] != self.stage or 0 < line["step"] <= step]
        self.count = sum(line["stage"] == self.stage for line in kept)
        if self.rank == 0 and self.file.exists():
            partial = self.file.with_suffix(".partial")
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            partial.replace(self.file)

    def add(self, step: int, entries: list[dict[str, Any]]) -> None:
        """Write down this rank's bad samples of a step."""
        if entries:
            with open(self.file, "a", encoding="utf-8") as file:
                file.writelines(json.dumps({"stage": self.stage, "step": step} | entry) + "\n" for entry in entries)

    def check(self, step: int, count: int) -> None:
        """count: bad samples of this step over all ranks. Raises DataError on every rank once they are more than the budget allows."""
        self.count += count
        if self.count > allowed(self.budget, self.samples):
            kinds = Counter(line["kind"] for line in self._lines() if line["stage"] == self.stage and line["step"])
            self._stop(f"stage {self.stage} at step {step}", self.count, self.samples, kinds)

    def _lines(self) -> list[dict[str, Any]]:
        if not self.file.is_file():
            return []
        return [json.loads(line) for line in self.file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]

    def _stop(self, where: str, count: int, samples: int, kinds: Counter[str]) -> None:
        raise DataError(
            f"too many bad samples in {where}",
            got=f"{count:,} ({', '.join(f'{number:,} {kind}' for kind, number in kinds.most_common())})",
            expected=f"at most {allowed(self.budget, samples):,} (bad_budget {self.budget:g} of {samples:,} samples)",
            cure=f"look at {self.file} and at the source with `vlm data check`, mend the data, or raise bad_budget",
        )
