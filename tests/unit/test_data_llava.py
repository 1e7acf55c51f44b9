"""The LLaVA reader, on files of the test's own making and on the field cases."""

import hashlib
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm.data import readers
from vlm.data.jsonfile import JsonReader
from vlm.data.llava import LlavaSource
from vlm.data.sample import Picture, Sample
from vlm.errors import DataError

ANSWERS = ["a café", "两个字", "one\ntwo\u2028three\x85four"]


def talk(*turns: tuple[Any, Any], **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": text} for role, text in turns], **more}


def write(path: Path, records: list[Any], lines: bool = False) -> str:
    text = "\n".join(json.dumps(record, ensure_ascii=False) for record in records) if lines else json.dumps(records, ensure_ascii=False, indent=1)
    path.write_bytes(text.encode("utf-8"))
    return str(path)


def opened(tmp_path: Path, *records: Any, **settings: Any) -> JsonReader:
    return LlavaSource(file=write(tmp_path / "train.json", list(records)), **settings).open()


def supervised(sample: Sample) -> list[str]:
    return [turn.text for turn in sample.turns if turn.supervised]


def names(sample: Sample) -> list[str]:
    return [Path(picture.path).name for picture in sample.pictures]


def refusal(reader: JsonReader, index: int = 0) -> str:
    with pytest.raises(DataError) as caught:
        reader[index]
    return str(caught.value)


def test_registered_with_its_name():
    assert readers.get("llava") is LlavaSource


# Files and encodings


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_byte_order_mark_and_line_ends_are_no_text(tmp_path: Path, lines: bool, mark: bytes, end: bytes):
    file = Path(write(tmp_path / "train", [talk(("human", "q"), ("gpt", answer)) for answer in ANSWERS], lines))
    file.write_bytes(mark + file.read_bytes().replace(b"\n", end) + end + end)
    reader = LlavaSource(file=str(file)).open()
    assert [supervised(reader[index]) for index in range(len(reader))] == [[answer] for answer in ANSWERS]


def test_joined_files_keep_no_byte_order_mark(tmp_path: Path):
    file = tmp_path / "train.jsonl"
    file.write_bytes(b"".join(b"\xef\xbb\xbf" + json.dumps(talk(("human", "q"), ("gpt", str(n)))).encode() + b"\n" for n in range(3)))
    assert [supervised(sample) for sample in LlavaSource(file=str(file)).open()] == [["0"], ["1"], ["2"]]


@pytest.mark.parametrize("lines", [False, True])
def test_another_encoding_is_refused_with_its_place(tmp_path: Path, lines: bool):
    file = Path(write(tmp_path / "train.json", [talk(("human", "q"), ("gpt", "é" * 9)), talk(("human", "问"), ("gpt", "答"))], lines))
    text = file.read_text(encoding="utf-8")
    for encoding, facts in (("gbk", ["not UTF-8 at byte", "0x"]), ("utf-16", ["UTF-16", "byte 0"]), ("utf-16-be", ["UTF-16-BE"]), ("utf-32", ["UTF-32"])):
        file.write_bytes(text.encode(encoding))
        with pytest.raises(DataError) as caught:
            LlavaSource(file=str(file)).open()
        assert all(fact in str(caught.value) for fact in ["train.json", "UTF-8", "re-save", *facts])


def test_byte_position_is_exact(tmp_path: Path):
    file = tmp_path / "train.json"
    head = '[\n{"é": "'.encode()
    file.write_bytes(head + "出口".encode("gbk") + b'"}]')
    with pytest.raises(DataError, match=rf"byte {len(head)} \(line 2\)"):
        LlavaSource(file=str(file)).open()


def test_cut_line_is_named(tmp_path: Path):
    file = Path(write(tmp_path / "train.jsonl", [talk(("human", "q"), ("gpt", "a"))] * 3, lines=True))
    lines = file.read_bytes().split(b"\n")
    file.write_bytes(b"\n".join([lines[0], b"", lines[1][:30], lines[2]]))
    with pytest.raises(DataError, match=r"train\.jsonl, line 3 \(sample 1\)"):
        LlavaSource(file=str(file)).open()
    reader = LlavaSource(file=str(file), on_bad="skip").open()
    assert [sample.where for sample in reader] == [f"{file}, sample 0 (line 1)", f"{file}, sample 2 (line 4)"]
    assert len(reader.bad) == 1
    assert "line 3" in str(reader.bad[0])


@pytest.mark.parametrize("damage", [lambda b: b[:-20], lambda b: b + b" x", lambda b: b.replace(b"},\n {", b"}\n {"), lambda b: b[:-1] + b",]"])
def test_damaged_array_is_named_with_its_place(tmp_path: Path, damage: Any):
    file = Path(write(tmp_path / "train.json", [talk(("human", "é"), ("gpt", "a"))] * 2))
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match=r"train\.json, sample [012]: not JSON at line \d+ column \d+ \(byte \d+\)"):
        LlavaSource(file=str(file)).open()


