"""Samples, readers (one file each), the mixture, collation, and the generators of scenes and small text. Knows Specs, never modules."""

from vlm.registry import Registry

NOT_PARTS = (
    "sample",
    "mixture",
    "scenes",
    "smalltext",
    "convert",
    "tokenizer",
    "record",
    "pictures",
    "jsonfile",
    "remote",
    "packing",
    "tarindex",
    "shards",
    "write",
    "sources",
    "survey",
)
readers = Registry("reader", __name__)
register = readers.register
