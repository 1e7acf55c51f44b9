"""What a run would do, and everything that is wrong with it, before it is started: no GPU, no weights, no DeepSpeed."""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vlm.composition import to_plain
from vlm.config import links, picture_tokens
from vlm.connectors.base import ConnectorSpec, Link
from vlm.encoders.tower import TowerSpec
from vlm.errors import CheckpointError, ConfigurationError, EnvironmentProblem, listed
from vlm.folders import check_place
from vlm.hf_config import refuse_unknown
from vlm.images import apply_policy
from vlm.llm.base import check_claims, check_order
from vlm.llm.decoder import is_varlen
from vlm.loading import model_folder, text_config
from vlm.processor import load_tokenizer, placeholder_id
from vlm.prompt import TEMPLATES, Prompt
from vlm.train import cost
from vlm.train.check_data import DataCheck
from vlm.train.config import RunSpec, StageSpec
from vlm.train.engine import deepspeed_config, precision_of
from vlm.train.findings import Report, StageReport
from vlm.train.forms import model_at, stage_processor
from vlm.train.optim import rates
from vlm.train.space import checkpoint_bytes, room, size_of, stage_bytes
from vlm.train.start import check_start, left_out
from vlm.weights.files import find_folder, read_json

__all__ = ["check_run"]


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


