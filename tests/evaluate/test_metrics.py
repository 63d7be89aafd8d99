"""Each measure against a naive twin written from its definition."""

from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embkit.evaluate import metrics

answers = st.dictionaries(st.integers(0, 40), st.sampled_from([1.0, 2.0, 3.0]), min_size=1)
rankings = st.permutations(range(41))


def naive(ranked: list[int], judged: dict[int, float]) -> dict[str, float]:
    gain = sum(judged.get(d, 0) / math.log2(i + 2) for i, d in enumerate(ranked[:10]))
    best = sorted(judged.values(), reverse=True)[:10]
    ideal = sum(g / math.log2(i + 2) for i, g in enumerate(best))
    first = next((i for i, d in enumerate(ranked[:10]) if d in judged), None)
    return {
        "ndcg@10": 100 * gain / ideal,
        "recall@10": 100 * len(set(ranked[:10]) & set(judged)) / len(judged),
        "recall@100": 100 * len(set(ranked[:100]) & set(judged)) / len(judged),
        "mrr@10": 0.0 if first is None else 100 / (first + 1),
    }


@given(st.lists(st.tuples(rankings, answers), min_size=1, max_size=6), st.integers(1, 41))
def test_retrieval_measures_equal_naive(
    cases: list[tuple[list[int], dict[int, float]]], depth: int
) -> None:
    rows = np.array([ranked[:depth] for ranked, _ in cases])
    got = metrics.retrieval_metrics(rows, [judged for _, judged in cases])
    each = [naive(ranked[:depth], judged) for ranked, judged in cases]
    for name, value in got.items():
        assert value == pytest.approx(sum(e[name] for e in each) / len(each), abs=1e-9)


def test_ndcg_is_100_for_the_ideal_order_and_0_for_none() -> None:
    judged = [{3: 2.0, 5: 1.0}]
    assert metrics.retrieval_metrics(np.array([[3, 5, 1]]), judged)["ndcg@10"] == 100
    assert metrics.retrieval_metrics(np.array([[0, 1, 2]]), judged)["ndcg@10"] == 0


def ranks(values: list[float]) -> list[float]:
    """Average ranks of ties, by counting."""
    return [
        sum(w < v for w in values) + (sum(w == v for w in values) + 1) / 2 for v in values
    ]  # fmt: skip


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=2, max_size=25))
def test_spearman_equals_pearson_of_counted_ranks(pairs: list[tuple[int, int]]) -> None:
    a, b = [float(p[0]) for p in pairs], [float(p[1]) for p in pairs]
    got = metrics.spearman(np.array(a), np.array(b))
    x, y = ranks(a), ranks(b)
    mx, my = sum(x) / len(x), sum(y) / len(y)
    top = sum((p - mx) * (q - my) for p, q in zip(x, y, strict=True))
    below = math.sqrt(sum((p - mx) ** 2 for p in x) * sum((q - my) ** 2 for q in y))
    assert got == pytest.approx(100 * top / below if below else 0.0, abs=1e-9)


def test_draws_hold_at_most_eight_a_label_and_differ() -> None:
    labels = [random.Random(i).choice("abc") for i in range(60)] + ["rare"] * 3
    drawn = metrics.draws(labels)
    assert len(drawn) == 10
    want = {"a": 8, "b": 8, "c": 8, "rare": 3}
    for rows in drawn:
        assert len(set(rows.tolist())) == len(rows)
        assert Counter(labels[i] for i in rows) == want
    assert len({tuple(sorted(rows.tolist())) for rows in drawn}) > 1
    again = metrics.draws(labels)
    assert all((a == b).all() for a, b in zip(drawn, again, strict=True))


def naive_accuracy(
    train: np.ndarray, labels: list[str], test: np.ndarray, truth: list[str]
) -> float:
    """Multinomial logistic regression by plain gradient descent on the same draws."""
    names = sorted(set(labels))
    scores = []
    for rows in metrics.draws(labels):
        x = np.hstack([train[rows].astype(float), np.ones((len(rows), 1))])
        y = np.eye(len(names))[[names.index(labels[i]) for i in rows]]
        w = np.zeros((x.shape[1], len(names)))
        for _ in range(20000):
            z = x @ w
            p = np.exp(z - z.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            decay = np.vstack([w[:-1], np.zeros((1, len(names)))])  # C = 1, no decay of the bias
            step = x.T @ (p - y) + decay
            w -= 0.02 * step
            if np.abs(step).max() < 1e-6:
                break
        guess = (np.hstack([test, np.ones((len(test), 1))]) @ w).argmax(1)
        scores.append(np.mean([names[g] == t for g, t in zip(guess, truth, strict=True)]))
    return 100 * float(np.mean(scores))


def test_accuracy_equals_gradient_descent() -> None:
    rng = np.random.default_rng(3)
    centers = rng.normal(size=(3, 6))
    labels = [str(i % 3) for i in range(60)]
    truth = [str(i % 3) for i in range(90)]
    at = lambda names: np.array([centers[int(n)] for n in names])  # noqa: E731
    train = (at(labels) + rng.normal(size=(60, 6))).astype(np.float32)
    test = (at(truth) + rng.normal(size=(90, 6))).astype(np.float32)
    got = metrics.accuracy(train, labels, test, truth)
    assert 40 < got < 100
    # A point that lies on a border may fall on either side: one text in 90 over 10 draws.
    assert got == pytest.approx(naive_accuracy(train, labels, test, truth), abs=0.25)
