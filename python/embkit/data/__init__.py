"""From raw records to a token store: read, dedup, tokenize, load. Needs no torch."""

from __future__ import annotations

from embkit.data.batches import Batches
from embkit.data.compose import append, merge, subset
from embkit.data.dedup import dedup
from embkit.data.export import to_datasets
from embkit.data.loader import Store
from embkit.data.records import Records, read
from embkit.data.tables import Examples, Texts
from embkit.data.tokenize import tokenize

__all__ = [
    "Batches",
    "Examples",
    "Records",
    "Store",
    "Texts",
    "append",
    "dedup",
    "merge",
    "read",
    "subset",
    "to_datasets",
    "tokenize",
]
