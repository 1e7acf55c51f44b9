"""The report of a run: what it says is what was written, nothing in it asks a network, and whatever comes from data is text."""

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from interrupted import records, stopped_at
from torch import nn

import vlm
from vlm import connectors
from vlm.connectors.mlp import MLPSpec
from vlm.errors import CheckpointError
from vlm.eval.report_chart import Chart, Curve, thinned
from vlm.eval.report_page import write_report
from vlm.figures import Figure, Seen
from vlm.train import stages
from vlm.train.stages import starting_model

EVIL = 'What is <script>alert("x")</script> & <img src="http://example.org/a.png">?'
COLOUR = "What colour is the picture?"


class Page(HTMLParser):
    """tags: (name, attributes) of the page in order. text: what a reader sees. rows: of its tables, as texts. sections: text by anchor."""

    def __init__(self, file: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.style, self.rows = "", "", [[]]
        self.sections: dict[str, str] = {}
        self._inside, self._section, self._cell = "", "", False
        self.feed(file.read_bytes().decode())  # with carriage returns as they are

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "section":
            self._section = str(dict(attrs)["id"])
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        self._inside, self._cell = "", self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._inside == "style":
            self.style += data
            return
        self.text += data
        self.sections[self._section] = self.sections.get(self._section, "") + data
        if self._cell:
            self.rows[-1][-1] += data

    def row(self, first: str, length: int) -> list[str]:
        """The one row that begins so and is so long."""
        (found,) = [row for row in self.rows if row[:1] == [first] and len(row) == length]
        return found


def assert_alone(page: Page) -> None:
    """No attribute of any tag, and nothing in the style, names anything outside of the file."""
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
                assert value is not None and value.startswith("data:image/" if tag == "img" else "#"), (tag, name, value[:80] if value else value)
            elif name != "alt":
                assert "//" not in (value or ""), (tag, name, value)
    assert "@import" not in page.style and "url(" not in page.style and "//" not in page.style
    assert any((attributes.get("content") or "").startswith("default-src 'none'") for tag, attributes in page.tags if tag == "meta")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.data_root(tmp_path_factory.mktemp("data"))
    rows = json.loads((folder / "heldout.json").read_text())
    rows[0]["conversations"][0]["value"] = f"<image>\n{EVIL}"
    rows[0]["kind"] = "<b>evil</b>"
    (folder / "heldout.json").write_text(json.dumps(rows))
    return folder


def compose(root: Path, folder: Path, run: str, *more: str) -> Any:
    return vlm.compose(run, f"data_root={root}", f"runs={folder}", "save.every=1", *more)


@pytest.fixture(scope="module")
def arcana(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vlm.fit(compose(root, tmp_path_factory.mktemp("runs"), "arcana_tiny"))


@pytest.fixture(scope="module")
def mixed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = "stages.instruct.data={questions: 0.75, captions: 0.25}"
    return vlm.fit(compose(root, tmp_path_factory.mktemp("runs"), "llava_tiny", data, "stages.instruct.steps=6"))


# ---- a finished run --------------------------------------------------------------------------------------------------------


def test_training_ends_with_a_page_that_stands_alone(arcana: Path, mixed: Path) -> None:
    for folder in (arcana, mixed):
        page = Page(folder / "report.html")
        assert_alone(page)
        assert folder.name in page.text and "finished" in page.text and "not finished" not in page.text
        assert {"curves", "samples", "accuracy", "ledger", "data", "warnings", "speed", "machine"} <= page.sections.keys()
        assert {"loss.png", "loss_sources.png", "rates.png", "gradient_norm.png"} <= {file.name for file in (folder / "pictures").iterdir()}
        assert "Nothing was evaluated yet" in page.sections["accuracy"]


def test_its_numbers_are_those_of_the_run(mixed: Path) -> None:
    page, steps = Page(mixed / "report.html"), records(mixed)
    for stage in ("align", "instruct"):
        own = [record for record in steps if record["stage"] == stage]
        losses = [record["loss"] for record in own]
        assert page.row(stage, 5) == [stage, str(len(own)), f"{losses[0]:.4f}", f"{losses[-1]:.4f}", f"{min(losses):.4f}"]
        seconds = sum(record["seconds"] for record in own)
        assert page.row(stage, 6)[2] == f"{sum(record['tokens'] for record in own) / seconds:,.0f}"
    seen = {name: sum(record["sources"].get(name, {}).get("samples", 0) for record in steps if record["stage"] == "instruct") for name in ("questions", "captions")}
    assert page.row("questions", 7) == ["questions", "12", "75.0 %", f"{100 * seen['questions'] / 24:.1f} %", "18", str(seen["questions"]), f"{seen['questions'] / 12:.2f}"]
    ledger = json.loads((mixed / "ledger-instruct.json").read_text())
    trained = sum(row["parameters"] for row in ledger if row["rate"] is not None)
    assert f"{trained:,} of {sum(row['parameters'] for row in ledger):,} parameters trained" in page.sections["ledger"]


def test_samples_show_what_each_model_answers_and_text_stays_text(arcana: Path, mixed: Path) -> None:
    for folder in (arcana, mixed):
        page = Page(folder / "report.html")
        assert EVIL in page.sections["samples"] and "<b>evil</b>" in page.sections["samples"]
        rows = [row for row in page.rows if row[:1] and row[0].startswith(("before", "after", "reference"))]
        assert [row[0] for row in rows] == ["reference", "before training", "after align", "after instruct"] * 6
        assert [row[1] for row in rows[::4]] == ["red", "green", "blue"] * 2
        for place, stage in ((2, "align"), (3, "instruct")):
            model, processor = vlm.load(folder / "stages" / stage)
            said = [vlm.answer(model, processor, EVIL if number == 0 else COLOUR, [folder_picture(folder, number)], max_new_tokens=32) for number in range(6)]
            assert any(said) and [row[1].removesuffix(" ✓").removesuffix(" …") for row in rows[place::4]] == [text or "nothing" for text in said]


def test_without_eval_the_questions_are_shared_among_the_training_sources(mixed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(mixed, tmp_path / "run"))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"eval": {}}))
    page = Page(write_report(folder))
    assert sum(tag == "article" for tag, _ in page.tags) == 8 and page.sections["samples"].count("Describe the picture") == 4
    assert "these are training questions of stage instruct" in page.sections["samples"]


