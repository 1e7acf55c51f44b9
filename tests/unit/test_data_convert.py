"""Conversion between all formats: the same samples there and back, or an error that names the record."""

import io
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from vlm import compose
from vlm.cli import app
from vlm.data.convert import convert_data
from vlm.data.llava import LlavaSource
from vlm.data.sample import Picture, Sample, Turn, held
from vlm.data.sources import columns_of, sources_at
from vlm.data.write import FORMATS, picture_suffix, write_records, write_split
from vlm.errors import ConfigurationError, DataError, EnvironmentProblem

datasets = pytest.importorskip("datasets", reason="needs the extra `data`")
ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["q?", "größe 图片 🎈", "one\ntwo\u2028three\x85four\u2029", " \n  leading", '"quoted" \\ {}', "<Image> &lt;image&gt;", "\r\n", "x" * 3000]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".cache")


def picture_bytes(form: str, shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (4 + shade, 4), shade).save(buffer, form)
    return buffer.getvalue()


PICTURES = [picture_bytes(form, shade) for shade, form in enumerate(("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000"))]


def drawn(number: int, rng: random.Random) -> Sample:
    """Any sample that a reader may give."""

    def text(literal: bool = False) -> str:
        return rng.choice(TEXTS[:-2] + (["the mark <image> is text here"] if literal else []))

    def question(pictures: bool) -> tuple[str | Picture, ...]:
        parts: list[str | Picture] = [text()]
        for _ in range(rng.randint(0, 3) if pictures else 0):
            parts += [held(rng.choice(PICTURES)), *([rng.choice(TEXTS)] if rng.random() < 0.6 else [])]
        return tuple(parts[rng.random() < 0.5 and len(parts) > 1 :])

    independent = rng.random() < 0.3
    turns = [Turn("system", (text(True),))] * rng.choice([0, 0, 1, 2])
    for place in range(rng.randint(1, 3)):
        kind = rng.choice([None, "colour", "größe"])
        turns += [Turn("user", question(not (independent and place)), kind=kind), Turn("assistant", (text(True),), supervised=True, kind=kind)]
    if not independent:
        turns = [*([Turn("assistant", ("hello",), supervised=True, kind=rng.choice([None, "k"]))] if rng.random() < 0.2 else []), *turns]
        turns += [Turn("user", question(True), kind=rng.choice([None, "last"]))] if rng.random() < 0.2 else []
    return Sample(rng.choice([str(number), "twice", "a/../b.c", "图", ""]), tuple(turns), where=f"made, sample {number}", independent=independent)


SAMPLES = [drawn(number, random.Random(number)) for number in range(60)]


def said(sample: Sample) -> Any:
    turns = [(turn.role, turn.supervised, turn.kind, *(part if isinstance(part, str) else part.read() for part in turn.parts)) for turn in sample.turns]
    return sample.id, sample.independent, turns


def opened(folder: Path) -> list[Sample]:
    (spec,) = sources_at(folder).values()
    return list(spec.open())


@pytest.mark.parametrize("first", FORMATS)
def test_there_and_back_is_the_same(tmp_path: Path, first: str):
    expected = [said(sample) for sample in SAMPLES]
    assert {len(sample.pictures) for sample in SAMPLES} >= {0, 1, 2, 3, 4}
    (tmp_path / "first").mkdir()
    written = write_split(iter(SAMPLES), tmp_path / "first", "train", first, per_shard=7)
    assert written[:2] == (60, sum(turn.supervised for sample in SAMPLES for turn in sample.turns))
    assert [said(sample) for sample in opened(tmp_path / "first")] == expected
    for second in FORMATS:
        convert_data(tmp_path / "first", tmp_path / second, second)
        assert [said(sample) for sample in opened(tmp_path / second)] == expected, second


@pytest.mark.parametrize("to", FORMATS)
def test_what_a_format_cannot_say_is_an_error_with_the_record(tmp_path: Path, to: str):
    literal = Sample("x", (Turn("user", (held(PICTURES[0]), "\nwhat does <image> mean?")), Turn("assistant", ("a",), supervised=True)), where="made, sample 7")
    unseen = Sample("y", (Turn("user", ("what does <image> mean?",)), Turn("assistant", ("a",), supervised=True)))
    if to in ("messages", "parquet", "tar"):
        write_split([literal, unseen], tmp_path, "train", to)
        assert [said(sample) for sample in opened(tmp_path)] == [said(literal), said(unseen)]
        return
    with pytest.raises(DataError, match=rf"made, sample 7: cannot be written as {to}.*images 1, placeholders 2") as caught:
        write_split([SAMPLES[0], literal], tmp_path, "train", to)
    assert caught.value.cure is not None
    assert "messages" in caught.value.cure


