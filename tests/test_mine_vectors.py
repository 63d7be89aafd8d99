"""Mining from arrays against a naive miner, and everything that a caller can get wrong."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from embkit.errors import UsageError
from embkit.mine import Negatives, Rules, mine_vectors, miner

WORDS = [
    "red",
    "green",
    "blue",
    "old",
    "new",
    "fast",
    "slow",
    "big",
    "small",
    "round",
    "flat",
    "warm",
]


def unit(rng: np.random.Generator, n: int, d: int = 12) -> np.ndarray:
    x = rng.standard_normal((n, d)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def shingles(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


def jaccard(a: str, b: str) -> float:
    x, y = shingles(a), shingles(b)
    return len(x & y) / len(x | y)


class Given:
    """Queries with one to three positives; some passages are copies or near-copies of others."""

    def __init__(self, seed: int, n: int = 150, m: int = 40) -> None:
        rng = np.random.default_rng(seed)
        self.corpus, self.queries = unit(rng, n), unit(rng, m)
        self.texts = [" ".join(rng.choice(WORDS, 9)) for _ in range(n)]
        for a, b in rng.integers(0, n, (20, 2)):
            self.texts[a] = self.texts[b]
            self.corpus[a] = self.corpus[b]
        for a, b in rng.integers(0, n, (20, 2)):  # one word more: Jaccard 7/8
            self.texts[a] = self.texts[b] + " too"
        self.positives = [
            rng.choice(n, rng.integers(1, 4), replace=False).tolist() for _ in range(m)
        ]
        self.query_texts = [" ".join(rng.choice(WORDS, 5)) for _ in range(m)]
        self.query_texts[3] = self.texts[7]

    def mine(self, **settings: Any) -> Negatives:
        return mine_vectors(
            self.queries, self.corpus, self.positives, texts=self.texts,
            query_texts=self.query_texts, **settings,
        )  # fmt: skip

    def naive(self, rules: Rules, rerank: Any = None) -> list[list[int]]:
        out = []
        for i, positives in enumerate(self.positives):
            score = self.corpus.astype(float) @ self.queries[i].astype(float)
            ranked = sorted(range(len(score)), key=lambda r: (-np.float32(score[r]), r))
            close = [self.texts[p] for p in positives] + [self.query_texts[i]]
            seen, left = set(close), []
            for row in ranked:
                if self.texts[row] not in seen:
                    seen.add(self.texts[row])
                    left.append(row)
            low = min(score[p] for p in positives)
            kept = []
            for row in left[rules.skip : rules.candidates]:
                s = score[row]
                if rules.max_score is not None and s > rules.max_score:
                    continue
                if rules.margin is not None and s > low - rules.margin:
                    continue
                share = rules.percent_of_positive
                if share is not None and s > low - abs(low) * (1 - share):
                    continue
                if rules.min_score is not None and s < rules.min_score:
                    continue
                if any(jaccard(self.texts[row], t) >= 0.7 for t in close):
                    continue
                kept.append(row)
            if rerank is not None:
                query, bar = self.query_texts[i], rules.rerank_percent or 1.0
                least = min(rerank(query, self.texts[p]) for p in positives)
                kept = [
                    row for row in kept[: rules.rerank_candidates]
                    if rerank(query, self.texts[row]) <= least - abs(least) * (1 - bar)
                ]  # fmt: skip
            out.append(kept[: rules.k])
        return out


def rows(found: Negatives) -> list[list[int]]:
    ends = found.offsets.astype(int).tolist()
    return [found.row[a:b].tolist() for a, b in itertools.pairwise(ends)]


@pytest.mark.parametrize(
    "settings",
    [
        {"percent_of_positive": None},
        {"skip": 3, "candidates": 20},
        {"percent_of_positive": None, "margin": 0.1, "min_score": -0.4},
        {"percent_of_positive": 0.9, "max_score": 0.3, "k": 9},
    ],
)
def test_negatives_equal_a_naive_miner(settings: dict[str, Any]) -> None:
    for seed in range(4):
        given = Given(seed)
        found = given.mine(**settings)
        assert rows(found) == given.naive(Rules(**settings))
        assert found.audit["candidates"] == sum(
            n for name, n in found.audit.items()
            if name not in ("queries", "candidates", "drawn", "short_queries")
        )  # fmt: skip


def test_the_result_does_not_depend_on_copies_blocks_or_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = Given(1)
    want = given.mine(k=6)
    assert want.audit["short_queries"] > 0  # k is larger than what survives somewhere
    many = given.mine(k=6, threads=7)
    monkeypatch.setattr(miner, "MOST", 13)
    small = given.mine(k=6, threads=1)
    for other in (small, many):
        for name in ("offsets", "row", "score", "rank"):
            assert np.array_equal(getattr(other, name), getattr(want, name))
    # 300 copies of the nearest negatives fill every list: the same negatives at the same ranks.
    flat = np.repeat(want.row[:6].astype(int), 50)
    given.corpus = np.concatenate([given.corpus, given.corpus[flat]])
    given.texts += [given.texts[r] for r in flat]
    again = given.mine(k=6)
    assert rows(again) == rows(want) and np.array_equal(again.rank, want.rank)
    assert again.audit["repeat"] > want.audit["repeat"]


def test_an_approximate_search_is_the_same_in_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    centres = unit(rng, 60, 16)
    corpus = centres[rng.integers(0, 60, 6000)] + 0.1 * unit(rng, 6000, 16)
    corpus /= np.linalg.norm(corpus, axis=1, keepdims=True)
    queries = corpus[rng.permutation(6000)[:700]] + 0.05 * unit(rng, 700, 16)
    positives = (queries @ corpus.T).argmax(axis=1)
    settings: dict[str, Any] = {"near_duplicate": None, "engine": "ivf", "recall": 0.9, "k": 5}
    want = mine_vectors(queries, corpus, positives, **settings)
    assert want.report["engine"] == "ivf" and want.report["recall"] >= 0.9
    for most, memory in ((64, 0), (350, 40 << 20)):
        monkeypatch.setattr(miner, "MOST", most)
        found = mine_vectors(queries, corpus, positives, memory=memory, threads=2, **settings)
        for name in ("offsets", "row", "score", "rank"):
            assert np.array_equal(getattr(found, name), getattr(want, name))
        assert found.report == want.report


def test_a_reranker_is_asked_in_batches_and_agrees_with_a_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def relevance(query: str, passage: str) -> float:
        a, b = query.split(), passage.split()
        return len(set(a) & set(b)) + len(passage) / 100

    calls: list[list[int]] = []

    def reranker(queries: list[str], passages: list[str]) -> list[float]:
        pairs = list(zip(queries, passages, strict=True))
        calls.append([len(q) + len(p) for q, p in pairs])
        return [relevance(q, p) for q, p in pairs]

    from embkit.mine import rerank

    monkeypatch.setattr(rerank, "BATCH", 200)
    given = Given(2)
    settings: dict[str, Any] = {"rerank_candidates": 12, "rerank_percent": 0.9}
    found = given.mine(reranker=reranker, percent_of_positive=None, **settings)
    rules = Rules(percent_of_positive=None, **settings)
    assert rows(found) == given.naive(rules, relevance)
    assert found.audit["rerank"] > 0
    pairs = sum(map(len, calls))
    assert len(calls) == -(-pairs // 200)  # 40 queries, and no call for one of them
    lengths = [n for call in calls for n in call]
    assert lengths == sorted(lengths, reverse=True)
    assert found.rerank is not None and np.isfinite(found.rerank).all()

    class Cross:
        def predict(self, pairs: list[tuple[str, str]]) -> np.ndarray:
            return np.array([relevance(q, p) for q, p in pairs])

    same = given.mine(reranker=Cross(), percent_of_positive=None, **settings)
    assert rows(same) == rows(found)
    with pytest.raises(UsageError, match="one finite number"):
        given.mine(reranker=lambda q, p: [1.0])


def test_refills_are_seeded_and_marked() -> None:
    given = Given(3)
    settings: dict[str, Any] = {"k": 5, "candidates": 12, "percent_of_positive": 0.5}
    short = given.mine(**settings)
    assert short.audit["short_queries"] > 5
    relaxed = given.mine(refill="relax", **settings)
    drawn = given.mine(refill="random", seed=4, **settings)
    for found, marks in ((relaxed, relaxed.rank >> 31 == 1), (drawn, drawn.rank == 2**32 - 1)):
        assert found.audit["relaxed"] + found.audit["drawn"] == marks.sum() > 0
        assert len(found.row) - marks.sum() == len(short.row)
        for i, (a, b) in enumerate(zip(rows(short), rows(found), strict=True)):
            assert b[: len(a)] == a and not set(b) & set(given.positives[i])
    assert np.isnan(drawn.score[drawn.rank == 2**32 - 1]).all()
    assert rows(given.mine(refill="random", seed=4, **settings)) == rows(drawn)
    assert rows(given.mine(refill="random", seed=5, **settings)) != rows(drawn)


def test_odd_sizes() -> None:
    rng = np.random.default_rng(0)
    one = mine_vectors(unit(rng, 1), unit(rng, 5), [0], k=4, near_duplicate=None,
                       percent_of_positive=None)  # fmt: skip
    assert sorted(one.row.tolist()) == [1, 2, 3, 4]
    same = np.ones((500, 8), np.float32)
    every = mine_vectors(same[:3], same, [0, 1, 2], k=4, near_duplicate=None,
                         percent_of_positive=None)  # fmt: skip
    assert rows(every) == [[1, 2, 3, 4], [0, 2, 3, 4], [0, 1, 3, 4]]
    parts = mine_vectors([same[:1], same[1:3]], [same[:7], same[7:]], [0, 1, 2], k=4,
                         near_duplicate=None, percent_of_positive=None)  # fmt: skip
    assert rows(parts) == rows(every)


def test_ids_and_jagged_positives() -> None:
    given = Given(5)
    names = [f"p{i}" for i in range(len(given.texts))]
    want = rows(given.mine())
    named = [[names[p] for p in one] for one in given.positives]
    found = mine_vectors(
        given.queries, given.corpus, {i: named[i] for i in range(40)}, texts=given.texts,
        query_texts=given.query_texts, query_ids=range(40), passage_ids=names,
    )  # fmt: skip
    assert rows(found) == want
    flat = np.concatenate(given.positives)
    offsets = np.cumsum([0, *map(len, given.positives)])
    given.positives = (offsets, flat)  # type: ignore[assignment]
    assert rows(given.mine()) == want


def test_bad_input_is_named() -> None:
    rng = np.random.default_rng(0)
    q, c, pos = unit(rng, 4), unit(rng, 20), [0, 1, 2, 3]

    def fails(match: str, *args: Any, **settings: Any) -> None:
        with pytest.raises(UsageError, match=match):
            mine_vectors(*args, **{"near_duplicate": None, **settings})

    fails("12 dimensions, the corpus has 8", q, unit(rng, 20, 8), pos)
    hole, zero = c.copy(), q.copy()
    hole[[5, 17], 3] = np.nan
    zero[2] = 0
    fails(r"2 vectors of the corpus are NaN(.|\n)*rows 5, 17", q, hole, pos)
    fails(r"1 vectors of the queries are zero(.|\n)*rows 2", zero, c, pos)
    fails("3 passages for k = 4", q, c[:3], [0, 1, 2, 0])
    fails("positive 20 is not in the corpus of 20", q, c, [0, 1, 2, 20])
    fails("'x' is not in the corpus", q, c, ["0", "1", "2", "x"],
          passage_ids=[str(i) for i in range(20)])  # fmt: skip
    fails(
        "id 'a' of the passages comes twice", q, c, pos, passage_ids=["a", *"abcdefghijklmnopqrs"]
    )
    fails("comes twice", q, c, pos, query_ids=[1, 2, 2, 3])
    fails("1 queries have no positive", q, c, [[0], [1], [], [3]])
    fails("Positives of 3 queries for 4", q, c, [0, 1, 2])
    fails("give texts", q, c, pos, near_duplicate=0.7)
    fails("19 texts for 20 passages", q, c, pos, texts=["a"] * 19)
    fails("reads texts", q, c, pos, reranker=lambda a, b: a)
    fails("no reranker", q, c, pos, texts=["a"] * 20, query_texts=["b"] * 4, reranker=3)
    fails("int64", q.astype(int), c, pos)
    fails("candidates = 3 is less", q, c, pos, candidates=3)
    fails("margin = -1", q, c, pos, margin=-1)
    fails("one integer for each passage", q, c, pos, clusters=np.zeros(3, int))
