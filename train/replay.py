"""`vlm replay`: a step of a run once more, with its samples, their pictures and labels, and what each of them lost. The run's folder is read, and nothing in it is written."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch.distributed as dist
from PIL.Image import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from vlm.composition import compose
from vlm.data.sample import Picture, Sample
from vlm.errors import CheckpointError
from vlm.folders import free
from vlm.row import Row
from vlm.seen import as_seen
from vlm.train import checkpoint
from vlm.train.check_data import spans_of
from vlm.train.config import RunSpec
from vlm.train.cost import planned
from vlm.train.engine import Engine, connect
from vlm.train.folder import check_same
from vlm.train.log import Log
from vlm.train.loop import one_step, train_mode
from vlm.train.signals import StopSignals
from vlm.train.stages import Stage
from vlm.train.steps import MicroBatch, Step, StepData, loader, watched_workers
from vlm.whole import records

__all__ = ["Document", "Replay", "replay_step"]


@dataclass(frozen=True)
class Document:
    """A sample of the step. where: file and record. tokens, supervised: how many. loss: summed over its supervised tokens. pictures: where they lie. seen: files of --out, as the encoder saw them.

    text: as it was trained on, what is learned in [[ ]]. ids, labels: its row. notes: what happened to it. rank, micro_batch, place: who computed it.
    """

    id: str
    source: str
    where: str
    modality: str
    tokens: int
    supervised: int
    loss: float
    pictures: tuple[str, ...]
    seen: tuple[str, ...]
    notes: tuple[str, ...]
    text: str
    ids: tuple[int, ...]
    labels: tuple[int, ...]
    rank: int
    micro_batch: int
    place: int

    @property
    def mean(self) -> float:
        """Loss per supervised token."""
        return self.loss / max(1, self.supervised)


@dataclass(frozen=True)
class Replay:
    """A step done again. documents: of all ranks, by loss per token, the largest first. recorded: what metrics.jsonl holds of it. begun: the checkpoint, or the beginning of the stage, from which it was
    reached. rank: whose copy this is."""

    run: str
    stage: str
    step: int
    total: int
    loss: float
    recorded: float
    begun: str
    documents: tuple[Document, ...]
    rank: int

    @property
    def exact(self) -> bool:
        """Whether the loss is the recorded one, bit for bit."""
        return self.loss == self.recorded

    @property
    def largest(self) -> Document:
        """The sample with the largest loss per supervised token."""
        return self.documents[0]

    def print(self, console: Console | None = None) -> None:
        """On rank 0."""
        if self.rank:
            return
        console = console or Console()
        console.print(Text(f"step {self.total} of {self.run}: step {self.step} of stage {self.stage}, reached from {self.begun}"), soft_wrap=True)
        table = Table()
        for name in ("sample", "source", "modality", "tokens", "supervised", "loss", "per token"):
            table.add_column(name, justify="left" if name in ("sample", "source", "modality") else "right", overflow="fold")
        for one in self.documents:
            table.add_row(*map(Text, (one.id, one.source, one.modality, f"{one.tokens:,}", f"{one.supervised:,}", f"{one.loss:.4f}", f"{one.mean:.4f}")))
        console.print(table)
        for one in self.documents:
            for picture in one.pictures:
                console.print(Text(f"{one.id}: {picture}"), soft_wrap=True)
        share = 100 * self.largest.loss / max(1e-30, sum(one.loss for one in self.documents))
        facts = f"{self.largest.mean:.4f} per supervised token, {share:.0f} % of the step's"
        console.print(Text(f"the largest loss has sample {self.largest.id} of {self.largest.source} ({self.largest.where}): {facts}"), soft_wrap=True)
        console.print(Text(f"loss {self.loss!r}: {self._verdict()}"), soft_wrap=True)

    def _verdict(self) -> str:
        if self.exact:
            return "what metrics.jsonl holds, bit for bit"
        return f"metrics.jsonl holds {self.recorded!r}; another machine, number of threads or version rounds otherwise (environment.json says what the run had), and so does a GPU from time to time"


def replay_step(run_folder: str | Path, step: int, *, stage: str | None = None, out: str | Path | None = None) -> Replay:
    """Do a step of a run again, from the newest whole checkpoint of its stage before it, else from the stage's beginning. Called on every rank, of which there are as many as the run had.

    Args:
        step: `total` of metrics.jsonl; with `stage` the stage's own `step`.
        out: a folder, not there yet, for the samples as text, their pictures as the encoder saw them, and everything as JSON.

    Raises CheckpointError for a folder without this run or step, or for another number of ranks, ConfigurationError where `out` is taken, DataError for data that changed.
    """
    folder, out = Path(run_folder).absolute(), None if out is None else Path(out)
    if not (folder / "config.yaml").is_file():
        raise CheckpointError(f"{folder} holds no run", expected="config.yaml and metrics.jsonl", cure="give the folder that `vlm train` wrote")
    run = compose(RunSpec, folder / "config.yaml", allow_import=False)
    record = _recorded(folder, run, step, stage)
    if out is not None:
        free(out)
    rank, ranks, device = connect()
    check_same(run, folder)
    again = _Again(run, list(run.stages).index(record["stage"]), folder, rank, ranks, device, Log(folder, rank=1, every=run.log_every), StopSignals())
    again.check_ranks(record["ranks"])
    begun, made, engine = again.reach(record["step"] - 1, record["total"] - 1)
    result = one_step(engine, made, again.stage, len(again.data), again.stage.sources)
    found = again.documents(engine)
    if out is not None:
        again.draw(out)
    replayed = Replay(run.name, again.name, record["step"], record["total"], result["loss"], record["loss"], begun, tuple(found), rank)
    if out is not None and rank == 0:
        _write(replayed, out)
    dist.barrier()
    return replayed


def _recorded(folder: Path, run: RunSpec, step: int, stage: str | None) -> dict[str, Any]:
    """The step's record in metrics.jsonl."""
    found = records(folder / "metrics.jsonl")
    if stage is not None and stage not in run.stages:
        raise CheckpointError(f"{folder} has no stage {stage!r}", expected=f"one of {', '.join(run.stages)}")
    for record in found:
        if (record["total"] if stage is None else record["step"]) == step and stage in (None, record["stage"]):
            return record
    done = {name: sum(record["stage"] == name for record in found) for name in run.stages}
    there = ", ".join(f"{name} 1 to {count}" for name, count in done.items() if count) or "none"
    raise CheckpointError(f"{folder} has no step {step}" + (f" of stage {stage}" if stage else ""), expected=f"1 to {len(found)} (with --stage: {there})")


