"""Bootstrap of task scores: intervals of one model, and of the difference of two."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from embkit.evaluate.examples import Examples

Replicates = NDArray[np.float64]


def replicates(
    parts: Sequence[Examples], name: str, *, resamples: int, seed: int, keep: Sequence[NDArray] = ()
) -> Replicates:
    """The score on examples drawn again with replacement, part by part.

    The draws depend on the task's name, the sizes and the seed alone: two models are given the
    same examples, so the difference of their replicates is the paired bootstrap.

    Args:
        parts: of a task, one per split and subset; the score is their mean.
        name: of the task.
        keep: bool [n] per part, the examples to draw from; all by default.

    Returns:
        Float64 [resamples].
    """
    out = np.zeros(resamples)
    for i, part in enumerate(parts):
        rng = np.random.default_rng([seed, zlib.crc32(name.encode()), i])
        rows = np.flatnonzero(keep[i]) if keep else np.arange(part.n)
        for r in range(resamples):
            picks = rows[rng.integers(0, len(rows), len(rows))]
            out[r] += part.score(np.bincount(picks, minlength=part.n)) / len(parts)
    return out


def whole(parts: Sequence[Examples], keep: Sequence[NDArray] = ()) -> float:
    """The score with each example once, or with those to keep."""
    weights = keep or [np.ones(part.n, bool) for part in parts]
    scores = [p.score(w.astype(np.int64)) for p, w in zip(parts, weights, strict=True)]
    return float(np.mean(scores))


def bounds(value: float, drawn: Replicates, level: float) -> tuple[float, float]:
    """The percentile interval of replicates, less their bias.

    A draw repeats some examples, and clusters or nearest neighbours of repeated examples score a
    little otherwise: by how much is the mean of the replicates minus the value itself. Means have
    no such bias.
    """
    tail = (1 - level) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail]) - (drawn.mean() - value)
    return float(low), float(high)
