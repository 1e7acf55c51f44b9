"""The part of a run's report that needs its models: what they answer to a few questions before, between and after the stages, and the pictures that the parts show of themselves."""

import gc
import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from vlm.data.sample import Picture
from vlm.errors import DataError, VLMError
from vlm.eval.report import MAX_NEW_TOKENS
from vlm.eval.report_html import Html, Section, cell, data_uri, figure, note
from vlm.eval.report_run import Written
from vlm.eval.score import Question, matches, questions
from vlm.features import ImageInput
from vlm.figures import Figure, Seen
from vlm.generate import answer_all
from vlm.images import LIMITS, open_picture
from vlm.loading import load
from vlm.seen import as_seen

if TYPE_CHECKING:
    from vlm.model import VLM
    from vlm.processor import VLMProcessor

__all__ = ["Asked", "ask", "parts", "samples"]

QUESTIONS, LOOKED_THROUGH, PICTURES = 8, 400, 3
"""How many are asked, of so many samples of each source; and how many pictures the parts see."""
COLLECTED = 100_000_000
"""Parameters from which a model is worth the half second that Python takes to free it for certain before the next is loaded."""
SIDE = 320
"""Pixels that the longer side of an inlined picture has, at most."""

Loaded = Callable[[], "tuple[VLM, VLMProcessor]"]


@dataclass
class Asked:
    """chosen: the questions. broken: number of a question -> why its pictures cannot be opened. answers: when -> an answer per question, None where it was not asked. figures: what the parts of the newest
    model show. told: sentences about what was left out."""

    chosen: list[Question] = field(default_factory=list)
    held_out: bool = True
    views: dict[int, list[bytes]] = field(default_factory=dict)
    broken: dict[int, str] = field(default_factory=dict)
    answers: dict[str, list[str | None]] = field(default_factory=dict)
    figures: list[tuple[str, Figure]] = field(default_factory=list)
    told: list[str] = field(default_factory=list)


def ask(written: Written, starting: Loaded | None, largest: int | None) -> Asked:
    """Choose questions, and ask the starting model and that of every finished stage. starting: makes the model before the first step.

    largest: parameters above which no model is loaded, None for any size; above `largest` or without `starting` the starting model is left out. Whatever fails becomes a sentence in `told`.
    """
    asked = Asked()
    _choose(written, asked)
    size = written.parameters or 0
    if not written.stages:
        asked.told.append("No stage is finished, so there is no model to ask yet.")
        return asked
    if largest is not None and size > largest:
        asked.told.append(
            f"No model was loaded for this page: it has {size:,} parameters, and at the end of training at most {largest:,} are. To ask it: vlm report {written.folder}"
        )
        return asked
    loaders: dict[str, Loaded] = {f"after {stage}": _loader(written.folder / "stages" / stage) for stage in written.stages}
    if starting is not None:
        loaders = {"before training": starting, **loaders}
    else:
        asked.told.append(f"The model before training is left out: with {size:,} parameters it is not made again for a page.")
    for when, loaded in loaders.items():
        try:
            _one_model(asked, when, loaded, show=when == list(loaders)[-1])
        except VLMError as problem:
            asked.told.append(f"The model {when} could not be asked: {problem}")
        if size > COLLECTED:
            gc.collect()
    return asked


def _loader(folder: Path) -> Loaded:
    return lambda: load(folder)


def _one_model(asked: Asked, when: str, loaded: Loaded, *, show: bool) -> None:
    model, processor = loaded()
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    numbers = [number for number in range(len(asked.chosen)) if number not in asked.broken]
    if numbers:
        said = answer_all(model, processor, [asked.chosen[number].sample for number in numbers], batch_size=QUESTIONS, max_new_tokens=MAX_NEW_TOKENS)
        texts = {number: f"{one.text}{' …' if one.finish_reason == 'length' else ''}" for number, one in zip(numbers, said, strict=True)}
        asked.answers[when] = [texts.get(number) for number in range(len(asked.chosen))]
    if show:
        asked.figures, told = _figures(model, processor, [asked.chosen[number] for number in numbers])
        asked.told += told


# ---- questions -------------------------------------------------------------------------------------------------------------


