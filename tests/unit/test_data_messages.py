"""Records of every form as samples, the readers `messages` and `sharegpt`, and what may stand for a picture: paths, bytes, data: addresses, and addresses of the web where allowed."""

import base64
import io
import json
import pickle
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vlm.images
from vlm.data import readers
from vlm.data.llava import LlavaSource
from vlm.data.messages import MessagesSource
from vlm.data.pictures import picture_below
from vlm.data.record import sample_of
from vlm.data.sample import Picture, Sample, held
from vlm.data.sharegpt import SharegptSource
from vlm.data.write import write_split
from vlm.errors import DataError


def read(record: Mapping[str, Any], root: str = ".", **more: Any) -> Sample:
    return sample_of(record, number=3, where="here, sample 3", picture=picture_below(root), **more)


def refusal(record: Any, **more: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(record, **more)
    assert str(caught.value).startswith("here, sample 3")
    return str(caught.value)


def parts(sample: Sample, turn: int = 0) -> list[str]:
    """Texts as they are, pictures as <their names>."""
    return [part if isinstance(part, str) else f"<{Path(part.path).name}>" for part in sample.turns[turn].parts]


def ask(*content: Any, answer: Any = "red", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(content)}, {"role": "assistant", "content": answer}], **more}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def opened(source: type, file: Path, *records: Any, **settings: Any) -> Any:
    file.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return source(file=str(file), **settings).open()


def png(shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (3, 2), shade).save(buffer, "PNG")
    return buffer.getvalue()


# Messages


def test_parts_keep_their_order_and_their_text():
    sample = read(ask({"type": "image"}, text("Is "), text("<image>"), {"type": "image"}, text(" it?"), images=["a.png", "b.png"]))
    assert parts(sample) == ["<a.png>", "Is <image>", "<b.png>", " it?"]
    assert sample.turns[1].supervised
    assert sample.id == "3"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "a.png"},
        {"type": "image", "path": "a.png"},
        {"type": "image", "url": "a.png", "text": None},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image_url", "image_url": "a.png"},
        {"type": "input_image", "image_url": "a.png"},
    ],
)
def test_a_picture_part_in_any_spelling(part: dict[str, Any]):
    assert parts(read(ask({"type": "input_text", "text": "Look: "}, part, answer=[{"type": "output_text", "text": "red"}]))) == ["Look: ", "<a.png>"]


def test_marks_in_plain_content_are_pictures():
    record = {"messages": [{"role": "developer", "content": "<image>"}, {"role": "user", "content": "<image>\nq"}, {"role": "assistant", "content": "<image>"}], "images": "a.png"}
    sample = read(record)
    assert [parts(sample, turn) for turn in range(3)] == [["<image>"], ["<a.png>", "\nq"], ["<image>"]]
    assert [turn.role for turn in sample.turns] == ["system", "user", "assistant"]


@pytest.mark.parametrize(
    ("record", "facts"),
    [
        (ask({"type": "video", "video": "a.mp4"}), ["turn 0, part 0", "unknown type 'video'"]),
        (ask(text("q"), {"text": "q"}), ["turn 0, part 1", "unknown type None"]),
        (ask("q"), ["turn 0, part 0 is not an object"]),
        (ask({"type": "text"}), ["turn 0, part 0 has no text"]),
        (ask(text(" ")), ["turn 0 has no text"]),
        (ask(text("q"), answer=[text("\ud83d")]), ["turn 1", "half a character"]),
        (ask(text("q"), answer=[{"type": "image", "image": "a.png"}]), ["turn 1, part 0 is a picture in a turn of the assistant"]),
        (ask(text("q"), images=["a.png"]), ["images 1, placeholders 0", "missing_placeholder: prepend"]),
        (ask({"type": "image"}, images=[]), ["images 0, placeholders 1"]),
        (ask({"type": "image", "index": 1}, {"type": "image", "index": 0}, images=["a", "b"]), ["not in reading order", "index 1"]),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [{}]}]}, ["turn 1: `tool_calls` is not taken"]),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "tool", "content": "x"}]}, ["turn 1", "unknown role 'tool'", "tools cannot be trained on"]),
        (ask(text("<video> q"), video="a.mp4"), ["`video` is not taken"]),
        (ask(text("q"), audios=[{"bytes": None, "path": "a.wav"}]), ["`audios` is not taken"]),
        (ask(text("q"), tools=[{"name": "f"}]), ["`tools` is not taken", "tools cannot be trained on"]),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": "so"}]}, ["turn 1: `reasoning_content` is not taken"]),
        ({"texts": [{"user": "q", "assistant": "a", "videos": ["a.mp4"]}]}, ["turn 0: `videos` is not taken"]),
        (ask(text("q"), id="\ud800"), ["`id` holds half a character"]),
        (ask(text("q"), kind="\ud800"), ["`kind` holds half a character"]),
        ({"messages": [{"role": "user", "content": "q", "kind": "\ud800"}, {"role": "assistant", "content": "a"}]}, ["turn 0: `kind` holds half a character"]),
        ({"\ud800": 1}, ["a key holds half a character"]),
        (ask(text("q"), images=["\ud800.png"]), ["the name of a picture holds half a character"]),
        (ask({"type": "image"}, images=["data:image/png;base64,é"]), ["is not base64"]),
        (ask({"type": "image"}, images=[{"bytes": "a.png"}]), ["the `bytes` of a picture are str", "'a.png'"]),
        (ask(text("q"), conversations=[]), ["both `conversations` and `messages`"]),
        (ask(text("q"), system=3), ["`system` is not text"]),
        (ask({"type": "image_url", "image_url": {"url": "http://host/a.png"}}), ["turn 0", "is not a file", "remote: true"]),
    ],
)
def test_a_bad_record_says_what_and_where(record: dict[str, Any], facts: list[str]):
    message = refusal(record)
    assert all(fact in message for fact in facts), message


