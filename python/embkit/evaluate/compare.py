"""Two models compared query by query: paired bootstrap intervals.

A difference of two means over some hundred queries says little alone. Both models answer the same
queries, so queries are drawn again with replacement, set by set, and the difference is taken each
time: its quantiles are the interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from embkit import _rust
from embkit.errors import UsageError
from embkit.evaluate import metrics
from embkit.evaluate.run import encode_set
from embkit.evaluate.tasks import EvalSet, RetrievalSet

if TYPE_CHECKING:
    from embkit.model import Encoder

Values = Mapping[str, NDArray[np.float64]]
_DEPTH = 10
_BLOCK = 500  # resamples whose drawn values are in memory at once


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Mean over sets of the mean over queries, a minus b.

    Attributes:
        mean: the difference, in the unit of the values.
        low, high: bounds of the interval.
    """

    mean: float
    low: float
    high: float


def ndcg_per_query(
    encoder: Encoder, sets: Sequence[EvalSet], *, dim: int | None = None
) -> dict[str, NDArray[np.float64]]:
    """nDCG@10 of each query in percent, by retrieval set; their means are what `evaluate` has.

    Args:
        encoder: the model.
        sets: of :func:`embkit.evaluate.load_split`; other kinds are passed over.
        dim: MRL width (the full one by default).
    """
    width = dim or encoder.width
    return {
        one.name: ndcg_of(one, encode_set(encoder, one, width))
        for one in sets
        if isinstance(one, RetrievalSet)
    }


def ndcg_of(found: RetrievalSet, parts: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
    """nDCG@10 in percent of each query, from unit vectors of the queries and of the corpus."""
    query, corpus = parts
    rows, _ = _rust.topk(query, corpus, min(_DEPTH, len(corpus)))
    gain = metrics.gains(np.asarray(rows), found.judged)
    return 100 * metrics.ndcg(gain, found.judged, k=_DEPTH)


def paired_bootstrap(
    a: Values, b: Values, *, resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Difference:
    """The difference of two models with its percentile interval.

    Args:
        a, b: values of the same queries in the same order by set, float64 [n]; of several runs of
            a model give each query's mean.
        resamples: how often queries are drawn; level: share of the differences inside the interval.
        seed: of the draws.

    Raises:
        UsageError: other sets, or other numbers of queries.
    """
    if not a or a.keys() != b.keys() or any(len(a[k]) != len(b[k]) for k in a):
        raise UsageError("The two have other sets or queries.", fix="score the same split")
    rng = np.random.default_rng(seed)
    drawn = np.zeros(resamples)
    means = []
    for name in sorted(a):
        difference = np.asarray(a[name], np.float64) - np.asarray(b[name], np.float64)
        n = len(difference)
        means.append(float(difference.mean()))
        for start in range(0, resamples, _BLOCK):
            count = min(_BLOCK, resamples - start)
            picks = rng.integers(0, n, (count, n))
            drawn[start : start + count] += difference[picks].mean(axis=1) / len(a)
    tail = (1 - level) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Difference(mean=float(np.mean(means)), low=float(low), high=float(high))
