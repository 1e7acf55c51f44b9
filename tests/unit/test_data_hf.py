"""The reader of Hugging Face data sets: every layout of pictures, files and folders, and the same samples as from JSON."""

import hashlib
import io
import json
import multiprocessing
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm.data import readers
from vlm.data.hf import HfReader, HfSource
from vlm.data.llava import LlavaSource
from vlm.data.messages import MessagesSource
from vlm.data.sample import Picture, Sample
from vlm.data.sharegpt import SharegptSource
from vlm.errors import ConfigurationError, DataError

datasets = pytest.importorskip("datasets", reason="needs the extra `data`")
pyarrow = pytest.importorskip("pyarrow", reason="needs the extra `data`")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".cache")


def png(shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (3, 2), shade).save(buffer, "PNG")
    return buffer.getvalue()


def parquet(path: Path, rows: list[dict[str, Any]], schema: Any = None, group: int | None = None) -> str:
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), path, row_group_size=group)
    return str(path)


def opened(tmp_path: Path, *rows: dict[str, Any], **settings: Any) -> HfReader:
    return HfSource(file=parquet(tmp_path / "train.parquet", list(rows)), **settings).open()


def asked(number: int, **more: Any) -> dict[str, Any]:
    return {"question": f"q{number}", "answer": f"a{number}", **more}


def questions(reader: HfReader) -> list[str]:
    return [sample.turns[0].text.strip() for sample in reader]


def refusal(source: HfSource) -> str:
    with pytest.raises(DataError) as caught:
        source.open()
    return str(caught.value)


def content(sample: Sample) -> Any:
    """All that a model sees of a sample: its pictures as bytes."""
    turns = [replace(turn, parts=tuple(part.read() if isinstance(part, Picture) else part for part in turn.parts)) for turn in sample.turns]
    return sample.id, turns, sample.independent, sample.notes


# Pictures


BYTES, STRUCT = [pyarrow.binary(), pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})]


@pytest.mark.parametrize(
    ("kind", "value", "images"),
    [
        (BYTES, png(), [png()]),
        (STRUCT, {"bytes": png(), "path": None}, [png()]),
        (STRUCT, {"bytes": png(), "path": "gone.png"}, [png()]),
        (STRUCT, {"bytes": None, "path": "sub/a.png"}, [png(9)]),
        (pyarrow.string(), "sub/a.png", [png(9)]),
        (pyarrow.list_(BYTES), [png(1), png(2)], [png(1), png(2)]),
        (pyarrow.list_(STRUCT), [{"bytes": png(1), "path": None}, {"bytes": None, "path": "sub/a.png"}], [png(1), png(9)]),
        (pyarrow.large_list(pyarrow.large_binary()), [png(1)], [png(1)]),
        (pyarrow.list_(pyarrow.string()), ["sub/a.png"], [png(9)]),
        (pyarrow.list_(STRUCT), [], []),
        (pyarrow.list_(STRUCT), None, []),
    ],
)
@pytest.mark.parametrize("key", ["image", "images"])
def test_pictures_in_every_layout(tmp_path: Path, key: str, kind: Any, value: Any, images: list[bytes]):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(png(9))
    schema = pyarrow.schema({key: kind, "question": pyarrow.string(), "answer": pyarrow.string()})
    reader = HfSource(file=parquet(tmp_path / "train.parquet", [asked(0, **{key: value})], schema)).open()
    assert [picture.read() for picture in reader[0].pictures] == images


@pytest.mark.parametrize("many", [False, True])
def test_image_features_are_not_decoded(tmp_path: Path, many: bool):
    rows = {"image": [[{"bytes": b"no picture", "path": None}]] if many else [{"bytes": b"no picture", "path": None}], "caption": ["red"]}
    features = datasets.Features({"image": datasets.List(datasets.Image()) if many else datasets.Image(), "caption": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "train.parquet"))
    sample = HfSource(file=str(tmp_path / "train.parquet")).open()[0]
    assert [picture.read() for picture in sample.pictures] == [b"no picture"]
    assert sample.turns[1].text == "red"


