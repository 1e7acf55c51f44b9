"""A conversation in the terminal. What is typed is text: it is encoded piece by piece, so it can become neither a control token nor a picture."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from vlm.data.sample import Picture, Sample, Turn
from vlm.errors import DataError
from vlm.generate import Answer, PictureLike, picture, question, stream

if TYPE_CHECKING:
    from vlm.model import VLM
    from vlm.processor import VLMProcessor

__all__ = ["converse"]

HELP = "Ask, or: /image PATH (a picture for the next question), /reset (begin anew), /quit"


def converse(
    model: "VLM",
    processor: "VLMProcessor",
    *,
    images: Iterable[PictureLike] = (),
    prompt: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 512,
    read: Callable[[str], str] = input,
    write: Callable[..., Any] = print,
) -> None:
    """Talk until /quit or the end of input; with `prompt` ask that one question only.

    Args:
        images: for the first question. system: instead of the prompt's own system text. read: takes the text in front of the cursor, gives a line. write: as print.

    Raises DataError for a picture that cannot be read where `prompt` is given; in a conversation it is said and the talk goes on.
    """
    conversation = _Conversation(model, processor, system, max_new_tokens, write)
    if prompt is not None:
        for image in images:
            conversation.add(image)
        conversation.ask(prompt)
        return
    write(HELP)
    for image in images:
        conversation.attempt(conversation.add, image)
    while (line := _line(read)) is not None:
        command, _, rest = line.strip().partition(" ")
        if command == "/quit":
            return
        if command == "/reset":
            conversation.reset()
        elif command == "/image":
            conversation.attempt(conversation.add, rest.strip())
        elif command:
            conversation.attempt(conversation.ask, line)


def _line(read: Callable[[str], str]) -> str | None:
    """What was typed; None at the end of input."""
    try:
        return read("> ")
    except (EOFError, KeyboardInterrupt):
        return None


class _Conversation:
    """The turns so far and the pictures that wait for the next question."""

    def __init__(self, model: "VLM", processor: "VLMProcessor", system: str | None, max_new_tokens: int, write: Callable[..., Any]):
        self.model, self.processor, self.max_new_tokens, self.write = model, processor, max_new_tokens, write
        self.head = (Turn("system", (system,)),) if system else ()
        self.turns: tuple[Turn, ...] = self.head
        self.waiting: list[Picture] = []

    def attempt(self, act: Callable[[Any], None], what: Any) -> None:
        """Do it; an error that the user can cure is said, and nothing has changed."""
        try:
            act(what)
        except DataError as problem:
            self.write(str(problem))

    def add(self, image: PictureLike) -> None:
        """A picture for the next question, read once now so that the error comes where it was named."""
        if not image:
            raise DataError("/image names no picture", cure="write /image PATH")
        one = picture(image)
        self.processor.see(one, where=one.path)
        self.waiting.append(one)

    def reset(self) -> None:
        """Forget turns and pictures."""
        self.turns, self.waiting = self.head, []
        self.write("A new conversation.")

    def ask(self, text: str) -> None:
        """One question, its answer written as it comes. An interrupted answer stays as far as it came."""
        turns = (*self.turns, question(text, self.waiting))
        chunks = stream(self.model, self.processor, Sample("chat", turns), max_new_tokens=self.max_new_tokens)
        said: list[str] = []
        whole: Answer | None = None
        try:
            while whole is None:
                try:
                    chunk = next(chunks)
                except StopIteration as end:
                    whole = end.value
                else:
                    said.append(chunk)
                    self.write(chunk, end="", flush=True)
        except KeyboardInterrupt:
            chunks.close()
        self.write()
        if whole is not None and whole.finish_reason == "length":
            self.write(f"[cut at {self.max_new_tokens} tokens]")
        self.turns, self.waiting = (*turns, Turn("assistant", ("".join(said),))), []
