"""Batched and streamed generation for chat, evaluation and validation: when an answer ends, and what its text is."""

import queue
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from vlm.data.sample import Picture, Sample, Turn, held
from vlm.errors import DataError
from vlm.processor import VLMProcessor
from vlm.row import Row

if TYPE_CHECKING:
    from vlm.model import VLM

__all__ = ["Answer", "PictureLike", "TextStream", "answer", "answer_all", "blank", "decode", "picture", "prepare", "question", "stop_ids", "stream"]

SORTED_TOGETHER = 16
"""Batches whose rows are sorted by length together: their pictures are in memory at once."""

REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class Answer:
    """text: without the end mark and without the blank that the template writes in front of an answer. ids: what was generated, end mark included.

    finish_reason: "stop", or "length" where max_new_tokens ended it.
    """

    text: str
    ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]


# ---- when an answer ends -------------------------------------------------------------------------------------------------


def stop_ids(model: "VLM", processor: VLMProcessor) -> tuple[int, ...]:
    """Every id that ends an answer, ascending: of the generation configs, the decoder's config, the tokenizer and the prompt's end mark.

    A decoder's config carries its family's default where nobody wrote one (Llama: 2), and that id may be an ordinary word of another tokenizer: from it only control tokens count.
    A generation config that somebody wrote is taken at its word.
    """
    control = set(processor.prompt.text.control.values())
    found = {*processor.prompt.end_ids, *_ids(processor.tokenizer.eos_token_id), *(_ids(getattr(model.config.text_config, "eos_token_id", None)) & control)}
    for config in (model.generation_config, model.llm.generation_config):
        if config is not None:
            ids = _ids(config.eos_token_id)
            found |= ids & control if config._from_model_config else ids
    return tuple(sorted(index for index in found if 0 <= index < len(processor.tokenizer)))


def _ids(value: Any) -> set[int]:
    if value is None:
        return set()
    return {int(index) for index in value} if isinstance(value, Iterable) else {int(value)}


def _settings(model: "VLM", processor: VLMProcessor) -> dict[str, Any]:
    """Stop ids, padding, and ids that are never generated: rows of the vocabulary beyond the tokenizer, and the picture placeholder."""
    beyond = range(len(processor.tokenizer), model.config.text_config.vocab_size)
    return {"eos_token_id": list(stop_ids(model, processor)), "pad_token_id": processor.pad_id, "suppress_tokens": sorted({*beyond, processor.image_token_id})}


def prepare(model: "VLM", processor: VLMProcessor) -> None:
    """Write how generation ends and what it never says into the model's generation config, so that a saved folder carries it to every program that reads it."""
    config = model.generation_config
    assert config is not None
    for name, value in _settings(model, processor).items():
        setattr(config, name, value)
    config._from_model_config = False  # from here on somebody wrote it: `stop_ids` of a loaded folder takes it at its word


# ---- text ----------------------------------------------------------------------------------------------------------------


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of ids, as it was trained: no control tokens, no spaces tidied away."""
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)  # type: ignore[return-value]


def blank(processor: VLMProcessor) -> str:
    """What decoding gives in front of an answer although it is the template's: " " where it writes "ASSISTANT:" for inference and "ASSISTANT: red" for training, all of a header that it never writes for inference."""

    def shown(word: str) -> str:
        encoded = processor.prompt.encode((Turn("user", (Picture(""), "q")), Turn("assistant", (word,), supervised=True)))
        return decode(processor.tokenizer, [index for index, supervised in zip(encoded.ids, encoded.supervised, strict=True) if supervised])

    return "".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], zip(shown("a"), shown("x"), strict=False)))


