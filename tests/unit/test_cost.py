"""Records and the rows they make, looked at without pixels: what is refused, what is cut, what is counted, and which kinds of conversations a template refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from PIL import Image
from tiny_run import compose, only, register
from tokenizers import processors

from vlm.errors import ConfigurationError
from vlm.processor import VLMProcessor, load_tokenizer
from vlm.train import check_data, cost
from vlm.train.check import check_run as check
from vlm.train.config import RunSpec

TALK = [{"from": "human", "value": "q1"}, {"from": "gpt", "value": "a1"}]
SEEN = [{"from": "human", "value": "<image>\nq1"}, {"from": "gpt", "value": "a1"}]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tiny.data_root(tmp_path / "data")


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)


def write(root: Path, rows: list[Any], name: str = "instruct") -> None:
    (root / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")


# ---- records --------------------------------------------------------------------------------------------------------------


def test_pictures_that_are_not_there_or_damaged_are_named_by_sample(root: Path) -> None:
    (root / "img" / "4.png").unlink()
    (root / "img" / "8.png").write_bytes((root / "img" / "8.png").read_bytes()[:-20])
    texts = [str(problem) for problem in check(compose(root, "stages.instruct=null", "eval.heldout=null")).problems]
    assert len(texts) == 2
    assert "align.json, sample 4: there is no such picture file" in texts[0]
    assert f"got {root / 'img' / '4.png'}" in texts[0]
    assert "check the path" in texts[0]
    assert "align.json, sample 8: the picture is truncated or corrupt" in texts[1]


def test_a_strip_that_cannot_be_padded_is_found_in_its_header(root: Path) -> None:
    Image.new("1", (1, 60000)).save(root / "img" / "5.png")
    run = ("stages.align=null", "stages.instruct.data=captions", "stages.instruct.images=pad", "eval.heldout=null")
    problem = str(only(check(compose(root, *run))))
    assert f"align.json, sample 5: the picture is too thin for its length. got {root / 'img' / '5.png'}, 1 x 60000" in problem
    assert check(compose(root, *run, "data.captions.on_bad=skip")).ok


def test_five_of_a_kind_are_named_and_the_others_counted(root: Path) -> None:
    sound = [{"conversations": TALK}]
    write(root, [*sound, *({"conversations": SEEN} for _ in range(9)), *({"conversations": TALK[:1]} for _ in range(2))])
    texts = [str(problem) for problem in check(compose(root)).problems]
    assert len(texts) == 5 + 1 + 2
    for index, text in enumerate(texts[:5], 1):
        assert f"instruct.json, sample {index}: pictures and placeholders differ. got images 0, placeholders 1" in text
    assert "4 more samples are refused like the last one above" in texts[5]
    assert "sample 10: no assistant turn" in texts[6]


def test_a_record_of_two_stages_is_reported_once(root: Path) -> None:
    write(root, [{"conversations": TALK[:1]}, {"conversations": TALK}])
    assert "sample 0: no assistant turn" in str(only(check(compose(root, "stages.align.data=questions", "stages.align.prompt=chatml"))))


def test_skipped_samples_are_counted_but_some_must_be_left(root: Path) -> None:
    long = {"conversations": [{"from": "human", "value": "word " * 200}, TALK[1]]}
    write(root, [{"conversations": TALK}, long, {"conversations": []}])
    run = compose(root, "stages.instruct.max_length=40", "data.questions.on_bad=skip")
    report = check(run)
    assert report.ok  # one bad record may always be
    warning = report.warnings[0]
    assert warning.startswith("data.questions: 2 samples are left out or replaced (on_bad: skip), the first:")
    assert "sample 2: no turns" in warning
    write(root, [long, long])
    assert "all 2 samples lose every supervised token at max_length 40" in str(only(check(run)))


def test_more_bad_records_than_the_budget_are_a_problem(root: Path) -> None:
    write(root, [{"conversations": TALK}, {"conversations": []}, {"conversations": []}])
    run = compose(root, "data.questions.on_bad=skip")
    assert "data.questions: too many bad samples. got 2 of 3 samples" in str(only(check(run)))
    assert check(compose(root, "data.questions.on_bad=skip", "bad_budget=0.5")).ok


# ---- rows -----------------------------------------------------------------------------------------------------------------


def processor(run: RunSpec, index: int) -> VLMProcessor:
    stage = list(run.stages.values())[index]
    return VLMProcessor(run.model, 32, load_tokenizer(run.model), stage.prompt, stage.images.use)


def test_every_answer_beyond_max_length_is_one_problem(root: Path) -> None:
    write(root, [{"id": i, "conversations": [{"from": "human", "value": "word " * 40}, {"from": "gpt", "value": "answer"}]} for i in range(4)])
    run = compose(root, "stages.instruct.max_length=16")
    problem = str(only(check(run)))
    needed = processor(run, 1).row(run.data["questions"].open()[0])
    for part in (
        "instruct.json: all 4 samples lose",
        "max_length 16 of stage instruct",
        "instruct.json, sample 0",
        f"got {len(needed)} tokens needed",
        "raise stages.instruct.max_length",
    ):
        assert part in problem
    with pytest.raises(ConfigurationError):
        check(run, quick=True)


def test_some_answers_beyond_max_length_are_named_and_cut_rows_counted(root: Path) -> None:
    question, answer = {"from": "human", "value": "word " * 40}, {"from": "gpt", "value": "answer"}
    write(root, [{"conversations": TALK}, {"conversations": [question, answer]}, {"conversations": [*TALK, question, answer]}])
    report = check(compose(root, "stages.instruct.max_length=40"))
    assert "instruct.json, sample 1: no token of sample '1' is supervised once it is cut to 40 tokens" in str(only(report))
    assert [(note.partition(",")[0], count) for note, count in report.stages[1].counted.items()] == [("questions: cut to max_length 40", 2)]
    assert "sample 1: sample '1' is too long" in str(check(compose(root, "stages.instruct.max_length=40", "stages.instruct.too_long=error")).problems[0])


def test_rows_that_may_not_be_cut_are_not_said_to_lose_their_answers(root: Path) -> None:
    write(root, [{"conversations": [{"from": "human", "value": "word " * 40}, TALK[1]]} for _ in range(2)])
    texts = [str(problem) for problem in check(compose(root, "stages.instruct.max_length=16", "stages.instruct.too_long=error")).problems]
    assert len(texts) == 2
    assert all("is too long" in text and "set too_long: cut" in text for text in texts)


def vicuna(root: Path) -> None:
    """A tokenizer that starts every string with <s> and ends answers in </s>."""
    tokenizer = tiny.tokenizer(bos="<s>", eos="</s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.save_pretrained(root / "tokenizer")


def test_official_prompts_are_rendered_for_every_sample(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vicuna(root)
    write(root, [{"image": "img/0.png", "conversations": [SEEN[0], answer]} for answer in (TALK[1], {"from": "gpt", "value": "Write <image>."})])
    run = compose(root, "stages.instruct.prompt={use: vicuna_v1, official: true}", "stages.align.prompt=vicuna_v1")
    assert "instruct.json, sample 1: an official prompt knows no system turns, no <image> in text" in str(only(check(run)))
    monkeypatch.setattr(check_data, "SECONDS", -1.0)
    assert any("whether 2 rows of stage instruct" in line for line in check(run).not_checked)


def test_a_picture_larger_than_a_row_is_named_where_sizes_differ(root: Path, parts: None) -> None:
    tiny.picture(size=(420, 420)).save(root / "img" / "5.png")
    run = compose(root, "model.encoder=native", "model.connector.level=0", "stages.align.max_length=1025", "stages.instruct=null", "eval.heldout=null")
    assert check(run).ok
    tiny.picture(size=(560, 560)).save(root / "img" / "5.png")
    problem = str(only(check(run)))
    assert "align.json, sample 5: one picture takes 1600 tokens" in problem
    assert "less than max_length 1025" in problem


def test_lengths_that_hang_on_unread_headers_are_not_guessed(root: Path, parts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_data, "HEADERS", 5)
    report = check(compose(root, "model.encoder=native", "model.connector.level=0", "every_stage.max_length=1100", "stages.instruct=null", "eval.heldout=null"))
    assert "data.captions: the length of 7 rows of stage align, whose pictures' sizes are not known" in report.not_checked


@pytest.mark.parametrize(("prompt", "source"), [("chatml", "questions"), ("vicuna_v1", "questions"), ("plain", "captions")])
def test_rows_are_counted_as_cut_exactly_where_the_processor_cuts(root: Path, prompt: str, source: str) -> None:
    pairs = [turn for word in "abcdefgh" for turn in ({"from": "human", "value": word}, {"from": "gpt", "value": word})]
    system = {"from": "system", "value": "Be brief, whatever is asked."}
    short = [{"independent": free, "conversations": turns} for free in (True, False) for turns in (pairs, [system, *pairs], pairs[:2])]
    write(root, json.loads((root / "instruct.json").read_text(encoding="utf-8")) + short)
    run = compose(root, f"stages.instruct.prompt={prompt}")
    reader, real = run.data[source].open(), processor(run, 1)
    long = [len(real.row(sample)) for sample in reader]
    rows = cost.RowLengths(run.model, 32, real.tokenizer, run.stages["instruct"].prompt)
    for limit in sorted({edge for count in long for edge in (count - 1, count)}):
        measure = cost.Measure("instruct", rows, limit, "cut")
        cost.scan("", reader, [measure], headers=0, until=float("inf"))
        assert measure.cut == sum(count > limit for count in long), limit


# ---- kinds of conversations (field cases, on inputs of this file's making, and on the folders where they are) -------------

REFUSES = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn is known here') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns must alternate') }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DROPS = tiny.CHATML.replace("for m in messages", "for m in messages if m['role'] != 'system'")


def refusing(root: Path, chat: str = REFUSES) -> None:
    tiny.tokenizer(chat=chat).save_pretrained(root / "tokenizer")


def test_all_kinds_that_a_template_refuses_are_found_with_its_own_sentence(root: Path) -> None:
    refusing(root)
    user, answer = TALK
    system = {"from": "system", "value": "Answer in French."}
    write(root, [{"conversations": turns} for turns in (TALK, [system, *TALK], [user, user, answer], [answer, user, answer], [user, answer, answer], [user, answer, user])])
    report = check(compose(root, "stages.instruct.prompt=tokenizer"))
    texts = list(map(str, report.problems))
    assert len(texts) == 3
    for index, text in zip((2, 3, 4), texts, strict=True):
        assert f"instruct.json, sample {index}: the chat template cannot render this conversation: turns must alternate" in text
        assert "choose another prompt" in text
    assert report.stages[1].counted == {"questions: system text folded into the first question": 1, "questions: unsupervised trailing turn": 1}
    strict = check(compose(root, "stages.instruct.prompt={use: tokenizer, fold_system: error}"))
    assert any("sample 1: the chat template refuses or loses the system turn" in str(problem) for problem in strict.problems)


def test_a_system_turn_that_a_template_drops_is_folded_and_shown(root: Path) -> None:
    refusing(root, DROPS)
    write(root, [{"conversations": [{"from": "system", "value": "Answer in French."}, *TALK]}])
    report = check(compose(root, "stages.instruct.prompt=tokenizer"))
    assert report.ok
    assert report.stages[1].counted == {"questions: system text folded into the first question": 1}
    assert "Answer in French.\n\nq1" in "".join(text for text, _ in report.stages[1].rendered[0])


def test_after_the_time_is_up_new_forms_of_conversation_are_still_rendered(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_data, "SECONDS", -1.0)
    write(root, [{"conversations": [{"from": "human", "value": "word " * 100}, TALK[1]]} for _ in range(3)])
    report = check(compose(root, "stages.instruct.max_length=120"))
    assert report.ok
    assert report.not_checked == ["data.questions: whether 3 rows of stage instruct are too long, after -1 s of measuring (--all measures every one)"]
    write(root, [{"conversations": TALK}, {"conversations": [TALK[0], *TALK]}])
    refusing(root)
    assert "turns must alternate" in str(only(check(compose(root, "stages.instruct.prompt=tokenizer"))))


def test_a_stage_that_trains_the_connector_on_text_alone_is_warned_of_once(root: Path) -> None:
    write(root, [{"conversations": TALK}, {"conversations": TALK}])
    report = check(compose(root))
    assert report.ok
    assert report.warnings == ["stage instruct trains the connector, but no sample of 2 has an image"]
    assert not check(compose(root, "stages.instruct.train.connector=frozen")).warnings
    write(root, [{"conversations": TALK}, {"image": "img/0.png", "conversations": SEEN}])
    assert not check(compose(root)).warnings


def field_run(root: Path, file: Path, *overrides: str) -> RunSpec:
    return compose(root, f"data.questions.file={file}", f"data.questions.images={file.parent}", *overrides)


def test_field_template_roles(field_folder: Path, root: Path) -> None:
    case = field_folder / "tok_template_roles"
    talks: dict[str, Any] = json.loads((case / "conversations.json").read_text(encoding="utf-8"))
    write(root, [{"id": name, "messages": turns} for name, turns in talks.items()])
    for kind, refused in (("refuses", {"two_users", "assistant_first", "two_assistants"}), ("drops_system", set())):
        report = check(compose(root, f"model.llm.tokenizer={case / kind}", "stages.instruct.prompt=tokenizer"))
        said = [f"instruct.json, sample {index}: the chat template cannot render this conversation: turns must alternate" for index, name in enumerate(talks) if name in refused]
        assert len(report.problems) == len(said)
        assert all(part in str(problem) for part, problem in zip(said, report.problems, strict=True))
        assert report.stages[1].counted["questions: system text folded into the first question"] == 1


def test_field_zero_supervised(field_folder: Path, root: Path) -> None:
    problem = str(only(check(field_run(root, field_folder / "train_zero_supervised" / "all_answers_cut.json", "stages.instruct.max_length=16"))))
    for part in ("all_answers_cut.json: all 4 samples lose every supervised token at max_length 16", "sample 0", "tokens needed", "raise stages.instruct.max_length"):
        assert part in problem


def test_field_mixed_modalities(field_folder: Path, root: Path) -> None:
    case = field_folder / "train_mixed_modalities"
    assert check(field_run(root, case / "train.json")).warnings == []
    report = check(field_run(root, case / "text_only.json"))
    assert report.ok
    assert report.warnings == ["stage instruct trains the connector, but no sample of 2 has an image"]


@pytest.mark.parametrize(("case", "refused"), [("data_roles", (9, 10, 11, 12)), ("data_placeholder_count", (1, 2, 3, 6))])
def test_field_records_are_refused_by_index(field_folder: Path, root: Path, case: str, refused: tuple[int, ...]) -> None:
    for name in ("a.jpg", "b.jpg"):
        tiny.picture().save(root / name)
    report = check(compose(root, f"data.questions.file={field_folder / case / 'train.json'}", f"data.questions.images={root}"))
    assert [next(index for index in range(13) if f"sample {index}:" in str(problem)) for problem in report.problems] == list(refused)
    assert report.stages[1].counted == ({"questions: unsupervised trailing turn": 1} if case == "data_roles" else {})
