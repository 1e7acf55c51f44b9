"""Connectors between encoder and decoder: base.py is the contract, every other file is one connector."""

from vlm.registry import Registry

registry = Registry("connector", __name__)
register = registry.register
