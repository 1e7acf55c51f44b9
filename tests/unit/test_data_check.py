"""`vlm data check`: every record is read, problems are counted by kind and named, and the exit code says whether there were any."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import tiny
from archives import tar
from PIL import Image
from typer.testing import CliRunner

from vlm.cli import app
from vlm.config import LLMSpec, ModelSpec
from vlm.connectors.mlp import MLPSpec
from vlm.data import survey as surveys
from vlm.data.llava import LlavaSource
from vlm.data.messages import MessagesSource
from vlm.data.sample import Sample, Turn
from vlm.data.shards import ShardWriter
from vlm.data.sources import sources_at
from vlm.data.survey import Survey, survey_source
from vlm.data.tar import TarSource
from vlm.encoders.clip import CLIPSpec
from vlm.errors import KINDS, DataError
from vlm.processor import VLMProcessor
from vlm.prompt import PromptSpec

ROOT = Path(__file__).resolve().parents[2]


def talk(text: str = "q", answer: str = "a", **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": answer}], **more}


def lines(path: Path, *records: Any) -> str:
    path.write_text("\n".join(record if isinstance(record, str) else json.dumps(record) for record in records), encoding="utf-8")
    return str(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures good and bad."""
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    Image.new("L", (10, 20)).save(tmp_path / "b.jpg")
    Image.new("RGB", (60, 50)).save(tmp_path / "c.jpg")
    (tmp_path / "text.png").write_text("text")
    (tmp_path / "empty.png").touch()
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    (tmp_path / "huge.ppm").write_bytes(b"P6 10000 9000 255\n")
    return tmp_path


def counts(found: Survey) -> dict[str, int]:
    return {kind: problems.count for kind, problems in found.problems.items()}


BAD: list[tuple[Any, str]] = [
    (talk("<image>", image="gone.png"), "missing picture"),
    (talk("<image>", image="text.png"), "unreadable picture"),
    (talk("<image>", image="cut.png"), "unreadable picture"),
    (talk("<image>", image="data:image/png;base64,?"), "unreadable picture"),
    (talk("<image>", image=3), "unreadable picture"),
    (talk("<image>", image="empty.png"), "empty"),
    (talk("<image>", image="huge.ppm"), "too large"),
    (talk("<image>", image="../a.png"), "outside of the root"),
    (talk("<image>", image="https://host/a.png"), "remote"),
    (talk("q", image="a.png"), "placeholder count"),
    (talk("<image>"), "placeholder count"),
    (talk("q", answer=""), "empty"),
    ({"conversations": []}, "empty"),
    ({"conversations": [{"from": "human", "value": "q"}]}, "role"),
    ({"conversations": [{"from": "tool", "value": "q"}]}, "role"),
    ({"messages": [{"role": "assistant", "content": None, "tool_calls": [1]}]}, "role"),
    (talk(independent=True) | {"conversations": talk()["conversations"][1:]}, "role"),
    ("{", "not JSON"),
    (talk("half \ud83d"), "not JSON"),
    ([1], "not JSON"),
    (talk(independent="yes"), "other"),
    (talk(video="a.mp4"), "unsupported"),
]


@pytest.mark.parametrize(("record", "kind"), BAD)
def test_kinds_of_bad_records(folder: Path, record: Any, kind: str):
    found = survey_source(LlavaSource(file=lines(folder / "train.jsonl", talk(), record, talk())))
    assert counts(found) == {kind: 1}
    assert found.samples == 2
    assert "sample 1" in found.problems[kind].examples[0]
    assert kind in KINDS


def test_every_kind_is_raised_by_its_own_input(tmp_path: Path):
    spec = ModelSpec(encoder=CLIPSpec(config=tiny.tower_config(), weights="random"), connector=MLPSpec(), llm=LLMSpec(config=tiny.llm_config(), weights="random"))
    row = VLMProcessor(spec, 32, tiny.tokenizer(), PromptSpec(use="chatml"), "pad").row
    sample = Sample("x", (Turn("user", ("q",)), Turn("assistant", ("a",), supervised=True)))
    for raised, kind in (
        (lambda: LlavaSource(file=str(tmp_path / "gone.json")).open(), "unreadable file"),
        (lambda: row(sample, max_length=3, too_long="error"), "too long"),
    ):
        with pytest.raises(DataError) as caught:
            raised()
        assert caught.value.kind == kind
    assert {kind for _, kind in BAD} | {"unreadable file", "too long"} == set(KINDS)


