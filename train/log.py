"""What a run says while it goes: a progress line, metrics.jsonl, and the same numbers for TensorBoard."""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from vlm.whole import keep_records, records

__all__ = ["Log"]


class Log:
    """Rank 0's voice; the other ranks keep quiet. Each step's record goes to metrics.jsonl and, once `rewind` has said where the run stands, to tensorboard/; every `every` steps a line
    to the terminal."""

    def __init__(self, folder: Path, rank: int, every: int):
        self.folder, self.loud, self.every = folder, rank == 0, every
        self.console = Console(stderr=False, quiet=not self.loud, width=None if sys.stdout.isatty() else 180, highlight=False, markup=False)
        self._file = open(folder / "metrics.jsonl", "a", encoding="utf-8") if self.loud else None  # noqa: SIM115  open as long as the run
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._window: list[dict[str, Any]] = []
        self._board: Any = None
        self._board_asked = False

    def rewind(self, total: int) -> None:
        """Forget steps behind `total`: a run that goes on from an older checkpoint writes them again. Called before the first step of a stage."""
        if self._file is None:
            return
        if not self._board_asked:  # a later stage of the same process goes on in the same file
            self._board_asked, self._board = True, self._open_board(total)
        self._file.close()
        path = self.folder / "metrics.jsonl"
        for kept in (path, self.folder / "validation.jsonl"):
            keep_records(kept, lambda record: record["total"] <= total)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def _open_board(self, total: int) -> Any:
        """A writer whose events hide those of earlier processes behind `total`; None, and said so, where TensorBoard cannot be had."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except (ImportError, AttributeError, TypeError) as error:  # the last two: an old TensorBoard beside a newer NumPy or protobuf
            absent = isinstance(error, ModuleNotFoundError) and error.name == "tensorboard"
            reason = "TensorBoard is not installed" if absent else f"TensorBoard cannot be imported ({error})"
            self.console.print(f"{reason}: the curves are in metrics.jsonl alone" + (' (pip install "vlm[tensorboard]")' if absent else ""))
            return None
        return SummaryWriter(str(self.folder / "tensorboard"), purge_step=total + 1)

    def begin(self, stage: str, start: int, steps: int) -> None:
        if not self.loud:
            return
        self._stage, self._steps, self._window = stage, steps, []
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=8),
                TextColumn("{task.completed}/{task.total}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[facts]}"),
            )
            self._progress = Progress(*columns, console=self.console)
            self._task = self._progress.add_task(stage, total=steps, completed=start, facts="")
            self._progress.start()

    def step(self, record: dict[str, Any]) -> None:
        """record: stage, step (from 1), loss, tokens, supervised, seconds, wait, rates, ..."""
        if self._file is None:
            return
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._board is not None:
            for tag, value in _scalars(record):
                self._board.add_scalar(tag, value, record["total"])
            self._board.flush()  # as the line above: a kill loses no step that a checkpoint holds
        self._window.append(record)
        last = record["step"] == self._steps
        if record["step"] % self.every and not last:
            return
        seconds = sum(entry["seconds"] for entry in self._window)
        loss = sum(entry["loss"] for entry in self._window) / len(self._window)
        speed, supervised = (sum(entry[name] for entry in self._window) for name in ("tokens", "supervised"))
        speed, wait, left = speed / seconds, 100 * sum(entry["wait"] for entry in self._window) / seconds, (self._steps - record["step"]) * seconds / len(self._window)
        self._window = []
        if self._progress is not None and self._task is not None:  # 80 columns
            self._progress.update(
                self._task, completed=record["step"], facts=f"loss {loss:.3f} {speed / 1000:.1f}k tok/s {supervised} sup wait {wait:.0f}% {record['memory']:.1f}G"
            )
            return
        facts = f"loss {loss:.4f}  {speed:,.0f} tokens/s  supervised {supervised:,}  data wait {wait:.0f} %  memory {record['memory']:.2f} GiB" + (
            f"  MFU {100 * record['mfu']:.0f} %" if "mfu" in record else ""
        )
        self.console.print(f"{self._stage} {record['step']}/{self._steps}  {facts}  {left:.0f} s left")

    def validation(self, record: dict[str, Any], best: bool) -> None:
        """record: stage, step, total, loss, supervised, sources (name -> loss). best: no loss of the stage was as small. Goes to validation.jsonl and, as `validation/...`, to tensorboard/."""
        if self._file is None:
            return
        with open(self.folder / "validation.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self._board is not None:
            for tag, value in _scalars({key: record[key] for key in ("loss", "sources")}, "validation/"):
                self._board.add_scalar(tag, value, record["total"])
            self._board.flush()
        sources = ", ".join(f"{name} {loss:.4f}" for name, loss in record["sources"].items())
        self.console.print(f"{record['stage']} {record['step']}  validation loss {record['loss']:.4f} ({sources}){', the smallest so far' if best else ''}")

    def warn(self, text: str) -> None:
        """Also goes to warnings.jsonl, once."""
        self.console.print(f"warning: {text}")
        file = self.folder / "warnings.jsonl"
        if self.loud and {"text": text} not in records(file):
            with open(file, "a", encoding="utf-8") as opened:
                opened.write(json.dumps({"text": text}) + "\n")

    def end(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def close(self) -> None:
        self.end()
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def _scalars(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a record as TensorBoard's tags: `loss`, `rates/connector.mlp`, `sources/captions/loss`."""
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and f"{prefix}{key}" not in ("step", "total"):
            yield f"{prefix}{key}", value
