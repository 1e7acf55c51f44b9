"""Vision encoders: base.py is the contract, every other file is one encoder, named after itself."""

from vlm.registry import Registry

registry = Registry("encoder", __name__)
register = registry.register
