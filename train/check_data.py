"""What a run's data hold against it: sources that are not there, records that are refused, rows that are too long; and the first rows as they are trained on."""

import os
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from vlm.data.base import Reader, Source
from vlm.data.survey import HEADERS
from vlm.errors import DataError
from vlm.llm.context import VISION
from vlm.row import IGNORE, Row
from vlm.train import cost
from vlm.train.bad import allowed
from vlm.train.config import RunSpec, StageSpec
from vlm.train.findings import Report, Span
from vlm.train.forms import blocks_of, stage_mixture

__all__ = ["DataCheck", "spans_of"]

SECONDS, QUICK_SECONDS = 120.0, 30.0
"""Time after which rows are no longer measured: of `vlm check`, and at the start of training. Records are read, and new forms of conversation rendered, however long it takes."""
SHOWN = 3
"""Rendered samples per stage."""


class DataCheck:
    """One pass over the sources of a run. It adds to the report, and leaves out what an earlier problem made meaningless.

    rows: stage -> its processor, of those stages whose rows can be made.
    """

    def __init__(self, run: RunSpec, report: Report, rows: Mapping[str, cost.RowLengths], *, everything: bool, quick: bool):
        self.run, self.report, self.rows, self.everything, self.quick = run, report, rows, everything, quick
        self.seconds = float("inf") if everything else QUICK_SECONDS if quick else SECONDS
        self.ranks = int(os.environ.get("WORLD_SIZE", "1"))
        self.readers: dict[str, Reader[Any]] = {}

    def all(self) -> None:
        stages = list(enumerate(self.run.stages.values()))
        self._open_sources()
        self._validation()
        for index, stage in stages:
            self._length(index, stage)
        self._data()
        if not self.quick:
            for index, stage in stages:
                self._render(index, stage)

    def _used(self) -> dict[str, Source]:
        """Sources of stages, of validation and of `eval`."""
        named = [name for stage in self.run.stages.values() for name in stage.sources]
        return {name: self.run.data[name] for name in dict.fromkeys([*named, *self.run.validated.values(), *self.run.eval.values()]) if name in self.run.data}

    def _open_sources(self) -> None:
        for name, spec in self._used().items():
            if "${" in spec.file:
                continue
            if spec.samples is not None and not spec.there():
                self.report.leave(f"data.{name}.file: {spec.file} is not there; its {spec.samples:,} samples are taken from `samples`")
                continue
            with self.report.at(f"data.{name}"):
                reader = self.readers[name] = spec.open()
                self.report.warnings += [f"data.{name}: {warning}" for warning in reader.warnings]
                if spec.samples not in (None, len(reader)):
                    self.report.warnings.append(f"data.{name}.samples: {spec.samples:,} are named, the file holds {len(reader):,}, which count")

    def _validation(self) -> None:
        """What the loss is looked at on while training."""
        validate, sizes = self.run.validate, self._sizes()
        for name, source in self.run.validated.items():
            if (size := sizes.get(source)) is not None:
                self.report.validation.append(f"{name}: {min(size, validate.samples):,} of {size:,} samples of {source}, every {validate.every:,} steps and at a stage's end")
            if trained := [stage_name for stage_name, stage in self.run.stages.items() if source in stage.sources]:
                self.report.warnings.append(f"validate: {name} looks at {source}, which stage {' and '.join(trained)} {'trains' if len(trained) == 1 else 'train'} on")

    def _length(self, index: int, stage: StageSpec) -> None:
        if stage.batch < 1 or (stage.micro_batch != "auto" and stage.micro_batch < 1):
            return
        name, report = list(self.run.stages)[index], self.report.stages[index]
        report.batch = f"{stage.batch:,} samples per step = {cost.batch_line(stage, self.ranks)}"
        if (stage.epochs is not None and stage.steps is not None) or any(source not in self.run.data for source in stage.sources):
            return
        with self.report.at(f"stages.{name}"):
            report.length = cost.length(self.run, index, self._sizes())

    def _sizes(self) -> dict[str, int | None]:
        return {name: len(self.readers[name]) if name in self.readers else spec.samples for name, spec in self._used().items()}

    def _data(self) -> None:
        until = time.monotonic() + self.seconds
        scans: dict[str, cost.Scan] = {}
        for name, reader in self.readers.items():
            validated = name in self.run.validated.values()  # with every stage's prompt
            stages = [(stage_name, stage) for stage_name, stage in self.run.stages.items() if (validated or name in stage.sources) and stage_name in self.rows]
            measures = [cost.Measure(stage_name, self.rows[stage_name], stage.max_length, stage.too_long) for stage_name, stage in stages]
            spec = self.run.data[name]
            images = spec.images
            unset = images is not None and "${" in images
            absent = images is not None and not Path(images).is_dir()
            headers = 0 if absent else float("inf") if self.everything else HEADERS
            scans[name] = cost.scan(spec.file, reader, measures, headers=headers, until=until)
            if absent and not unset and scans[name].vision:
                self.report.refuse(f"data.{name}.images", "there is no such folder of pictures", kind=DataError, got=images, cure=f"set data.{name}.images, or data_root")
            elif scans[name].closed:
                self.report.leave(f"data.{name}: the headers of {scans[name].closed:,} pictures" + ("" if absent else " (--all reads every one)"))
            self._refused(name, spec, scans[name], measures)
            self._measured(name, scans[name], measures)
        for index, stage in enumerate(self.run.stages.values()):
            self._blind(index, stage, scans)

    def _refused(self, name: str, spec: Source, scan: cost.Scan, measures: list[cost.Measure]) -> None:
        problems = [*scan.refused.problems(spec.file), *(problem for measure in measures for problem in measure.problems(spec.file))]
        if spec.on_bad == "error" or any(measure.nothing_left for measure in measures):
            for problem in problems:
                self.report.add(problem)
            return
        bad = self.readers[name].bad
        samples = len(bad) + len(self.readers[name])
        if len(bad) > allowed(self.run.bad_budget, samples):
            got, expected = f"{len(bad):,} of {samples:,} samples, the first: {bad[0]}", f"at most {allowed(self.run.bad_budget, samples):,} (bad_budget {self.run.bad_budget:g})"
            self.report.refuse(f"data.{name}", "too many bad samples", kind=DataError, got=got, expected=expected, cure="mend the data, or raise bad_budget")
            return
        if left := len(bad) + len(scan.refused) + sum(len(measure.lost) for measure in measures):
            self.report.warnings.append(f"data.{name}: {left:,} samples are left out or replaced (on_bad: skip), the first: {[*bad, *problems][0]}")

    def _measured(self, name: str, scan: cost.Scan, measures: list[cost.Measure]) -> None:
        for measure in measures:
            report = next(stage for stage in self.report.stages if stage.name == measure.stage)
            for note, count in measure.notes.items():
                report.counted[f"{name}: {note}"] = count
            if measure.cut and measure.too_long == "cut":
                report.counted[f"{name}: cut to max_length {measure.max_length}, the longest has {measure.longest:,} tokens"] = measure.cut
            if measure.picture_tokens:
                seen = measure.picture_tokens | set(report.picture_range or ())
                report.picture_range = min(seen), max(seen)
            if measure.late:
                self.report.leave(
                    f"data.{name}: whether {measure.late:,} rows of stage {measure.stage} are too long, after {self.seconds:g} s of measuring (--all measures every one)"
                )
            if measure.unknown:
                self.report.leave(f"data.{name}: the length of {measure.unknown:,} rows of stage {measure.stage}, whose pictures' sizes are not known")

    def _blind(self, index: int, stage: StageSpec, scans: Mapping[str, cost.Scan]) -> None:
        """A stage that trains what only pictures reach, on text alone."""
        found = [scans[name] for name in stage.sources if name in scans]
        if len(found) < len(stage.sources) or any(scan.vision for scan in found):
            return
        report = self.report.stages[index]
        trained = {group.path.partition(".")[0] for group in report.groups if group.rate is not None}
        if parts := [f"the {part}" for part in ("encoder", "connector") if part in trained]:
            count = sum(scan.readable for scan in found)
            self.report.warnings.append(f"stage {report.name} trains {' and '.join(parts)}, but no sample of {count:,} has an image")

    def _render(self, index: int, stage: StageSpec) -> None:
        """The first rows of the stage's own order that can be rendered."""
        report = self.report.stages[index]
        if report.name not in self.rows or report.length is None or any(name not in self.readers for name in stage.sources):
            return
        rows = self.rows[report.name]
        readers = {name: self.readers[name] for name in stage.sources}
        mixture = stage_mixture(self.run, index, {name: len(reader) for name, reader in readers.items()}, blocks_of(readers))
        for source, place in (one for step in range(min(mixture.steps, 10)) for one in mixture.step(step)):
            if len(report.rendered) == SHOWN:
                return
            try:
                row = rows.row(self.readers[source][place], max_length=stage.max_length, too_long=stage.too_long)
            except DataError:
                continue  # among the problems
            report.rendered.append(spans_of(row, rows.tokenizer))


def spans_of(row: Row, tokenizer: Any) -> list[Span]:
    """A row as text: pictures as their number of tokens, questions that do not see one another set apart."""
    keys = list(zip(row.branches, row.pictures, row.types, (label != IGNORE for label in row.labels), strict=True))
    edges = [0, *(index for index in range(1, len(row)) if keys[index] != keys[index - 1]), len(row)]
    spans: list[Span] = []
    text: list[int] = []
    branch = 0
    for start, end in pairwise(edges):
        here, _, kind, supervised = keys[start]
        if here != branch:
            spans.append((f"\n    <question {here}> ", False))
            branch = here
        if kind == VISION:
            spans.append((f"<picture: {end - start} tokens>", False))
            continue
        # Decoded behind what stands before, or the space in front of a word would be lost.
        before = tokenizer.decode(text, skip_special_tokens=False)
        text += row.ids[start:end]
        whole = tokenizer.decode(text, skip_special_tokens=False)
        spans.append((whole.removeprefix(before), supervised))
    return spans
