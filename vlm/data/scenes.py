"""The demo's world: pictures of up to four coloured shapes on a grid, with captions and questions, drawn from a seed.

A 60-pixel picture of 3 x 3 cells suits a tower with 10-pixel patches merged by 2 x 2: each token is one cell. Whole layouts are held out, by hash, so that
none can be learned by heart. Answers are spread evenly within each kind, so that guessing without the picture earns no more than chance.
"""

import hashlib
import math
import multiprocessing
import random
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlm.data.llava import LlavaSource
from vlm.data.tokenizer import write_tokenizer
from vlm.data.write import write_records, write_split
from vlm.errors import ConfigurationError
from vlm.folders import new_folder

__all__ = ["KINDS", "Question", "Scene", "Thing", "caption", "draw_scene", "llava_record", "paint", "questions_about", "write_scenes"]

GRID, CELL, DETAIL = 3, 20, 4  # cells a side; pixels a cell; drawn that much larger, then reduced
COLOURS = {
    "red": (224, 48, 48),
    "green": (56, 188, 76),
    "blue": (64, 104, 236),
    "yellow": (238, 214, 64),
    "purple": (178, 72, 212),
    "white": (238, 238, 238),
}
PLACES = [f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "center", "right")]
NUMBERS = ["one", "two", "three", "four"]
KINDS = {"colour": 4.0, "position": 3.5, "shape": 3.0, "count": 0.5}
"""Kind of question -> how often it is asked in training, relative to the others."""
CAPTION_SHARE = 0.2
HELD_OUT = 8  # one layout in eight
CHUNK = 250
Point = tuple[float, float]


def _circle(points: int = 40) -> list[Point]:
    return [(math.cos(2 * math.pi * k / points), math.sin(2 * math.pi * k / points)) for k in range(points)]


def _star() -> list[Point]:
    spokes = [(1.08 if k % 2 == 0 else 0.45, math.pi * (k / 5 - 0.5)) for k in range(10)]
    return [(length * math.cos(angle), length * math.sin(angle)) for length, angle in spokes]


def _square(half: float) -> list[Point]:
    return [(-half, -half), (half, -half), (half, half), (-half, half)]


def _turned(points: list[Point], angle: float) -> list[Point]:
    cosine, sine = math.cos(angle), math.sin(angle)
    return [(x * cosine - y * sine, x * sine + y * cosine) for x, y in points]


_ARM = 0.26
_PLUS = [point for quarter in range(4) for point in _turned([(-_ARM, -_ARM), (-_ARM, -1.0), (_ARM, -1.0)], quarter * math.pi / 2)]
_TRIANGLE = [(1.1 * math.cos(angle), 1.1 * math.sin(angle) + 0.12) for angle in (math.pi * (k / 1.5 - 0.5) for k in range(3))]


class Figure(NamedTuple):
    """A shape in units of its radius. hole: the part of its size that is left open. rim: whether it has a dark edge."""

    outline: list[Point]
    hole: float = 0.0
    rim: bool = False


SHAPES = {
    "disk": Figure(_circle(), rim=True),
    "ring": Figure(_circle(), hole=0.64),
    "cross": Figure(_turned(_PLUS, math.pi / 4)),
    "triangle": Figure(_TRIANGLE, rim=True),
    "square": Figure(_square(0.86), rim=True),
    "star": Figure(_star()),
    "frame": Figure(_square(0.86), hole=0.6),
    "plus": Figure(_PLUS),
}
ANSWERS = {"colour": list(COLOURS), "position": PLACES, "shape": list(SHAPES), "count": NUMBERS}
"""What can be answered, by kind of question."""


class Thing(NamedTuple):
    """One object: its cell (0 to 8, in reading order), colour and shape."""

    cell: int
    colour: str
    shape: str

    @property
    def place(self) -> str:
        return PLACES[self.cell]


Scene = tuple[Thing, ...]
"""One to four things in reading order, in different cells and of different colours."""


class Question(NamedTuple):
    """A question, its answer, and what it asks for (`kind`), where that is known."""

    question: str
    answer: str
    kind: str | None = None


