"""Rows of conversations: counts are layouts, independent questions are branches, nothing is cut silently, and a saved processor makes the same rows."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conversations import batch_of, drawn, facts, processor, sample, says, user
from models import model_spec
from PIL import Image
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, processors
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from vlm.config import LLMSpec, ModelSpec
from vlm.connectors.mlp import MLPSpec
from vlm.data.sample import Picture, Sample, Turn
from vlm.encoders.base import FixedSizeSpec, Mode
from vlm.encoders.clip import CLIPSpec
from vlm.errors import CheckpointError, ConfigurationError, DataError
from vlm.features import Layouts, TokenLayout
from vlm.generate import prepare
from vlm.llm.context import TEXT, VISION
from vlm.loading import first_model, load
from vlm.processor import VLMProcessor, load_tokenizer, placeholder_id
from vlm.prompt import GIVEN_UP, PromptSpec
from vlm.row import IGNORE, Row

SIZES = ((40, 30), (28, 28), (13, 90), (100, 15), (1, 1))


@dataclass(frozen=True, kw_only=True)
class NativeSpec(FixedSizeSpec):
    """An encoder that sees every picture in its own size: as many patches as it takes."""

    size: int = 28
    patch: int = 14

    def layout(self, width: int, height: int, mode: Mode) -> Layouts:
        return {"image": TokenLayout.grid(-(-height // self.patch), -(-width // self.patch), prefix=1)}

    def preprocess(self, image: Image.Image, mode: Mode) -> Mapping[str, Tensor]:
        return {"pixels": self.normalise(image)}


@pytest.fixture
def pictures(tmp_path: Path) -> list[Picture]:
    return drawn(tmp_path, SIZES)


def read(one: VLMProcessor, row: Row, branch: int | None = None) -> str:
    """The text of a row, or of one of its branches; pictures left out."""
    ids = [index for index, kind, place in zip(row.ids, row.types, row.branches, strict=True) if kind == TEXT and branch in (None, place)]
    return one.tokenizer.decode(ids)  # type: ignore[return-value]


# ---- pictures in rows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "grids"), [("native", [(3, 3), (2, 2), (7, 1), (2, 8), (1, 1)]), ("pad", [(3, 3), (2, 2), (7, 7), (8, 8), (1, 1)]), ("crop", [(2, 2)] * 5), ("squash", [(2, 2)] * 5)]
)
def test_a_picture_takes_as_many_tokens_as_its_layout_says(policy: str, grids: list[tuple[int, int]], pictures: list[Picture]) -> None:
    one = processor(policy=policy, encoder=NativeSpec())
    for picture, size, (rows, columns) in zip(pictures, SIZES, grids, strict=True):
        layout = one.layout(*size)
        assert (layout.rows, layout.columns, layout.count) == (rows, columns, rows * columns)
        row = one.row(sample(user("Look: ", picture, "\nWhat?"), says("red")))
        assert row.ids.count(one.image_token_id) == row.types.count(VISION) == row.pictures.count(0) == layout.count
        height, width = row.images[0].views["pixels"].shape[1:]
        assert (-(-height // 14), -(-width // 14)) == (rows, columns), "the policy was applied to the pixels too"
        assert (row.images[0].width, row.images[0].height, row.images[0].layout) == (*size, layout)


def test_a_row_tells_of_every_token_what_it_is(pictures: list[Picture]) -> None:
    one = processor(encoder=NativeSpec())
    counts = [one.layout(*size).count for size in SIZES]
    row = one.row(sample(user(pictures[0], " and ", pictures[2], "\nWhich?"), says("this"), user("Or ", pictures[3], "?"), says("that"), source="s"))
    assert [row.pictures.count(number) for number in range(3)] == [counts[0], counts[2], counts[3]]
    assert [index for index, before in zip(row.pictures, [-1, *row.pictures], strict=False) if index >= 0 and index != before] == [0, 1, 2]
    assert all((kind == VISION) == (picture >= 0) == (index == one.image_token_id) for kind, picture, index in zip(row.types, row.pictures, row.ids, strict=True))
    assert row.positions == list(range(len(row)))
    assert set(row.branches) == {0}
    assert all(label in (IGNORE, index) for label, index in zip(row.labels, row.ids, strict=True))
    assert one.tokenizer.decode([label for label in row.labels if label != IGNORE]) == "this<|im_end|>that<|im_end|>"
    assert row.supervised == sum(label != IGNORE for label in row.labels)
    assert (
        read(one, row)
        == "<|im_start|>user\n and \nWhich?<|im_end|>\n<|im_start|>assistant\nthis<|im_end|>\n<|im_start|>user\nOr ?<|im_end|>\n<|im_start|>assistant\nthat<|im_end|>\n"
    )
    assert (row.id, row.source, len(row.images)) == ("id7", "s", 3)


def test_a_row_without_pictures() -> None:
    row = processor().row(sample(user("Hello! <image>"), says("Hello!"), notes=("read so",)))
    assert (set(row.types), set(row.pictures), row.images, row.notes) == ({TEXT}, {-1}, [], ("read so",))


def test_a_picture_may_come_from_anywhere(pictures: list[Picture], tmp_path: Path) -> None:
    one = processor()
    path = Path(pictures[0].path)
    seen = [one.see(given).views["pixels"] for given in (pictures[0], path, str(path), path.read_bytes(), Image.open(path))]
    assert all(torch.equal(view, seen[0]) for view in seen)
    clear = Image.new("RGBA", (40, 30), (200, 10, 10, 90))
    clear.save(tmp_path / "clear.png")
    assert torch.equal(one.see(clear).views["pixels"], one.see(tmp_path / "clear.png").views["pixels"])
    with pytest.raises(DataError, match=r"train.json, sample 7: cannot read picture .*missing.png.*check the path"):
        one.row(sample(user(Picture(str(tmp_path / "missing.png"))), says("red")))


def test_a_prompt_that_shows_nothing_of_a_question() -> None:
    with pytest.raises(DataError, match=r"^train.json, sample 7: prompt 'plain' leaves nothing of it to read. add a picture"):
        processor("plain")([sample(user("What?"))])
    with pytest.raises(DataError, match=r"^sample '7': prompt 'plain' leaves nothing"):
        processor("plain")([Sample("7", (user("What?"),))])


def test_a_row_for_generation_begins_the_training_row(pictures: list[Picture]) -> None:
    one = processor()
    asked = one.row(sample(user(pictures[0], "\nWhat?")), generate=True, mode="infer")
    trained = one.row(sample(user(pictures[0], "\nWhat?"), says("red")))
    assert trained.ids[: len(asked)] == asked.ids
    assert trained.labels[len(asked)] != IGNORE
    assert asked.supervised == 0


# ---- rows that are too long ----------------------------------------------------------------------------------------------


def test_a_long_row_is_cut_at_its_end_never_inside_a_picture(pictures: list[Picture]) -> None:
    one = processor()
    talk = sample(user(pictures[0], "\nWhat?"), says("red"), user("And ", pictures[1], pictures[2], "?"), says("two objects on the left"))
    whole = one.row(talk)
    assert one.row(talk, max_length=len(whole)).notes == ()
    for length in range(whole.ids.index(one.tokenizer.eos_token_id, whole.labels.index(next(label for label in whole.labels if label != IGNORE))) + 1, len(whole)):
        row = one.row(talk, max_length=length)
        end = next(place for place in range(length, 0, -1) if whole.pictures[place] < 0 or whole.pictures[place - 1] != whole.pictures[place])
        for name in ("ids", "labels", "types", "pictures", "branches", "positions"):
            assert getattr(row, name) == getattr(whole, name)[:end]
        assert row.notes == ("cut",)
        assert len(row.images) == len({picture for picture in row.pictures if picture >= 0})
        assert all(row.pictures.count(number) == image.layout.count for number, image in enumerate(row.images))


def test_a_cut_row_goes_through_the_model(pictures: list[Picture]) -> None:
    one, model = processor(), first_model(model_spec(), placeholder_id(tiny.tokenizer()))
    talk = sample(user(pictures[0], "\nWhat?"), says("red"), user(pictures[1]), says("two"))
    second = one.row(talk).pictures.index(1)
    assert model(**batch_of(one.row(talk, max_length=second + 2))).count == one.row(talk, max_length=second).supervised


def test_a_row_that_is_too_long_may_be_an_error(pictures: list[Picture]) -> None:
    one = processor()
    talk = sample(user(pictures[0], "\nWhat?"), says("red"))
    needed = len(one.row(talk))
    assert len(one.row(talk, max_length=needed, too_long="error")) == needed
    with pytest.raises(
        DataError,
        match=rf"^train.json, sample 7: sample 'id7' is too long\. got {needed} tokens; expected at most max_length {needed - 1}\. raise max_length, or set too_long: cut",
    ):
        one.row(talk, max_length=needed - 1, too_long="error")


def test_a_picture_that_does_not_fit(pictures: list[Picture]) -> None:
    one = processor(encoder=NativeSpec())
    count = one.layout(*SIZES[3]).count
    for too_long in ("cut", "error"):
        with pytest.raises(
            DataError,
            match=rf"^train.json, sample 7: one picture takes {count} tokens, which does not fit\. expected less than max_length {count}\. raise max_length, or use an encoder",
        ):
            one.row(sample(user(pictures[3], "\nWhat?"), says("red")), max_length=count, too_long=too_long)


def test_what_is_wrong_with_a_picture_says_whose_it_is(tmp_path: Path) -> None:
    """The record first, so that `on_bad: skip` and a reader of the log find it, and the picture's name behind."""
    thin, cut = Picture(str(tmp_path / "thin.png")), tmp_path / "cut.png"
    Image.new("1", (1, 60000)).save(thin.path)
    cut.write_bytes(Path(thin.path).read_bytes()[:-20])
    for policy in ("pad", "crop"):
        one = processor(policy=policy, encoder=CLIPSpec(config=tiny.tower_config(image_size=336), weights="random"))
        row = sample(user(thin), says("red"))
        with pytest.raises(DataError, match=rf"^train.json, sample 7: the picture is too thin for its length. got {thin.path}, 1 x 60000, to become") as caught:
            one.row(row)
        assert caught.value.kind == "too large"
        with pytest.raises(DataError, match="the picture is too thin for its length. got 1 x 60000, to become"):
            one.layout(1, 60000)
    with pytest.raises(DataError, match=rf"^train.json, sample 7: the picture is truncated or corrupt.* got {cut}\."):
        processor().row(sample(user(Picture(str(cut))), says("red")))