def test_a_path_says_nothing_about_the_kind(tmp_path: Path):
    folder = tmp_path / "what is empty, too large, and leads out of"
    folder.mkdir()
    (folder / "train.json").write_text("[{}", encoding="utf-8")
    assert counts(survey_source(LlavaSource(file=str(folder / "train.json")))) == {"not JSON": 1}


def test_an_error_that_names_its_kind_is_believed():
    assert DataError("no assistant turn", kind="remote").kind == "remote"
    assert DataError("something new").kind == "other"


def test_all_bad_records_are_counted_and_three_of_a_kind_named(folder: Path):
    found = survey_source(LlavaSource(file=lines(folder / "train.jsonl", *[record for record, _ in BAD], *[talk("<image>", image="gone.png")] * 9, talk())))
    assert (found.bad, found.samples, found.ok) == (len(BAD) + 9, 1, False)
    assert counts(found) == {kind: sum(other == kind for _, other in BAD) + 9 * (kind == "missing picture") for _, kind in BAD}
    assert len(found.problems["missing picture"].examples) == 3


def test_what_a_source_holds_is_counted(folder: Path):
    pairs = [{"from": "human", "value": "<image>q", "kind": "k"}, {"from": "gpt", "value": "a"}, {"from": "human", "value": "q2", "kind": "other"}, {"from": "gpt", "value": "a2"}]
    file = lines(
        folder / "train.jsonl",
        talk("<image> and <image>", "the longest answer", image=["a.png", "b.jpg"], kind="k"),
        {"conversations": [{"from": "system", "value": "s"}, *talk()["conversations"], {"from": "human", "value": "again"}]},
        {"conversations": pairs, "image": "c.jpg", "independent": True},
    )
    found = survey_source(LlavaSource(file=file))
    assert (found.samples, found.text_only, found.independent, found.pictures, found.ok) == (3, 1, 1, 3, True)
    assert found.turns == {"system": 1, "user": 5, "assistant": 4}
    assert found.kinds == {"k": 2, "other": 1}
    assert found.longest == (len("the longest answer"), f"{file}, sample 0 (line 1), turn 1")
    assert found.notes == {"unsupervised trailing turn": 1}
    report = found.to_json()
    assert report["sizes"] == {"least": (10, 20), "median": (40, 30), "most": (60, 50)}
    assert report["files"]["most"] == max((folder / name).stat().st_size for name in ("a.png", "b.jpg", "c.jpg"))
    assert report["modes"] == {"RGB": 2, "L": 1}


def test_headers_of_the_first_pictures_unless_all_are_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(surveys, "HEADERS", 2)
    source = LlavaSource(file=lines(folder / "train.jsonl", *[talk("<image>", image=name) for name in ("a.png", "b.jpg", "text.png")]))
    assert (survey_source(source).ok, len(survey_source(source).sizes)) == (True, 2)
    assert counts(survey_source(source, everything=True)) == {"unreadable picture": 1}
    lines(folder / "train.jsonl", *[talk("<image>", image=name) for name in ("a.png", "b.jpg", "gone.png")])
    assert counts(survey_source(source)) == {"missing picture": 1}


@pytest.mark.parametrize(("content", "kind"), [(b"[{}", "not JSON"), ("é".encode("latin-1"), "not JSON"), (b"", "empty"), ("[]".encode("utf-16"), "not JSON")])
def test_a_file_that_cannot_be_opened_is_one_problem(tmp_path: Path, content: bytes, kind: str):
    (tmp_path / "train.json").write_bytes(content)
    assert counts(survey_source(LlavaSource(file=str(tmp_path / "train.json")))) == {kind: 1}


def test_a_reader_of_another_form_is_told(folder: Path):
    assert counts(survey_source(MessagesSource(file=lines(folder / "train.jsonl", talk())))) == {"other": 1}


def test_shards_that_cannot_be_opened_do_not_hide_the_others(tmp_path: Path):
    record = json.dumps(talk()).encode()
    with ShardWriter(tmp_path, prefix="train", per_shard=2) as out:
        for number in range(6):
            out.write(f"{number}", {"json": record})
    with tarfile.open(tmp_path / "train-000000.tar", "a") as shard:
        shard.addfile(tarfile.TarInfo(".hidden.jpg"))
        shard.addfile(tarfile.TarInfo("lonely.jpg"))
    found = survey_source(sources_at(tmp_path)["train"])
    assert (found.samples, counts(found)) == (6, {"other": 1})
    assert any(".hidden.jpg" in warning for warning in found.warnings)
    (tmp_path / "train-000001.tar").write_bytes((tmp_path / "train-000001.tar").read_bytes()[:1100])
    (tmp_path / "train-000003.tar").write_text("<html>")
    found = survey_source(sources_at(tmp_path)["train"])
    assert (found.samples, counts(found)) == (4, {"other": 1, "unreadable file": 2})
    assert ["train-000001.tar is cut" in example or "train-000003.tar is not a tar" in example for example in found.problems["unreadable file"].examples] == [True, True]


