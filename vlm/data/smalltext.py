"""Small text at high resolution: six small digits in the nine cells of a page, drawn from a seed.

A page has 216 pixels a side and a digit some 11, with specks of its ink around it. Shrunk to 12 pixels a digit is a grey spot. Of a tower that sees this, the questions where
digits are say that it works, and the questions which they are that it cannot read. Clean print would not do: how a small network reads a digit from two grey pixels, nobody sees.
"""

import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vlm.data.scenes import Question, llava_record
from vlm.data.tokenizer import write_tokenizer
from vlm.data.write import write_records
from vlm.errors import ConfigurationError
from vlm.folders import new_folder

__all__ = ["Page", "draw_page", "paint_page", "questions_about", "reading", "write_smalltext"]

GRID, CELL = 3, 72  # cells a side; pixels a cell
FONT, SHIFT = 15, 2  # size of the font, of which a digit's height is seven tenths; how far from the middle of its cell a digit may lie; pixels
PAPER, INK = 16, (120, 255)  # brightness; the ink's by chance, so that how bright a spot is does not give the digit away
SPECKS, AROUND = 30, 8  # how many at most, pixels each; how far from the middle of the digit
FILLED = 6
PLACES = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")

Page = tuple[str | None, ...]
"""The digit of each cell in reading order."""


def draw_page(rng: random.Random) -> Page:
    """Six cells with a digit, by chance."""
    filled = rng.sample(range(GRID**2), FILLED)
    return tuple(rng.choice("0123456789") if cell in filled else None for cell in range(GRID**2))


def paint_page(page: Page, rng: random.Random) -> Image.Image:
    """The picture (grey, 216 x 216). Places in the cell, brightness and specks vary with `rng`."""
    picture = Image.new("L", (GRID * CELL, GRID * CELL), PAPER)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(FONT)
    for cell, digit in enumerate(page):
        if digit is None:
            continue
        x, y = ((index + 0.5) * CELL + rng.uniform(-SHIFT, SHIFT) for index in (cell % GRID, cell // GRID))
        ink = rng.randint(*INK)
        draw.text((x, y), digit, ink, font, anchor="mm")
        for _ in range(rng.randint(0, SPECKS)):
            draw.point((x + rng.uniform(-AROUND, AROUND), y + rng.uniform(-AROUND, AROUND)), ink)
    return picture


def questions_about(page: Page) -> dict[str, list[Question]]:
    """All of a page, by what is asked: `digit`, and whether a cell has one, `yes` and `no`. The place comes first, so what is gathered there serves all."""
    found: dict[str, list[Question]] = {"digit": [], "yes": [], "no": []}
    for place, digit in zip(PLACES, page, strict=True):
        there = "no" if digit is None else "yes"
        found[there].append(Question(f"{place} : a digit ?", there, "filled"))
        if digit is not None:
            found["digit"].append(Question(f"{place} : which digit ?", digit, "digit"))
    return found


def reading(page: Page) -> Question:
    """All of the page in reading order; for training alone."""
    return Question("read the page .", " ".join(digit or "-" for digit in page), "reading")


def write_smalltext(folder: str | Path, *, seed: int = 0, pages: int = 4000, held_out: int = 300) -> dict[str, int]:
    """Writes train.json, test.json, pictures/ and tokenizer/ into `folder`: the same bytes for a seed. All pages differ, so none is in both parts.

    train: the reading of each page, five digits, and of a cell with and one without a digit whether it has one; independent of one another.
    test: two digits of each held-out page, and of one cell whether it has one, yes and no in turn; one question per sample.
    Returns the numbers of samples and pictures. Raises ConfigurationError for a part without pages, and where `folder` holds something.
    """
    if min(pages, held_out) < 1:
        raise ConfigurationError("small text needs pages to learn from and pages to be asked about", got=f"pages {pages}, held out {held_out}", expected="1 or more of each")
    rng = random.Random(f"{seed} small text")
    drawn: dict[Page, None] = {}
    while len(drawn) < pages + held_out:
        drawn.setdefault(draw_page(rng))
    train, test = [], []
    with new_folder(Path(folder)) as root:
        for index, page in enumerate(drawn):
            name = f"pictures/{index // 1000:03d}/{index:06d}.png"
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            paint_page(page, rng).save(root / name)
            if index < pages:
                train.append(llava_record(f"train-{index}", name, [reading(page), *_some(page, rng, digit=5, yes=1, no=1)], independent=True))
            else:
                asked = _some(page, rng, digit=2, yes=index % 2, no=1 - index % 2)
                test += [llava_record(f"test-{index - pages}-{number}", name, [question]) for number, question in enumerate(asked)]
        write_records(root / "train.json", train)
        write_records(root / "test.json", test)
        write_tokenizer(root / "tokenizer", (turn["value"].removeprefix("<image>") for record in train for turn in record["conversations"]))
    return {"train": len(train), "test": len(test), "pictures": pages + held_out}


def _some(page: Page, rng: random.Random, **numbers: int) -> list[Question]:
    """So many of each kind, in any order."""
    chosen = [question for about, questions in questions_about(page).items() for question in rng.sample(questions, numbers[about])]
    return rng.sample(chosen, len(chosen))
