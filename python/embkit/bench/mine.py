"""Bench group `mine`: searches of many queries and the negative filter, beside their rivals.

Queries are rows of the corpus: a kNN join. Every result is compared with brute force first; recall
counts by score (mine_rivals.py).
"""

from __future__ import annotations

import os
import time
from functools import cache, partial
from typing import Any

import numpy as np

from embkit import _rust
from embkit.bench import Case, Reported, Sample, isa, mine_end
from embkit.bench.corpus import NotBuilt, digest, text_shard, vectors
from embkit.bench.mine_rivals import (
    Answer,
    best_scores,
    exact_rivals,
    indexes,
    recall,
    timed,
)
from embkit.search import Found, Searcher, choose, search

_D, _K = 384, 100
_LEAST = 0.95
_ASKED = 1_000  # queries of slow rivals, and of the recall
_GOALS = {  # of exact search, by processor
    "amx_bf16": {64: "14000 queries/s", 100: "9000 queries/s", 300: "3000 queries/s"},
    "avx512_bf16": {64: "2x faiss Flat", 100: "2x faiss Flat", 300: "3000 queries/s"},
    "avx512f": {64: "1.2x faiss Flat", 100: "1.2x faiss Flat", 300: "3000 queries/s"},
}


@cache
def _limits() -> dict[str, float]:
    """Multiplications of bare products per CPU-second, one thread: what no search can pass."""
    import torch

    def rate(call: Any, work: float) -> float:
        call()
        taken = []
        for _ in range(3):
            begun = time.process_time()
            call()
            taken.append(max(time.process_time() - begun, 1e-9))
        return work / min(taken)

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        a, b = torch.ones(512, _D), torch.ones(_D, 4096)
        work = 512 * _D * 4096
        ways = (partial(torch.mm, a, b), partial(np.matmul, a.numpy(), b.numpy()))
        found = {"f32 GEMM": max(rate(way, work) for way in ways)}
        a, b = torch.ones(1024, 1024), torch.ones(1024, 1024)
        for name, dtype in (("bf16 GEMM", torch.bfloat16), ("int8 GEMM", torch.int8)):
            x, y = a.to(dtype), b.to(dtype)
            product = torch._int_mm if dtype == torch.int8 else torch.mm
            found[name] = rate(partial(product, x, y), 1024**3)
    finally:
        torch.set_num_threads(before)
    return found


def _facts(n: int, corpus: np.ndarray) -> dict[str, Any]:
    limits = {name: round(rate / (_D * n), 1) for name, rate in _limits().items()}
    about = {"n": n, "d": _D, "k": _K, "isa": isa(), "data": digest(corpus)}
    return {**about, "limits_queries_per_s": limits}


# ---------------------------------------------------------------- exact


