"""Generation: when an answer ends, what its text is, and that neither batch nor cache nor stream changes it."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from vlm.config import LLMSpec, ModelSpec
from vlm.connectors.mlp import MLPSpec
from vlm.data.sample import Picture, Sample, Turn
from vlm.encoders.clip import CLIPSpec
from vlm.errors import DataError
from vlm.generate import Answer, TextStream, answer, answer_all, blank, decode, picture, prepare, question, stop_ids, stream
from vlm.loading import first_model, load
from vlm.model import VLM
from vlm.processor import VLMProcessor, placeholder_id
from vlm.prompt import PromptSpec

TOKENIZERS = ("byte_level", "byte_level_prefix_space", "metaspace_legacy", "metaspace_first")
TEXT = "Hot 🌶️ größe 图片 👨‍👩‍👧 done.\n\nTwo  spaces"


def built(llm: LLMSpec, tokenizer: PreTrainedTokenizerBase, prompt: str = "chatml") -> tuple[VLM, VLMProcessor]:
    spec = ModelSpec(encoder=CLIPSpec(config=tiny.tower_config(), weights="random"), connector=MLPSpec(), llm=llm)
    model = first_model(spec, placeholder_id(tokenizer)).eval()
    return model, VLMProcessor(spec, model.config.text_config.hidden_size, tokenizer, PromptSpec(use=prompt), "pad")


def made(family: str = "llama", prompt: str = "chatml", tokenizer: PreTrainedTokenizerBase | None = None, **numbers: Any) -> tuple[VLM, VLMProcessor]:
    return built(LLMSpec(config=tiny.llm_config(family, **numbers), weights="random"), tokenizer or tiny.tokenizer(), prompt)


def saying(ids: Sequence[int], prompt: str = "chatml", tokenizer: PreTrainedTokenizerBase | None = None) -> tuple[VLM, VLMProcessor]:
    """A model that says these ids one after the other (all different): what follows a token depends on that token only."""
    model, processor = made(prompt=prompt, tokenizer=tokenizer, hidden_size=400, num_hidden_layers=1)
    last = processor.prompt.encode((Turn("user", ("q",)),), generate=True).ids[-1]
    with torch.no_grad():
        for parameter in model.llm.model.layers.parameters():
            parameter.zero_()
        model.llm.get_input_embeddings().weight.copy_(torch.eye(400))
        head = model.llm.get_output_embeddings().weight.zero_()
        for before, after in zip([last, *ids], ids, strict=False):
            head[after, before] = 1.0
    return model, processor


def ask(text: str = "q", *pictures: Picture, number: int = 0) -> Sample:
    return Sample(str(number), (question(text, pictures),))


# ---- when an answer ends -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["decoder_generation_config", "generation_config", "decoder_config", "tokenizer", "prompt"])
def test_an_answer_stops_at_an_end_mark_wherever_it_is_written(where: str) -> None:
    tokenizer = tiny.tokenizer(eos="<|im_start|>" if where == "tokenizer" else "<|im_end|>")
    red, end, other = (
        tokenizer("red two", add_special_tokens=False)["input_ids"][0],
        tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        tokenizer.convert_tokens_to_ids("<|im_end|>"),
    )
    if where == "tokenizer":
        end = tokenizer.eos_token_id
    if where == "prompt":
        end, tokenizer.eos_token = other, "<|endoftext|>"
    model, processor = saying([red, end, 7, 8, 9], tokenizer=tokenizer)
    if where == "decoder_generation_config":
        model.llm.generation_config = GenerationConfig(eos_token_id=[other, end])
    if where == "generation_config":
        model.generation_config = GenerationConfig(eos_token_id=end)
    if where == "decoder_config":
        model.config.text_config.eos_token_id = end
    assert {end, other} <= set(stop_ids(model, processor))
    (said,) = answer_all(model, processor, [ask()], batch_size=1, max_new_tokens=5)
    assert (said.ids, said.finish_reason, said.text) == ((red, end), "stop", decode(tokenizer, [red]))
    assert list(stream(model, processor, ask(), max_new_tokens=5)) == [said.text]


def test_a_family_default_that_is_an_ordinary_word_of_the_tokenizer_is_no_end_mark() -> None:
    tokenizer = tiny.tokenizer()
    model, processor = made(tokenizer=tokenizer, eos_token_id=2)
    assert stop_ids(model, processor) == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)


def test_an_answer_without_an_end_mark_is_cut_and_says_so() -> None:
    model, processor = saying([5, 6, 7, 8])
    (said,) = answer_all(model, processor, [ask()], batch_size=1, max_new_tokens=3)
    assert (said.ids, said.finish_reason) == ((5, 6, 7), "length")


def test_field_serve_several_eos(field_folder: Path) -> None:
    case = field_folder / "serve_several_eos"
    expected = json.loads((case / "expected.json").read_text())
    for name, generated in expected["generated"].items():
        folder = case / name
        model, processor = built(LLMSpec(path=str(folder)), AutoTokenizer.from_pretrained(folder), "tokenizer")
        if (folder / "generation_config.json").is_file():
            model.llm.generation_config = GenerationConfig.from_pretrained(folder)
        assert list(stop_ids(model, processor)) == expected["stop_set"][name], name
        prepare(model, processor)
        assert model.generate(input_ids=torch.tensor([expected["prompt"]]), max_new_tokens=10).tolist() == [generated], name
        assert decode(processor.tokenizer, generated) == expected["text"]


def test_what_is_never_said_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own processor looks thousands of ids of a padded vocabulary up in every step (benchmarks/generation.py)."""
    from transformers.generation import utils

    model, processor = saying([5, 6, 7, 8])
    prepare(model, processor)
    model.generation_config.suppress_tokens = [6, 7]
    looked_up: list[Any] = []
    made_by = utils.SuppressTokensLogitsProcessor
    monkeypatch.setattr(utils, "SuppressTokensLogitsProcessor", lambda ids, **more: (looked_up.extend(ids), made_by(ids, **more))[1])
    said = model.generate(input_ids=torch.tensor([[1, 2]]), max_new_tokens=3)
    assert not {6, 7} & set(said[0].tolist()) and looked_up == []
    assert model.generation_config.suppress_tokens == [6, 7]