@pytest.mark.parametrize(("value", "fact"), [("[" * 100_000 + "]" * 100_000, "nested too deeply"), ("1" * 5000, "an integer of too many digits")])
def test_what_json_allows_and_python_does_not_is_named(tmp_path: Path, value: str, fact: str):
    good, file = json.dumps(talk(("human", "q"), ("gpt", "a"))), tmp_path / "train.json"
    file.write_text(f'{good}\n{{"a": {value}}}\n{good}\n')
    with pytest.raises(DataError, match=rf"train\.json, line 2 \(sample 1\).*{fact}"):
        LlavaSource(file=str(file)).open()
    reader = LlavaSource(file=str(file), on_bad="skip").open()
    assert (len(reader), len(reader.bad)) == (2, 1)
    file.write_text(f'[{good}, {{"a": {value}}}, {good}]')
    with pytest.raises(DataError, match=rf"train\.json, sample 1.*{fact}"):
        list(LlavaSource(file=str(file)).open())


@pytest.mark.parametrize("content", [b"", b"[]", b" \n\n", b"\xef\xbb\xbf"])
def test_empty_file_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "train.json").write_bytes(content)
    with pytest.raises(DataError, match=r"train\.json holds no samples"):
        LlavaSource(file=str(tmp_path / "train.json")).open()


RECORD = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (json.dumps(RECORD, indent=1), r"one object instead of a list.*put it into \[ \]"),
        (json.dumps({"größe": 1, "daten": [RECORD]}, indent=1, ensure_ascii=False), "one object around a list.*under the key 'daten'.*that list alone"),
        (json.dumps({"data": [RECORD]}), "under the key 'data'"),
        (" [ ]\n", "holds no samples. got no records"),
        ("", "holds no samples. got no records"),
        ("\n<!DOCTYPE html>\n<html><body>Log in</body></html>", "a page of HTML, not JSON. got <!DOCTYPE html>;.*fetch the data file itself"),
    ],
)
@pytest.mark.parametrize("on_bad", ["error", "skip"])
def test_files_that_are_no_list_say_what_they_are(tmp_path: Path, content: str, fact: str, on_bad: Any):
    (tmp_path / "train.json").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=fact):
        LlavaSource(file=str(tmp_path / "train.json"), on_bad=on_bad).open()


def test_one_object_on_a_line_is_json_lines(tmp_path: Path):
    (tmp_path / "train.json").write_text(json.dumps(RECORD) + "\n", encoding="utf-8")
    assert len(LlavaSource(file=str(tmp_path / "train.json")).open()) == 1


def test_missing_file_is_named():
    with pytest.raises(DataError, match=r"nowhere\.json"):
        LlavaSource(file="nowhere.json").open()


def test_pickled_reader_is_small_and_reads_the_same(tmp_path: Path):
    reader = opened(tmp_path, *[talk(("human", "q" * 500), ("gpt", f"é{n}")) for n in range(50)])
    packed = pickle.dumps(reader)
    assert len(packed) < 50 * 40 + 1000
    assert list(pickle.loads(packed)) == list(reader)
    assert reader[-1] == reader[49]
    assert reader.file_hash() == hashlib.sha256((tmp_path / "train.json").read_bytes()).hexdigest()


