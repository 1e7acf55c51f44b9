"""Training-only losses that look inside the model: base.py is the contract, every other file is one objective."""

from vlm.registry import Registry

registry = Registry("objective", __name__)
register = registry.register