def test_a_saved_folder_carries_stop_ids_and_what_is_never_said(tmp_path: Path) -> None:
    model, processor = made()
    model.llm.generation_config = GenerationConfig(eos_token_id=[7])  # an ordinary word, which somebody wants to end answers
    prepare(model, processor)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert written["eos_token_id"] == list(stop_ids(model, processor))
    assert written["suppress_tokens"] == sorted({processor.image_token_id, *range(len(processor.tokenizer), 400)})
    assert stop_ids(*load(tmp_path)) == stop_ids(model, processor) == (7, processor.tokenizer.eos_token_id)


def never_beyond(model: VLM, processor: VLMProcessor) -> None:
    with torch.no_grad():
        head = model.llm.get_output_embeddings().weight
        head[len(processor.tokenizer) :] *= 5
        head[processor.image_token_id] *= 5
    samples = [ask("one"), ask("two, three")]
    free = model.generate(**processor(samples), max_new_tokens=16)
    assert ((free >= len(processor.tokenizer)) | (free == processor.image_token_id)).any(), "the test would prove nothing"
    for said in answer_all(model, processor, samples, batch_size=2, max_new_tokens=16):
        assert all(index < len(processor.tokenizer) and index != processor.image_token_id for index in said.ids)
    prepare(model, processor)
    assert bool((model.generate(**processor(samples), max_new_tokens=16) < len(processor.tokenizer)).all())


def test_rows_of_a_padded_vocabulary_are_never_said() -> None:
    never_beyond(*made())