class TextStream:
    """Token ids in, text out, as soon as it is certain. Joined, the chunks are `decode` of all ids, less `blank` at their start.

    Certain: it stays, whatever follows. Held back are parts of a character, and runs of byte tokens (`<0xE5>`): one byte that does not fit turns the whole run into U+FFFD.
    U+FFFD is therefore only ever in what `finish` gives.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, blank: str = ""):
        self._tokenizer, self._blank = tokenizer, blank
        self._bytes = _known(tokenizer, [f"<0x{byte:02X}>" for byte in range(256)])
        self._ids: list[int] = []
        self._window = 0  # decoding starts here, at the ids sent last, so that long answers cost no more per token than short ones
        self._sent = 0  # ids
        self._length = 0  # characters, the blank included

    def feed(self, ids: Iterable[int]) -> str:
        """The text that has become certain, often empty."""
        self._ids.extend(ids)
        if not self._ids or self._ids[-1] in self._bytes:
            return ""
        before = decode(self._tokenizer, self._ids[self._window : self._sent])
        now = decode(self._tokenizer, self._ids[self._window :])
        new = now[len(before) :]
        if not new or REPLACEMENT in new or not now.startswith(before):
            return ""
        if not self._length and len(new) < len(self._blank) and self._blank.startswith(new):
            return ""
        self._window, self._sent = self._sent, len(self._ids)
        return self._take(new)

    def finish(self) -> str:
        """The rest, once no more ids come; half characters as U+FFFD."""
        return self._take(decode(self._tokenizer, self._ids)[self._length :])

    def _take(self, text: str) -> str:
        first, self._length = not self._length, self._length + len(text)
        return text.removeprefix(self._blank) if first else text


def _known(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> set[int]:
    """Ids of those tokens that the tokenizer has; for others it gives the id of its unknown token."""
    ids = [tokenizer.convert_tokens_to_ids(token) for token in tokens]
    return {index for token, index in zip(tokens, ids, strict=True) if isinstance(index, int) and tokenizer.convert_ids_to_tokens(index) == token}


# ---- questions -----------------------------------------------------------------------------------------------------------

PictureLike = Picture | Image.Image | bytes | str | Path


def picture(source: PictureLike) -> Picture:
    """A reference to a picture: a path, the bytes of a file, or a Pillow image."""
    if isinstance(source, Picture):
        return source
    if isinstance(source, bytes | Image.Image):
        return held(source)
    return Picture(str(source))


def question(text: str, pictures: Iterable[Picture] = ()) -> Turn:
    """A user's turn as LLaVA's data write it: every picture on a line of its own, then the text."""
    return Turn("user", (*(part for one in pictures for part in (one, "\n")), text))


def answer(model: "VLM", processor: VLMProcessor, text: str, images: Iterable[PictureLike] = (), *, system: str | None = None, max_new_tokens: int = 512, **sampling: Any) -> str:
    """The answer to one question about pictures. sampling: arguments of transformers' generate; greedy without. Raises DataError for a picture that cannot be read."""
    turns = (*((Turn("system", (system,)),) if system else ()), question(text, [picture(image) for image in images]))
    return answer_all(model, processor, [Sample("question", turns)], batch_size=1, max_new_tokens=max_new_tokens, **sampling)[0].text


# ---- generation ----------------------------------------------------------------------------------------------------------


def answer_all(model: "VLM", processor: VLMProcessor, samples: Sequence[Sample], *, batch_size: int, max_new_tokens: int, **sampling: Any) -> list[Answer]:
    """The answers to samples that end in a question, in their order.

    Rows are sorted by length, padded on the left and given to the model batch_size at a time. sampling: arguments of transformers' generate; greedy without.
    Raises DataError where a picture cannot be read or a row leaves no room for an answer.
    """
    settings = _settings(model, processor) | {"do_sample": False, "max_new_tokens": max_new_tokens, **sampling}
    stops, lead = set(settings["eos_token_id"]), blank(processor)
    answers: dict[int, Answer] = {}
    with _evaluating(model):
        for start in range(0, len(samples), SORTED_TOGETHER * batch_size):
            rows = dict(enumerate((_row(model, processor, sample) for sample in samples[start : start + SORTED_TOGETHER * batch_size]), start))
            order = sorted(rows, key=lambda index: len(rows[index]), reverse=True)  # what needs most memory comes first
            for at in range(0, len(order), batch_size):
                batch = order[at : at + batch_size]
                new = model.generate(**processor.inputs([rows[index] for index in batch], model.device), **settings)
                answers.update((index, _answer(processor, ids, stops, lead)) for index, ids in zip(batch, new.tolist(), strict=True))
    return [answers[index] for index in range(len(samples))]


