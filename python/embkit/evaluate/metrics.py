"""The measures, as MTEB computes them, in percent; their naive twins are in the tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_DRAWS = 10  # linear probes averaged, as MTEB does
_PER_LABEL = 8
_SEED = 42


def gains(rows: NDArray[np.integer], judged: Sequence[Mapping[int, float]]) -> NDArray[np.float64]:
    """Grade of each retrieved passage.

    Args:
        rows: retrieved positions [queries, k], best first.
        judged: per query, position to grade.

    Returns:
        Float64 [queries, k], 0 where not judged.
    """
    out = np.zeros(rows.shape, np.float64)
    for i, (found, answers) in enumerate(zip(rows.tolist(), judged, strict=True)):
        out[i] = [answers.get(row, 0.0) for row in found]
    return out


def retrieval_metrics(
    rows: NDArray[np.integer], judged: Sequence[Mapping[int, float]]
) -> dict[str, float]:
    """nDCG@10 (linear gains), recall@10, recall@100 and MRR@10, means over the queries, in percent.

    Args:
        rows: retrieved positions [queries, up to 100], best first.
        judged: per query, position to grade (> 0).
    """
    gain = gains(rows, judged)
    return {
        "ndcg@10": 100 * float(np.mean(ndcg(gain, judged, k=10))),
        "recall@10": 100 * float(np.mean(recall(gain, judged, k=10))),
        "recall@100": 100 * float(np.mean(recall(gain, judged, k=100))),
        "mrr@10": 100 * float(np.mean(reciprocal_rank(gain, k=10))),
    }


def ndcg(
    gain: NDArray[np.float64], judged: Sequence[Mapping[int, float]], *, k: int
) -> NDArray[np.float64]:
    """Normalised discounted cumulative gain at ``k`` per query, 0 to 1."""
    discount = 1 / np.log2(np.arange(2, k + 2))
    ideal = np.array(
        [
            np.dot(best := sorted(answers.values(), reverse=True)[:k], discount[: len(best)])
            for answers in judged
        ]
    )
    found = gain[:, :k]
    return found @ discount[: found.shape[1]] / ideal


def recall(
    gain: NDArray[np.float64], judged: Sequence[Mapping[int, float]], *, k: int
) -> NDArray[np.float64]:
    """Share of the judged passages among the first ``k``, per query."""
    return (gain[:, :k] > 0).sum(axis=1) / np.array([len(answers) for answers in judged])


def reciprocal_rank(gain: NDArray[np.float64], *, k: int) -> NDArray[np.float64]:
    """One over the rank of the first judged passage within ``k``, else 0, per query."""
    hit = gain[:, :k] > 0
    return np.where(hit.any(axis=1), 1 / (hit.argmax(axis=1) + 1), 0.0)


def spearman(similarity: NDArray[np.floating], score: NDArray[np.floating]) -> float:
    """Spearman's rank correlation in percent; 0 when one side is constant."""
    from scipy.stats import spearmanr

    if np.ptp(similarity) == 0 or np.ptp(score) == 0:
        return 0.0
    return 100 * float(spearmanr(similarity, score).statistic)


def accuracy(
    train: NDArray[np.float32],
    train_label: Sequence[str],
    test: NDArray[np.float32],
    test_label: Sequence[str],
) -> float:
    """Accuracy in percent of logistic regression on 8 examples a label, mean of 10 draws (MTEB).

    Args:
        train, test: embeddings [n, d].
    """
    return mean_accuracy(hits(train, train_label, test, test_label))


def mean_accuracy(hit: NDArray[np.bool_]) -> float:
    """Accuracy in percent of what :func:`hits` has found."""
    return 100 * float(np.mean([float(np.mean(draw)) for draw in hit]))


def hits(
    train: NDArray[np.float32],
    train_label: Sequence[str],
    test: NDArray[np.float32],
    test_label: Sequence[str],
) -> NDArray[np.bool_]:
    """Which test texts the probes of :func:`accuracy` get right, bool [draws, n]."""
    from sklearn.linear_model import LogisticRegression

    truth = np.array(test_label)
    labels = np.array(train_label)
    found = []
    for rows in draws(train_label):
        # lbfgs stops at max_iter with a warning: MTEB's setting, kept for comparable numbers.
        probe = LogisticRegression(max_iter=100, random_state=_SEED)
        found.append(_fit(probe, train[rows], labels[rows]).predict(test) == truth)
    return np.array(found)


def draws(labels: Sequence[str]) -> list[NDArray[np.int64]]:
    """Ten draws of at most 8 rows per label, the same in every run.

    The order is shuffled again before each draw, starting from the last one, as MTEB does.
    """
    rng = np.random.default_rng(_SEED)
    order = np.arange(len(labels))
    out = []
    for _ in range(_DRAWS):
        rng.shuffle(order)
        taken: dict[str, int] = {}
        rows = []
        for i in order.tolist():
            count = taken.get(labels[i], 0)
            if count < _PER_LABEL:
                rows.append(i)
                taken[labels[i]] = count + 1
        out.append(np.array(rows, np.int64))
    return out


def _fit(probe: Any, x: NDArray[np.float32], y: NDArray[np.str_]) -> Any:
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="lbfgs failed to converge")
        return probe.fit(x, y)
