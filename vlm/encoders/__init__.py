"""Vision encoders: base.py is the contract, every other file is one encoder, named after itself, but for the towers of NOT_PARTS, which an encoder is made of."""

from vlm.registry import Registry

NOT_PARTS = ("sam", "backbone", "prepare")

registry = Registry("encoder", __name__)
register = registry.register
