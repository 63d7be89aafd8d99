"""Weighted measures against the libraries' own on rows that are repeated that often."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import average_precision_score, f1_score, v_measure_score

from embkit.evaluate import examples as ex
from embkit.evaluate.examples import Examples
from embkit.evaluate.intervals import bounds, replicates, whole

rng = np.random.default_rng(0)
N = 40
WEIGHTS = [np.ones(N, int), rng.integers(0, 3, N), rng.integers(0, 6, N)]


@pytest.mark.parametrize("w", WEIGHTS)
def test_correlations(w: np.ndarray) -> None:
    x, y = rng.integers(0, 5, N).astype(float), rng.normal(size=N).round(1)
    a, b = np.repeat(x, w), np.repeat(y, w)
    assert ex.spearman(x, y)(w) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)
    assert ex.pearson(x, y, w) == pytest.approx(pearsonr(a, b).statistic, abs=1e-12)


@pytest.mark.parametrize("w", WEIGHTS)
def test_average_precision(w: np.ndarray) -> None:
    value, label = rng.integers(0, 9, N).astype(float), rng.integers(0, 2, N)
    want = average_precision_score(np.repeat(label, w), np.repeat(value, w))
    assert ex.average_precision(value, label)(w) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("w", WEIGHTS)
def test_macro_f1(w: np.ndarray) -> None:
    truth, guess = rng.integers(0, 4, N), rng.integers(0, 6, N)
    want = f1_score(np.repeat(truth, w), np.repeat(guess, w), average="macro", zero_division=0)
    assert ex.macro_f1(truth, guess, w, 6) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("w", WEIGHTS)
def test_v_measure(w: np.ndarray) -> None:
    truth, guess = rng.integers(0, 4, N), rng.integers(0, 3, N)
    table = np.zeros((4, 3))
    np.add.at(table, (truth, guess), w)
    want = v_measure_score(np.repeat(truth, w), np.repeat(guess, w))
    assert ex.v_measure(table) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("w", WEIGHTS)
def test_f1_of_a_bitext(w: np.ndarray) -> None:
    guess = rng.integers(0, N, N)
    guess[::2] = np.arange(N)[::2]
    found = {"sentence1-sentence2": [{"corpus_id": int(g), "score": 0.0} for g in guess]}
    part = ex._bitext({}, found, "f1")
    assert part is not None
    truth = np.repeat(np.arange(N), w)
    want = f1_score(truth, np.repeat(guess, w), average="weighted", zero_division=0)
    assert part.score(w) == pytest.approx(want, abs=1e-12)


def test_constant_sides_are_zero() -> None:
    one, w = np.ones(N), WEIGHTS[1]
    assert ex.pearson(one, rng.normal(size=N), w) == 0
    assert ex.spearman(one, rng.normal(size=N))(w) == 0
    assert ex.average_precision(rng.normal(size=N), np.zeros(N, int))(w) == 0
    assert ex.v_measure(np.array([[5.0]])) == 1


def part_of(values: np.ndarray) -> Examples:
    return Examples(n=len(values), score=lambda w: ex.mean(values, w), texts=list)


def test_interval_of_a_mean_is_the_known_one() -> None:
    values = np.tile([0.0, 1.0], 200)
    drawn = replicates([part_of(values)], "coin", resamples=4000, seed=1)
    low, high = bounds(0.5, drawn, 0.95)
    assert (low, high) == pytest.approx((0.5 - 1.96 * 0.025, 0.5 + 1.96 * 0.025), abs=0.005)


def test_two_models_meet_the_same_draws() -> None:
    """A constant lead stays one in every draw, so its interval has no width."""
    values = rng.random(30)
    drawn = [
        replicates([part_of(v)], "task", resamples=200, seed=1) for v in (values, values + 0.25)
    ]
    assert drawn[1] - drawn[0] == pytest.approx(0.25)
    other = replicates([part_of(values)], "another task", resamples=200, seed=1)
    assert np.abs(other - drawn[0]).max() > 1e-3


def test_left_out_examples_are_never_drawn() -> None:
    values = np.where(np.arange(50) < 10, 100.0, rng.random(50))
    keep = [np.arange(50) >= 10]
    drawn = replicates([part_of(values)], "task", resamples=300, seed=1, keep=keep)
    assert drawn.max() < 1
    assert whole([part_of(values)], keep) == pytest.approx(values[10:].mean())


def test_a_bias_of_repeated_examples_is_taken_off() -> None:
    """The share of distinct examples falls in every draw; the interval lies around the value."""
    part = Examples(n=50, score=lambda w: float((w > 0).mean()), texts=list)
    drawn = replicates([part], "task", resamples=500, seed=1)
    assert drawn.max() < 0.8
    low, high = bounds(1.0, drawn, 0.95)
    assert low < 1 < high
