"""The decoder and its adaptations: decoder, context, layer, cache, base; every other file is one adaptation."""

from vlm.registry import Registry

NOT_PARTS = ("decoder", "context", "layer", "cache", "head")
registry = Registry("adaptation", __name__)
register = registry.register
