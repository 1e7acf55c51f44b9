"""OpenAI's chat format: JSON lines, or a JSON array, of records with `messages`."""

from dataclasses import dataclass
from typing import ClassVar

from vlm.data import register
from vlm.data.jsonfile import JsonSource
from vlm.data.record import Form

__all__ = ["MessagesSource"]


@register("messages")
@dataclass(frozen=True, kw_only=True)
class MessagesSource(JsonSource):
    """Records with `messages`: turns with `role` and `content`, a text or a list of parts in which texts and pictures keep their order. Others are refused."""

    form: ClassVar[Form | None] = "messages"