def test_numbered_parts_are_one_source(tmp_path: Path):
    """Every file keeps its own numbers in messages; ids of records without one go on."""
    record = talk(("human", "q"), ("gpt", "a"))
    for part, lines in (("00", [record, record]), ("01", []), ("02", [record, {}])):
        write(tmp_path / f"train-00{part}.jsonl", lines, lines=True)
    reader = LlavaSource(file=f"{tmp_path}/train-????.jsonl").open()
    assert len(reader) == 4 and reader.warnings == (f"1 of 3 files without records: {tmp_path}/train-0001.jsonl",)
    assert [(reader[index].id, reader[index].where) for index in range(3)] == [
        ("0", f"{tmp_path}/train-0000.jsonl, sample 0 (line 1)"),
        ("1", f"{tmp_path}/train-0000.jsonl, sample 1 (line 2)"),
        ("2", f"{tmp_path}/train-0002.jsonl, sample 0 (line 1)"),
    ]
    assert "train-0002.jsonl, sample 1 (line 2): no turns" in refusal(reader, 3)
    before = reader.file_hash()
    write(tmp_path / "train-0002.jsonl", [record], lines=True)
    assert "train-0002.jsonl was changed" in refusal(reader, 2) and reader[0].id == "0" and LlavaSource(file=reader.source.file).open().file_hash() != before
    with pytest.raises(DataError, match=r"the data file .*other-\?\.json cannot be read"):
        LlavaSource(file=f"{tmp_path}/other-?.json").open()


def test_changed_file_is_noticed(tmp_path: Path):
    reader = opened(tmp_path, talk(("human", "q"), ("gpt", "a")))
    write(tmp_path / "train.json", [talk(("human", "q"), ("gpt", "another"))])
    assert "was changed" in refusal(reader)


# Roles and turns


def test_roles_in_any_spelling(tmp_path: Path):
    reader = opened(
        tmp_path,
        talk(("system", "s"), ("HUMAN", "q"), ("Bot", "a")),
        {"id": 7, "messages": [{"role": "User", "content": "q"}, {"role": "ASSISTANT", "content": "a"}]},
        {"conversations": [{"role": "user", "content": "q"}, {"from": "gpt", "value": "a"}]},
        talk(("gpt", "hello"), ("user", "q1"), ("user", "q2"), ("assistant", "a")),
    )
    assert [[turn.role for turn in sample.turns] for sample in reader] == [
        ["system", "user", "assistant"],
        ["user", "assistant"],
        ["user", "assistant"],
        ["assistant", "user", "user", "assistant"],
    ]
    assert [sample.id for sample in reader] == ["0", "7", "2", "3"]
    assert supervised(reader[3]) == ["hello", "a"]


def test_trailing_question_is_kept_and_noted(tmp_path: Path):
    sample = opened(tmp_path, talk(("human", "q"), ("gpt", "a"), ("human", "q2")))[0]
    assert supervised(sample) == ["a"]
    assert len(sample.turns) == 3
    assert sample.notes == ("unsupervised trailing turn",)


@pytest.mark.parametrize(
    ("record", "facts"),
    [
        (talk(("human", "q"), ("human", "a")), ["no assistant turn"]),
        (talk(("human", "q"), ("observation", "x"), ("gpt", "a")), ["turn 1", "unknown role 'observation'", "assistant"]),
        (talk((None, "q"), ("gpt", "a")), ["turn 0", "unknown role None"]),
        (talk(), ["no turns"]),
        ({"id": 1, "text": "x"}, ["no turns", "id, text"]),
        ({"conversations": "q"}, ["no turns"]),
        (talk(("human", "q"), ("gpt", None)), ["turn 1 has no text"]),
        (talk(("human", "q"), ("gpt", " \n")), ["turn 1 has no text"]),
        (talk(("human", ["q"]), ("gpt", "a")), ["turn 0 has no text"]),
        ({"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]}, ["turn 0 has no text"]),
        ({"messages": [{"role": "user", "content": "q"}], "conversations": []}, ["both"]),
        (talk(("human", "q"), ("gpt", "\ud83d")), ["turn 1", "half a character"]),
        ({"conversations": ["q", "a"]}, ["turn 0 is not an object"]),
        ("text", ["not an object", "str"]),
        (talk(("human", "q"), ("gpt", "a"), kind=3), ["`kind`"]),
        (talk(("human", "q"), ("gpt", "a"), independent="yes"), ["`independent`", "yes"]),
    ],
)
def test_bad_record_says_what_and_where(tmp_path: Path, record: Any, facts: list[str]):
    file = tmp_path / "train.json"
    file.write_text(json.dumps([talk(("human", "q"), ("gpt", "a")), record]))
    message = refusal(LlavaSource(file=str(file)).open(), 1)
    assert all(fact in message for fact in [f"{file}, sample 1", *facts]), message


def test_skip_leaves_bad_records_out_and_lists_them(tmp_path: Path):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    good = talk(("human", "<image>q"), ("gpt", "a"), image="a.png")
    reader = opened(tmp_path, talk(("human", "q")), good, {**good, "image": "gone.png"}, {**good, "image": "../a.png"}, on_bad="skip")
    assert len(reader) == 1
    assert reader[0].where.endswith("sample 1")
    assert [next(word for word in ("no assistant", "gone.png", "leads out") if word in str(error)) for error in reader.bad] == ["no assistant", "gone.png", "leads out"]
    with pytest.raises(DataError, match=r"no samples.*1 bad records.*no assistant"):
        opened(tmp_path, talk(("human", "q")), on_bad="skip")


def test_kind_of_question_answer_or_sample(tmp_path: Path):
    def kinds(question: dict[str, str], answer: dict[str, str], **more: Any) -> list[str | None]:
        turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "q", **question}, {"from": "gpt", "value": "a", **answer}]
        return [turn.kind for turn in opened(tmp_path, {"conversations": turns, **more})[0].turns]

    assert kinds({"kind": "colour"}, {}) == kinds({}, {"kind": "colour"}) == kinds({}, {}, kind="colour") == [None, "colour", "colour"]
    assert kinds({"kind": "shape"}, {}, kind="colour") == [None, "shape", "shape"]
    assert kinds({}, {}) == [None, None, None]