def test_a_row_with_nothing_left_to_learn(pictures: list[Picture]) -> None:
    one = processor()
    talk = sample(user(pictures[0], "\nWhat?"), says("red"))
    needed = len(one.row(talk))
    with pytest.raises(
        DataError,
        match=rf"^train.json, sample 7: no token of sample 'id7' is supervised once it is cut to 12 tokens\. got {needed} tokens needed; expected an answer within max_length 12\. raise max_length",
    ):
        one.row(talk, max_length=12)
    with pytest.raises(
        DataError,
        match=r"^train.json, sample 7: no token of sample 'id7' is supervised\. got \d+ tokens; expected an assistant turn with text\. add an answer, or leave the sample out",
    ):
        one.row(sample(user("q"), Turn("assistant", ("a",))))
    assert one.row(sample(user("q"), Turn("assistant", ("a",))), mode="infer").supervised == 0


def test_a_conversation_that_the_released_walk_gives_up_stays_without_labels() -> None:
    tokenizer = tiny.tokenizer(bos="<s>", eos="</s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    one = processor("vicuna_v1", tokenizer=tokenizer, official=True)  # a tokenizer without the `legacy` switch counts later rounds as Llama's does
    talk = sample(user("q"), says("a"), user("r"), says("b"))
    row = one.row(talk)
    assert (row.supervised, row.notes) == (0, (GIVEN_UP,))
    assert one.row(talk, max_length=len(row) - 3).notes == ("cut",)


# ---- the placeholder -----------------------------------------------------------------------------------------------------


def bare(**options: Any) -> PreTrainedTokenizerBase:
    """A tokenizer that does not know <image>."""
    known = tiny.tokenizer(**options)
    content = json.loads(known.backend_tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<image>"]
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token=known.eos_token, pad_token=known.pad_token)
    made.chat_template = known.chat_template
    return made


@pytest.mark.parametrize("known", ["special", "not special", "not at all"])
def test_the_placeholder_is_one_id_that_text_never_becomes(known: str, pictures: list[Picture]) -> None:
    tokenizer = tiny.tokenizer() if known == "special" else bare()
    if known == "not special":
        tokenizer.add_tokens([AddedToken("<image>", special=False)])
    size, before = len(tokenizer), tokenizer.get_vocab().get("<image>")
    one = processor(tokenizer=tokenizer)
    assert one.image_token_id == (before if before is not None else size)
    assert len(tokenizer) == size + (before is None)
    assert placeholder_id(tokenizer) == one.image_token_id
    row = one.row(sample(user(pictures[0], "<image> is text"), says("an <image> <image>")))
    assert row.ids.count(one.image_token_id) == row.types.count(VISION) == 4
    assert one.tokenizer.decode([label for label in row.labels if label != IGNORE]) == "an <image> <image><|im_end|>"


def decoder_folder(folder: Path, tokenizer: PreTrainedTokenizerBase, rows: int, **numbers: Any) -> Path:
    """A decoder with `rows` rows of the vocabulary, and its tokenizer, as transformers writes them."""
    config = AutoConfig.for_model(**tiny.llm_config("llama", vocab_size=rows, **numbers))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("spare", [19, 1, 0])
def test_a_padded_vocabulary_keeps_its_rows(spare: int, tied: bool, tmp_path: Path) -> None:
    tokens = len(bare())
    folder = decoder_folder(tmp_path / "decoder", bare(), tokens + spare, tie_word_embeddings=tied)
    spec = ModelSpec(encoder=model_spec().encoder, connector=MLPSpec(), llm=LLMSpec(path=str(folder)))
    tokenizer = load_tokenizer(spec)
    image = placeholder_id(tokenizer)
    assert image == tokens
    model = first_model(spec, image)
    old = AutoModelForCausalLM.from_pretrained(folder)
    rows = max(tokens + spare, tokens + 1)
    assert model.config.text_config.vocab_size == rows
    for ours, theirs in ((model.get_input_embeddings(), old.get_input_embeddings()), (model.get_output_embeddings(), old.get_output_embeddings())):
        assert len(ours.weight) == rows  # type: ignore[arg-type]
        assert torch.equal(ours.weight[: tokens + spare], theirs.weight)  # type: ignore[index]
        assert bool(ours.weight[-1].isfinite().all())  # type: ignore[index,union-attr]


def test_field_ckpt_vocab_padded(field_folder: Path, tmp_path: Path) -> None:
    """The case's checkpoint is a whole Llava; its decoder is taken out here. New tokens beside the placeholder are the tokenizer's own."""
    case = field_folder / "ckpt_vocab_padded"
    expected = json.loads((case / "expected.json").read_text())
    folder = tmp_path / "decoder"
    tensors = {key.removeprefix("language_model."): tensor for key, tensor in load_file(case / "base" / "model.safetensors").items() if key.startswith("language_model.")}
    numbers = json.loads((case / "base" / "config.json").read_text())["text_config"]
    decoder = AutoModelForCausalLM.from_config(AutoConfig.for_model(**numbers))
    decoder.load_state_dict(tensors)
    decoder.to(torch.bfloat16).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(case / "base")
    assert len(tokenizer) == expected["tokenizer_length"]
    tokenizer.add_tokens(json.loads((case / "new_tokens.json").read_text())["few"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    spec = ModelSpec(encoder=model_spec().encoder, connector=MLPSpec(), llm=LLMSpec(path=str(folder)))
    tokenizer = load_tokenizer(spec)
    model = first_model(spec, placeholder_id(tokenizer))
    assert tokenizer.convert_tokens_to_ids(["<image>", "<box>", "</box>"]) == expected["few"]["new_ids"]
    assert len(model.get_input_embeddings().weight) == len(model.get_output_embeddings().weight) == expected["few"]["embedding_rows_after"]  # type: ignore[arg-type]
    kept = expected["few"]["old_rows_bit_equal"]
    assert torch.equal(model.get_input_embeddings().weight[:kept].bfloat16(), tensors["model.embed_tokens.weight"][:kept])  # type: ignore[index]
    assert torch.equal(model.get_output_embeddings().weight[:kept].bfloat16(), tensors["lm_head.weight"][:kept])  # type: ignore[index]
    one = VLMProcessor(spec, numbers["hidden_size"], tokenizer, PromptSpec(use="plain"))
    prepare(model, one)
    model.save_pretrained(tmp_path / "saved")
    one.save_pretrained(tmp_path / "saved")
    again, read_again = load(tmp_path / "saved")
    assert (again.config.image_token_id, read_again.image_token_id, again.config.text_config.vocab_size) == (301, 301, 320)
    question = sample(user(Picture(str(tmp_path / "0.png"))))
    tiny.picture().save(tmp_path / "0.png")
    said = again.generate(**read_again([question]), max_new_tokens=20, do_sample=True)
    assert int(said.max()) < len(tokenizer)


# ---- files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [{"use": "plain"}, {"use": "vicuna_v1", "system": "Be brief."}, {"use": "chatml"}, {"use": "tokenizer", "fold_system": "fold"}])
@pytest.mark.parametrize("policy", ["native", "pad"])
def test_a_saved_processor_makes_the_same_rows(prompt: dict[str, Any], policy: str, tmp_path: Path, pictures: list[Picture]) -> None:
    chat = tiny.CHATML.replace("in messages", "in messages if m['role'] != 'system'")
    tokenizer = bare(chat=chat)
    one = VLMProcessor(model_spec(), 32, tokenizer, PromptSpec(**prompt), policy, official_pictures=True)
    model = first_model(model_spec(), one.image_token_id)
    model.save_pretrained(tmp_path / "saved")
    one.save_pretrained(tmp_path / "saved")
    assert tokenizer.chat_template == chat, "saving changes nothing"
    other = VLMProcessor.from_pretrained(tmp_path / "saved")
    assert (other.image_token_id, other.policy, other.official_pictures, other.prompt.spec) == (one.image_token_id, policy, True, one.prompt.spec)
    talks = [
        sample(Turn("system", ("s",)), user(pictures[2], "\nWhat? <image>"), says(" red"), user("Why?"), says("so <|im_end|>")),
        sample(user(pictures[0], "\nWhat?"), says("red"), user("Why?"), says("so"), independent=prompt["use"] != "plain"),
    ]
    for talk in talks:
        ours, theirs = one.row(talk), other.row(talk)
        assert facts(ours) == facts(theirs)
        for image, same in zip(ours.images, theirs.images, strict=True):
            assert image.layout == same.layout
            assert torch.equal(image.views["pixels"], same.views["pixels"])
    question = [sample(user(pictures[0], "q"))]
    assert one(question)["input_ids"].tolist() == other(question)["input_ids"].tolist()


def test_folders_that_hold_no_processor_or_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no processor. expected vlm_processor.json"):
        VLMProcessor.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="(?s)no tokenizer in .*give llm.tokenizer a folder with tokenizer.json"):
        load_tokenizer(ModelSpec(encoder=model_spec().encoder, connector=MLPSpec(), llm=LLMSpec(path=str(tmp_path))))
    with pytest.raises(CheckpointError, match="no tokenizer at 'scenes/tokenizer'.*a folder with tokenizer.json.*vlm data tokenizer SRC OUT"):
        load_tokenizer(ModelSpec(encoder=model_spec().encoder, connector=MLPSpec(), llm=LLMSpec(tokenizer="scenes/tokenizer")))
    with pytest.raises(CheckpointError, match="the decoder has no tokenizer. give llm.tokenizer or llm.path"):
        load_tokenizer(model_spec())


def test_a_policy_that_the_encoder_cannot_follow(pictures: list[Picture]) -> None:
    with pytest.raises(ConfigurationError, match=r"no picture policy is called 'padd'.*did you mean 'pad'"):
        processor(policy="padd").row(sample(user(pictures[0]), says("red")))