def test_parts_of_every_kind_of_source(tmp_path: Path):
    for name in ("a.jsonl", "b.jsonl"):
        lines(tmp_path / name, talk())
    (tmp_path / "b.jsonl").write_text("", encoding="utf-8")
    with ShardWriter(tmp_path / "shards", prefix="t", per_shard=1) as out:
        for number in range(4):
            out.write(f"{number}", {"json": json.dumps(talk()).encode()})
    cut = tmp_path / "shards" / "t-000001.tar"
    cut.write_bytes(cut.read_bytes()[:1100])
    shards = [str(tmp_path / "shards" / f"t-{number:06d}.tar") for number in range(4)]
    for file in (f"{tmp_path}/shards/t-{{000000..000003}}.tar", f"{tmp_path}/shards/t-*.tar", f"{tmp_path}/shards"):
        source = TarSource(file=file)
        found = survey_source(source)
        assert (source.parts(), found.samples, counts(found)) == (shards, 3, {"unreadable file": 1}), file
    tar(tmp_path / "shards" / "t-000009.tar")
    (tmp_path / "c.jsonl").write_text("{", encoding="utf-8")
    for source, problem in ((TarSource(file=f"{tmp_path}/shards"), "unreadable file"), (LlavaSource(file=f"{tmp_path}/?.jsonl"), "not JSON")):
        found = survey_source(source)  # empty parts are no fault, whatever is wrong with others
        assert (counts(found), ["holds no samples" in warning for warning in found.warnings]) == ({problem: 1}, [True])


def test_command_prints_and_its_exit_code_means_something(folder: Path):
    good, bad = lines(folder / "good.jsonl", talk("<image>", image="a.png")), lines(folder / "bad.jsonl", talk(), talk("<image>", image="gone.png"))
    done = CliRunner().invoke(app, ["data", "check", good])
    assert (done.exit_code, "nothing bad" in done.output, "40 x 30" in done.output) == (0, True, True), done.output
    done = CliRunner().invoke(app, ["data", "check", bad, "--all", "--json", str(folder / "report.json")])
    assert (done.exit_code, "1 x missing picture" in done.output, f"{bad}, sample 1" in done.output) == (1, True, True), done.output
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))["bad"]
    assert (report["samples"], report["bad"], report["problems"]["missing picture"]["count"], report["turns"]) == (1, 1, 1, {"user": 1, "assistant": 1})
    done = CliRunner().invoke(app, ["data", "check", bad, "--images", str(ROOT / "tests")])
    assert "1 x missing picture" in done.output


def test_pictures_cut_behind_the_header_are_found_by_decoding(folder: Path):
    Image.effect_noise((90, 90), 60).save(folder / "whole.jpg")
    (folder / "half.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:2500])
    file = lines(folder / "train.jsonl", talk("<image>", image="whole.jpg"), talk("<image>", image="half.jpg"))
    done = CliRunner().invoke(app, ["data", "check", file, "--all"])
    assert (done.exit_code, "nothing bad, of pictures by their headers only: --decode" in done.output) == (0, True), done.output
    assert "headers of 2 read, none decoded" in done.output
    done = CliRunner().invoke(app, ["data", "check", file, "--decode"])
    assert (done.exit_code, "1 x unreadable picture" in done.output, "headers only" in done.output) == (1, True, False), done.output
    found = survey_source(LlavaSource(file=file), decode=True)
    assert (found.decoded, found.sizes, found.modes) == (1, [(90, 90)], {"L": 1})


def test_field_cases_are_counted(field_folder: Path):
    def problems(path: str, **settings: Any) -> dict[str, int]:
        (spec,) = sources_at(field_folder / path, **settings).values()
        return counts(survey_source(spec))

    assert problems("data_placeholder_count/train.json", images=field_folder / "data_placeholder_count" / "img") == {"placeholder count": 4}
    assert problems("data_roles/train.json") == {"role": 2, "empty": 2}
    assert problems("data_bom_crlf/train_cut_line2.jsonl") == problems("data_bom_crlf/train_gbk.json") == {"not JSON": 1}
    assert problems("data_mixed_types/openai_mixed.jsonl") == {}
    assert problems("data_wds_names/names.tar") == {"other": 1}
    assert problems("data_wds_empty_shards/s-*.tar") == {"unreadable file": 2}
