"""Vision encoders: base.py is the contract, every other file is one encoder, named after itself, but for those of NOT_PARTS, which hold what encoders share or are made of."""

from vlm.registry import Registry

NOT_PARTS = ("tower", "sam", "backbone", "readers", "prepare", "beside")

registry = Registry("encoder", __name__)
register = registry.register