def test_independent_pairs(tmp_path: Path):
    pairs = [("human", "<image>\nq1"), ("gpt", "a1"), ("human", "q2"), ("gpt", "a2")]
    assert opened(tmp_path, talk(*pairs, image="a.png", independent=True))[0].independent
    assert opened(tmp_path, talk(("system", "s"), *pairs, image="a.png", independent=True))[0].independent
    for bad, fact in (
        ([*pairs[:2], ("human", "<image>"), ("gpt", "a2")], "turn 2 brings pictures"),
        ([*pairs, ("human", "q3")], "turn 4"),
        ([pairs[0], ("human", "more"), *pairs[1:]], "turn 1"),
        ([*pairs[:2], ("system", "s"), *pairs[2:]], "turn 0"),
    ):
        images = ["a.png"] * sum(text.count("<image>") for _, text in bad)
        assert fact in refusal(opened(tmp_path, talk(*bad, image=images, independent=True)))


# Pictures


def test_marks_become_pictures_in_order(tmp_path: Path):
    reader = opened(
        tmp_path,
        talk(("human", "<image>\nq"), ("gpt", "a"), image="a.png"),
        talk(("system", "<image>"), ("human", "x<image><image> y"), ("gpt", "say <image>"), ("human", "and <image>?"), ("gpt", "b"), images=["1.png", "2.png", "3.png"]),
        talk(("human", "<Image> &lt;image&gt;"), ("gpt", "a"), image=[]),
    )
    assert reader[0].turns[0].parts == (Picture(str(tmp_path / "a.png")), "\nq")
    first, second, third = (Picture(str(tmp_path / f"{n}.png")) for n in (1, 2, 3))
    assert [turn.parts for turn in reader[1].turns] == [("<image>",), ("x", first, second, " y"), ("say <image>",), ("and ", third, "?"), ("b",)]
    assert reader[2].turns[0].parts == ("<Image> &lt;image&gt;",)
    assert reader[2].modality == "text"


@pytest.mark.parametrize(("text", "image", "counts"), [("q", "a", (1, 0)), ("<image>", None, (0, 1)), ("<image><image>", "a", (1, 2)), ("<image>", ["a", "b"], (2, 1))])
@pytest.mark.parametrize("form", ["conversations", "messages"])
def test_differing_counts_are_told(tmp_path: Path, text: str, image: Any, counts: tuple[int, int], form: str):
    role, value = ("from", "value") if form == "conversations" else ("role", "content")
    record = {form: [{role: "user", value: text}, {role: "assistant", value: "an <image>"}], "image": image}
    message = refusal(opened(tmp_path, record))
    assert f"{tmp_path / 'train.json'}, sample 0" in message
    assert "images {}, placeholders {}".format(*counts) in message
    assert ("missing_placeholder: prepend" in message) == (counts[1] == 0)