class _Check:
    """One pass over a run: each step adds to the report, and leaves out what an earlier problem made meaningless."""

    def __init__(self, run: RunSpec, report: Report, everything: bool, quick: bool):
        self.run, self.report, self.everything, self.quick = run, report, everything, quick
        self.text: Any = None
        self.tokenizer: Any = None
        self.chained = False
        self.rows: dict[str, cost.RowLengths] = {}

    def all(self) -> None:
        self._unset()
        self._ranges()
        if not self.run.stages:
            self.report.add(ConfigurationError("the run has no stage", cure="write one under `stages:`"))
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
        self._disk()
        DataCheck(self.run, self.report, self.rows, everything=self.everything, quick=self.quick).all()
        self._exports()

    @property
    def entered(self) -> bool:
        """Whether it is known in which stage each adaptation enters."""
        return not any(f"model.adapt.{name}.since" in self.report.wrong for name in self.run.model.adapt)

    # ---- what needs no part --------------------------------------------------------------------------------------------

    def _no_such(self, path: str, what: str, name: str, names: Iterable[str]) -> None:
        names = list(names)
        near = difflib.get_close_matches(name, names, 1)
        self.report.refuse(path, f"no {what} is called {name!r}", expected=f"one of {', '.join(names)}", cure=f"did you mean {near[0]!r}?" if near else None)

    def _unset(self) -> None:
        waiting: dict[str, list[str]] = {}
        for path, value in _strings(to_plain(self.run)):
            for name in re.findall(r"\$\{([\w.]+)\}", value):
                waiting.setdefault(name, []).append(path)
        for name, paths in waiting.items():
            self.report.leave(f"{name} is not set, so {', '.join(paths)} {'is' if len(paths) == 1 else 'are'} not looked at (add {name}=...)")

    def _ranges(self) -> None:
        run = self.run
        for path, value, low, high in (
            ("workers", run.workers, 0, None),
            ("log_every", run.log_every, 1, None),
            ("save.every", run.save.every, 0, None),
            ("save.keep", run.save.keep, 1, None),
            ("validate.every", run.validate.every, 0, None),
            ("validate.samples", run.validate.samples, 1, None),
            ("bad_budget", run.bad_budget, 0, 1),
        ):
            if value < low or (high is not None and value > high):
                self.report.refuse(path, "is out of range", got=value, expected=f"{low} or more" if high is None else f"from {low} to {high}", cure=f"set {path}")

    def _stage(self, path: str, stage: StageSpec) -> None:
        if stage.epochs is not None and stage.steps is not None:
            key = path.rpartition(".")[2]
            cure = f"take one away: stages.{key}.epochs=null or stages.{key}.steps=null"
            self.report.refuse(path, "both epochs and steps are given", got=f"epochs {stage.epochs:g}, steps {stage.steps}", expected="one of them", cure=cure)
        for name in ("batch", "micro_batch", "max_length", "pack"):
            value = getattr(stage, name)
            if isinstance(value, int) and value < 1:
                self.report.refuse(f"{path}.{name}", "must be at least 1", got=value, expected="1 or more", cure=f"set {path}.{name}")
        if stage.pack is not None and stage.max_length > stage.pack:
            cure = f"set {path}.max_length={stage.pack}, or raise {path}.pack"
            self.report.refuse(f"{path}.pack", "a sample may be longer than a packed row", got=f"max_length {stage.max_length}", expected=f"at most pack {stage.pack}", cure=cure)
        for name in stage.sources:
            if name not in self.run.data:
                self._no_such(f"{path}.data", "data source", name, self.run.data)
        with self.report.at(f"{path}.images"):
            encoder = self.run.model.encoder
            apply_policy(stage.images.use, Image.new("RGB", (16, 16)), getattr(encoder, "mean", None), getattr(encoder, "size", None))
            if stage.images.tiling is not None and (crop := getattr(encoder, "crop", None) or 1.0) < 1.0:
                self.report.warnings.append(f"{path}.images: the encoder drops the edges of every tile (model.encoder.crop {crop:g}); set model.encoder.crop=1.0 to keep them")
        with self.report.at(f"{path}.deepspeed"):  # at ZeRO 0 only an explicit bf16 is bf16, whatever the device
            deepspeed_config(stage, precision_of(self.run.precision, torch.device("cpu"), stage.zero))

    def _names(self) -> None:
        with self.report.at("runs"):
            check_place(self.run.folder)
        for path, named in (("eval", self.run.eval), ("validate.data", self.run.validate.data)):
            for name, source in named.items():
                if source not in self.run.data:
                    self._no_such(f"{path}.{name}", "data source", source, self.run.data)
        if self.run.validate.every and not self.run.validated:
            self.report.refuse("validate", "nothing is named to look at", expected="data: {NAME: SOURCE}, or `eval`", cure="name a source, or set validate.every=0")
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
            self.report.leave(f"{path}: {place} is neither a folder nor a cached hub snapshot")
            return False
        return True

    def _weights(self) -> None:
        self._connector_files("model.connector", self.run.model.connector)
        if self.run.start is not None:
            return
        towers = {f"model.encoder.{name}".rstrip("."): tower for name, tower in self.run.model.encoder.towers.items()}
        for path, part in (*towers.items(), ("model.llm", self.run.model.llm)):
            if part.weights == "path" and part.path is None:
                self.report.refuse(path, "weights of a path are asked for", got="no path", expected="a folder with weights", cure=f"set {path}.path, or {path}.weights=random")
            elif part.weights == "path" and self._there(f"{path}.path", str(part.path)) and part.config is not None:
                with self.report.at(path):
                    self._same_numbers(path, part.config, find_folder(str(part.path)) / "config.json")

    def _connector_files(self, path: str, spec: ConnectorSpec) -> None:
        if spec.path is not None and not Path(spec.path).is_file():
            self.report.refuse(
                f"{path}.path", "there is no such file", kind=CheckpointError, got=spec.path, expected="a file with the connector's weights", cure=f"set {path}.path"
            )
        if spec.then is not None:
            self._connector_files(f"{path}.then", spec.then)

    def _start(self) -> None:
        """The folder that the run goes on from, and whether it is of the run's parts."""
        if self.run.start is None or not self.run.stages or not self.entered:
            return
        with self.report.at("start"):
            model_folder(self.run.start)
            if self.text is not None and self.chained and self.tokenizer is not None:
                spec = model_at(self.run, 0)
                written = check_start(self.run.start, spec, placeholder_id(self.tokenizer), max(self.tokenizer.get_vocab().values()) + 1)
                if idle := left_out(written, spec):
                    self.report.warnings.append(f"start: {len(idle)} tensors that nothing reads are left out ({listed(idle)})")

    def _same_numbers(self, path: str, numbers: Mapping[str, Any], file: Path) -> None:
        """A warning where the configuration's numbers are not those beside the weights: shapes may fit all the same (an activation, a rotary base), and the answers be wrong."""
        if not file.is_file():
            return
        written = read_json(file)
        written = written.get("vision_config", written) if path != "model.llm" else written
        differ = [f"{name} {numbers[name]!r} (beside the weights {written[name]!r})" for name in numbers if name in written and written[name] != numbers[name]]
        if differ:
            self.report.warnings.append(f"{path}: the configuration's numbers are used, and some are not those of {file}: {', '.join(differ)}")

    def _decoder(self) -> None:
        llm = self.run.model.llm
        if llm.config is None and llm.path is not None and not self._there("model.llm.path", llm.path):
            return
        with self.report.at("model.llm"):
            self.text = text_config(self.run.model)
        if self.text is None:
            return
        if llm.config is not None:
            with self.report.at("model.llm.config"):
                refuse_unknown(type(self.text), set(llm.config) - {"model_type"})
        if is_varlen(llm.attention) and self.run.precision == "fp32":
            self.report.refuse(
                "model.llm.attention", "flash attention computes in bf16 only", got="precision: fp32", expected="bf16, or auto on a GPU", cure="set llm.attention: auto"
            )
        claims: dict[str, Sequence[str]] = {}
        for name, spec in self.run.model.adapt.items():
            with self.report.at(f"model.adapt.{name}"):
                claims[name] = spec.plan(self.text)
        with self.report.at("model.adapt"):
            check_claims(claims)
        if self.entered and self.run.stages:
            stages = list(self.run.stages)
            entering = sorted(self.run.model.adapt.items(), key=lambda item: (stages.index(item[1].since or stages[0]), item[1].order))
            with self.report.at("model.adapt"):
                check_order(dict(entering))

    def _connector(self) -> None:
        encoder, connector = self.run.model.encoder, self.run.model.connector
        if isinstance(encoder, TowerSpec) and encoder.path is None:  # else the numbers may be those of the file
            with self.report.at("model.encoder.config"):
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
                    self.report.refuse("model.connector.level", "the encoder has no such hidden state", got=level, expected=expected, cure="set model.connector.level=-2")
        with self.report.at("model.connector"):
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
            with self.report.at(path if place else "model.llm"):
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
            with self.report.at(path):
                prompt = Prompt(stage.prompt, self.tokenizer)
        if not self.chained or self.text is None or f"stages.{name}.images" in self.report.wrong:
            return
        positions = getattr(self.text, "max_position_embeddings", None)
        if positions is not None and stage.max_length > positions:
            self.report.warnings.append(
                f"stages.{name}.max_length {stage.max_length:,} is more than the decoder's {positions:,} positions: it has never seen longer rows, and chat refuses them"
            )
        fixed = False
        with self.report.at(f"stages.{name}.images"):
            report.picture_tokens, fixed = picture_tokens(self.run.model, self.text.hidden_size, stage.images.use, stage.images.tiling)
        if f"stages.{name}.images" in self.report.wrong:
            return
        if fixed and report.picture_tokens >= stage.max_length > 0:
            cure = f"raise stages.{name}.max_length, or use an encoder with fewer tokens"
            self.report.refuse(
                f"stages.{name}.max_length", "too short for one picture", got=stage.max_length, expected=f"more than its {report.picture_tokens:,} tokens", cure=cure
            )
        elif prompt is not None:
            self.rows[name] = stage_processor(cost.RowLengths, stage, self.run.model, self.text.hidden_size, prompt.tokenizer)

    def _structure(self, index: int, stage: StageSpec) -> None:
        name = list(self.run.stages)[index]
        if self.text is None or not self.chained or not self.entered or any(path.startswith("model.adapt") for path in self.report.wrong):
            return
        spec = model_at(self.run, index)
        with self.report.at("model"):
            model = cost.structure(spec, placeholder_id(self.tokenizer) if self.tokenizer else 0)
            self._parts(model.groups())
            for word, node in stage.train.items():
                with self.report.at(f"stages.{name}.train.{word}"):
                    rates(model.groups(), {word: node})
            if not any(f"stages.{name}.train.{word}" in self.report.wrong for word in stage.train):
                with self.report.at(f"stages.{name}"):
                    self.report.stages[index].groups = cost.planned(model, stage)
        self.report.stages[index].breaks = [f"{adapted}: {text}" for adapted, part in spec.adapt.items() for text in part.breaks()]

    def _disk(self) -> None:
        """What the run has still to write, against what is free."""
        if not self.run.stages or any(not report.groups for report in self.report.stages) or any(path.endswith(".deepspeed") for path in self.report.wrong):
            return
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        largest = total = 0
        for report, stage in zip(self.report.stages, self.run.stages.values(), strict=True):
            width = precision_of(self.run.precision, device, stage.zero).itemsize
            saved, weights = checkpoint_bytes(report.groups, width, stage.zero), stage_bytes(report.groups, width)
            report.disk = f"{saved / 1e9:,.2f} GB per checkpoint, {self.run.save.keep} stay; {weights / 1e9:,.2f} GB of weights at its end"
            largest, total = max(largest, saved), total + weights * (2 if self.run.validate.keep_best else 1)
        free, written = room(Path(self.run.runs)), size_of(self.run.folder)
        least, most = (max(0, largest * checkpoints + total - written) for checkpoints in (1, (self.run.save.keep + 1) * bool(self.run.save.every)))
        if self.quick and free < least:
            sides = {"got": f"{free / 1e9:,.1f} GB", "expected": f"{least / 1e9:,.1f} GB"}
            self.report.refuse("runs", "there is no room for the run", kind=EnvironmentProblem, cure="free some, or set runs to another disk", **sides)
        elif free < most:
            self.report.warnings.append(f"the run writes {most / 1e9:,.1f} GB, {free / 1e9:,.1f} GB are free in {self.run.runs}")

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

    # ---- the result ------------------------------------------------------------------------------------------------------

    def _exports(self) -> None:
        if self.text is None or not self.run.stages or not self.entered:
            return
        from vlm.weights.export import families

        last = model_at(self.run, len(self.run.stages) - 1)
        name, stage = list(self.run.stages.items())[-1]
        for to, family in families().items():
            found = list(map(str, family.obstacles(last, self.text)))
            if stage.images.use not in family.POLICIES:
                found.append(f"stages.{name}.images is {stage.images.use}, expected {' or '.join(family.POLICIES)}")
            if not found:
                self.report.exports[to] = family.WRITES
            elif to == "llava":
                self.report.impossible[to] = "; ".join(found)


def _strings(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
    for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ():
        yield from _strings(inner, f"{path}.{key}".lstrip("."))
