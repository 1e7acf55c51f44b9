"""Text -> token ids, never a control token: what users write stays text."""

import re
from functools import lru_cache
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from vlm.errors import DataError

__all__ = ["PlainText"]


class PlainText:
    """Encodes text as text: no control token comes out, and no word-boundary mark is put where the text goes on.

    control: token -> id of what only a template may write: the special tokens, and added tokens that read like marks (`<tool>`). Added words and runs of spaces are ordinary vocabulary.
    marks_start: whether the tokenizer puts a mark in front of a text's first word; marks_control: also behind control tokens (Llama's `legacy`).

    The pieces of a row are encoded one by one. Tokenizers that put a mark in front of every string (SentencePiece-like ones) would put one at each seam; a piece that continues a row is
    therefore encoded behind an anchor, whose ids are cut off.
    """

    ANCHORS = ("\n", "|", ">", ".", "0", "x", "\x01")

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.control = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special or _is_mark(token.content)}
        for token, index in zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True):
            self.control.setdefault(token, index)
        # The tokenizer itself splits special tokens in text; of the others, and of those that are in its vocabulary too, the first character is cut off.
        whole = [token for token, index in self.control.items() if len(token) > 1 and index in self._raw(token)]
        self._whole = re.compile("|".join(f"(?={re.escape(token)})" for token in whole) or "(?!)", re.IGNORECASE)
        self._closed = {index for token, index in self.control.items() if len(token) > 1 and token != tokenizer.unk_token}
        self._heads = {anchor: self._raw(anchor) for anchor in self.ANCHORS}
        trials = [(self._raw(word), self._behind(word, anchor)) for word in ("a", "the") for anchor in self.ANCHORS[:2]]
        self.marks_start = any(behind is not None and behind != raw for raw, behind in trials)
        token, index = next(iter(self.control.items()), ("", 0))
        self.marks_control = self.marks_start and tokenizer(f"{token}a", add_special_tokens=False)["input_ids"] == [index, *self._raw("a")]
        self.ids = lru_cache(maxsize=4096)(self._ids)

    def _ids(self, text: str, start: bool) -> tuple[int, ...]:
        """Ids of `text`; start: its first word gets a mark, as at the very beginning of a row, behind the start token at most (Llama: `<s>`, then the text with its mark)."""
        cuts = [0, *(found.start() + 1 for found in self._whole.finditer(text)), len(text)]
        return tuple(index for begin, end in pairwise(cuts) for index in self._piece(text[begin:end], start and begin == 0))

    def _piece(self, text: str, start: bool) -> list[int]:
        """Where the tokenizer makes a control token of other characters (full-width ones that it normalises), they are encoded one by one."""
        ids = self._plain(text, start)
        if len(text) > 1 and not self._closed.isdisjoint(ids):
            return [index for place, character in enumerate(text) for index in self._plain(character, start and not place)]
        return ids

    def _plain(self, text: str, start: bool) -> list[int]:
        if not text:
            return []
        if start or not self.marks_start:
            return self._raw(text)
        for anchor in self.ANCHORS:
            ids = self._behind(text, anchor)
            if ids is not None:
                return ids
        raise DataError(f"the tokenizer joins the text {text[:40]!r} to whatever stands before it", cure="use another tokenizer")

    def _raw(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]  # type: ignore[return-value]

    def _behind(self, text: str, anchor: str) -> list[int] | None:
        """Ids of the text behind the anchor, None where the two cannot be told apart."""
        head, ids = self._heads[anchor], self._raw(anchor + text)
        return ids[len(head) :] if head and ids[: len(head)] == head else None


def _is_mark(token: str) -> bool:
    return len(token) > 1 and not all(character.isalnum() or character.isspace() or character in "▁_-'" for character in token)
