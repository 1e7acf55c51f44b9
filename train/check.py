"""What a run would do, and everything that is wrong with it, before it is started: no GPU, no weights, no DeepSpeed."""

import difflib
import glob
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vlm.composition import to_plain
from vlm.config import links, picture_tokens
from vlm.connectors.base import ConnectorSpec, Link
from vlm.encoders.clip import TowerSpec
from vlm.errors import CheckpointError, ConfigurationError, DataError, VLMError
from vlm.hf_config import refuse_unknown
from vlm.images import apply_policy
from vlm.llm.base import check_claims, check_order
from vlm.llm.context import VISION
from vlm.llm.decoder import is_varlen
from vlm.loading import model_folder, text_config
from vlm.processor import IGNORE, Row, load_tokenizer, placeholder_id
from vlm.prompt import TEMPLATES, Prompt
from vlm.train import cost
from vlm.train.bad import allowed
from vlm.train.config import RunSpec, StageSpec
from vlm.train.engine import deepspeed_config, precision_of
from vlm.train.findings import Report, Span, StageReport
from vlm.train.forms import blocks_of, model_at, sources_of, stage_mixture
from vlm.train.optim import rates
from vlm.train.start import check_start
from vlm.weights.files import find_folder

__all__ = ["check_run"]

HEADERS = 1000
"""Pictures per source whose headers are read, unless everything is asked for."""
SECONDS, QUICK_SECONDS = 120.0, 30.0
"""Time after which rows are no longer measured: of `vlm check`, and at the start of training. Records are read, and new forms of conversation rendered, however long it takes."""
SHOWN = 3
"""Rendered samples per stage."""


def check_run(run: RunSpec, *, everything: bool = False, quick: bool = False) -> Report:
    """All problems of a run at once, and what it would do.

    Every record of every source that is used is opened, and the headers of the first 1,000 pictures of each source; every form of conversation is rendered. Rows that may be
    too long are measured for two minutes, and the report says how many were left.

    Args:
        everything: all headers, all rows, however long it takes.
        quick: for the start of training. Half a minute of measuring, no rendered samples; raises ConfigurationProblems where there are problems.
    """
    report = Report(run.name, [StageReport(name) for name in run.stages])
    _Check(run, report, everything, quick).all()
    if quick:
        report.stop()
    return report


def _lies_at(file: str) -> bool:
    """Whether there is something: a file, a folder, a match of a pattern or range; of an address it is assumed."""
    return "://" in file or Path(file).exists() or bool(glob.glob(re.sub(r"\{[^}]*\}", "*", file)))