def test_bad_pictures_are_named_with_file_and_row(tmp_path: Path):
    values = [
        {"bytes": png(), "path": None},
        {"bytes": None, "path": "gone.png"},
        {"bytes": b"", "path": None},
        {"bytes": None, "path": "/gone/a.png"},
        {"bytes": None, "path": "0.png"},
    ]
    (tmp_path / "0.png").write_bytes(b"")
    facts = {1: "gone.png is not there", 2: "0 bytes", 3: "is not there", 4: "0.png holds 0 bytes"}
    rows = [asked(number, image=value) for number, value in enumerate(values)]
    reader = opened(tmp_path, *rows)
    for row, fact in facts.items():
        with pytest.raises(DataError, match=rf"train\.parquet, row {row}: .*{fact}"):
            reader[row]
    left = opened(tmp_path, *rows, on_bad="skip")
    assert (len(left), len(left.bad)) == (1, 4)
    assert all(f"train.parquet, row {row}: " in str(error) for row, error in zip(facts, left.bad, strict=True))
    with pytest.raises(DataError, match="holds no samples.*1 bad rows"):
        opened(tmp_path, rows[1], on_bad="skip")


# Records


def test_the_same_content_gives_the_same_samples_as_json(tmp_path: Path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    turns = [("system", "Be brief."), ("human", "<image>\nIs <image> it?"), ("gpt", "Say <image>."), ("human", "And?"), ("gpt", "é"), ("human", "More?")]
    talk = {"id": "x", "images": ["0.png", "1.png"], "conversations": [{"from": role, "value": value} for role, value in turns], "kind": "colour"}
    plain = {"id": "7", "image": "2.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a"}]}
    embedded = [
        {**record, "image": None, "images": [{"bytes": (tmp_path / name).read_bytes(), "path": name} for name in record.get("images") or [record["image"]]]}
        for record in (talk, plain)
    ]
    share = {**talk, "conversations": talk["conversations"][1:], "system": "Be brief."}
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    chat = {**talk, "conversations": None, "messages": [{"role": roles[role], "content": value} for role, value in turns]}
    chat["messages"][1]["content"] = [{"type": "image"}, {"type": "text", "text": "\nIs "}, {"type": "image"}, {"type": "text", "text": " it?"}]
    other = {
        "id": "7",
        "messages": [{"role": "user", "content": [{"type": "image", "image": "2.png"}, {"type": "text", "text": "\nWhat?"}]}, {"role": "assistant", "content": "a"}],
    }
    for name, records in {"llava": [talk, plain], "share": [share, plain], "chat": [chat, other]}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(records), encoding="utf-8")
    sources = [
        LlavaSource(file=str(tmp_path / "llava.json")),
        SharegptSource(file=str(tmp_path / "share.json")),
        MessagesSource(file=str(tmp_path / "chat.json")),
        HfSource(file=parquet(tmp_path / "embedded.parquet", embedded)),
        HfSource(file=parquet(tmp_path / "paths.parquet", [talk, {**plain, "image": None, "images": ["2.png"]}])),
    ]
    first, *others = [[content(sample) for sample in source.open()] for source in sources]
    assert [len(turns) for _, turns, *_ in first] == [6, 2]
    assert all(other == first for other in others)


