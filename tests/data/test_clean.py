"""Rewriting of examples against a naive one that walks over lists and dicts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from embkit.data import tables
from embkit.data.clean import clean_examples
from embkit.data.tables import Examples

N = 12  # texts


def table(rows: list[dict[str, Any]], kind: str) -> Examples:
    def pack(name: str) -> tuple[np.ndarray, np.ndarray]:
        lists = [r.get(name, []) for r in rows]
        flat = np.array([x for part in lists for x in part], np.uint64)
        return tables.offsets_of(np.array([len(x) for x in lists], np.int64)), flat

    p_off, p = pack("positive")
    n_off, n = pack("negative")
    return Examples(
        name="t",
        kind=kind,
        query=np.array([r["query"] for r in rows], np.uint64),
        positive_offsets=p_off,
        positive=p,
        negative_offsets=n_off,
        negative=n,
        negative_score=np.arange(len(n), dtype=np.float32),
        score=np.array([r.get("score", np.nan) for r in rows], np.float32),
        label=np.array([r.get("label", -1) for r in rows], np.int32),
        weight=np.array([r.get("weight", 1) for r in rows], np.float32),
        provenance=np.zeros(len(rows), np.uint32),
    )


def rows_of(found: Examples) -> list[dict[str, Any]]:
    out = []
    for i in range(len(found)):
        p = slice(*found.positive_offsets[i : i + 2].astype(int).tolist())
        n = slice(*found.negative_offsets[i : i + 2].astype(int).tolist())
        out.append(
            {
                "query": int(found.query[i]),
                "positive": found.positive[p].tolist(),
                "negative": found.negative[n].tolist(),
                "score": float(found.score[i]),
                "label": int(found.label[i]),
                "weight": float(found.weight[i]),
            }
        )
    return out


def naive_retrieval(
    rows: list[dict[str, Any]], rep: list[int], leaked: set[int], action: str, conflicts: str
) -> tuple[list[dict[str, Any]], dict[str, int], set[tuple[int, int]]]:
    """The rows that are left, some counts, and the (query, text) that are called both."""
    kept: list[dict[str, Any]] = []
    for row in rows:
        texts = [row["query"], *row["positive"]]
        if any(t in leaked for t in texts):
            continue
        if action == "drop" and any(rep[t] != t for t in texts):
            continue
        stand = (lambda t: rep[t]) if action == "merge" else (lambda t: t)
        query = stand(row["query"])
        positive = [stand(t) for t in row["positive"] if stand(t) != query]
        negative = [stand(t) for t in row.get("negative", []) if t not in leaked]
        if positive:
            weight = float(row.get("weight", 1))
            kept.append(
                {"query": query, "positive": positive, "negative": negative, "weight": weight}
            )
    said = [(r["query"], t) for r in kept for t in r["positive"]]
    both = set(said) & {(r["query"], t) for r in kept for t in r["negative"]}
    counts = {"duplicate_pairs": len(said) - len(set(said)), "conflicts": len(both)}
    if conflicts == "drop":
        for row in kept:
            for side in ("positive", "negative"):
                row[side] = [t for t in row[side] if (row["query"], t) not in both]
    counts["conflicting"] = sum(not r["positive"] for r in kept)
    kept = [r for r in kept if r["positive"]]
    answers = {q: {t for r in kept if r["query"] == q for t in r["positive"]} for q in range(N)}
    counts["several_positives"] = sum(len(a) > 1 for a in answers.values())
    out: list[dict[str, Any]] = []
    place: dict[int, dict[str, Any]] = {}
    for row in kept:
        query, positive, negative = row["query"], row["positive"], row["negative"]
        target = place.get(query) if action == "merge" else None
        if target is None:
            target = {"query": query, "positive": [], "negative": [], "weight": 0.0}
            place[query] = target
            out.append(target)
        if action == "merge":
            target["positive"] += [
                t for t in dict.fromkeys(positive) if t not in target["positive"]
            ]
            target["negative"] += [
                t for t in dict.fromkeys(negative) if t not in target["negative"]
            ]
        else:
            target["positive"], target["negative"] = positive, negative
        target["weight"] = max(target["weight"], row["weight"])
    for row in out:
        row["negative"] = [t for t in row["negative"] if t not in (row["query"], *row["positive"])]
    return out, counts, both


texts = st.integers(0, N - 1)
retrieval_rows = st.lists(
    st.fixed_dictionaries(
        {
            "query": texts,
            "positive": st.lists(texts, min_size=1, max_size=3),
            "negative": st.lists(texts, max_size=3),
            "weight": st.sampled_from([0.5, 1.0, 2.0]),
        }
    ),
    max_size=14,
)


@st.composite
def stars(draw: st.DrawFn) -> list[int]:
    """Representatives that stand for themselves, as star clusters do."""
    heads = draw(st.lists(st.booleans(), min_size=N, max_size=N))
    first = [i for i in range(N) if heads[i]] or [0]
    return [i if i in first else draw(st.sampled_from(first)) for i in range(N)]


@settings(max_examples=300)
@given(
    retrieval_rows,
    stars(),
    st.sets(texts, max_size=3),
    st.sampled_from(["merge", "drop", "mark"]),
    st.sampled_from(["keep", "drop"]),
)
def test_retrieval_equals_naive(
    rows: list[dict[str, Any]], rep: list[int], leaked: set[int], action: str, conflicts: str
) -> None:
    flags = np.zeros(N, bool)
    flags[list(leaked)] = True
    done = clean_examples(
        table(rows, "retrieval"),
        representative=np.array(rep, np.uint64),
        leaked=flags,
        action=action,
        conflicts=conflicts,
    )
    got, counts = done.table, done.counts
    want, numbers, both = naive_retrieval(rows, rep, leaked, action, conflicts)
    assert {k: counts[k] for k in numbers} == numbers
    assert {(int(q), int(t)) for q, t in done.conflicts} == both
    keys = ("query", "positive", "negative", "weight")
    assert [{k: r[k] for k in keys} for r in rows_of(got)] == [
        {k: r[k] for k in keys} for r in want
    ]
    reasons = ("leaked", "duplicates", "same_text", "conflicting", "merged")
    assert counts["before"] - sum(counts[r] for r in reasons) == counts["after"] == len(got)


def test_a_second_pass_changes_nothing() -> None:
    rng = np.random.default_rng(1)
    rows = [
        {"query": int(a), "positive": [int(b), int(c)], "negative": [int(d)]}
        for a, b, c, d in rng.integers(0, N, (40, 4))
    ]
    rep = np.arange(N, dtype=np.uint64)
    rep[[3, 7]] = 1
    none = np.zeros(N, bool)
    once = clean_examples(table(rows, "retrieval"), representative=rep, leaked=none).table
    again = clean_examples(once, representative=rep, leaked=none)
    counts = again.counts
    assert str(rows_of(once)) == str(rows_of(again.table))
    assert counts["merged"] == counts["same_text"] == 0


def test_sentence_pairs_keep_near_duplicates_and_join_repeats() -> None:
    rows = [
        {"query": 0, "positive": [1], "score": 5.0},  # near-duplicates: that is the signal
        {"query": 1, "positive": [0], "score": 4.0},  # the same pair the other way round
        {"query": 2, "positive": [2], "score": 5.0},  # a text with itself
        {"query": 3, "positive": [4], "score": 1.0},  # 4 is in an evaluation set
    ]
    rep = np.arange(N, dtype=np.uint64)
    rep[1] = 0
    leaked = np.zeros(N, bool)
    leaked[4] = True
    done = clean_examples(table(rows, "sts"), representative=rep, leaked=leaked)
    left = rows_of(done.table)
    assert [(r["query"], r["positive"], r["score"]) for r in left] == [(0, [1], 4.5)]
    counts = done.counts
    assert (counts["merged"], counts["same_text"], counts["leaked"]) == (1, 1, 1)
    assert done.conflicts.tolist() == [[0, 1]]


def test_pairs_whose_scores_contradict_each_other_can_go() -> None:
    rows = [
        {"query": 0, "positive": [1], "score": 5.0},
        {"query": 1, "positive": [0], "score": 1.0},
        {"query": 2, "positive": [3], "score": 2.0},
        {"query": 3, "positive": [2], "score": 2.0},  # a repeat without a contradiction
    ]
    done = clean_examples(
        table(rows, "sts"),
        representative=np.arange(N, dtype=np.uint64),
        leaked=np.zeros(N, bool),
        conflicts="drop",
    )
    left = rows_of(done.table)
    assert [(r["query"], r["positive"], r["score"]) for r in left] == [(2, [3], 2.0)]
    counts = done.counts
    assert (counts["conflicting"], counts["conflicts"], counts["merged"]) == (2, 1, 1)


def test_labelled_copies_join_only_with_the_same_label() -> None:
    rows = [
        {"query": 0, "label": 0},
        {"query": 1, "label": 0},  # near-duplicate of 0, same label: goes
        {"query": 2, "label": 1},  # near-duplicate of 0, another label: stays and is counted
        {"query": 5, "label": 1},
    ]
    rep = np.arange(N, dtype=np.uint64)
    rep[[1, 2]] = 0
    none = np.zeros(N, bool)
    done = clean_examples(table(rows, "classification"), representative=rep, leaked=none)
    left = [(r["query"], r["label"]) for r in rows_of(done.table)]
    assert left == [(0, 0), (2, 1), (5, 1)]
    assert done.counts["merged"] == 1
    assert done.conflicts.tolist() == [[0, 0]]
    done = clean_examples(
        table(rows, "classification"), representative=rep, leaked=none, conflicts="drop"
    )
    assert [(r["query"], r["label"]) for r in rows_of(done.table)] == [(5, 1)]
    assert (done.counts["conflicting"], done.counts["merged"]) == (3, 0)


def test_empty_tables_stay_empty() -> None:
    for kind in ("retrieval", "sts", "classification"):
        done = clean_examples(
            table([], kind), representative=np.arange(N, dtype=np.uint64), leaked=np.zeros(N, bool)
        )
        assert len(done.table) == done.counts["after"] == len(done.conflicts) == 0


def test_scores_stay_with_their_negatives() -> None:
    rows = [
        {"query": 0, "positive": [1], "negative": [2, 3]},
        {"query": 0, "positive": [4], "negative": [4, 5]},
    ]
    got = clean_examples(
        table(rows, "retrieval"),
        representative=np.arange(N, dtype=np.uint64),
        leaked=np.zeros(N, bool),
    ).table
    assert got.negative.tolist() == [2, 3, 5]
    assert got.negative_score.tolist() == [0.0, 1.0, 3.0]
    assert math.isnan(got.score[0])