def test_a_picture_that_broke_is_a_sentence(mixed: Path, root: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(mixed, tmp_path / "run"))
    config = (folder / "config.yaml").read_text()
    data = tiny.data_root(tmp_path / "data")
    (folder / "config.yaml").write_text(config.replace(str(root), str(data)))
    (data / "img" / "1.png").write_bytes((data / "img" / "1.png").read_bytes()[:60])
    page = Page(write_report(folder))
    assert page.sections["samples"].count("The picture cannot be shown") == 1 and "img/1.png" in page.sections["samples"]
    assert page.sections["samples"].count("not asked") == 2  # after each stage
    assert sum(tag == "img" for tag, _ in page.tags) == 5


def folder_picture(folder: Path, number: int) -> str:
    config = vlm.compose(str(folder / "config.yaml"))
    return f"{config.data_root}/img/{number}.png"


def test_the_starting_model_is_that_of_the_run(root: Path, tmp_path: Path) -> None:
    """With a rate of nothing the first stage ends with the model that it began with, frozen parts included."""
    run = compose(root, tmp_path, "llava_tiny", "stages.align.train={connector: 1.0e-30}")
    folder = vlm.fit(run)
    start, _ = starting_model(run)
    after, _ = vlm.load(folder / "stages" / "align")
    expected, got = start.state_dict(), after.state_dict()
    assert expected.keys() == got.keys() and all(got[name].equal(expected[name]) for name in expected)


def test_scores_stand_beside_blind_and_chance(mixed: Path, root: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(mixed, tmp_path / "run"))
    found = vlm.evaluate(folder)
    page = Page(write_report(folder))
    (scores,) = found.values()
    for kind, values in scores["kinds"].items():
        row = page.row(kind, 6)
        assert row[1] == str(values["n"])
        assert row[3:] == ["–" if values[name] is None else f"{100 * values[name]:.1f}" for name in ("accuracy", "blind", "chance")]
    assert not any(row[:1] == ["before training"] for row in page.rows) and "The model before training is left out" in page.sections["samples"]  # nothing made it
    assert_alone(page)


# ---- parts -----------------------------------------------------------------------------------------------------------------


def test_queries_and_updates_have_pictures(arcana: Path) -> None:
    page = Page(arcana / "report.html")
    assert page.sections["parts"].count("Where the queries look") == 3  # of as many pictures
    assert "All 3 queries, with how many of the 2 x 2 patches they look at" in page.sections["parts"]
    assert "MM-LoRA: how far training moved the linears" in page.sections["parts"]
    drawn = ["connector.qladder-1.png", "connector.qladder-2.png", "connector.qladder-3.png", "llm.mm_lora-4.png"]
    assert sorted(file.name for file in (arcana / "pictures").glob("*-*.png")) == drawn
    names = [str(attributes.get("alt")) for tag, attributes in page.tags if tag == "img"]
    assert sum(name.startswith("Where the queries") for name in names) == 3


@dataclass(frozen=True, kw_only=True)
class ShownSpec(MLPSpec):
    """A connector of a user's own that has pictures to show, one of which fails."""

    def figures(self, module: nn.Module, seen: Seen) -> Iterable[Figure]:
        (stream,) = seen.features.streams.values()
        height, width, channels = seen.pictures[0].shape
        told = f"{len(seen.names)} pictures of {width} x {height} x {channels}, {sum(stream.lengths)} tokens, {sum(p.numel() for p in module.parameters())} parameters"
        yield Figure("Shown by the dummy", told, lambda figure: figure.subplots().plot([0, 1], [0, 1]))
        yield Figure("Never drawn", "", lambda figure: figure.nothing_of_that_name())
        raise RuntimeError("no more of them")


