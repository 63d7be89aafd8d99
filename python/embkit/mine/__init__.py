"""Hard negatives: search, then rules that are counted; from a store or from arrays.

Each retrieval task of a store is mined in its own corpus: every text that is a positive or negative
of one of its examples. Search and rules are Rust's; see docs/mining.md.
"""

from __future__ import annotations

from embkit.mine.arrays import mine_vectors
from embkit.mine.explain import Candidate, candidates_of, explain
from embkit.mine.miner import Negatives
from embkit.mine.report import audit_table
from embkit.mine.work import load_negatives, mine
from embkit.recipe import Rules

__all__ = [
    "Candidate",
    "Negatives",
    "Rules",
    "audit_table",
    "candidates_of",
    "explain",
    "load_negatives",
    "mine",
    "mine_vectors",
]
