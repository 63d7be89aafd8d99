"""The bench harness: what a sample means, rivals in other processes, results compared first."""

from __future__ import annotations

import time
from typing import Any

import pytest

from embkit import bench
from embkit.bench import Case, Reported, Sample
from embkit.bench.rivals import Job
from embkit.errors import EmbkitError


def reported(cpu: float, wall: float) -> Any:
    """A way that ran elsewhere and took so long there."""
    return lambda: Reported("result", Sample(cpu, wall, 7))


def case(**settings: Any) -> Case:
    """10 units of work, 2 s of CPU; a rival that takes 8."""
    fixed = {"name": "row", "work": 10.0, "ours": reported(2, 4), "rivals": {"r": reported(8, 12)}}
    return Case(**{**fixed, **settings})


def test_rates_and_times() -> None:
    """A ratio above 1 means that ours is faster, whatever the unit is."""
    (row,) = bench.run_case(case(unit="rows/s"), rounds=3)
    assert (row.value, row.peer_value, row.ratio, row.wall) == (5.0, 1.25, 4.0, 2.5)
    assert row.peak_bytes == row.peer_peak_bytes == 7
    (row,) = bench.run_case(case(unit="ms/row", measure="cpu"), rounds=3)
    assert (row.value, row.peer_value, row.ratio) == (200.0, 800.0, 4.0)
    (row,) = bench.run_case(case(unit="us", measure="wall", work=1.0), rounds=3)
    assert (row.value, row.peer_value, row.ratio) == (4e6, 12e6, 3.0)


def test_facts_from_the_medians() -> None:
    derive = lambda found: {"extra": found["r"].cpu - found["embkit"].cpu}  # noqa: E731
    (row,) = bench.run_case(case(unit="rows/s", facts={"n": 3}, derive=derive), rounds=1)
    assert row.facts == {"n": 3, "extra": 6}


def test_work_of_this_process_is_measured() -> None:
    def busy() -> None:
        end = time.process_time() + 0.05
        while time.process_time() < end:
            pass

    sample = bench.measure(busy)
    assert 0.05 <= sample.cpu < 0.1 and sample.wall >= sample.cpu - 0.01


def test_different_results_are_refused() -> None:
    def check(ours: str, theirs: str) -> None:
        assert ours == theirs + "!"

    with pytest.raises(EmbkitError, match="results of embkit and r differ"):
        bench.run_case(case(unit="rows/s", check=check))


def test_a_rival_that_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    import numpy as np

    monkeypatch.setenv("EMBKIT_RIVALS", str(tmp_path / "none"))
    job = Job({"flat": np.zeros(3, np.uint16)}, {"batch": 1})
    running, skipped = job.start({"MDS": "mds"})
    job.close()
    assert running == {} and "make rivals" in skipped["MDS"] and not job.path.exists()


def test_cases_are_chosen_by_name() -> None:
    with pytest.raises(EmbkitError, match=r"(?s)'exakt'.*exact_64k, exact_100k"):
        next(bench.run_group("mine", only="exakt"))
