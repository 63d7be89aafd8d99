"""Search against float64 brute force, in every form in which vectors and queries can come."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from embkit import _rust
from embkit.errors import UsageError
from embkit.search import Searcher, choose, search

F32 = NDArray[np.float32]


def vectors(n: int, d: int, seed: int = 0) -> F32:
    """Unit vectors in clusters, one in twenty a copy."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((max(n // 40, 1), d), dtype=np.float32)
    x = centres[rng.integers(len(centres), size=n)] + 0.8 * rng.standard_normal((n, d))
    x[19::20] = x[18::20][: len(x[19::20])]
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def brute(queries: F32, corpus: F32, k: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    score = queries.astype(np.float64) @ corpus.astype(np.float64).T
    row = np.argsort(-score, axis=1, kind="stable")[:, :k]
    return row, np.take_along_axis(score, row, 1)


@pytest.mark.parametrize(("n", "nq", "d", "k"), [(1, 1, 1, 1), (5, 3, 7, 5), (3000, 150, 48, 33)])
@pytest.mark.parametrize("engine", ["exact", "torch", "auto"])
def test_exact_engines_are_brute_force(n: int, nq: int, d: int, k: int, engine: str) -> None:
    corpus, queries = vectors(n, d), vectors(nq, d, 1)
    found = search(queries, corpus, k, engine=engine)
    row, score = brute(queries, corpus, k)
    np.testing.assert_allclose(found.score, score, atol=3e-6)
    # Where the order is clear, so are the rows; copies keep the order of their rows.
    clear = np.ones_like(row, bool)
    gap = np.abs(np.diff(score, axis=1)) > 1e-5
    same = np.diff(score, axis=1) == 0
    clear[:, 1:] &= gap | same
    clear[:, :-1] &= gap | same
    clear[:, -1] = False  # what follows it is not known
    np.testing.assert_array_equal(found.row[clear], row[clear])
    assert found.report["recall"] == 1.0


def test_scores_are_those_of_the_pair_whatever_the_engine() -> None:
    corpus, queries = vectors(6000, 40), vectors(300, 40, 1)
    exact = search(queries, corpus, 20, engine="exact")
    lists = search(queries, corpus, 20, engine="ivf", recall=0.9)
    known = {
        (q, r): s
        for q in range(300)
        for r, s in zip(exact.row[q].tolist(), exact.score[q].tolist(), strict=True)
    }
    shared = [
        (s, known[q, r])
        for q in range(300)
        for r, s in zip(lists.row[q].tolist(), lists.score[q].tolist(), strict=True)
        if (q, r) in known
    ]
    assert len(shared) > 0.85 * len(known)
    assert all(a == b for a, b in shared)


def test_the_reported_recall_is_the_recall() -> None:
    corpus = vectors(20_000, 32)
    queries = vectors(4000, 32, 1)
    want = search(queries, corpus, 10, engine="exact").score[:, -1:]
    last = 0
    for recall in (0.7, 0.95):
        found = search(queries, corpus, 10, engine="ivf", recall=recall)
        whole = float((found.score >= want).mean())
        assert found.report["recall"] >= recall
        assert abs(whole - found.report["recall"]) < 5 * found.report["recall_error"] + 1e-3
        assert found.report["probes"] > last
        last = found.report["probes"]


@pytest.mark.parametrize("engine", ["exact", "ivf"])
def test_pieces_threads_memory_and_forms_give_the_same(engine: str, tmp_path: Path) -> None:
    corpus, queries = vectors(9000, 24), vectors(700, 24, 1)
    options = {"engine": engine, "recall": 0.9}
    want = search(queries, corpus, 15, threads=1, **options)
    for threads, memory in ((2, 0), (3, 300_000)):
        got = search(queries, corpus, 15, threads=threads, memory=memory, **options)
        assert got.row.tobytes() == want.row.tobytes()
        assert got.score.tobytes() == want.score.tobytes()
    # Shards and mapped files, searched in ranges by a process that starts in the middle.
    np.save(tmp_path / "a.npy", corpus[:5000])
    np.save(tmp_path / "b.npy", corpus[5000:])
    mapped = [np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in "ab"]
    searcher = Searcher([queries[:300], queries[300:]], mapped, 15, **options)
    late, early = searcher.search(250), searcher.search(0, 250)
    assert np.concatenate([early.row, late.row]).tobytes() == want.row.tobytes()
    assert np.concatenate([early.score, late.score]).tobytes() == want.score.tobytes()
    assert len(searcher.search(10, 10).row) == 0


def test_half_floats_are_searched_as_their_values() -> None:
    corpus, queries = vectors(2000, 24).astype(np.float16), vectors(50, 24, 1)
    want = search(queries, corpus.astype(np.float32), 10)
    got = search(queries, [corpus[:700], corpus[700:]], 10)
    assert (got.row == want.row).all()
    assert (got.score == want.score).all()


def test_choice_is_a_function_of_sizes() -> None:
    isa = "avx512-vnni"
    assert choose(10**6, 10**6, 384, 100, 1.0, isa).engine == "exact"
    assert choose(10**6, 10**6, 384, 100, 0.95, isa).engine == "ivf"
    assert choose(100, 10**6, 384, 100, 0.95, isa).engine == "exact"  # lists would not pay
    assert choose(10**6, 3000, 384, 100, 0.95, isa).engine == "exact"
    assert choose(5, 5, 1, 1, 0.5, "unheard-of").engine == "exact"
    plan = choose(10**6, 10**6, 384, 100, 0.95, isa)
    assert plan.ivf_seconds < plan.exact_seconds
    assert str(plan).startswith("ivf on avx512-vnni")
    assert _rust.search_isa() in str(choose(10, 10, 8, 1))


def test_bad_input_says_what() -> None:
    good = vectors(30, 8)
    nan = good.copy()
    nan[7, 2] = np.nan
    with pytest.raises(UsageError, match="Query row 7 holds NaN"):
        search(nan, good, 3)
    with pytest.raises(UsageError, match="Corpus row 7 holds NaN"):
        search(good, nan, 3)
    with pytest.raises(UsageError, match="Queries of width 6, corpus of width 8"):
        search(good[:, :6], good, 3)
    with pytest.raises(UsageError, match="of width 8 and of width 6"):
        search(good, [good, good[:, :6]], 3)
    with pytest.raises(UsageError, match="(?i)top 31 of 30"):
        search(good, good, 31)
    with pytest.raises(UsageError, match="(?i)top 0 of"):
        search(good, good, 0)
    with pytest.raises(UsageError, match="Unknown engine 'ivv'; did you mean 'ivf'"):
        search(good, good, 3, engine="ivv")
    with pytest.raises(UsageError, match="recall = 1.2"):
        search(good, good, 3, recall=1.2)
    with pytest.raises(UsageError, match=r"\[rows, width\]"):
        search(good[0], good, 3)
    with pytest.raises(UsageError, match="(?i)lists were built from"):
        _rust.Ivf(good, 4).search(good, good[:20], 3, 2)