def test_what_is_empty_is_not_refused():
    absent = {"video": None, "audio": {"bytes": None, "path": None}, "videos": [], "tools": "[]", "functions": ""}
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "tool_calls": [], "function_call": {"name": None, "arguments": None}, "reasoning_content": ""},
    ]
    assert read({"messages": messages, **absent}).turns[1].text == "a"


@pytest.mark.parametrize(("key", "off", "on"), [("weight", 0, 1), ("weight", 0.0, 1.0), ("train", False, True), ("train_on_turn", False, True)])
def test_answers_that_are_not_to_be_learnt(tmp_path: Path, key: str, off: Any, on: Any):
    def talk(first: Any, second: Any) -> dict[str, Any]:
        return {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "a", key: first},
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "b", key: second},
            ]
        }

    sample = read(talk(off, on))
    assert [turn.supervised for turn in sample.turns] == [False, False, False, True]
    assert sample.notes == ("unsupervised answer",)
    assert [turn.supervised for turn in read(talk(on, None)).turns] == [False, True, False, True]
    assert [turn.supervised for turn in read({"texts": [{"user": "q", "assistant": "a", key: off}, {"user": "q", "assistant": "b"}]}).turns] == [False, False, False, True]
    assert "no answer is to be learnt" in refusal(talk(off, off))
    for other in (0.5, 2, "0"):
        assert f"turn 1: `{key}` is neither" in refusal(talk(other, on))
    for to in ("messages", "tar"):
        out = tmp_path / to
        out.mkdir()
        written = write_split([sample], out, "train", to)
        (back,) = readers.get(to)(file=str(out / written.file)).open()
        assert back.turns == sample.turns
    with pytest.raises(DataError, match="cannot be written as llava without a change.*such as messages"):
        write_split([sample], tmp_path, "train", "llava")


# Other forms


def test_pictures_without_a_mark_stand_in_front():
    cauldron = read({"images": ["a.png", "b.png"], "texts": [{"user": "q1", "assistant": "a1", "source": "x"}, {"user": "q2", "assistant": "a2"}]})
    assert [parts(cauldron, turn) for turn in range(4)] == [["<a.png>", "\n", "<b.png>", "\nq1"], ["a1"], ["q2"], ["a2"]]
    question = read({"id": "x", "image": "a.png", "question": "q", "answer": "a <image>", "kind": "colour", "image_id": "7"})
    assert [parts(question, turn) for turn in range(2)] == [["<a.png>", "\nq"], ["a <image>"]]
    assert [turn.kind for turn in question.turns] == ["colour", "colour"]
    assert (question.id, question.notes) == ("x", ())
    assert parts(read({"image": "a.png", "question": "at <image>?", "answer": "a"})) == ["at ", "<a.png>", "?"]
    for key in ("caption", "text"):
        caption = read({"images": ["a.png", "b.png"], key: "a dog"})
        assert [parts(caption, turn) for turn in range(2)] == [["<a.png>", "\n", "<b.png>"], ["a dog"]]
        assert caption.turns[1].supervised