@pytest.mark.parametrize("to", FORMATS)
def test_kinds_that_would_be_joined_are_an_error(tmp_path: Path, to: str):
    sample = Sample("x", (Turn("user", ("q",), kind="one"), Turn("assistant", ("a",), supervised=True, kind="other")), where="made, sample 7")
    with pytest.raises(DataError, match="made, sample 7: cannot be written"):
        write_split([sample], tmp_path, "train", to)


def test_files_hold_what_other_programs_expect(tmp_path: Path):
    sample = Sample("7", (Turn("system", ("s",)), Turn("user", (held(PICTURES[0]), "\nq"), kind="k"), Turn("assistant", ("a",), supervised=True, kind="k")))
    for to in ("llava", "sharegpt", "messages", "parquet"):
        (tmp_path / to).mkdir()
        write_split([sample, sample], tmp_path / to, "train", to)
    name = next(path.relative_to(tmp_path / "llava").as_posix() for path in (tmp_path / "llava" / "pictures" / "train").rglob("*.png"))
    system, asked, answer = {"from": "system", "value": "s"}, {"from": "human", "value": "<image>\nq", "kind": "k"}, {"from": "gpt", "value": "a"}
    assert json.loads((tmp_path / "llava" / "train.json").read_text())[1] == {"id": "7", "image": name, "conversations": [system, asked, answer]}
    assert json.loads((tmp_path / "sharegpt" / "train.json").read_text())[0] == {"id": "7", "images": [name], "system": "s", "conversations": [asked, answer]}
    content = [{"type": "image"}, {"type": "text", "text": "\nq"}]
    rows = [{"role": "system", "content": "s"}, {"role": "user", "content": content, "kind": "k"}, {"role": "assistant", "content": "a"}]
    assert json.loads((tmp_path / "messages" / "train.jsonl").read_text().splitlines()[1]) == {"id": "7", "images": [name], "messages": rows}
    table = datasets.load_dataset("parquet", data_files=str(tmp_path / "parquet" / "train.parquet"), split="train", cache_dir=str(tmp_path / ".cache"))
    assert table[1]["images"][0].size == (4, 4)
    assert table[1]["messages"][1]["content"][1] == {"type": "text", "text": "\nq"}


def test_line_ends_within_texts_end_no_line_for_others(tmp_path: Path):
    write_split([SAMPLES[0], Sample("x", (Turn("assistant", (TEXTS[2],), supervised=True),))], tmp_path, "train", "messages")
    assert [json.loads(line)["id"] for line in (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()] == [SAMPLES[0].id, "x"]


def test_a_picture_of_many_samples_is_one_file(tmp_path: Path):
    sample = Sample("x", (Turn("user", (held(PICTURES[0]), held(PICTURES[0]), held(PICTURES[1]))), Turn("assistant", ("a",), supervised=True)))
    assert write_split([sample] * 3, tmp_path, "train", "llava").pictures == 9
    assert sorted(path.suffix for path in (tmp_path / "pictures").rglob("*.*")) == [".jpg", ".png"]


def test_a_picture_that_is_none_or_missing_is_named(tmp_path: Path):
    for picture, fact in ((held(b"text"), "not a picture file"), (Picture(str(tmp_path / "gone.png")), "gone.png cannot be read")):
        sample = Sample("x", (Turn("user", (picture,)), Turn("assistant", ("a",), supervised=True)), where="made, sample 7")
        for to in FORMATS:
            with pytest.raises(DataError, match=f"made, sample 7.*{fact}"):
                write_split([sample], tmp_path / "out" if to == "tar" else tmp_path, "train", to)
    assert [picture_suffix(data, "") for data in PICTURES] == [".png", ".jpg", ".webp", ".gif", ".bmp", ".tif", ".ppm", ".avif", ".jp2"]


# Which splits and readers


def test_splits_of_folders(tmp_path: Path):
    for split in ("train", "val"):
        write_split(SAMPLES[:9], tmp_path, split, "tar", per_shard=3)
    sources = sources_at(tmp_path)
    assert {split: len(spec.open()) for split, spec in sources.items()} == {"train": 9, "val": 9}
    assert set(sources_at(str(tmp_path / "val-*.tar"))) == {"val"}
    assert set(sources_at(tmp_path / "val-000001.tar")) == {"val"}
    write_split(SAMPLES[:2], tmp_path, "more", "messages")
    with pytest.raises(ConfigurationError, match=r"\.jsonl, \.tar"):
        sources_at(tmp_path)
    assert {split: spec.use for split, spec in sources_at(tmp_path, reader="messages", images=tmp_path).items()} == {"more": "messages"}
    table = datasets.Dataset.from_list([{"question": "q", "answer": "a"}])
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path / "saved"))
    assert {split: len(spec.open()) for split, spec in sources_at(tmp_path / "saved").items()} == {"test": 1, "train": 1}
    assert convert_data(tmp_path / "saved" / "test", tmp_path / "out", "tar")["test"].samples == 1


