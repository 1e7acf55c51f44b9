"""Samples, readers (one file each), the mixture, collation, and the generator of scenes. Knows Specs, never modules."""

from vlm.registry import Registry

NOT_PARTS = (
    "sample",
    "mixture",
    "scenes",
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
