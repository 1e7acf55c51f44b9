"""LLaVA's format: a JSON array, or JSON lines, of conversations that name their pictures by path."""

from dataclasses import dataclass

from vlm.data import register
from vlm.data.jsonfile import JsonSource

__all__ = ["LlavaSource"]


@register("llava")
@dataclass(frozen=True, kw_only=True)
class LlavaSource(JsonSource):
    """LLaVA's files; records of any other form that `vlm.data.record.sample_of` knows are taken too."""