class _Check:
    """One pass over a run: each step adds to the report, and leaves out what an earlier problem made meaningless."""

    def __init__(self, run: RunSpec, report: Report, everything: bool, quick: bool):
        self.run, self.report, self.everything, self.quick = run, report, everything, quick
        self.seconds = float("inf") if everything else QUICK_SECONDS if quick else SECONDS
        self.ranks = int(os.environ.get("WORLD_SIZE", "1"))
        self.text: Any = None
        self.tokenizer: Any = None
        self.chained = False
        self.wrong: set[str] = set()
        self.readers: dict[str, Any] = {}
        self.rows: dict[str, cost.RowLengths] = {}

    def all(self) -> None:
        self._unset()
        self._ranges()
        if not self.run.stages:
            self.report._add(ConfigurationError("the run has no stage", cure="write one under `stages:`"))
        for name, stage in self.run.stages.items():
            self._stage(f"stages.{name}", stage)
        self._names()
        self._weights()
        self._decoder()
        self._connector()
        self._find_tokenizer()
        self._start()
        for index, stage in enumerate(self.run.stages.values()):
            self._prompt(index, stage)
            self._structure(index, stage)
        self._never_trained()
        self._open_sources()
        for index, stage in enumerate(self.run.stages.values()):
            self._length(index, stage)
        self._data()
        if not self.quick:
            for index, stage in enumerate(self.run.stages.values()):
                self._render(index, stage)
        self._exports()

    @property
    def entered(self) -> bool:
        """Whether it is known in which stage each adaptation enters."""
        return not any(f"model.adapt.{name}.since" in self.wrong for name in self.run.model.adapt)

    # ---- what needs no part --------------------------------------------------------------------------------------------

    @contextmanager
    def _at(self, path: str) -> Iterator[None]:
        """A problem inside belongs to `path`."""
        try:
            yield
        except VLMError as problem:
            self._wrong(path, problem.what, got=problem.got, expected=problem.expected, cure=problem.cure, kind=type(problem))

    def _wrong(self, path: str, what: str, *, kind: type[VLMError] = ConfigurationError, **sides: Any) -> None:
        kind = ConfigurationError if issubclass(kind, ConfigurationError) else kind
        self.wrong.add(path)
        self.report._add(kind(f"{path}: {what}", **sides))

    def _no_such(self, path: str, what: str, name: str, names: Iterable[str]) -> None:
        names = list(names)
        near = difflib.get_close_matches(name, names, 1)
        self._wrong(path, f"no {what} is called {name!r}", expected=f"one of {', '.join(names)}", cure=f"did you mean {near[0]!r}?" if near else None)

    def _unset(self) -> None:
        waiting: dict[str, list[str]] = {}
        for path, value in _strings(to_plain(self.run)):
            for name in re.findall(r"\$\{([\w.]+)\}", value):
                waiting.setdefault(name, []).append(path)
        for name, paths in waiting.items():
            self.report._leave(f"{name} is not set, so {', '.join(paths)} {'is' if len(paths) == 1 else 'are'} not looked at (add {name}=...)")

    def _ranges(self) -> None:
        run = self.run
        for path, value, low, high in (
            ("workers", run.workers, 0, None),
            ("log_every", run.log_every, 1, None),
            ("save.every", run.save.every, 0, None),
            ("save.keep", run.save.keep, 1, None),
            ("bad_budget", run.bad_budget, 0, 1),
        ):
            if value < low or (high is not None and value > high):
                self._wrong(path, "is out of range", got=value, expected=f"{low} or more" if high is None else f"from {low} to {high}", cure=f"set {path}")

    def _stage(self, path: str, stage: StageSpec) -> None:
        if stage.epochs is not None and stage.steps is not None:
            key = path.rpartition(".")[2]
            cure = f"take one away: stages.{key}.epochs=null or stages.{key}.steps=null"
            self._wrong(path, "both epochs and steps are given", got=f"epochs {stage.epochs:g}, steps {stage.steps}", expected="one of them", cure=cure)
        for name in ("batch", "micro_batch", "max_length", "pack"):
            value = getattr(stage, name)
            if isinstance(value, int) and value < 1:
                self._wrong(f"{path}.{name}", "must be at least 1", got=value, expected="1 or more", cure=f"set {path}.{name}")
        if stage.pack is not None and stage.max_length > stage.pack:
            cure = f"set {path}.max_length={stage.pack}, or raise {path}.pack"
            self._wrong(f"{path}.pack", "a sample may be longer than a packed row", got=f"max_length {stage.max_length}", expected=f"at most pack {stage.pack}", cure=cure)
        for name in sources_of(stage):
            if name not in self.run.data:
                self._no_such(f"{path}.data", "data source", name, self.run.data)
        with self._at(f"{path}.images"):
            encoder = self.run.model.encoder
            apply_policy(stage.images.use, Image.new("RGB", (16, 16)), getattr(encoder, "mean", None), getattr(encoder, "size", None))
            if stage.images.tiling is not None and (crop := getattr(encoder, "crop", None) or 1.0) < 1.0:
                self.report.warnings.append(f"{path}.images: the encoder drops the edges of every tile (model.encoder.crop {crop:g}); set model.encoder.crop=1.0 to keep them")
        self._zero(f"{path}.deepspeed", stage)

    def _zero(self, path: str, stage: StageSpec) -> None:
        zero = stage.deepspeed.get("zero_optimization", {"stage": 0})
        level = zero.get("stage") if isinstance(zero, Mapping) else zero
        if level not in (0, 1, 2, 3):
            self._wrong(path, "no ZeRO stage is given", got=f"zero_optimization {zero!r}", expected="stage 0, 1, 2 or 3", cure="name a file of configs/deepspeed")
            return
        with self._at(path):  # at ZeRO 0 only an explicit bf16 is bf16, whatever the device
            deepspeed_config(stage, precision_of(self.run.precision, torch.device("cpu"), int(level)))

    def _names(self) -> None:
        for name, source in self.run.eval.items():
            if source not in self.run.data:
                self._no_such(f"eval.{name}", "data source", source, self.run.data)
        for name, spec in self.run.model.adapt.items():
            if spec.since is not None and spec.since not in self.run.stages:
                self._no_such(f"model.adapt.{name}.since", "stage", spec.since, self.run.stages)

    # ---- model ---------------------------------------------------------------------------------------------------------

    def _there(self, path: str, place: str) -> bool:
        """Whether a model's folder or snapshot is there; where not, that is said."""
        if "${" in place:
            return False
        try:
            find_folder(place)
        except CheckpointError:
            self.report._leave(f"{path}: {place} is neither a folder nor a cached hub snapshot")
            return False
        return True

    def _weights(self) -> None:
        self._connector_files("model.connector", self.run.model.connector)
        if self.run.start is not None:
            return
        towers = {f"model.encoder.{name}".rstrip("."): tower for name, tower in self.run.model.encoder.towers.items()}
        for path, part in (*towers.items(), ("model.llm", self.run.model.llm)):
            if part.weights == "path" and part.path is None:
                self._wrong(path, "weights of a path are asked for", got="no path", expected="a folder with weights", cure=f"set {path}.path, or {path}.weights=random")
            elif part.weights == "path" and self._there(f"{path}.path", str(part.path)) and part.config is not None:
                self._same_numbers(path, part.config, find_folder(str(part.path)) / "config.json")

    def _connector_files(self, path: str, spec: ConnectorSpec) -> None:
        if spec.path is not None and not Path(spec.path).is_file():
            self._wrong(f"{path}.path", "there is no such file", kind=CheckpointError, got=spec.path, expected="a file with the connector's weights", cure=f"set {path}.path")
        if spec.then is not None:
            self._connector_files(f"{path}.then", spec.then)

    def _start(self) -> None:
        """The folder that the run goes on from, and whether it is of the run's parts."""
        if self.run.start is None or not self.run.stages or not self.entered:
            return
        with self._at("start"):
            model_folder(self.run.start)
            if self.text is not None and self.chained and self.tokenizer is not None:
                check_start(self.run.start, model_at(self.run, 0), placeholder_id(self.tokenizer), max(self.tokenizer.get_vocab().values()) + 1)

    def _same_numbers(self, path: str, numbers: Mapping[str, Any], file: Path) -> None:
        """A warning where the configuration's numbers are not those beside the weights: shapes may fit all the same (an activation, a rotary base), and the answers be wrong."""
        if not file.is_file():
            return
        written = json.loads(file.read_text(encoding="utf-8"))
        written = written.get("vision_config", written) if path != "model.llm" else written
        differ = [f"{name} {numbers[name]!r} (beside the weights {written[name]!r})" for name in numbers if name in written and written[name] != numbers[name]]
        if differ:
            self.report.warnings.append(f"{path}: the configuration's numbers are used, and some are not those of {file}: {', '.join(differ)}")

    def _decoder(self) -> None:
        llm = self.run.model.llm
        if llm.config is None and llm.path is not None and not self._there("model.llm.path", llm.path):
            return
        with self._at("model.llm"):
            self.text = text_config(self.run.model)
        if self.text is None:
            return
        if llm.config is not None:
            with self._at("model.llm.config"):
                refuse_unknown(type(self.text), set(llm.config) - {"model_type"})
        if is_varlen(llm.attention) and self.run.precision == "fp32":
            self._wrong("model.llm.attention", "flash attention computes in bf16 only", got="precision: fp32", expected="bf16, or auto on a GPU", cure="set llm.attention: auto")
        claims: dict[str, Sequence[str]] = {}
        for name, spec in self.run.model.adapt.items():
            with self._at(f"model.adapt.{name}"):
                claims[name] = spec.plan(self.text)
        with self._at("model.adapt"):
            check_claims(claims)
        if self.entered and self.run.stages:
            stages = list(self.run.stages)
            entering = sorted(self.run.model.adapt.items(), key=lambda item: (stages.index(item[1].since or stages[0]), item[1].place))
            with self._at("model.adapt"):
                check_order(dict(entering))

    def _connector(self) -> None:
        encoder, connector = self.run.model.encoder, self.run.model.connector
        if isinstance(encoder, TowerSpec) and encoder.path is None:  # else the numbers may be those of the file
            with self._at("model.encoder.config"):
                refuse_unknown(encoder.config_class(), encoder.config or ())
        before = len(self.report.problems)
        link = Link(encoder.widths, encoder.levels, None)
        self._stream("model.connector", connector, link)
        if len(self.report.problems) > before:
            return
        for stream, levels in connector.reads(link).items():
            depth = encoder.levels[stream]
            for level in levels:
                if level != "final" and not (isinstance(level, int) and -depth - 1 <= level <= depth):
                    expected = f"{-depth - 1} to {depth}, or final, of the {depth} blocks of {encoder.use}"
                    self._wrong("model.connector.level", "the encoder has no such hidden state", got=level, expected=expected, cure="set model.connector.level=-2")
        with self._at("model.connector"):
            for number, (spec, behind) in enumerate(links(encoder, connector, self.text.hidden_size if self.text else 1)):
                self._stream("model.connector" + ".then" * number, spec, behind)
        self.chained = len(self.report.problems) == before

    def _stream(self, path: str, spec: ConnectorSpec, link: Link) -> None:
        if spec.stream is not None and spec.stream not in link.widths:
            self._no_such(f"{path}.stream", "stream", spec.stream, link.widths)

    def _find_tokenizer(self) -> None:
        llm = self.run.model.llm
        place = llm.tokenizer or llm.path
        path = "model.llm.tokenizer" if llm.tokenizer else "model.llm.path"
        if place is None or self._there(path, place):
            with self._at(path if place else "model.llm"):
                self.tokenizer = load_tokenizer(self.run.model)

    def _prompt(self, index: int, stage: StageSpec) -> None:
        """The stage's prompt on the tokenizer; the layout of a picture; together the rows' lengths."""
        name, report = list(self.run.stages)[index], self.report.stages[index]
        path = f"stages.{name}.prompt"
        if stage.prompt.use not in (*TEMPLATES, "tokenizer"):
            self._no_such(path, "prompt", stage.prompt.use, [*TEMPLATES, "tokenizer"])
            return
        prompt = None
        if self.tokenizer is not None:
            with self._at(path):
                prompt = Prompt(stage.prompt, self.tokenizer)
        if not self.chained or self.text is None or f"stages.{name}.images" in self.wrong:
            return
        fixed = False
        with self._at(f"stages.{name}.images"):
            report.picture_tokens, fixed = picture_tokens(self.run.model, self.text.hidden_size, stage.images.use, stage.images.tiling)
        if f"stages.{name}.images" in self.wrong:
            return
        if fixed and report.picture_tokens >= stage.max_length > 0:
            cure = f"raise stages.{name}.max_length, or use an encoder with fewer tokens"
            self._wrong(f"stages.{name}.max_length", "too short for one picture", got=stage.max_length, expected=f"more than its {report.picture_tokens:,} tokens", cure=cure)
        elif prompt is not None:
            self.rows[name] = cost.RowLengths(self.run.model, self.text.hidden_size, self.tokenizer, stage.prompt, stage.images.use, stage.images.official, stage.images.tiling)

    def _structure(self, index: int, stage: StageSpec) -> None:
        name = list(self.run.stages)[index]
        if self.text is None or not self.chained or not self.entered or any(path.startswith("model.adapt") for path in self.wrong):
            return
        spec = model_at(self.run, index)
        with self._at("model"):
            model = cost.structure(spec, placeholder_id(self.tokenizer) if self.tokenizer else 0)
            self._parts(model.groups())
            for word, node in stage.train.items():
                with self._at(f"stages.{name}.train.{word}"):
                    rates(model.groups(), {word: node})
            if not any(f"stages.{name}.train.{word}" in self.wrong for word in stage.train):
                with self._at(f"stages.{name}"):
                    self.report.stages[index].groups = cost.planned(model, stage)
        self.report.stages[index].breaks = [f"{adapted}: {text}" for adapted, part in spec.adapt.items() for text in part.breaks()]

    def _never_trained(self) -> None:
        """Adaptations that no stage trains."""
        for name, spec in self.run.model.adapt.items():
            groups = [group for stage in self.report.stages for group in stage.groups if re.search(rf"\b{spec.use}\b", group.path)]
            if groups and all(group.rate is None for group in groups):
                self.report.warnings.append(f"model.adapt.{name} is never trained: no stage gives {groups[0].path} a rate")

    def _parts(self, groups: Mapping[str, list[Any]]) -> None:
        """The parts with their parameters; the last stage's stay."""
        counts: dict[str, int] = {}
        for path, parameters in groups.items():
            part = path.partition(".")[0]
            counts[part] = counts.get(part, 0) + sum(parameter.numel() for parameter in parameters)
        model = self.run.model
        chain = " -> ".join(spec.use for spec, _ in links(model.encoder, model.connector, self.text.hidden_size))
        adapted = "".join(f" + {name}" for name in model.adapt)
        for part, text in (("encoder", model.encoder.use), ("connector", chain), ("llm", f"{self.text.model_type}{adapted}")):
            self.report.parts[part] = f"{text}, {counts.get(part, 0):,} parameters"

    # ---- data ----------------------------------------------------------------------------------------------------------

    def _used(self) -> dict[str, Any]:
        """Sources of stages and of `eval`."""
        named = [name for stage in self.run.stages.values() for name in sources_of(stage)]
        return {name: self.run.data[name] for name in dict.fromkeys([*named, *self.run.eval.values()]) if name in self.run.data}

    def _open_sources(self) -> None:
        for name, spec in self._used().items():
            file, size = str(getattr(spec, "file", "")), getattr(spec, "samples", None)
            if "${" in file:
                continue
            if size is not None and not _lies_at(file):
                self.report._leave(f"data.{name}.file: {file} is not there; its {size:,} samples are taken from `samples`")
                continue
            with self._at(f"data.{name}"):
                reader = self.readers[name] = spec.open()
                self.report.warnings += [f"data.{name}: {warning}" for warning in getattr(reader, "warnings", ())]
                if size is not None and size != len(reader):
                    self.report.warnings.append(f"data.{name}.samples: {size:,} are named, the file holds {len(reader):,}, which count")

    def _length(self, index: int, stage: StageSpec) -> None:
        if stage.batch < 1 or (stage.micro_batch != "auto" and stage.micro_batch < 1):
            return
        name, report = list(self.run.stages)[index], self.report.stages[index]
        report.batch = f"{stage.batch:,} samples per step = {cost.batch_line(stage, self.ranks)}"
        if (stage.epochs is not None and stage.steps is not None) or any(source not in self.run.data for source in sources_of(stage)):
            return
        with self._at(f"stages.{name}"):
            report.length = cost.length(self.run, index, self._sizes())

    def _sizes(self) -> dict[str, int | None]:
        return {name: len(self.readers[name]) if name in self.readers else getattr(spec, "samples", None) for name, spec in self._used().items()}

    def _data(self) -> None:
        until = time.monotonic() + self.seconds
        scans: dict[str, cost.Scan] = {}
        for name, reader in self.readers.items():
            stages = [(stage_name, stage) for stage_name, stage in self.run.stages.items() if name in sources_of(stage) and stage_name in self.rows]
            measures = [cost.Measure(stage_name, self.rows[stage_name], stage.max_length, stage.too_long) for stage_name, stage in stages]
            spec = self.run.data[name]
            images = getattr(spec, "images", None)
            unset = images is not None and "${" in images
            absent = images is not None and not Path(images).is_dir()
            headers = 0 if absent else float("inf") if self.everything else HEADERS
            scans[name] = cost.scan(str(getattr(spec, "file", "")), reader, measures, headers=headers, until=until)
            if absent and not unset and scans[name].vision:
                self._wrong(f"data.{name}.images", "there is no such folder of pictures", kind=DataError, got=images, cure=f"set data.{name}.images, or data_root")
            elif scans[name].closed:
                self.report._leave(f"data.{name}: the headers of {scans[name].closed:,} pictures" + ("" if absent else " (--all reads every one)"))
            self._refused(name, spec, scans[name], measures)
            self._measured(name, scans[name], measures)
        for index, stage in enumerate(self.run.stages.values()):
            self._blind(index, stage, scans)

    def _refused(self, name: str, spec: Any, scan: cost.Scan, measures: list[cost.Measure]) -> None:
        source = str(getattr(spec, "file", name))
        problems = [*scan.refused.problems(source), *(problem for measure in measures for problem in measure.problems(source))]
        if getattr(spec, "on_bad", "error") == "error" or any(measure.nothing_left for measure in measures):
            for problem in problems:
                self.report._add(problem)
            return
        bad = [*getattr(self.readers[name], "bad", ())]
        samples = len(bad) + len(self.readers[name])
        if len(bad) > allowed(self.run.bad_budget, samples):
            got, expected = f"{len(bad):,} of {samples:,} samples, the first: {bad[0]}", f"at most {allowed(self.run.bad_budget, samples):,} (bad_budget {self.run.bad_budget:g})"
            self._wrong(f"data.{name}", "too many bad samples", kind=DataError, got=got, expected=expected, cure="mend the data, or raise bad_budget")
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
                self.report._leave(
                    f"data.{name}: whether {measure.late:,} rows of stage {measure.stage} are too long, after {self.seconds:g} s of measuring (--all measures every one)"
                )
            if measure.unknown:
                self.report._leave(f"data.{name}: the length of {measure.unknown:,} rows of stage {measure.stage}, whose pictures' sizes are not known")

    def _blind(self, index: int, stage: StageSpec, scans: Mapping[str, cost.Scan]) -> None:
        """A stage that trains what only pictures reach, on text alone."""
        found = [scans[name] for name in sources_of(stage) if name in scans]
        if len(found) < len(sources_of(stage)) or any(scan.vision for scan in found):
            return
        report = self.report.stages[index]
        trained = {group.path.partition(".")[0] for group in report.groups if group.rate is not None}
        if parts := [f"the {part}" for part in ("encoder", "connector") if part in trained]:
            count = sum(scan.readable for scan in found)
            self.report.warnings.append(f"stage {report.name} trains {' and '.join(parts)}, but no sample of {count:,} has an image")

    def _render(self, index: int, stage: StageSpec) -> None:
        """The first rows of the stage's own order that can be rendered."""
        report = self.report.stages[index]
        if report.name not in self.rows or report.length is None or any(name not in self.readers for name in sources_of(stage)):
            return
        rows = self.rows[report.name]
        readers = {name: self.readers[name] for name in sources_of(stage)}
        mixture = stage_mixture(self.run, index, {name: len(reader) for name, reader in readers.items()}, blocks_of(readers))
        for source, place in (one for step in range(min(mixture.steps, 10)) for one in mixture.step(step)):
            if len(report.rendered) == SHOWN:
                return
            try:
                row = rows.row(self.readers[source][place], max_length=stage.max_length, too_long=stage.too_long)
            except DataError:
                continue  # among the problems
            report.rendered.append(_spans(row, rows.tokenizer))

    def _exports(self) -> None:
        if self.text is None or not self.run.stages or not self.entered:
            return
        from vlm.weights import deepseek
        from vlm.weights.llava import obstacles

        last = model_at(self.run, len(self.run.stages) - 1)
        found = list(map(str, obstacles(last, self.text)))
        name, stage = list(self.run.stages.items())[-1]
        if stage.images.tiling is not None:
            found.append(f"stages.{name}.images is anyres, LLaVA reads one square per picture")
        self.report.exports["llava"] = f"not possible: {'; '.join(found)}" if found else "transformers' LlavaForConditionalGeneration"
        for family in (deepseek.SINGLE, deepseek.HYBRID):
            if stage.images.use == "native" and not family.obstacles(last, self.text):
                self.report.exports[family.name] = f"transformers' {family.model_class}"


def _strings(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
    for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ():
        yield from _strings(inner, f"{path}.{key}".lstrip("."))


def _spans(row: Row, tokenizer: Any) -> list[Span]:
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
