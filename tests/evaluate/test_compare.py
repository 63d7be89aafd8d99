"""Paired bootstrap: closed cases, and values that are those of `evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embkit.errors import UsageError
from embkit.evaluate import evaluate, load_split, ndcg_per_query, paired_bootstrap


def test_means_per_query_are_those_of_evaluate(encoder: Any, split: Path) -> None:
    for dim in encoder.dims:
        found = ndcg_per_query(encoder, load_split(split), dim=dim)
        want = evaluate(encoder, split, bm25=False)["tasks"]
        assert set(found) == {n for n, t in want.items() if t["type"] == "retrieval"}
        for name, values in found.items():
            measure = want[name]["widths"][str(dim)]["ndcg@10"]
            assert values.mean() == pytest.approx(measure, abs=1e-9)


def test_a_constant_difference_has_no_spread() -> None:
    b = {"x": np.arange(7.0), "y": np.zeros(3)}
    a = {"x": b["x"] + 2, "y": b["y"] + 4}
    found = paired_bootstrap(a, b)
    assert (found.mean, found.low, found.high) == pytest.approx((3.0, 3.0, 3.0))


def test_interval_of_a_coin_is_the_binomial_one() -> None:
    """400 differences of 0 or 1: their mean has the standard error 0.025 when half are 1."""
    a = {"x": np.tile([0.0, 1.0], 200)}
    found = paired_bootstrap(a, {"x": np.zeros(400)}, resamples=20_000)
    assert found.mean == 0.5
    assert found.low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.004)
    assert found.high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.004)


def test_sets_count_alike_and_are_drawn_apart() -> None:
    """Two sets of unlike size: the standard error is that of the mean of two means."""
    a = {"large": np.tile([0.0, 1.0], 800), "small": np.tile([0.0, 1.0], 50)}
    zero = {name: np.zeros(len(v)) for name, v in a.items()}
    found = paired_bootstrap(a, zero, resamples=20_000)
    error = 0.5 * np.hypot(0.5 / 40, 0.5 / 10)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.06)


def test_pairing_counts() -> None:
    """Queries differ widely and both models share that: only the difference is drawn."""
    hard = np.linspace(0, 100, 50)
    found = paired_bootstrap({"x": hard + 1}, {"x": hard})
    assert found.low == pytest.approx(1) and found.high == pytest.approx(1)


def test_other_queries_are_refused() -> None:
    with pytest.raises(UsageError, match="other sets or queries"):
        paired_bootstrap({"x": np.zeros(3)}, {"x": np.zeros(4)})
