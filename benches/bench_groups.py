"""The cases of `embkit bench` under pytest-benchmark: `pytest benches/bench_groups.py`.

One test per case and way, in groups by case; `EMBKIT_BENCH_FULL=1` takes the full sizes. Results
are asserted equal before the clock starts.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest

from embkit.bench import GROUPS

FULL = bool(os.environ.get("EMBKIT_BENCH_FULL"))
# The trainers of group `train` run as many rounds as they were told to, and no more; the rows of
# `recipes` are no times.
CHOSEN = [g for g in GROUPS if g not in ("train", "recipes")]
MAKERS = [make for g in CHOSEN for make in importlib.import_module(f"embkit.bench.{g}").CASES]


@pytest.fixture(
    scope="module", params=MAKERS, ids=lambda make: f"{make.__module__[13:]}.{make.__name__}"
)
def case(request: pytest.FixtureRequest) -> Any:
    """A case, its rivals' results compared with ours."""
    try:
        made = request.param(not FULL)
    except ImportError as error:
        pytest.skip(str(error))
    ours = made.ours()
    for way in made.rivals.values():
        if made.check is not None:
            made.check(ours, way())
    yield made
    if made.close is not None:
        made.close()


def test_ours(case: Any, benchmark: Any) -> None:
    benchmark.group = case.name
    benchmark.pedantic(case.ours, rounds=3, warmup_rounds=1)


def test_rivals(case: Any, benchmark: Any) -> None:
    """The first rival; `embkit bench` times all of them, interleaved."""
    if not case.rivals:
        pytest.skip(f"no rival of {case.name} is installed: {dict(case.skipped)}")
    benchmark.group = case.name
    name, way = next(iter(case.rivals.items()))
    benchmark.extra_info["rival"] = name
    benchmark.pedantic(way, rounds=3, warmup_rounds=1)
