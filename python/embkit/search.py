"""Nearest neighbours of many queries at once: exact, in blocks, on the CPU.

Every query is known before the search starts, so whole blocks of queries meet whole blocks of the
corpus; see docs/mining.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embkit import _rust

Vectors = NDArray[Any] | Sequence[NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Found:
    """Neighbours of each query, best first, ties by lower row.

    Attributes:
        row: U32 [queries, k], positions in the corpus.
        score: F32 [queries, k], inner products.
        report: what was done: engine, measured recall, seconds; JSON types only.
    """

    row: NDArray[np.uint32]
    score: NDArray[np.float32]
    report: dict[str, Any]


def search(
    queries: Vectors,
    corpus: Vectors,
    k: int,
    *,
    engine: str = "auto",
    recall: float = 1.0,
    memory: int = 0,
    seed: int = 0,
    threads: int = 0,
    progress: Callable[[int], object] | None = None,
) -> Found:
    """The k corpus rows with the largest inner product for each query.

    Args:
        queries: float [nq, d], or several such arrays that follow one another.
        corpus: float [n, d], likewise.
        k: neighbours per query, at most n.
        engine: ``"auto"``, ``"exact"``, ``"ivf"`` or ``"torch"``.
        recall: least share of the true neighbours that an approximate engine may find; 1 is exact.
        memory: bytes beside the vectors and the result; 0 lets embkit choose.
        seed: of the clustering and of the sample on which recall is measured.
        threads: 0 for all; no effect on the result.
        progress: called with the number of queries done.

    Raises:
        UsageError: shapes that do not fit, k out of range, NaN or infinite values.
    """
    q, c = _whole(queries), _whole(corpus)
    row, score = _rust.topk(q, c, k, threads=threads, progress=progress)
    return Found(row=row, score=score, report={"engine": "exact", "recall": 1.0})


def _whole(vectors: Vectors) -> NDArray[np.float32]:
    parts = [vectors] if isinstance(vectors, np.ndarray) else list(vectors)
    whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return np.ascontiguousarray(whole, np.float32)
