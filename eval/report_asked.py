"""The part of a run's report that needs its models: what they answer to a few questions before, between and after the stages; the newest also shows its parts."""

import gc
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from vlm.data.sample import Picture
from vlm.errors import DataError, VLMError
from vlm.eval.report_html import Html, Section, cell, data_uri, note
from vlm.eval.report_parts import figures
from vlm.eval.report_run import Written
from vlm.eval.score import Question, matches, questions, spread
from vlm.eval.scores import MAX_NEW_TOKENS
from vlm.figures import Figure
from vlm.generate import answer_all
from vlm.images import LIMITS, open_picture
from vlm.loading import load

if TYPE_CHECKING:
    from vlm.model import VLM
    from vlm.processor import VLMProcessor

__all__ = ["Asked", "ask", "samples"]

QUESTIONS, LOOKED_THROUGH = 8, 400
"""About how many are asked, shared among the sources; of so many samples of each."""
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
        asked.figures, told = figures(model, processor, [asked.chosen[number] for number in numbers])
        asked.told += told


# ---- questions -------------------------------------------------------------------------------------------------------------


def _choose(written: Written, asked: Asked) -> None:
    """Questions of the `eval` sources, else of the last stage's, kinds in turn; their pictures, shrunk."""
    asked.held_out = bool(written.run.eval)
    names = list(dict.fromkeys(written.run.eval.values())) or list(list(written.run.stages.values())[-1].sources)
    for name in names:
        try:
            reader = written.run.data[name].open()
            found = [question for number in spread(len(reader), LOOKED_THROUGH) for question in _questions(reader, number)]
            asked.chosen += _kinds_in_turn(found, max(1, QUESTIONS // len(names)))
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
    some = [[ones[place] for place in spread(len(ones), count)] for ones in by_kind.values()]
    turns = [ones[place] for place in range(count) for ones in some if place < len(ones)]
    return turns[:count]


def _shrunk(picture: Picture, where: str) -> bytes:
    """A picture as a small file. Raises DataError, OSError."""
    if picture.length() > LIMITS.max_bytes:
        raise DataError(f"{where}: the picture file {picture.name} is too large", kind="too large", got=f"{picture.length():,} bytes", expected=f"at most {LIMITS.max_bytes:,}")
    image = open_picture(picture.read(), where=f"{where}: {picture.name}")
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return min((_encoded(image, "PNG"), _encoded(image, "JPEG", quality=88)), key=len)


def _encoded(image: Image.Image, kind: str, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


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