def test_mixed_content_stored_as_json(tmp_path: Path):
    messages = [
        [{"role": "user", "content": [{"type": "text", "text": "q"}]}, {"role": "assistant", "content": "a"}],
        [{"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}],
    ]
    datasets.Dataset.from_dict({"messages": messages}, on_mixed_types="use_json").to_parquet(str(tmp_path / "train.parquet"))
    assert questions(HfSource(file=str(tmp_path / "train.parquet")).open()) == ["q", "r"]


def test_columns_are_named_and_nothing_else_is_read(tmp_path: Path):
    row = {"prompt": "q", "response": "a", "picture": png(), "question": 3, "text": "x"}
    names = {"image": "picture", "question": "prompt", "answer": "response"}
    sample = opened(tmp_path, row, columns=names)[0]
    assert [part for part in sample.turns[0].parts if isinstance(part, str)] == ["\nq"]
    assert sample.pictures[0].read() == png()
    with pytest.raises(DataError, match="no column 'reply'.*prompt, response.*columns.answer"):
        opened(tmp_path, row, columns={**names, "answer": "reply"})
    with pytest.raises(ConfigurationError, match="'prompt' is not a name of ours"):
        opened(tmp_path, row, columns={"prompt": "question"})


@pytest.mark.parametrize(
    ("row", "columns"), [({"prompt": "q"}, None), ({"id": "1", "prompt": "q", "text": "a"}, None), ({"prompt": "q", "question": "r"}, {"question": "question"})]
)
def test_files_whose_columns_are_no_form_name_them_and_the_setting(tmp_path: Path, row: dict[str, Any], columns: dict[str, str] | None):
    with pytest.raises(DataError, match=f"not the columns of any form.*the columns {', '.join(row)};.*`columns: .*--columns"):
        opened(tmp_path, row, columns=columns)


def test_columns_that_nothing_can_be_learnt_from_are_refused_unless_left_out(tmp_path: Path):
    rows = {"video": [str(tmp_path / "a.mp4"), None], "question": ["<video>?", "q"], "answer": ["a", "b"]}
    (tmp_path / "a.mp4").write_bytes(b"film")
    features = datasets.Features({"video": datasets.Video(), "question": datasets.Value("string"), "answer": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "train.parquet"))
    reader = HfSource(file=str(tmp_path / "train.parquet"), on_bad="skip").open()
    assert questions(reader) == ["q"]
    assert "row 0: `video` is not taken" in str(reader.bad[0])
    named = HfSource(file=str(tmp_path / "train.parquet"), columns={"question": "question", "answer": "answer"})
    assert questions(named.open()) == ["<video>?", "q"]


# Files


def test_rows_are_read_alone_in_any_order_and_in_other_processes(tmp_path: Path):
    file = parquet(tmp_path / "train.parquet", [asked(number, id=f"r{number}", image=png(number % 5)) for number in range(40)], group=7)
    reader = HfSource(file=file).open()
    assert readers.get("hf") is HfSource
    assert [reader[row].id for row in (39, 0, -1, 13)] == ["r39", "r0", "r39", "r13"]
    with pytest.raises(IndexError):
        reader[40]
    packed = pickle.dumps(reader)
    assert len(packed) < 5000
    assert list(pickle.loads(packed)) == list(reader)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(reader.__getitem__, range(40)) == list(reader)
    assert reader.file_hash() == hashlib.sha256(Path(file).read_bytes()).hexdigest()


def test_a_changed_file_is_read_anew(tmp_path: Path):
    for number in range(3):
        assert questions(opened(tmp_path, asked(number))) == [f"q{number}"]


def test_files_of_a_folder_in_the_order_of_their_names(tmp_path: Path):
    folder = tmp_path / "data [1] *"
    for shard, numbers in {"c": [5], "a": [0, 1, 2], "b": [], "deep/d": [9]}.items():
        rows = [asked(number, image=f"{number}.png") for number in numbers]
        parquet(folder / f"{shard}.parquet", rows, pyarrow.schema({name: pyarrow.string() for name in ("question", "answer", "image")}))
        for number in numbers:
            (folder / f"{shard}.parquet").with_name(f"{number}.png").write_bytes(png(number))
    reader = HfSource(file=str(folder)).open()
    assert questions(reader) == ["q0", "q1", "q2", "q5", "q9"]
    assert [Path(sample.where).name for sample in reader] == ["a.parquet, row 0", "a.parquet, row 1", "a.parquet, row 2", "c.parquet, row 0", "d.parquet, row 0"]
    assert [sample.pictures[0].read() for sample in reader] == [png(number) for number in (0, 1, 2, 5, 9)]
    assert [sample.id for sample in reader] == ["0", "1", "2", "3", "4"]
    before = reader.file_hash()
    parquet(folder / "c.parquet", [asked(6, image="5.png")])
    assert HfSource(file=str(folder)).open().file_hash() != before
    assert questions(HfSource(file=str(tmp_path / "data*" / "[bc].parquet")).open()) == ["q6"]


def test_arrow_files_and_saved_folders(tmp_path: Path):
    rows = datasets.Dataset.from_dict({name: [f"{name[0]}{number}" for number in range(4)] for name in ("question", "answer")})
    rows.select([3, 1]).save_to_disk(str(tmp_path / "saved"))
    saved = HfSource(file=str(tmp_path / "saved")).open()
    assert questions(saved) == ["q3", "q1"]
    assert saved[1].where == f"{tmp_path / 'saved'}, row 1"
    assert saved.file_hash() == HfSource(file=str(tmp_path / "saved")).open().file_hash()
    rows.save_to_disk(str(tmp_path / "two"), num_shards=2)
    assert questions(HfSource(file=str(tmp_path / "two" / "*.arrow")).open()) == ["q0", "q1", "q2", "q3"]
    state = tmp_path / "saved" / "state.json"
    state.write_text(state.read_text().replace('"data-', '"../two/data-').replace("of-00001", "of-00002"))
    assert "outside of itself" in refusal(HfSource(file=str(tmp_path / "saved")))
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "dict"))
    message = refusal(HfSource(file=str(tmp_path / "dict")))
    assert "test, train" in message
    assert str(tmp_path / "dict" / "train") in message