def _exact(thousands: int, quick: bool) -> Case:
    n = thousands * (250 if quick else 1000)
    corpus = vectors(n, _D, quick)
    asked = 256 if quick else 1024 if thousands > 100 else 2048
    queries = np.ascontiguousarray(corpus[:: n // asked][:asked])
    rivals, skipped = exact_rivals(queries, corpus, _K)
    recalls: dict[str, float] = {}

    def check(ours: Found, theirs: Answer) -> None:
        """A rival's scores are ours to the last digits; one without scores finds ours again."""
        found = recall(theirs.row, queries, corpus, ours.score[:, -1])
        assert found >= theirs.least, f"recall {found:.4f}"
        if theirs.score is not None:
            np.testing.assert_allclose(ours.score, theirs.score, rtol=0, atol=2e-5)
            own = recall(ours.row, queries, corpus, theirs.score[:, -1])
            recalls["embkit"] = min(own, recalls.get("embkit", 1.0))
            assert own >= 0.9999, f"our recall is {own:.5f}"
        else:
            recalls["torch bf16"] = round(found, 4)

    facts = _facts(n, corpus)
    return Case(
        name=f"mine.exact.{thousands}k",
        unit="queries/s",
        work=len(queries),
        ours=lambda: search(queries, corpus, _K, engine="exact"),
        rivals=rivals,
        check=check,
        limit=("f32 GEMM", facts["limits_queries_per_s"]["f32 GEMM"]),
        floor="1x faiss Flat",
        goal=_GOALS.get(isa(), {}).get(thousands),
        facts={**facts, "queries": asked},
        derive=lambda _: {"recall": recalls},
        skipped=skipped,
    )


def exact_64k(quick: bool) -> Case:
    """n = 64k, d = 384, k = 100."""
    return _exact(64, quick)


def exact_100k(quick: bool) -> Case:
    """n = 100k."""
    return _exact(100, quick)


def exact_300k(quick: bool) -> Case:
    """n = 300k."""
    return _exact(300, quick)


# ---------------------------------------------------------------- approximate


def _sizes(quick: bool) -> tuple[int, int]:
    return (8_000, 200) if quick else (300_000, _ASKED)


def _join(corpus: np.ndarray) -> tuple[Found, Sample]:
    """Our neighbours of every row, for a recall of 0.95."""
    found, took = timed(lambda: search(corpus, corpus, _K, engine="auto", recall=_LEAST))
    return found, took


def approx_300k(quick: bool) -> Case:
    """Rate of the search alone; rivals that have built their index answer 1,000 queries.

    Ours takes a fifth of the rows as queries, because it searches list by list; a search of one
    query comes first and pays for the lists and for the number of them to visit.
    """
    n, asked = _sizes(quick)
    corpus = vectors(n, _D, quick)
    others = indexes(n, _D, _K, _LEAST, asked, quick)
    stride = 5
    queries = np.ascontiguousarray(corpus[::stride])
    at = np.arange(len(others.queries)) * (n // asked)
    mine = np.flatnonzero(at % stride == 0)  # the rivals' queries that are ours as well
    state: dict[str, Any] = {}

    @cache
    def built() -> Searcher:
        searcher = Searcher(queries, corpus, _K, engine="ivf", recall=_LEAST)
        _, took = timed(lambda: searcher.search(0, 1))
        state.update(build_cpu=round(took.cpu, 2), build_peak=took.peak)
        return searcher

    def ours() -> Reported:
        searcher = built()
        found, took = timed(searcher.search)
        rows = found.row[at[mine] // stride]
        reached = recall(rows, others.queries[mine], corpus, others.edge[mine])
        assert reached >= _LEAST, f"our recall is {reached:.4f}"
        state.update(recall=round(reached, 4), report=found.report)
        scale = asked / len(found.row)  # to the rivals' number of queries
        return Reported(found, Sample(took.cpu * scale, took.wall * scale, took.peak))

    return Case(
        name="mine.approx.300k",
        unit="queries/s",
        work=asked,
        ours=ours,
        rivals={name: partial(others.search, name) for name in others.running},
        check=lambda _, theirs: _reaches(others.recall(theirs.row)),
        goal="12000 queries/s",
        facts=_facts(n, corpus),
        derive=lambda _: {"embkit_search": state, "rivals": others.facts},
        skipped=others.skipped,
        rounds=3,
    )


def join_300k(quick: bool) -> Case:
    """CPU seconds of the whole n x n join, build included; the rivals' from build and rate."""
    n, asked = _sizes(quick)
    corpus = vectors(n, _D, quick)
    others = indexes(n, _D, _K, _LEAST, asked, quick)
    at = np.arange(len(others.queries)) * (n // asked)
    state: dict[str, Any] = {}

    def ours() -> Reported:
        found, took = _join(corpus)
        reached = others.recall(found.row[at])
        assert reached >= _LEAST, f"our recall is {reached:.4f}"
        state.update(recall=round(reached, 4), report=found.report)
        return Reported(found, took)

    return Case(
        name="mine.join.300k",
        unit="s/join",
        work=1,
        measure="cpu",
        ours=ours,
        rivals={name: partial(others.total, name) for name in others.running},
        check=lambda _, theirs: _reaches(others.recall(theirs.row)),
        goal="40 s",
        facts={**_facts(n, corpus), "rivals_queries": asked},
        derive=lambda _: {"embkit_search": state, "rivals": others.facts},
        skipped=others.skipped,
        rounds=1,
        close=others.close,
    )


def join_1m(quick: bool) -> Case:
    """1M x 1M: the real vectors, and seeded mixtures of a real one with one of its 8 neighbours."""
    if not os.environ.get("EMBKIT_BENCH_LARGE") and not quick:
        raise NotBuilt("it takes minutes and 8 GB: set EMBKIT_BENCH_LARGE=1")
    n, real = (12_000, 4_000) if quick else (1_000_000, 300_000)
    corpus = _mixtures(n, vectors(real, _D, quick))
    asked = 200
    at = np.arange(asked) * (n // asked)
    edge = best_scores(corpus[at], corpus, _K)[:, -1]
    state: dict[str, Any] = {}

    @cache
    def once() -> Reported:
        found, took = _join(corpus)
        reached = recall(found.row[at], corpus[at], corpus, edge)
        assert reached >= _LEAST, f"our recall is {reached:.4f}"
        state.update(recall=round(reached, 4), report=found.report)
        return Reported(None, took)

    return Case(
        name="mine.join.1m",
        unit="s/join",
        work=1,
        measure="cpu",
        ours=once,
        facts={**_facts(n, corpus), "real": real, "made": "mixtures of neighbours"},
        derive=lambda _: {"embkit_search": state},
        rounds=1,
    )


def _mixtures(n: int, real: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(0)
    near = search(real, real, 9, engine="auto", recall=_LEAST).row
    out = np.empty((n, real.shape[1]), np.float32)
    out[: len(real)] = real
    for start in range(len(real), n, 65536):
        stop = min(start + 65536, n)
        one = rng.integers(len(real), size=stop - start)
        other = near[one, rng.integers(1, 9, size=stop - start)]
        share = rng.uniform(0.3, 0.7, (stop - start, 1)).astype(np.float32)
        made = share * real[one] + (1 - share) * real[other]
        out[start:stop] = made / np.linalg.norm(made, axis=1, keepdims=True)
    return out


def _reaches(found: float) -> None:
    assert found >= _LEAST - 1e-3, f"recall {found:.4f}"


def growth(quick: bool) -> Case:
    """CPU seconds of the n x n join, exact and approximate; the value is where the lines cross.

    Exact is timed on 1,024 queries and multiplied. 0 means that exact is cheaper up to 300k.
    `chosen` is what engine `auto` takes, `chosen_over_faster` the worst of its times over the
    better of the two.
    """
    sizes = (5_000, 10_000) if quick else (3_000, 10_000, 30_000, 100_000, 300_000)
    corpus = vectors(sizes[-1], _D, quick)

    @cache
    def measured() -> dict[str, dict[int, float]]:
        exact, approximate = {}, {}
        for n in sizes:
            part = np.ascontiguousarray(corpus[:: sizes[-1] // n][:n])
            asked = np.ascontiguousarray(part[:: max(n // 1024, 1)])
            _, took = timed(partial(search, asked, part, _K, engine="exact"))
            exact[n] = round(took.cpu * n / len(asked), 3)
            _, took = timed(partial(search, part, part, _K, engine="ivf", recall=_LEAST))
            approximate[n] = round(took.cpu, 3)
        return {"exact_s": exact, "approximate_s": approximate}

    def derive(_: Any) -> dict[str, Any]:
        found = measured()
        chosen = {n: choose(n, n, _D, _K, _LEAST).engine for n in sizes}
        worst = 1.0
        for n, engine in chosen.items():
            times = (found["exact_s"][n], found["approximate_s"][n])
            worst = max(worst, times[engine == "ivf"] / min(times))
        return {**found, "chosen": chosen, "chosen_over_faster": round(worst, 2)}

    return Case(
        name="mine.growth",
        unit="rows",
        work=1,
        ours=measured,
        score=lambda found: _crossing(**found),
        facts={**_facts(sizes[-1], corpus), "recall": _LEAST},
        derive=derive,
        rounds=1,
    )


def _crossing(exact_s: dict[int, float], approximate_s: dict[int, float]) -> float:
    """Corpus rows from which approximate search costs less, between sizes on a log scale."""
    gain = {n: np.log(exact_s[n] / approximate_s[n]) for n in exact_s}
    sizes = sorted(gain)
    if gain[sizes[0]] > 0:
        return float(sizes[0])
    for a, b in zip(sizes, sizes[1:], strict=False):
        if gain[b] > 0:
            return float(np.exp(np.interp(0, [gain[a], gain[b]], [np.log(a), np.log(b)])))
    return 0.0


# ---------------------------------------------------------------- rules


def end_to_end(quick: bool) -> Case:
    """Embeddings and texts in memory to filtered negatives, each in a process of its own."""
    work = mine_end.work(quick)
    return Case(
        name="mine.end_to_end",
        unit="s/run",
        work=1,
        measure="cpu",
        ours=lambda: work.run("embkit"),
        rivals=work.rivals(),
        check=_about_as_many,
        goal="5 s, 400 MB",
        facts={**_pair_facts(work), "k": mine_end.KEEP, "candidates": mine_end.CANDIDATES},
        rounds=3,
    )


def _about_as_many(ours: Any, theirs: Any) -> None:
    """Same candidates and thresholds: every query of theirs has negatives of ours, mostly equal.

    Ours drop near-duplicates of the positive and take the next candidate in their place.
    """
    mine = set(zip(ours[0].tolist(), ours[1].tolist(), strict=True))
    their = list(zip(theirs[0].tolist(), theirs[1].tolist(), strict=True))
    shared = sum(pair in mine for pair in their) / max(len(their), 1)
    assert shared >= 0.75, f"only {shared:.2f} of the rival's negatives are ours as well"


def _pair_facts(work: mine_end.Work) -> dict[str, Any]:
    return {
        "n": len(work.pairs.passages),
        "queries": len(work.pairs.queries),
        "d": _D,
        "isa": isa(),
        "data": digest(work.pairs.passage_vectors),
    }


def filtering(quick: bool) -> Case:
    """The rules alone: thresholds, and texts compared where the thresholds leave candidates."""
    work = mine_end.work(quick)
    made = work.pairs
    shard = text_shard(tuple(made.passages))
    found = search(made.query_vectors, made.passage_vectors, mine_end.CANDIDATES, engine="auto")
    score = np.einsum("nd,nd->n", made.query_vectors, made.passage_vectors[made.positive])
    offsets = np.arange(len(made.queries) + 1, dtype=np.uint64)
    cluster = np.arange(len(made.passages), dtype=np.uint64)
    number, none = np.arange(len(made.queries), dtype=np.uint64), np.zeros(0, np.uint64)
    queries = (
        number.astype(np.uint32), number, none.astype(np.uint32), none, none,
        offsets, made.positive.astype(np.uint32), score,
    )  # fmt: skip
    rules = {"percent": mine_end.SHARE, "k": mine_end.KEEP, "skip": 0}

    def ours(near: float | None = 0.7) -> Any:
        fresh = _rust.NegativeFilter(cluster, cluster, [shard])  # knows nothing of the texts yet
        return fresh.run(found.row, found.score, queries, {**rules, "near_jaccard": near})

    def theirs() -> Reported:
        """All of mine_hard_negatives that is not faiss."""
        run = work.once("st-faiss")
        said = work.said["st-faiss"]
        return Reported(None, Sample(said["cpu"] - said["search_cpu"], 0.0, run.sample.peak))

    def derive(_: Any) -> dict[str, Any]:
        alone = min(timed(lambda: ours(None))[1].cpu for _ in range(3))
        return {"without_texts_us": round(alone / len(made.queries) * 1e6, 3)}

    return Case(
        name="mine.filter",
        unit="us/query",
        work=len(made.queries),
        measure="cpu",
        ours=ours,
        rivals={"mine_hard_negatives without faiss": theirs},
        goal="1 us/query",
        facts={**_pair_facts(work), "candidates": mine_end.CANDIDATES},
        derive=derive,
    )


def near_duplicates(quick: bool) -> Case:
    """Share of mined negatives whose word-3-gram Jaccard with the positive reaches 0.7."""
    work = mine_end.work(quick)
    return Case(
        name="mine.near_duplicates",
        unit="share",
        work=1,
        ours=lambda: work.once("embkit"),
        rivals=work.rivals(),
        score=work.near_share,
        goal="0",
        facts=_pair_facts(work),
        rounds=1,
    )


CASES = (
    exact_64k,
    exact_100k,
    exact_300k,
    approx_300k,
    join_300k,
    join_1m,
    growth,
    end_to_end,
    filtering,
    near_duplicates,
)