def test_field_ckpt_vocab_padded_says_only_what_the_tokenizer_knows(field_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(field_folder / "ckpt_vocab_padded" / "base")
    tokenizer.eos_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    never_beyond(*made(tokenizer=tokenizer, prompt="vicuna_v1", vocab_size=320))


# ---- batches -------------------------------------------------------------------------------------------------------------


def same_in_every_batch(model: VLM, processor: VLMProcessor, samples: list[Sample], settings: dict[str, Any]) -> None:
    alone = [answer_all(model, processor, [sample], batch_size=1, max_new_tokens=8, **settings)[0] for sample in samples]
    assert len({said.ids for said in alone}) > 2, "the test would prove little"
    for order in (range(len(samples)), range(len(samples))[::-1], [1], [2, 0]):
        for size in (len(order), 2):
            said = answer_all(model, processor, [samples[index] for index in order], batch_size=size, max_new_tokens=8, **settings)
            assert said == [alone[index] for index in order]
    with torch.no_grad():
        logits = model(**processor(samples), logits_to_keep=1).logits[:, -1]
        for index, sample in enumerate(samples):
            assert torch.allclose(model(**processor([sample]), logits_to_keep=1).logits[0, -1], logits[index], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family, pad", [*((family, "<|endoftext|>") for family in tiny.FAMILIES), ("llama", None)])
def test_batched_is_single_and_cached_is_uncached(family: str, pad: str | None) -> None:
    model, processor = made(family, tokenizer=tiny.tokenizer(pad=pad))
    seen = [picture(tiny.picture(seed=number, size=(30 + 5 * number, 28))) for number in range(3)]
    samples = [ask("How many are two and two?"), ask("Colour?", seen[0]), ask("Which of the two is wider?", *seen[1:]), ask("", seen[0]), ask("Colour? " * 20, seen[2])]
    same_in_every_batch(model, processor, samples, {})
    cached = answer_all(model, processor, samples, batch_size=5, max_new_tokens=8)
    assert answer_all(model, processor, samples, batch_size=5, max_new_tokens=8, use_cache=False) == cached


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_field_gen_batch_mixed_images(field_folder: Path, family: str) -> None:
    case = field_folder / "gen_batch_mixed_images"
    rows = json.loads((case / "batch.json").read_text())
    samples = [ask(row["text"], *(Picture(str(case / name)) for name in row["images"]), number=number) for number, row in enumerate(rows)]
    model, processor = made(family, tokenizer=tiny.tokenizer(pad=None))
    same_in_every_batch(model, processor, samples, {})


def test_every_module_is_afterwards_in_the_mode_in_which_it_was() -> None:
    model, processor = made()
    model.train()
    model.encoder.eval()
    answer_all(model, processor, [ask()], batch_size=1, max_new_tokens=2)
    list(stream(model, processor, ask(), max_new_tokens=2))
    assert model.llm.training
    assert not any(module.training for module in model.encoder.modules())


def test_a_conversation_that_leaves_no_room_is_refused() -> None:
    model, processor = made(max_position_embeddings=16)
    with pytest.raises(DataError, match=r"no room.*got \d+ tokens.*16 positions"):
        answer_all(model, processor, [ask("word " * 20)], batch_size=1, max_new_tokens=2)


# ---- text ----------------------------------------------------------------------------------------------------------------


def chunks_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], blank: str = "") -> list[str]:
    text = TextStream(tokenizer, blank)
    return [*(text.feed([index]) for index in ids), text.finish()]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_stream_never_sends_half_a_character(kind: str) -> None:
    tokenizer = tiny.tokenizer(kind)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    for end in range(len(ids) + 1):
        chunks = chunks_of(tokenizer, ids[:end])
        assert "".join(chunks) == decode(tokenizer, ids[:end])
        assert "\ufffd" not in "".join(chunks[:-1])
    assert "".join(chunks_of(tokenizer, ids)).strip() == TEXT


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_any_ids_in_any_portions_give_the_text_of_all(kind: str) -> None:
    tokenizer = tiny.tokenizer(kind)
    draw = random.Random(0)
    for _ in range(300):
        ids = [draw.randrange(len(tokenizer)) for _ in range(draw.randrange(1, 30))]
        text, chunks, at = TextStream(tokenizer), [], 0
        while at < len(ids):
            step = draw.randrange(1, 4)
            chunks.append(text.feed(ids[at : at + step]))
            at += step
        assert "\ufffd" not in "".join(chunks)
        assert "".join(chunks) + text.finish() == decode(tokenizer, ids)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_words_are_sent_when_their_token_arrives(kind: str) -> None:
    tokenizer = tiny.tokenizer(kind)
    ids = tokenizer("red, green and blue", add_special_tokens=False)["input_ids"]
    text, shown = TextStream(tokenizer), ""
    for number, index in enumerate(ids, 1):
        shown += text.feed([index])
        assert shown == decode(tokenizer, ids[:number])


