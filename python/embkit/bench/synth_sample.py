"""Real questions with twenty passages each, of which one or a few are right.

The pairs are those that the group `recipes` holds out of its training (dev/, whole passages at a
time). A set's questions come in the order of their hash, as do its passages.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embkit.bench.recipes_data import part
from embkit.evaluate.bm25 import bm25_rank
from embkit.evaluate.tasks import RetrievalSet, load_split

WORDS = 32  # of a passage: a score by a language model costs by the token


@dataclass(frozen=True)
class Question:
    """A query and its candidates.

    Attributes:
        passages: texts. right: which of them are positives. bm25: their ranks by BM25 over the
            whole set, from 1.
    """

    name: str
    query: str
    passages: tuple[str, ...]
    right: tuple[int, ...]
    bm25: tuple[int, ...]

    def rank(self, scores: np.ndarray) -> int:
        """The best rank of a right passage, from 1; among equal scores the last."""
        best = max(scores[i] for i in self.right)
        wrong = np.delete(np.asarray(scores), self.right)
        return 1 + int((wrong >= best).sum())


def questions(folder: Path, *, each: int, n: int = 20, hard: bool = False) -> list[Question]:
    """The first ``each`` queries of every set, with ``n`` passages that hold its positives.

    Args:
        folder: a data folder with dev/retrieval/.
        hard: the other passages are the best of BM25 in the whole set; else random ones of a pool
            of 3 n of the set's passages (the same pool for its queries, so that scoring is quick).
    """
    found = []
    for one in load_split(folder / "dev"):
        if isinstance(one, RetrievalSet):
            found += _of_set(one, each, n, hard)
    return found


def _of_set(data: RetrievalSet, each: int, n: int, hard: bool) -> list[Question]:
    texts = [" ".join(text.split()[:WORDS]) for text in data.corpus]
    order = sorted(range(len(data.queries)), key=lambda i: part(data.queries[i], 2**60))[:each]
    ranked = bm25_rank([data.queries[i] for i in order], texts, k=len(texts))
    pool = sorted(range(len(texts)), key=lambda j: part(texts[j], 2**60))[: 3 * n]
    found = []
    for row, i in enumerate(order):
        place = np.empty(len(texts), np.int64)
        place[ranked[row]] = np.arange(1, len(texts) + 1)
        same = {texts[j] for j in data.judged[i]}
        right = sorted(data.judged[i])[: n // 4]
        if hard:
            others = [int(j) for j in ranked[row] if texts[j] not in same]
        else:
            others = sorted(pool, key=lambda j: part(f"{data.queries[i]}\n{texts[j]}", 2**60))
            others = [j for j in others if texts[j] not in same]
        chosen = [*right, *others[: n - len(right)]]
        chosen.sort(key=lambda j: part(f"{j} {data.queries[i]}", 2**60))
        found.append(
            Question(
                data.name, data.queries[i], tuple(texts[j] for j in chosen),
                tuple(chosen.index(j) for j in right), tuple(int(place[j]) for j in chosen),
            )
        )  # fmt: skip
    return found