@pytest.mark.parametrize(
    ("record", "fact"),
    [
        ({"texts": [{"user": "q", "assistant": ""}]}, "turn 1 has no text"),
        ({"texts": ["q"]}, "a pair of `texts` is not an object"),
        ({"texts": {"user": ["q"]}}, "`texts` is dict"),
        ({"question": "q", "answer": ["a", "b"]}, "turn 1 has no text"),
        ({"question": "<image> <image>", "answer": "a", "image": "a.png"}, "images 1, placeholders 2"),
        ({"image": "a.png", "caption": "a", "text": "b"}, "both `caption` and `text`. expected one of them. take the one that is not meant out; or, with the reader hf, name"),
        ({"image": [], "caption": "a"}, "no turns"),
        ({"text": "a", "id": 3}, "no turns. got the keys text, id"),
    ],
)
def test_a_bad_record_of_another_form(record: dict[str, Any], fact: str):
    assert fact in refusal(record)


def test_a_system_key_is_a_turn_in_front():
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert [(turn.role, turn.text) for turn in read({"conversations": turns, "system": "Be brief."}).turns] == [("system", "Be brief."), ("user", "q"), ("assistant", "a")]
    assert len(read({"conversations": turns, "system": ""}).turns) == 2
    assert "both `system` and a system turn" in refusal({"conversations": [{"from": "system", "value": "s"}, *turns], "system": "t"})


# Readers


def test_the_form_must_be_the_readers(tmp_path: Path):
    chat, talk = ask(text("q")), {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    assert readers.get("messages") is MessagesSource
    assert readers.get("sharegpt") is SharegptSource
    for source, good, bad, cure in ((MessagesSource, chat, talk, "llava or sharegpt"), (SharegptSource, talk, chat, "the reader messages")):
        reader = opened(source, tmp_path / "train.jsonl", good, bad)
        assert reader[0].turns[0].text == "q"
        with pytest.raises(DataError, match=rf"sample 1 \(line 2\): the record is of another form.*{cure}"):
            reader[1]
        assert len(opened(source, tmp_path / "train.jsonl", good, bad, on_bad="skip").bad) == 1
    assert len(list(opened(LlavaSource, tmp_path / "train.jsonl", chat, talk, {"question": "q", "answer": "a"}))) == 3


def test_types_that_change_from_row_to_row_are_read_line_by_line(tmp_path: Path):
    rows = [{"id": n, "note": None, "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": str(n)}]} for n in range(300)]
    late = [{**ask({"type": "image", "image": "a.png"}, text("q")), "id": "x", "note": {"k": 1}}, {**ask(text("q")), "id": None, "note": "late", "images": None}]
    samples = list(opened(MessagesSource, tmp_path / "train.jsonl", *rows, *late))
    assert [sample.id for sample in samples[298:]] == ["298", "299", "x", "301"]
    assert [len(sample.pictures) for sample in samples[299:]] == [0, 1, 0]


# Pictures


def test_bytes_in_every_layout(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(png())
    resolve = pickle.loads(pickle.dumps(picture_below(str(tmp_path))))
    address = "data:image/png;base64," + base64.b64encode(png()).decode()
    same = [png(), {"bytes": png(), "path": None}, {"bytes": png(), "path": "gone.png"}, {"bytes": None, "path": "a.png"}, "a.png", address, held(png())]
    for value in same:
        picture = resolve(value, "here")
        assert (picture.read(), picture.length()) == (png(), len(png()))
        assert pickle.loads(pickle.dumps(picture)) == picture
    drawn = resolve(Image.new("RGB", (3, 2), "red"), "here")
    assert Image.open(io.BytesIO(drawn.read())).getpixel((0, 0)) == (255, 0, 0)
    for value, fact in ((b"", "0 bytes"), ({"bytes": b"", "path": "a.png"}, "a.png holds 0 bytes"), ("data:;base64,AA", "not base64"), ({"bytes": png(), "path": "../a"}, None)):
        if fact:
            with pytest.raises(DataError, match=rf"here: .*{fact}"):
                resolve(value, "here")
        else:
            assert resolve(value, "here").read() == png()


def tiff(image: Image.Image, orientation: int = 1) -> bytes:
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    image.save(buffer, "TIFF", exif=exif)
    return buffer.getvalue()


def test_an_image_of_pillow_goes_the_way_of_its_file():
    grey = np.array([[0, 300, 40000], [65535, 9, 20000]])
    files = [
        tiff(Image.fromarray(grey.astype(">u2"))),
        tiff(Image.fromarray(grey.astype("<u2")), orientation=6),
        b"P5 3 2 65535 " + grey.astype(">u2").tobytes(),
        tiff(Image.new("CMYK", (3, 2), (0, 255, 0, 30))),
        tiff(Image.new("LAB", (3, 2), (128, 140, 128))),
    ]
    for data in files:
        opened, drawn = vlm.images.open_picture(data), held(Image.open(io.BytesIO(data)))
        assert np.array_equal(np.asarray(opened), np.asarray(vlm.images.open_picture(drawn.read()))), Image.open(io.BytesIO(data))
        assert vlm.images.upright_size(drawn.read()) == opened.size
    clear = Image.new("RGBA", (3, 2), (9, 200, 30, 128))
    for mode, plain in (("RGBa", clear), ("PA", clear.convert("PA").convert("RGBA")), ("La", clear.convert("LA"))):
        other = clear.convert("LA").convert("La") if mode == "La" else clear.convert(mode)
        assert np.allclose(*(np.asarray(vlm.images.open_picture(held(one).read())) for one in (other, plain)), atol=2), mode


def test_an_image_of_pillow_is_refused_as_its_file_is():
    for dtype in ("int32", "float32"):
        image = Image.fromarray(np.ones((2, 3), dtype))
        told = []
        for data in (held(image).read(), tiff(image)):
            with pytest.raises(DataError, match="nothing says which of its values is white") as caught:
                vlm.images.open_picture(data)
            told.append(str(caught.value))
        assert told[0] == told[1]
    inverted = bytearray(tiff(Image.fromarray(np.ones((2, 3), "<u2"))))
    at = inverted.index((262).to_bytes(2, "little"))
    inverted[at + 8] = 0
    for image in (Image.open(io.BytesIO(bytes(inverted))), Image.open(io.BytesIO(png()[:-24])), Image.new("RGB", (0, 3))):
        with pytest.raises(DataError, match="which of its values is white|truncated or corrupt"):
            held(image)


def test_too_many_bytes_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vlm.images, "LIMITS", replace(vlm.images.LIMITS, max_bytes=20))
    with pytest.raises(DataError, match="here: the picture in the record is too large"):
        picture_below(".")(png(), "here")