class _Engine(Engine):
    """Remembers what the documents of each forward lost: (losses, supervised tokens)."""

    losses: list[tuple[Tensor, Tensor]]

    def forward(self, inputs: Mapping[str, Any]) -> Any:
        output = super().forward(inputs)
        self.losses.append((output.document_losses, output.document_counts))
        return output


class _Data(StepData):
    """Remembers of the last step that was made in this process which row and sample each of its documents is, by micro-batch."""

    def __getitem__(self, number: int) -> Step:
        self._samples: dict[int, tuple[Row, Sample]] = {}
        self.documents: list[list[tuple[Row, Sample]]] = []
        return super().__getitem__(number)

    def _take(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._take(*args, **kwargs)
        self._samples[id(found.row)] = found.row, found.sample  # the row is held, so that no other gets its id
        return found

    def micro_batch_of(self, packs: Sequence[Sequence[Row]]) -> MicroBatch:
        self.documents.append([self._samples[id(row)] for pack in packs for row in pack])
        return super().micro_batch_of(packs)


class _Again(Stage):
    """A stage that comes as far as a step."""

    DATA: ClassVar[type[StepData]] = _Data
    ENGINE: ClassVar[type[Engine]] = _Engine
    data: _Data

    def reach(self, step: int, total: int) -> tuple[str, Step, _Engine]:
        """Do the steps of this stage before number `step`, `total` over all stages; -> where that began, the step itself, the engine."""
        found = self._checkpoint(total - step, total)
        if self.stage.micro_batch == "auto" and not (self.folder / f"micro_batch-{self.name}.json").is_file():
            raise CheckpointError(f"{self.folder} does not say what micro_batch: auto was", expected=f"micro_batch-{self.name}.json", cure="bring the file back")
        model = self.model()
        engine: Any = self.engine(model, planned(model, self.stage))
        if found:
            checkpoint.restore(found[0], engine, found[1])
        train_mode(model)
        start = found[1].step if found else 0
        with watched_workers(self.run.workers):
            for earlier in islice(loader(self.data, start, self.run.workers), step - start):
                engine.losses = []
                one_step(engine, earlier, self.stage, len(self.data), self.stage.sources)
        engine.losses = []
        return f"checkpoint {found[0].name}" if found else f"the beginning of stage {self.name}", self.data[step], engine

    def _checkpoint(self, before: int, total: int) -> tuple[Path, checkpoint.Position] | None:
        """The newest whole checkpoint of this stage, which begins behind step `before`, up to step `total`. One that was changed is passed over, and one of another number of ranks."""
        while (found := checkpoint.latest(self.folder / "resume", total)) is not None and (at := int(found.name.removeprefix("step-"))) > before:
            total = at - 1
            try:
                position = checkpoint.read_position(found, self.fingerprint)
            except CheckpointError:
                continue
            if position.ranks == self.ranks:
                return found, position
        return None

    def check_ranks(self, ranks: int) -> None:
        if self.ranks != ranks:
            raise CheckpointError(
                "a step is done again by as many ranks as did it",
                got=f"{self.ranks}",
                expected=f"{ranks}",
                cure=f"torchrun --standalone --nproc-per-node {ranks} --no-python vlm replay {self.folder} ..." if ranks > 1 else "leave torchrun away",
            )

    def documents(self, engine: Any) -> list[Document]:
        """Of all ranks, the largest loss per token first. Called on all ranks."""
        mine = [
            self._document(row, sample, float(loss), int(count), number, place)
            for number, (rows, (losses, counts)) in enumerate(zip(self.data.documents, engine.losses, strict=True))
            for place, ((row, sample), loss, count) in enumerate(zip(rows, losses.tolist(), counts.tolist(), strict=False))
        ]
        return sorted((one for of_rank in engine.gather(mine) for one in of_rank), key=lambda one: one.mean, reverse=True)

    def _document(self, row: Row, sample: Sample, loss: float, count: int, number: int, place: int) -> Document:
        pictures = sample.pictures[: len(row.images)]
        files = tuple(name for name, _ in self._seen(row, number, place))
        text = "".join(f"[[{part}]]" if supervised else part for part, supervised in spans_of(row, self.processor.tokenizer))
        return Document(
            row.id, row.source, sample.where, "vision" if row.images else "text", len(row), count, loss, tuple(map(_place, pictures)), files, row.notes, text,
            tuple(row.ids), tuple(row.labels), self.rank, number, place,
        )  # fmt: skip

    def _seen(self, row: Row, number: int, place: int) -> Iterator[tuple[str, Image]]:
        """File and picture of everything that the encoder saw of a document."""
        for index, image in enumerate(row.images):
            for word, picture in as_seen(self.spec.encoder, image):
                yield "-".join(filter(None, (f"{self.rank}-{number}-{place}", f"{index}", word))) + ".png", picture

    def draw(self, out: Path) -> None:
        """Write the pictures of this rank's documents."""
        out.mkdir(parents=True, exist_ok=True)
        for number, documents in enumerate(self.data.documents):
            for place, (row, _) in enumerate(documents):
                for file, picture in self._seen(row, number, place):
                    picture.save(out / file)


def _place(picture: Picture) -> str:
    return picture.path if not picture.offset else f"{picture.path}, {picture.size:,} bytes from byte {picture.offset:,}"


def _write(replayed: Replay, out: Path) -> None:
    """replay.json with everything; samples.txt to be read."""
    plain = asdict(replayed) | {"exact": replayed.exact}
    (out / "replay.json").write_text(json.dumps(plain, indent=1, ensure_ascii=False), encoding="utf-8")
    texts = [
        f"=== {one.id} ({one.source}, {one.where})\nloss per token {one.mean:.4f} over {one.supervised:,} of {one.tokens:,} tokens; pictures: {', '.join(one.seen) or 'none'}\n{one.text}\n"
        for one in replayed.documents
    ]
    (out / "samples.txt").write_text("\n".join(texts), encoding="utf-8")
