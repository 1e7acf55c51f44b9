"""The samples of a bench of training or generation: real ones where they are, else drawn, in LLaVA's format, with a tokenizer made of their text."""

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.data import scenes
from vlm.data.scenes import Question, llava_record
from vlm.data.tokenizer import write_tokenizer

__all__ = ["Corpus", "corpus"]

TALKS = ("digits_strips", "icons", "fashion")
"""Sets of which all questions about a picture are one conversation, as in LLaVA's own mixture."""
SINGLE = {"photos_caption": "caption", "scene_words": None, "nlvr_real": "human_sentence"}
"""Sets of which a question is a sample, and the kind that is taken."""


@dataclass(frozen=True)
class Corpus:
    """A data root with a file of samples in LLaVA's format, their pictures, and a tokenizer made of their text."""

    root: Path
    name: str
    records: list[dict[str, Any]]

    def holding(self, name: str, records: list[dict[str, Any]]) -> "Corpus":
        """The same root with other samples."""
        _write(self.root / f"{name}.json", records)
        return Corpus(self.root, name, records)

    def separate(self) -> "Corpus":
        """Every question a sample of its own; its id begins with that of its sample."""
        return self.holding(
            "separate",
            [
                llava_record(f"{record['id']}:{number}", record["image"], [Question(asked["value"].removeprefix("<image>\n"), answer["value"])])
                for record in self.records
                for number, (asked, answer) in enumerate(_pairs(record["conversations"]))
            ],
        )

    def independent(self) -> "Corpus":
        """Every conversation as questions that share the picture and do not see one another."""
        return self.holding("independent", [record | {"independent": True} for record in self.records])


def _pairs(turns: list[dict[str, str]]) -> list[tuple[dict[str, str], dict[str, str]]]:
    return list(zip(turns[::2], turns[1::2], strict=True))


def corpus(root: Path, per_set: int) -> Corpus:
    """`per_set` samples of each of six sets of ../shared/data (or of the folder VLM_DATA): captions, short answers, conversations of several turns. Without that folder drawn scenes, said so."""
    given = os.environ.get("VLM_DATA")
    data = Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not data.is_dir():
        print(f"   no folder {data}: drawn scenes instead of real pictures")
    found = _real(data, root, per_set) if data.is_dir() else _drawn(root, per_set)
    random.Random(0).shuffle(found)
    _write(root / "mix.json", found)
    write_tokenizer(root / "tokenizer", (turn["value"].removeprefix("<image>\n") for record in found for turn in record["conversations"]), size=8192)
    return Corpus(root, "mix", found)


def _real(data: Path, root: Path, per_set: int) -> list[dict[str, Any]]:
    import pyarrow.parquet as parquet

    records = []
    for name in (*TALKS, *SINGLE):
        asked: dict[str, list[Question]] = {}
        for row in parquet.read_table(data / name / "train.parquet", columns=["image", "image_id", "question", "answer", "kind"]).to_pylist():
            if SINGLE.get(name) not in (None, row["kind"]) or (name in SINGLE and row["image_id"] in asked):
                continue
            if row["image_id"] not in asked and len(asked) == per_set:
                break
            if row["image_id"] not in asked:
                path = root / "pictures" / name / row["image_id"].replace("/", "_")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(row["image"])
            asked.setdefault(row["image_id"], []).append(Question(row["question"], row["answer"]))
        records += [llava_record(f"{name}-{image}", f"pictures/{name}/{image.replace('/', '_')}", questions) for image, questions in asked.items()]
    return records


def _drawn(root: Path, per_set: int) -> list[dict[str, Any]]:
    records = []
    (root / "pictures").mkdir()
    for index in range(per_set * (len(TALKS) + len(SINGLE))):
        rng = random.Random(index)
        scene = scenes.draw_scene(rng, False)
        scenes.paint(scene, rng).save(root / "pictures" / f"{index}.png")
        questions = [question for found in scenes.questions_about(scene).values() for question in found]
        chosen = [scenes.caption(scene, rng)] if index % 2 else rng.sample(questions, min(4, len(questions)))
        records.append(llava_record(f"scene-{index}", f"pictures/{index}.png", chosen))
    return records


def _write(file: Path, records: list[dict[str, Any]]) -> None:
    file.write_text(json.dumps(records), encoding="utf-8")
