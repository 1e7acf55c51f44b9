"""The part of a run's report in which parts show pictures of themselves (`vlm/figures.py`)."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from vlm.eval.report_html import Html, Section, figure, note
from vlm.eval.score import Question
from vlm.features import ImageInput
from vlm.figures import Figure, Seen
from vlm.seen import as_seen

if TYPE_CHECKING:
    from vlm.model import VLM
    from vlm.processor import VLMProcessor

__all__ = ["figures", "parts"]

PICTURES = 3
"""That the parts see."""


@torch.no_grad()
def figures(model: "VLM", processor: "VLMProcessor", chosen: Sequence[Question]) -> tuple[list[tuple[str, Figure]], list[str]]:
    """(part, figure) of every part of a model that shows something for the pictures of some questions, and a sentence for each that failed."""
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


def parts(shown: Sequence[tuple[str, Figure]]) -> tuple[Section, dict[str, bytes]]:
    """The section with the figures of parts, and the same as picture files, by name: PART-NUMBER.png. What fails becomes a sentence."""
    body: list[Html] = []
    files: dict[str, bytes] = {}
    for number, (name, one) in enumerate(shown, 1):
        try:
            data = files[f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}-{number}.png"] = one.png()
            body.append(figure(data, one.title, one.caption))
        except Exception as problem:  # a part of anybody's
            body.append(note(f"The picture {one.title!r} of the part {name} could not be drawn: {type(problem).__name__}: {problem}", "warning"))
    return Section("parts", "Inside the parts", body), files