def test_what_cannot_be_read_is_named(tmp_path: Path):
    whole = Path(parquet(tmp_path / "train-0.parquet", [asked(0)]))
    with pyarrow.OSFile(str(tmp_path / "file.arrow"), "wb") as sink, pyarrow.ipc.new_file(sink, pyarrow.schema({"question": pyarrow.string()})):
        pass
    schema = pyarrow.schema({"question": pyarrow.string(), "answer": pyarrow.string()})
    for name, made, fact in (
        ("gone.parquet", None, "there is no data at"),
        ("none.json", b"{}", "of another kind. got .json"),
        ("bad.parquet", b"no parquet", "cannot be read"),
        ("cut.parquet", whole.read_bytes()[:-20], "cannot be read"),
        ("bad.arrow", b"xx", "cannot be read"),
        ("file.arrow", (tmp_path / "file.arrow").read_bytes(), "Arrow's file format"),
        ("empty.parquet", Path(parquet(tmp_path / "e", [], schema)).read_bytes(), "holds no samples"),
    ):
        if made is not None:
            (tmp_path / name).write_bytes(made)
        message = refusal(HfSource(file=str(tmp_path / name)))
        assert name in message
        assert fact in message
    parquet(tmp_path / "sub" / "data" / "train-0.parquet", [asked(0)])
    parquet(tmp_path / "sub" / "data" / "test-0.parquet", [asked(0)])
    message = refusal(HfSource(file=str(tmp_path / "sub")))
    assert "several splits. got test, train" in message
    assert "train-0.parquet" in message
    parquet(tmp_path / "sub" / "data" / "train-1.parquet", [{"question": [1], "answer": {"x": 1}}])
    assert "same columns" in refusal(HfSource(file=str(tmp_path / "sub" / "data" / "train-*")))


# The field case itself, and the sets of real pictures


def test_field_parquet_images(field_folder: Path):
    case = field_folder / "data_parquet_images"
    expected = json.loads((case / "expected.json").read_text(encoding="utf-8"))
    for name, want in expected.items():
        reader = HfSource(file=str(case / name)).open()
        assert len(reader) == want.get("rows", len(want["images"]))
        for row, images in enumerate(want["images"]):
            if isinstance(images, str):
                with pytest.raises(DataError, match=rf"{name}, row {row}: .*({'is not there' if 'not found' in images else '0 bytes'})"):
                    reader[row]
            else:
                sizes = [Image.open(io.BytesIO(picture.read())).size for picture in reader[row].pictures]
                assert len(sizes) == images
                if "sizes" in want:
                    assert sizes == [tuple(want["sizes"][row])]
    answers = [sample.turns[-1].text for sample in HfSource(file=str(case / "with_features.parquet")).open()]
    assert answers == ["red", "blue"]


def test_digits_strips(data_folder: Path):
    from pyarrow import parquet

    file = data_folder / "digits_strips" / "val.parquet"
    reader = HfSource(file=str(file), on_bad="skip").open()
    rows = parquet.read_table(file).to_pylist()
    assert (len(reader), reader.bad) == (len(rows), ())
    for row in range(0, len(rows), 50):
        sample, want = reader[row], rows[row]
        assert (sample.id, sample.turns[1].text, sample.turns[1].kind) == (want["id"], want["answer"], want["kind"])
        assert sample.turns[0].parts == (sample.pictures[0], f"\n{want['question']}")
        assert sample.pictures[0].read() == want["image"]