def test_what_cannot_be_told_is_refused(tmp_path: Path):
    (tmp_path / "x.csv").touch()
    with pytest.raises(ConfigurationError, match="--reader"):
        sources_at(tmp_path / "x.csv")
    with pytest.raises(DataError, match="holds no data"):
        sources_at(tmp_path)
    with pytest.raises(DataError, match="nothing at"):
        sources_at(tmp_path / "gone")
    with pytest.raises(ConfigurationError, match="coco"):
        convert_data(tmp_path, tmp_path / "out", "coco")
    assert [path.name for path in tmp_path.iterdir()] == ["x.csv"]


def test_examples_of_the_docs_are_read(tmp_path: Path):
    for name in ("cat.jpg", "dog.jpg"):
        (tmp_path / name).write_bytes(PICTURES[1])
    examples = re.findall(r"^```json title=(\w+)\n(.*?)^```", (ROOT / "docs" / "data.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert {reader for reader, _ in examples} == {"llava", "messages", "sharegpt"}
    for number, (reader, text) in enumerate(examples):
        (tmp_path / f"{number}.json").write_text(text, encoding="utf-8")
        (written,) = convert_data(tmp_path / f"{number}.json", tmp_path / f"{number}", "tar", reader=reader).values()
        assert written.pictures


# Sets of questions about pictures


def row(number: int, image: str, data: bytes | None, **more: Any) -> dict[str, Any]:
    return {"id": f"r{number}", "image": data, "image_id": image, "question": f"q{number}?", "answer": f"a{number}", "kind": "k", **more}


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet as parquet

    path.parent.mkdir(exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("to", FORMATS)
def test_training_questions_about_a_picture_become_one_sample(tmp_path: Path, to: str):
    png, jpeg, webp = PICTURES[:3]
    write_parquet(tmp_path / "set" / "train.parquet", [row(0, "one", png), row(1, "a/../b", jpeg), row(2, "one", png, kind="other")])
    write_parquet(tmp_path / "set" / "val.parquet", [row(3, "one", webp), row(4, "one", webp)])
    counts = convert_data(tmp_path / "set", tmp_path / "out", to)
    assert {split: written[:3] for split, written in counts.items()} == {"train": (2, 3, 2), "val": (2, 2, 2)}
    train, val = (list(spec.open()) for spec in sources_at(tmp_path / "out").values())
    assert [sample.id for sample in train + val] == ["one", "a/../b", "r3", "r4"]
    assert [sample.independent for sample in train + val] == [True, True, False, False]
    assert [(turn.text, turn.kind) for turn in train[0].turns] == [("\nq0?", "k"), ("a0", "k"), ("q2?", "other"), ("a2", "other")]
    assert [[picture.read() for picture in sample.pictures] for sample in train + val] == [[png], [jpeg], [webp], [webp]]
    convert_data(tmp_path / "set" / "train.parquet", tmp_path / "flat", to, group=False)
    assert [(sample.id, sample.independent) for sample in opened(tmp_path / "flat")] == [("r0", False), ("r1", False), ("r2", False)]


def test_questions_are_grouped_over_all_files_that_the_reader_finds(tmp_path: Path):
    (tmp_path / "train").mkdir()
    write_parquet(tmp_path / "train" / "0.parquet", [row(0, "one", PICTURES[0]), row(1, "two", PICTURES[1])])
    write_parquet(tmp_path / "train" / "deep" / "1.parquet", [row(2, "one", PICTURES[0]), row(3, "two", PICTURES[1]), row(4, "three", PICTURES[2])])
    written = convert_data(f"{tmp_path}/train/**/*.parquet", tmp_path / "out")["train"]
    assert written[:3] == (3, 5, 3)
    assert {sample.id: [turn.text for turn in sample.turns[1::2]] for sample in opened(tmp_path / "out")} == {"one": ["a0", "a2"], "two": ["a1", "a3"], "three": ["a4"]}


def test_columns_of_other_names(tmp_path: Path):
    rows = [{"picture": PICTURES[0], "image_id": "one", "prompt": f"q{number}", "response": "a"} for number in range(2)]
    file = str(write_parquet(tmp_path / "train.parquet", rows))
    columns = ["--columns", "{image: picture, question: prompt, answer: response}"]
    for command in (["check", file], ["convert", file, str(tmp_path / "out")], ["tokenizer", file, str(tmp_path / "tokenizer")]):
        assert CliRunner().invoke(app, ["data", *command]).exit_code == 1
        done = CliRunner().invoke(app, ["data", *command, *columns])
        assert done.exit_code == 0, done.output
    (sample,) = opened(tmp_path / "out")
    assert ([turn.text for turn in sample.turns], sample.independent) == (["\nq0", "a", "q1", "a"], True)
    with pytest.raises(ConfigurationError, match="the reader llava takes no columns.*leave it away"):
        sources_at(tmp_path / "out", columns={"image": "picture"})
    for text in ("{image:picture}", "[image]", "{image: [}", "{image: 3}", ""):
        with pytest.raises(ConfigurationError, match="--columns.*our names for the file's"):
            columns_of(text)


@pytest.mark.parametrize("to", FORMATS)
def test_what_convert_prints_is_a_source_in_the_place_of_another(tmp_path: Path, to: str):
    write_split([sample for sample in SAMPLES if sample.pictures][:3], tmp_path, "train", "messages")
    done = CliRunner().invoke(app, ["data", "convert", str(tmp_path / "train.jsonl"), str(tmp_path / "out"), "--to", to])
    printed = done.output.split("; ")[-1].strip()
    run = compose("llava_tiny", f"data.questions={printed}", "data_root=/nowhere")
    assert [len(sample.pictures) > 0 and all(picture.read() for picture in sample.pictures) for sample in run.data["questions"].open()] == [True] * 3


@pytest.mark.parametrize(
    ("rows", "fact"),
    [
        ([row(0, "x", PICTURES[0]), row(1, "x", PICTURES[1])], "row 1: another picture"),
        ([row(0, "x", b"text")], "row 0, in the record: not a picture file"),
        ([row(0, "x", PICTURES[0]), row(1, "x", PICTURES[0], question="<image>?")], "row 1: the question holds the placeholder"),
        ([row(0, "x", PICTURES[0]), row(1, "x", PICTURES[0], answer=None)], "row 1: no turns"),
    ],
)
def test_errors_name_file_and_row_and_leave_nothing(tmp_path: Path, rows: list[dict[str, Any]], fact: str):
    file = write_parquet(tmp_path / "train.parquet", rows)
    with pytest.raises(DataError) as caught:
        convert_data(file, tmp_path / "out")
    assert fact in str(caught.value)
    assert str(file) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir() if path.name != ".cache"] == ["train.parquet"]


def test_without_the_packages_the_cure_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(EnvironmentProblem, match=r"vlm\[data\]"):
        write_split(SAMPLES, tmp_path, "train", "parquet")


def test_records_stand_on_lines_of_their_own(tmp_path: Path):
    write_records(tmp_path / "x.json", [{"id": "é"}, {"id": 2}])
    assert (tmp_path / "x.json").read_text(encoding="utf-8") == '[\n{"id": "é"},\n{"id": 2}\n]\n'


@pytest.mark.parametrize("to", ["llava", "parquet", "tar"])
def test_command_on_real_pictures(data_folder: Path, tmp_path: Path, to: str):
    done = CliRunner().invoke(app, ["data", "convert", str(data_folder / "scene_words" / "val.parquet"), str(tmp_path / "out"), "--to", to])
    assert done.exit_code == 0, done.output
    assert "val: 466 samples, 466 answers, 466 pictures" in done.output
    samples = opened(tmp_path / "out")
    (straight,) = sources_at(data_folder / "scene_words" / "val.parquet").values()
    assert [said(sample) for sample in samples] == [said(sample) for sample in straight.open()]


def test_what_the_reader_left_out_is_told(tmp_path: Path):
    write_split(SAMPLES[:2], tmp_path / "in", "train", "tar")
    import tarfile

    with tarfile.open(tmp_path / "in" / "train-000000.tar", "a") as shard:
        shard.addfile(tarfile.TarInfo("lonely.png"))
    (written,) = convert_data(tmp_path / "in", tmp_path / "out", "llava").values()
    assert written.samples == 2
    assert any("lonely" in warning for warning in written.warnings)
    assert len(LlavaSource(file=str(tmp_path / "out" / written.file)).open()) == 2