def test_missing_marks_are_prepended_where_asked(tmp_path: Path):
    reader = opened(
        tmp_path,
        talk(("gpt", "hello"), ("human", "q"), ("gpt", "a"), image=["1.png", "2.png"]),
        talk(("human", "<image>q"), ("gpt", "a"), image=["1.png", "2.png"]),
        missing_placeholder="prepend",
    )
    assert reader[0].turns[1].parts == (Picture(str(tmp_path / "1.png")), "\n", Picture(str(tmp_path / "2.png")), "\nq")
    assert reader[0].notes == ("placeholder prepended",)
    assert "images 2, placeholders 1" in refusal(reader, 1)


@pytest.mark.parametrize("path", ["../x.png", "/x.png", "sub/../../x.png", "link/x.png", "link.png"])
@pytest.mark.parametrize("many", [False, True])
def test_pictures_outside_the_folder_are_refused(tmp_path: Path, path: str, many: bool):
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    Image.new("RGB", (2, 2)).save(tmp_path / "x.png")
    (root / "link").symlink_to(tmp_path)
    (root / "link.png").symlink_to(tmp_path / "x.png")
    message = refusal(opened(tmp_path, talk(("human", "<image>"), ("gpt", "a"), image=[path] if many else path), images=str(root)))
    assert "sample 0" in message
    assert path in message
    assert "leads out" in message


@pytest.mark.parametrize("path", ["http://host/x.png", "HTTPS://host/x.png", "s3://b/x.png", "file:///x.png", "data:text/plain,x"])
def test_remote_pictures_are_refused(tmp_path: Path, path: str):
    assert "is not a file" in refusal(opened(tmp_path, talk(("human", "<image>"), ("gpt", "a"), image=path)))


@pytest.mark.parametrize("path", ["", 3, {"name": "a.png"}, {"path": ""}, "a\0.png"])
def test_a_picture_must_be_a_path(tmp_path: Path, path: Any):
    assert "not a path" in refusal(opened(tmp_path, talk(("human", "<image>"), ("gpt", "a"), image=path)))


def test_absent_pictures_do_not_stop_the_reader(tmp_path: Path):
    sample = opened(tmp_path, talk(("human", "<image>"), ("gpt", "a"), image="gone.png"))[0]
    with pytest.raises((DataError, OSError), match=r"gone\.png"):
        sample.pictures[0].read()


# The field cases themselves


def test_field_bom_crlf(field_folder: Path):
    case = field_folder / "data_bom_crlf"
    expected = json.loads((case / "expected.json").read_text(encoding="utf-8"))
    for name, outcome in expected["files"].items():
        source = LlavaSource(file=str(case / name))
        if "error_names" in outcome:
            with pytest.raises(DataError) as caught:
                list(source.open())
            assert all(word in str(caught.value) for word in outcome["error_names"])
        else:
            samples = list(source.open())
            assert [text for sample in samples for text in supervised(sample)] == expected["answers"]
            assert all(Image.open(io.BytesIO(picture.read())).size for sample in samples for picture in sample.pictures)


def test_field_placeholder_count(field_folder: Path):
    case = field_folder / "data_placeholder_count"
    expected = json.loads((case / "expected.json").read_text(encoding="utf-8"))
    reader = LlavaSource(file=str(case / "train.json"), images=str(case / "img")).open()
    assert len(expected["accepted"]) + len(expected["refused"]) == len(reader)
    for index, images in expected["accepted"].items():
        assert len(reader[int(index)].pictures) == images
    for index, counts in expected["refused"].items():
        message = refusal(reader, int(index))
        assert "train.json" in message
        assert f"sample {index}" in message
        assert f"images {counts['images']}, placeholders {counts['placeholders']}" in message
    assert supervised(reader[4]) == [expected["supervised_text_of_4"]]
    assert names(reader[5]) == expected["image_order_of_5"]
    assert [[isinstance(part, Picture) for part in turn.parts].count(True) for turn in reader[5].turns] == [1, 0, 1, 0]


def test_field_roles(field_folder: Path):
    case = field_folder / "data_roles"
    expected = json.loads((case / "expected.json").read_text(encoding="utf-8"))
    reader = LlavaSource(file=str(case / "train.json")).open()
    for index, texts in expected["accepted"].items():
        assert supervised(reader[int(index)]) == texts
    for index, reason in expected["refused"].items():
        message = refusal(reader, int(index))
        assert f"sample {index}" in message
        assert reason in message
    assert [index for index in range(9) if reader[index].notes] == [7]