def test_the_cost_of_a_chunk_does_not_grow_with_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, longest = tiny.tokenizer(), 0

    def counting(tokenizer: Any, ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(tokenizer, ids)

    monkeypatch.setattr("vlm.generate.decode", counting)
    text = TextStream(tokenizer)
    for index in tokenizer("the red disk " * 50, add_special_tokens=False)["input_ids"]:
        text.feed([index])
    assert longest <= 4


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_field_serve_stream_unicode(field_folder: Path, kind: str) -> None:
    case = field_folder / "serve_stream_unicode"
    tokenizer = AutoTokenizer.from_pretrained(case / kind)
    expected, ids = json.loads((case / "expected.json").read_text()), json.loads((case / f"{kind}_ids.json").read_text())
    whole = chunks_of(tokenizer, ids["whole"])
    assert "".join(whole) == expected["text"]
    assert "\ufffd" not in "".join(whole)
    assert sum(map(bool, whole)) > 8, "words come one by one"
    cut = chunks_of(tokenizer, ids["cut_inside_first_emoji"])
    assert "".join(cut) == tokenizer.decode(ids["cut_inside_first_emoji"])
    assert ("".join(cut[:-1]).count("\ufffd"), cut[-1].count("\ufffd")) == (0, {"byte_level": 1, "byte_fallback": 2}[kind])


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("prompt", ["vicuna_v1", "chatml", "plain", "tokenizer"])
def test_the_blank_of_the_template_is_no_part_of_the_answer(kind: str, prompt: str) -> None:
    tokenizer = tiny.tokenizer(kind)
    processor = VLMProcessor(made()[0].spec, 32, tokenizer, PromptSpec(use=prompt))
    turns = (Turn("user", (Picture(""), "q")), Turn("assistant", ("red  disk",), supervised=True))
    encoded = processor.prompt.encode(turns)
    learned = [index for index, supervised in zip(encoded.ids, encoded.supervised, strict=True) if supervised]
    content = learned[: learned.index(processor.prompt.end_ids[0])]
    assert "".join(chunks_of(tokenizer, content, blank(processor))) == "red  disk"
    assert blank(processor) == (" " if prompt == "vicuna_v1" and kind.startswith("byte") else "")


def test_a_header_that_a_template_never_writes_for_inference_is_no_part_of_the_answer() -> None:
    """The model learns to write it."""
    chat = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    processor = VLMProcessor(made()[0].spec, 32, tiny.tokenizer(chat=chat), PromptSpec(use="tokenizer"))
    assert blank(processor) == "assistant\n"


def test_answers_and_streams_leave_the_blank_out() -> None:
    tokenizer = tiny.tokenizer()
    ids = [*tokenizer(" two", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    model, processor = saying(ids, "vicuna_v1", tokenizer)
    assert answer(model, processor, "How many?") == "two"
    assert "".join(stream(model, processor, ask("How many?"), max_new_tokens=20)) == "two"


# ---- streams and single answers ------------------------------------------------------------------------------------------


def streamed(model: VLM, processor: VLMProcessor, sample: Sample) -> tuple[list[str], Answer]:
    running, chunks = stream(model, processor, sample, max_new_tokens=24), []
    while True:
        try:
            chunks.append(next(running))
        except StopIteration as end:
            return chunks, end.value


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_a_stream_says_what_a_batch_says(family: str) -> None:
    model, processor = made(family)
    sample = ask("Colour?", picture(tiny.picture(seed=1)))
    chunks, whole = streamed(model, processor, sample)
    assert [whole] == answer_all(model, processor, [sample], batch_size=1, max_new_tokens=24)
    assert "".join(chunks) == whole.text


def test_a_stream_sends_word_by_word() -> None:
    tokenizer = tiny.tokenizer()
    ids = [*tokenizer("There are two objects", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert len(set(ids)) == len(ids) > 4
    model, processor = saying(ids)
    chunks, whole = streamed(model, processor, ask())
    assert chunks == [decode(tokenizer, [index]) for index in ids[:-1]]
    assert whole == Answer("There are two objects", tuple(ids), "stop")


def test_closing_a_stream_stops_the_model() -> None:
    model, processor = saying(range(5, 90))
    calls: list[int] = []
    model.register_forward_pre_hook(lambda module, arguments: calls.append(1))
    chunks = stream(model, processor, ask(), max_new_tokens=400)
    next(chunks)
    chunks.close()
    said = len(calls)
    assert said < 300
    assert len(calls) == said


def test_an_error_of_the_model_reaches_who_reads_the_stream() -> None:
    model, processor = made()

    def fail(module: Any, arguments: Any) -> None:
        raise RuntimeError("no memory left")

    model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no memory left"):
        list(stream(model, processor, ask(), max_new_tokens=2))


def test_a_picture_may_be_a_path_bytes_or_an_image(tmp_path: Path) -> None:
    model, processor = made()
    image = tiny.picture(seed=3)
    image.getexif()[0x0112] = 6
    file = tmp_path / "turned.png"
    image.save(file, exif=image.getexif())
    said = answer(model, processor, "What?", [file], max_new_tokens=8)
    assert said != answer(model, processor, "What?", [tiny.picture(seed=4)], max_new_tokens=8)
    for same in (str(file), file.read_bytes(), image, Picture(str(file))):
        assert answer(model, processor, "What?", [same], max_new_tokens=8) == said
    for mode in ("CMYK", "RGBA", "L", "P"):
        answer(model, processor, "What?", [image.convert(mode)], max_new_tokens=1)


def test_a_picture_that_is_not_there_is_named(tmp_path: Path) -> None:
    model, processor = made()
    with pytest.raises(DataError, match=r"none\.png"):
        answer(model, processor, "What?", [tmp_path / "none.png"])
