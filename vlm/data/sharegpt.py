"""ShareGPT's format: a JSON array, or JSON lines, of records with `conversations`, and `system` beside them."""

from dataclasses import dataclass
from typing import ClassVar

from vlm.data import register
from vlm.data.jsonfile import JsonSource
from vlm.data.record import Form

__all__ = ["SharegptSource"]


@register("sharegpt")
@dataclass(frozen=True, kw_only=True)
class SharegptSource(JsonSource):
    """Records with `conversations`: turns with `from` and `value`, `system` in front. Others are refused, and so are turns of tools."""

    form: ClassVar[Form | None] = "conversations"