def test_a_part_of_ones_own_shows_its_picture(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(connectors.registry._specs, "shown", ShownSpec)
    monkeypatch.setattr(ShownSpec, "use", "shown")
    folder = vlm.fit(compose(root, tmp_path, "llava_tiny", "model.connector={use: shown, depth: 2}", f"data.heldout.file={root}/instruct.json"))
    page = Page(folder / "report.html")
    parameters = sum(row["parameters"] for row in json.loads((folder / "ledger-align.json").read_text()) if row["group"].startswith("connector"))
    assert f"3 pictures of 28 x 28 x 3, 15 tokens, {parameters} parameters" in page.sections["parts"]  # 4 patches and the CLS token each
    (picture,) = (folder / "pictures").glob("connector.shown-*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "'Never drawn' of the part connector.shown could not be drawn: AttributeError" in page.sections["parts"]
    assert "The part connector.shown has a picture to show, and failed: RuntimeError: no more of them" in page.sections["samples"]
    assert_alone(page)


# ---- runs that did not come to their end -----------------------------------------------------------------------------------


def test_an_interrupted_run_says_so(root: Path, tmp_path: Path) -> None:
    with stopped_at(6):
        vlm.fit(compose(root, tmp_path, "llava_tiny"))
    folder = tmp_path / "llava_tiny"
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"stage": "instruct", "st')  # a kill cut it
    (folder / "eval").mkdir()
    (folder / "eval" / "heldout.json").write_text('{"kinds": ')
    page = Page(vlm.report(folder))
    assert "not finished" in page.text and "Stage instruct stands at step 2 of 4" in page.text and "--resume" in page.text
    assert page.row("instruct", 5)[1] == "2"
    assert "before training" in page.text and "after align" in page.text and "after instruct" not in page.text
    assert "heldout.json" in page.sections["warnings"]
    assert_alone(page)


def test_a_run_without_a_step_has_a_page_too(mixed: Path, tmp_path: Path) -> None:
    shutil.copy(mixed / "config.yaml", tmp_path)
    page = Page(write_report(tmp_path))
    assert "Stage align has not begun" in page.text and "No step was made yet" in page.text and "No stage is finished" in page.text
    assert_alone(page)
    with pytest.raises(CheckpointError, match="holds no run"):
        write_report(tmp_path / "nowhere")


def test_warnings_stand_there_and_bad_samples_are_counted_with_examples(mixed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(mixed, tmp_path / "run"))
    entries = [{"stage": "align", "step": number, "source": "captions", "kind": "missing picture", "reason": f"<i>number {number}</i>"} for number in range(5)]
    (folder / "bad_samples.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (folder / "warnings.jsonl").write_text(json.dumps({"text": "stage align: <u>no gradient</u>"}) + "\n")
    page = Page(write_report(folder, largest=0))
    assert page.row("missing picture", 4)[1] == "5"
    assert "stage align: <u>no gradient</u>" in page.sections["warnings"] and "None" not in page.sections["warnings"]
    assert "<i>number 2</i>" in page.sections["warnings"] and "number 3" not in page.sections["warnings"]
    assert "No model was loaded for this page" in page.sections["samples"]


def test_a_report_that_fails_does_not_fail_the_run(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: Any, **__: Any) -> Path:
        raise RuntimeError("the pen is dry")

    monkeypatch.setattr(stages, "write_report", fail)
    folder = vlm.fit(compose(root, tmp_path, "llava_tiny"))
    assert (folder / "export" / "config.json").is_file()
    assert "no report was written (RuntimeError: the pen is dry)" in capsys.readouterr().out


# ---- curves ----------------------------------------------------------------------------------------------------------------


def test_a_curve_keeps_its_mean_and_its_ends_when_thinned() -> None:
    points = [(step, float(step % 7)) for step in range(1, 961)]
    few = thinned(points, 240)
    assert len(few) == 240 and few[0][0] == 2.5 and few[-1][0] == 958.5
    assert sum(value for _, value in few) / 240 == pytest.approx(sum(value for _, value in points) / 960)


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [5.0, 5.0, float("nan")], [1e-9, 3e-9], [-1.0, 2.0], [0.5, float("inf")], []])
@pytest.mark.parametrize("log", [True, False])
def test_any_values_can_be_drawn(values: list[float], log: bool) -> None:
    chart = Chart("<loss>", [Curve("<a>", list(enumerate(values, 1)))], [(1, "<b>")], log=log)
    drawn = chart.svg()
    assert chart.png().startswith(b"\x89PNG")
    assert "nan" not in drawn and "inf" not in drawn and "<a>" not in drawn
    assert bool(drawn) == bool(values)
