"""From raw records to a token store: read, dedup, tokenize, load. Needs no torch."""

from __future__ import annotations

from embkit.data.batches import Batches
from embkit.data.compose import append, merge, subset
from embkit.data.dedup import dedup
from embkit.data.export import to_datasets
from embkit.data.filter import filter
from embkit.data.filter_rules import FilterRules, text_statistics
from embkit.data.filter_score import ScoreFilter
from embkit.data.loader import Store
from embkit.data.records import Records, read
from embkit.data.tables import Examples, Texts
from embkit.data.teacher import Teacher, teach
from embkit.data.tokenize import tokenize
from embkit.recipe.tasks import Conversion, Task

__all__ = [
    "Batches",
    "Conversion",
    "Examples",
    "FilterRules",
    "Records",
    "ScoreFilter",
    "Store",
    "Task",
    "Teacher",
    "Texts",
    "append",
    "dedup",
    "filter",
    "merge",
    "read",
    "subset",
    "teach",
    "text_statistics",
    "to_datasets",
    "tokenize",
]