def draw_scene(rng: random.Random, held_out: bool) -> Scene:
    """A layout of the training part or of the held-out part."""
    while True:
        number = rng.randint(1, len(NUMBERS))
        cells, colours = rng.sample(range(GRID**2), number), rng.sample(list(COLOURS), number)
        scene = tuple(sorted(Thing(cell, colour, rng.choice(list(SHAPES))) for cell, colour in zip(cells, colours, strict=True)))
        digest = hashlib.md5(repr([tuple(thing) for thing in scene]).encode(), usedforsecurity=False).digest()
        if (digest[0] % HELD_OUT == 0) == held_out:
            return scene


def paint(scene: Scene, rng: random.Random) -> Image.Image:
    """The picture (RGB, 60 x 60). Sizes, places in the cell, rotations, shades and the background vary with `rng`."""
    side = GRID * CELL * DETAIL
    picture = _background(rng, side)
    for thing in scene:
        cell = CELL * DETAIL
        x, y = ((index + 0.5 + rng.uniform(-0.08, 0.08)) * cell for index in (thing.cell % GRID, thing.cell // GRID))
        radius, angle, light = cell * rng.uniform(0.33, 0.44), rng.uniform(-0.12, 0.12), rng.uniform(0.88, 1.06)
        colour = tuple(max(0, min(255, round(value * light + rng.uniform(-8, 8)))) for value in COLOURS[thing.colour])
        _place(picture, SHAPES[thing.shape], x, y, radius, angle, colour)
    return picture.reduce(DETAIL)


def caption(scene: Scene, rng: random.Random) -> Question:
    """The scene in reading order, each thing before its place or after it."""
    by_place = rng.random() < 0.5
    things = [(thing.place, f"a {thing.colour} {thing.shape}") for thing in scene]
    told = " , ".join(f"{place} {what}" if by_place else f"{what} {place}" for place, what in things)
    head = f"{NUMBERS[len(scene) - 1]} object{'s' if len(scene) > 1 else ''}"
    return Question("describe the picture by place ." if by_place else "describe the picture .", f"{head} : {told} .", "caption")


def questions_about(scene: Scene) -> dict[str, list[Question]]:
    """Every question that has one answer, by kind. A shape names a thing only where no other has it."""
    found: dict[str, list[Question]] = {kind: [] for kind in KINDS}
    shapes = Counter(thing.shape for thing in scene)
    for thing in scene:
        found["colour"].append(Question(f"what colour is the object {thing.place} ?", thing.colour, "colour"))
        found["shape"].append(Question(f"what shape is the object {thing.place} ?", thing.shape, "shape"))
        found["shape"].append(Question(f"what shape is the {thing.colour} object ?", thing.shape, "shape"))
        found["position"].append(Question(f"where is the {thing.colour} object ?", thing.place, "position"))
        if shapes[thing.shape] == 1:
            found["colour"].append(Question(f"what colour is the {thing.shape} ?", thing.colour, "colour"))
            found["position"].append(Question(f"where is the {thing.shape} ?", thing.place, "position"))
    found["count"].append(Question("how many objects are there ?", NUMBERS[len(scene) - 1], "count"))
    return found


def llava_record(name: str, image: str, questions: list[Question], independent: bool = False) -> dict[str, Any]:
    """One record in LLaVA's format: a picture, and questions with answers about it."""
    turns: list[dict[str, str]] = []
    for question in questions:
        asked = {"from": "human", "value": question.question if turns else f"<image>\n{question.question}"}
        turns += [asked | ({} if question.kind is None else {"kind": question.kind}), {"from": "gpt", "value": question.answer}]
    return {"id": name, "image": image} | ({"independent": True} if independent else {}) | {"conversations": turns}


def write_scenes(
    folder: str | Path, *, to: str = "llava", seed: int = 0, scenes: int = 12000, held_out: int = 2000, per_kind: int = 300, questions: int = 6, processes: int = 2
) -> dict[str, int]:
    """Writes the demo's data root: align.json, instruct.json, heldout.json, pictures/, tokenizer/, examples.png. The same bytes for a seed, whatever `processes`.

    to: llava, or tar: the same samples and pictures as shards align-000000.tar, instruct-000000.tar, heldout-000000.tar, ... in the place of JSON and pictures/.
    align: a caption per training scene. instruct: `questions` independent questions per training scene, to one in five also the caption.
    heldout: `per_kind` questions per kind about the `held_out` scenes, one per sample, every answer of a kind equally often.
    Returns the numbers of samples and pictures. Raises ConfigurationError for sizes that cannot be had, and where `folder` holds something.
    """
    if to not in ("llava", "tar"):
        raise ConfigurationError(f"scenes cannot be written as {to!r}", expected="llava or tar")
    if scenes < 1 or not 1 <= questions <= 6:
        raise ConfigurationError(
            "at least one scene, and 1 to 6 questions about each", got=f"scenes {scenes}, questions {questions}", cure="a scene of one thing has no more than 6"
        )
    heldout = _heldout_records([draw_scene(_rng(seed, True, index), True) for index in range(held_out)], seed, per_kind)
    with new_folder(Path(folder)) as root:
        jobs = [(root, seed, held, first, min(first + CHUNK, number)) for held, number in ((False, scenes), (True, held_out)) for first in range(0, number, CHUNK)]
        align, instruct = _training_records(_paint_all(jobs, processes)[:scenes], seed, questions)
        for name, records in (("align", align), ("instruct", instruct), ("heldout", heldout)):
            write_records(root / f"{name}.json", records)
        texts = (turn["value"].removeprefix("<image>") for record in align + instruct + heldout for turn in record["conversations"])
        write_tokenizer(root / "tokenizer", texts)
        _write_sheet(root, heldout)
        if to == "tar":
            _pack(root, ("align", "instruct", "heldout"))
    return {"align": len(align), "instruct": len(instruct), "heldout": len(heldout), "pictures": scenes + held_out}


def _pack(root: Path, names: Iterable[str]) -> None:
    """JSON and pictures -> shards."""
    for name in names:
        write_split(LlavaSource(file=str(root / f"{name}.json")).open(), root, name, "tar")
        (root / f"{name}.json").unlink()
    shutil.rmtree(root / "pictures")


Job = tuple[Path, int, bool, int, int]
"""Scenes first <= i < stop of one part: (root, seed, held out, first, stop)."""


def _paint_all(jobs: list[Job], processes: int) -> list[Scene]:
    if processes == 1 or len(jobs) == 1:
        return [scene for job in jobs for scene in _paint_part(job)]
    with multiprocessing.Pool(processes) as pool:
        return [scene for scenes in pool.map(_paint_part, jobs, chunksize=1) for scene in scenes]


def _paint_part(job: Job) -> list[Scene]:
    root, seed, held_out, first, stop = job
    scenes = []
    for index in range(first, stop):
        rng = _rng(seed, held_out, index)
        scenes.append(draw_scene(rng, held_out))
        path = root / _picture(held_out, index)
        path.parent.mkdir(parents=True, exist_ok=True)
        paint(scenes[-1], rng).save(path)
    return scenes


def _rng(seed: int, held_out: bool, index: int) -> random.Random:
    """Of one scene, so that the split into jobs does not matter."""
    return random.Random(f"{seed} {held_out} {index}")


def _picture(held_out: bool, index: int) -> str:
    return f"pictures/{'heldout' if held_out else 'train'}/{index // 1000:03d}/{index:06d}.png"


def _training_records(scenes: list[Scene], seed: int, number: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    align, instruct = [], []
    for index, scene in enumerate(scenes):
        rng = random.Random(f"{seed} texts {index}")
        align.append(llava_record(f"align-{index}", _picture(False, index), [caption(scene, rng)]))
        asked = _choose(scene, rng, number)
        if rng.random() < CAPTION_SHARE:
            asked.insert(0, caption(scene, rng))
        instruct.append(llava_record(f"instruct-{index}", _picture(False, index), asked, independent=True))
    return align, instruct


def _choose(scene: Scene, rng: random.Random, number: int) -> list[Question]:
    """Different questions, kinds drawn by weight.

    Whether the count is asked is settled first: other kinds run out sooner where things are few, which would make "one" its usual answer.
    """
    left = questions_about(scene)
    for pool in left.values():
        rng.shuffle(pool)
    weights = dict(KINDS)
    counts = rng.random() > (1 - weights["count"] / sum(weights.values())) ** number
    chosen = [left["count"].pop()] if counts else []
    del weights["count"]
    while len(chosen) < number:
        kind = rng.choices(list(weights), list(weights.values()))[0]
        if left[kind]:
            chosen.append(left[kind].pop())
    rng.shuffle(chosen)
    return chosen


def _heldout_records(scenes: list[Scene], seed: int, per_kind: int) -> list[dict[str, Any]]:
    """One question per record; the answers of a kind equally often, up to one."""
    rng = random.Random(f"{seed} heldout")
    asked = [(index, questions_about(scene)) for index, scene in enumerate(scenes)]
    records = []
    for kind in KINDS:
        order = rng.sample(ANSWERS[kind], len(ANSWERS[kind]))
        for place, answer in enumerate(order):
            wanted = per_kind // len(order) + (place < per_kind % len(order))
            pool = [(index, question) for index, found in asked for question in found[kind] if question.answer == answer]
            if len(pool) < wanted:
                enough = _enough_held_out(seed, per_kind)
                cure = f"--held-out {enough} is enough (in Python: held_out={enough}, or a lower per_kind)"
                raise ConfigurationError(f"too few held-out scenes for {per_kind} questions of the kind {kind}", got=f"{len(pool)} about {answer!r}", expected=wanted, cure=cure)
            records += [(kind, index, question) for index, question in sorted(rng.sample(pool, wanted))]
    return [llava_record(f"{kind}-{number}", _picture(True, index), [question]) for number, (kind, index, question) in enumerate(records)]


def _enough_held_out(seed: int, per_kind: int) -> int:
    """The least number of held-out scenes with as many questions of every answer as may be asked."""
    left = Counter({(kind, answer): math.ceil(per_kind / len(answers)) for kind, answers in ANSWERS.items() for answer in answers})
    number = 0
    while max(left.values()) > 0:
        found = questions_about(draw_scene(_rng(seed, True, number), True))
        left.subtract((kind, question.answer) for kind in KINDS for question in found[kind])
        number += 1
    return number


def _write_sheet(root: Path, records: list[dict[str, Any]], columns: int = 4, rows: int = 2) -> None:
    """examples.png: some held-out questions of all kinds under their pictures."""
    tile, line = 4 * GRID * CELL, 16
    sheet, font = Image.new("RGB", (columns * tile, rows * (tile + 3 * line)), "white"), ImageFont.load_default(12)
    draw = ImageDraw.Draw(sheet)
    for place in range(min(columns * rows, len(records))):
        record = records[place * len(records) // (columns * rows)]
        x, y = place % columns * tile, place // columns * (tile + 3 * line)
        with Image.open(root / record["image"]) as picture:
            sheet.paste(picture.resize((tile - 8, tile - 8), Image.Resampling.BICUBIC), (x + 4, y + 4))
        question, answer = (turn["value"].removeprefix("<image>\n") for turn in record["conversations"])
        draw.text((x + 4, y + tile), question, "black", font)
        draw.text((x + 4, y + tile + line), answer, "black", font)
    sheet.save(root / "examples.png")


def _background(rng: random.Random, side: int) -> Image.Image:
    """A gradient between two dark colours, in any direction."""
    one, other = (np.array([rng.randint(12, high) for _ in range(3)]) for high in (48, 62))
    angle, ramp = rng.uniform(0, 2 * math.pi), np.linspace(-1, 1, 8)
    blend = np.clip((ramp * math.cos(angle) + ramp[:, None] * math.sin(angle) + 1) / 2, 0, 1)[..., None]
    return Image.fromarray((one + (other - one) * blend).astype(np.uint8)).resize((side, side), Image.Resampling.BILINEAR)


def _place(picture: Image.Image, figure: Figure, x: float, y: float, radius: float, angle: float, colour: tuple[int, ...]) -> None:
    outline = _turned(figure.outline, angle)

    def scaled(factor: float) -> list[Point]:
        return [(x + px * radius * factor, y + py * radius * factor) for px, py in outline]

    if figure.hole:
        mask = Image.new("L", picture.size)
        draw = ImageDraw.Draw(mask)
        draw.polygon(scaled(1), fill=255)
        draw.polygon(scaled(figure.hole), fill=0)
        picture.paste(colour, mask=mask)
        return
    draw = ImageDraw.Draw(picture)
    draw.polygon(scaled(1), fill=tuple(value * 55 // 100 for value in colour) if figure.rim else colour)
    if figure.rim:
        draw.polygon(scaled(0.86), fill=colour)
