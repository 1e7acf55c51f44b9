"""The decoder and its adaptations: base is the contract, those of NOT_PARTS are what they share; every other file is one adaptation."""

from vlm.registry import Registry

NOT_PARTS = ("decoder", "context", "layer", "cache", "head", "targets")
registry = Registry("adaptation", __name__)
register = registry.register