def _choose(written: Written, asked: Asked) -> None:
    """Questions of the `eval` sources, else of the last stage's, kinds in turn; their pictures, shrunk."""
    names = list(dict.fromkeys(written.run.eval.values()))
    asked.held_out = bool(names)
    for name in names or list(written.run.stages.values())[-1].sources:
        try:
            reader = written.run.data[name].open()
            size = len(reader)
            count = min(size, LOOKED_THROUGH)
            found = [question for number in range(count) for question in _questions(reader, number * size // count)]
            asked.chosen += _kinds_in_turn(found, QUESTIONS // max(1, len(names)) or 1)
        except (VLMError, OSError) as problem:
            asked.told.append(f"Source {name} could not be opened: {problem}")
    for number, question in enumerate(asked.chosen):
        try:
            asked.views[number] = [_shrunk(picture, question.sample.where) for picture in question.sample.pictures]
        except (VLMError, OSError) as problem:
            asked.broken[number] = str(problem)


def _questions(reader: Any, index: int) -> list[Question]:
    """Of one sample; none of a bad record, of which the warnings tell."""
    try:
        return questions(reader[index])
    except DataError:
        return []


def _kinds_in_turn(found: Sequence[Question], count: int) -> list[Question]:
    by_kind: dict[str, list[Question]] = {}
    for question in found:
        by_kind.setdefault(question.kind, []).append(question)
    spread = {kind: [ones[place * len(ones) // min(count, len(ones))] for place in range(min(count, len(ones)))] for kind, ones in by_kind.items()}
    turns = [ones[place] for place in range(count) for ones in spread.values() if place < len(ones)]
    return turns[:count]


def _shrunk(picture: Picture, where: str) -> bytes:
    """A picture as a small file. Raises DataError, OSError."""
    if picture.length() > LIMITS.max_bytes:
        raise DataError(f"{where}: the picture file {picture.path} is too large", kind="too large", got=f"{picture.length():,} bytes", expected=f"at most {LIMITS.max_bytes:,}")
    image = open_picture(picture.read(), where=f"{where}: {picture.path}")
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return min((_encoded(image, "PNG"), _encoded(image, "JPEG", quality=88)), key=len)


def _encoded(image: Image.Image, kind: str, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


# ---- what parts show -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _figures(model: "VLM", processor: "VLMProcessor", chosen: Sequence[Question]) -> tuple[list[tuple[str, Figure]], list[str]]:
    """(part, figure) of every part that shows something, and a sentence for each that failed."""
    pictures = {picture: question.text for question in chosen for picture in question.sample.pictures}
    some = list(pictures)[:PICTURES]
    inputs = [processor.see(picture) for picture in some] or [model.spec.encoder.dummy()]
    pieces = [one.pieces()[0] for one in inputs]
    features = model.encoder([piece.to(model.device, model.dtype) for piece in pieces], model.reads)
    names = [f"“{pictures[picture]}”" for picture in some] or ["a black picture"]
    seen = Seen(names, [_view(model.spec.encoder, piece) for piece in pieces], features)
    found: list[tuple[str, Figure]] = []
    told: list[str] = []

    def collect(name: str, shown: Callable[[], Iterable[Figure]]) -> None:
        try:
            found.extend((name, one) for one in shown())
        except Exception as problem:  # a part of anybody's
            told.append(f"The part {name} has a picture to show, and failed: {type(problem).__name__}: {problem}")

    collect("encoder", lambda: model.spec.encoder.figures(model.encoder, seen))
    handed = seen
    for (spec, _), (name, part) in zip(model.chain, model.connector.items(), strict=True):
        collect(f"connector.{name}", lambda spec=spec, part=part, handed=handed: spec.figures(part, handed))
        handed = replace(handed, features=part(handed.features))
    for name, adaptation in model.spec.adapt.items():
        collect(f"{adaptation.part}.{name}", lambda adaptation=adaptation: adaptation.figures(model.part(adaptation), seen))
    return found, told


def _view(encoder: Any, piece: ImageInput) -> Any:
    """What the encoder reads, as a picture (H, W, 3) uint8; of several views the last, which of a pair is the low one."""
    shown = [picture for _, picture in as_seen(encoder, piece)]
    return np.asarray(shown[-1] if shown else Image.new("RGB", (16, 16)))


# ---- on the page -----------------------------------------------------------------------------------------------------------


def samples(written: Written, asked: Asked) -> Section:
    """Picture, question, reference and answers, one below the other."""
    body = [note(line, "warning") for line in asked.told]
    if not asked.held_out:
        body.append(note(f"No `eval` source is named: these are training questions of stage {list(written.run.stages)[-1]}."))
    if asked.answers:
        body.append(
            note(
                f"Each question alone, greedy, at most {MAX_NEW_TOKENS} tokens; each model with the prompt of its stage. Green: the reference to the letter, case and blanks aside."
            )
        )
    if asked.chosen:
        body.append(Html(f'<div class="questions">{"".join(_asked(asked))}</div>'))
    return Section("samples", "Samples", body)


def _asked(asked: Asked) -> Iterator[Html]:
    for number, question in enumerate(asked.chosen):
        views = "".join(_picture(view) for view in asked.views.get(number, ()))
        if reason := asked.broken.get(number):
            views = f'<p class="note">{cell(f"The picture cannot be shown: {reason}")}</p>'
        rows = [("reference", cell(question.truth)), *((when, _answer(texts[number], question.truth)) for when, texts in asked.answers.items())]
        lines = "".join(f"<tr><th>{cell(name)}</th><td>{value}</td></tr>" for name, value in rows)
        kind = f' <span class="note">{cell(question.kind)}</span>' if question.kind != "all" else ""
        text = f'<div><p class="question">{cell(question.text)}{kind}</p><div class="scroll"><table><tbody>{lines}</tbody></table></div></div>'
        yield Html(f'<article class="asked"><div class="views">{views or "<p class=note>no picture</p>"}</div>{text}</article>')


def _picture(view: bytes) -> str:
    small = max(Image.open(io.BytesIO(view)).size) < SIDE // 2
    return f'<img{" class=small" if small else ""} src="{data_uri(view)}" alt="the picture of this question">'


def _answer(text: str | None, truth: str) -> Html:
    if text is None:
        return Html("<i>not asked</i>")
    if not text:
        return Html("<i>nothing</i>")
    return Html(f'<span class="right">{cell(text)} ✓</span>') if matches(text, truth) else cell(text)


def parts(asked: Asked, folder: Path) -> Section:
    """The figures of the parts, which are also written into a folder, as PART-NUMBER.png. What fails becomes a sentence."""
    body: list[Html] = []
    for number, (name, one) in enumerate(asked.figures, 1):
        try:
            data = one.png()
            folder.mkdir(exist_ok=True)
            (folder / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}-{number}.png").write_bytes(data)
            body.append(figure(data, one.title, one.caption))
        except Exception as problem:  # a part of anybody's
            body.append(note(f"The picture {one.title!r} of the part {name} could not be drawn: {type(problem).__name__}: {problem}", "warning"))
    return Section("parts", "Inside the parts", body)
