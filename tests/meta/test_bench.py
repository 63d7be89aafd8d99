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


def test_recall_counts_by_score() -> None:
    """Another of several equal vectors is as good; a worse one, or a missing one, is not."""
    import numpy as np

    from embkit.bench.mine_rivals import best_scores, recall

    rng = np.random.default_rng(0)
    corpus = rng.standard_normal((40, 6)).astype(np.float32)
    corpus[10:20] = corpus[0]
    queries = corpus[[0, 30]]
    edge = best_scores(queries, corpus, 4)
    want = np.sort(queries @ corpus.T, axis=1)[:, ::-1][:, :4]
    np.testing.assert_allclose(edge, want, rtol=1e-6)
    order = np.argsort(-(queries @ corpus.T), axis=1)
    rows = order[:, :4].copy()
    rows[0] = [11, 19, 0, 15]
    assert recall(rows, queries, corpus, edge[:, -1]) == 1.0
    rows[1, 3] = order[1, 30]
    assert recall(rows, queries, corpus, edge[:, -1]) == 7 / 8


def test_where_approximate_search_starts_to_win() -> None:
    from embkit.bench.mine import _crossing

    exact = {10: 1.0, 100: 100.0, 1000: 10_000.0}
    assert _crossing(exact, {10: 10.0, 100: 100.0, 1000: 1000.0}) == pytest.approx(100)
    assert _crossing(exact, {10: 0.5, 100: 1.0, 1000: 1.0}) == 10
    assert _crossing(exact, {10: 2.0, 100: 200.0, 1000: 20_000.0}) == 0


def test_share_of_near_duplicates() -> None:
    import numpy as np

    from embkit.bench.corpus import Pairs
    from embkit.bench.mine_end import Work

    words = [f"w{i}" for i in range(30)]
    same, other = " ".join(words), " ".join(words[::-1])
    passages = [same, same + " end", other, "café " + same]
    none = np.zeros((4, 2), np.float32)
    work = Work(Pairs(["q"] * 4, passages, np.array([0, 0, 0, 3]), none, none))
    share = work.near_share((np.array([0, 1, 2, 3]), np.array([1, 2, 2, 1])))
    work.close()
    assert share == pytest.approx(1 / 3)  # the fourth positive is not ASCII and does not count