def stream(model: "VLM", processor: VLMProcessor, sample: Sample, *, max_new_tokens: int, **sampling: Any) -> Generator[str, None, Answer]:
    """The answer to one sample in chunks, each sent when it is certain (`TextStream`); returns the whole (`answer = yield from stream(...)`). Closing it stops the model."""
    settings = _settings(model, processor) | {"do_sample": False, "max_new_tokens": max_new_tokens, **sampling}
    stops, lead = set(settings["eos_token_id"]), blank(processor)
    text, ids = TextStream(processor.tokenizer, lead), []
    with _evaluating(model):
        tokens = _tokens(model, processor.inputs([_row(model, processor, sample)], model.device), settings)
        try:
            for index in tokens:
                ids.append(index)
                if index in stops:
                    break
                if chunk := text.feed([index]):
                    yield chunk
        finally:
            tokens.close()
    if chunk := text.finish():
        yield chunk
    return _answer(processor, ids, stops, lead)


def _answer(processor: VLMProcessor, ids: Sequence[int], stops: set[int], lead: str) -> Answer:
    end = next((at for at, index in enumerate(ids) if index in stops), None)
    text = decode(processor.tokenizer, ids[:end]).removeprefix(lead)
    return Answer(text, tuple(ids), "length") if end is None else Answer(text, tuple(ids[: end + 1]), "stop")


def _row(model: "VLM", processor: VLMProcessor, sample: Sample) -> Row:
    row = processor.row(sample, mode="infer", generate=True)
    room = getattr(model.config.text_config, "max_position_embeddings", None)
    if room is not None and len(row) >= room:
        raise DataError(
            f"{sample.where or f'question {sample.id!r}'}: the conversation leaves no room for an answer",
            got=f"{len(row)} tokens",
            expected=f"fewer than the decoder's {room} positions",
            cure="ask with fewer pictures or less text, or begin a new conversation",
        )
    return row


@contextmanager
def _evaluating(model: "VLM") -> Iterator[None]:
    """Dropout off; afterwards every module is in the mode in which it was (a frozen tower may be in another than the rest)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class _Tokens(BaseStreamer):
    """Hands new ids to another thread. transformers puts the prompt first, whatever it is."""

    def __init__(self, line: "queue.SimpleQueue[int | BaseException | None]"):
        self.line, self.prompt = line, True

    def put(self, value: torch.Tensor) -> None:
        if not self.prompt:
            for index in value.flatten().tolist():
                self.line.put(index)
        self.prompt = False

    def end(self) -> None: ...


class _Until(StoppingCriteria):
    def __init__(self, closed: threading.Event):
        self.closed = closed

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        return torch.full((len(input_ids),), self.closed.is_set(), dtype=torch.bool, device=input_ids.device)


def _tokens(model: "VLM", inputs: dict[str, Any], settings: dict[str, Any]) -> Generator[int, None, None]:
    """Ids of one row as they are generated. transformers calls a streamer instead of yielding, so it runs in a thread of its own."""
    line: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
    closed = threading.Event()

    def work() -> None:
        try:
            model.generate(**inputs, **settings, streamer=_Tokens(line), stopping_criteria=StoppingCriteriaList([_Until(closed)]))
            line.put(None)
        except BaseException as problem:  # it belongs to the caller's thread
            line.put(problem)

    thread = threading.Thread(target=work, name="generate", daemon=True)
    thread.start()
    try:
        while (item := line.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        thread.join()