@pytest.fixture
def host() -> Iterator[str]:
    """A server of this machine: /a.png is a picture, /to?ADDRESS leads there, the rest is not found."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path, _, to = self.path.partition("?")
            self.send_response(302 if to else 200 if path == "/a.png" else 404)
            if to:
                self.send_header("Location", to)
            self.end_headers()
            if path == "/a.png":
                self.wfile.write(png())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_an_address_is_read_only_where_allowed(host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "secret").write_text("x")
    record = ask({"type": "image_url", "image_url": {"url": f"{host}/a.png"}})
    picture = opened(MessagesSource, tmp_path / "train.jsonl", record, remote=True)[0].pictures[0]
    assert picture == Picture(f"{host}/a.png", remote=True)
    assert picture.read() == png()
    assert Picture(f"{host}/to?{host}/a.png", remote=True).read() == png()
    for address in (f"{host}/gone.png", f"{host}/to?file://{tmp_path}/secret", f"{host}/to?ftp://127.0.0.1/x", f"file://{tmp_path}/secret", "http://[", "ftp://127.0.0.1/x"):
        with pytest.raises(OSError, match=r"."):
            Picture(address, remote=True).read()
    for other in (f"file://{tmp_path}/secret", "s3://b/x.png", "../secret"):
        with pytest.raises(DataError):
            picture_below(str(tmp_path / "sub"), remote=True)(other, "here")
    monkeypatch.setattr(vlm.images, "LIMITS", replace(vlm.images.LIMITS, max_bytes=20))
    with pytest.raises(DataError, match="too large"):
        picture.read()


# The field case itself


def test_field_mixed_types(field_folder: Path):
    case = field_folder / "data_mixed_types"
    expected = json.loads((case / "expected.json").read_text(encoding="utf-8"))
    chats = list(MessagesSource(file=str(case / "openai_mixed.jsonl"), on_bad="skip").open())
    want = expected["openai_mixed.jsonl"]
    assert [len(sample.pictures) for sample in chats] == want["images"]
    kinds = [["image" if isinstance(part, Picture) else "text" for part in sample.turns[0].parts] for sample in chats[1:]]
    assert kinds == [want["parts_of_1"], want["parts_of_2"]]
    assert [turn.text for sample in chats for turn in sample.turns if turn.supervised] == want["answers"]
    late = list(SharegptSource(file=str(case / "late_types.jsonl"), on_bad="skip").open())
    want = expected["late_types.jsonl"]
    assert (len(late), sum(len(sample.pictures) for sample in late)) == (want["samples"], want["images_total"])
    assert [sample.id for sample in late[-2:]] == [str(name) for name in want["last_ids"]]
    assert all(Image.open(io.BytesIO(picture.read())).size for sample in [*chats, *late] for picture in sample.pictures)
