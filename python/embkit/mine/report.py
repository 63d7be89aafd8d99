"""What mining did, for people: the audit table, and a few queries with their negatives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from embkit.data.leaks import short
from embkit.data.loader import Store
from embkit.data.tables import Array, Examples, counts_of

_SAMPLES = 8
# What each line of the audit counts, in the order of the rules.
MEANING = {
    "candidates": "neighbours in the queries' lists",
    "positive": "a positive, the query itself, or of its class",
    "cluster": "in the near-duplicate cluster of a positive or of the query",
    "repeat": "in the cluster of a nearer candidate",
    "skipped": "rank below skip",
    "beyond": "rank from candidates on",
    "above_max": "score above max_score",
    "margin": "within margin of the lowest positive",
    "percent": "above percent_of_positive of the lowest positive",
    "below_min": "score below min_score",
    "near_duplicate": "a near-duplicate of a positive or of the query",
    "rerank": "by the reranker's score",
    "surplus": "not needed any more",
    "kept": "negatives",
    "relaxed": "negatives, taken back because there were too few",
    "drawn": "negatives from outside the lists, because there were too few",
    "short_queries": "queries with fewer than k",
}


def of_task(
    store: Store,
    table: Examples,
    columns: Mapping[str, Array],
    positive: Array,
    audit: dict[str, int],
) -> dict[str, Any]:
    """The report of a task; JSON types only.

    Args:
        columns: offsets, row, score and rank of its negatives.
        positive: scores of its positives, from the first miner.
    """
    offsets, score = columns["offsets"], columns["score"]
    counts = counts_of(offsets)
    samples = []
    step = max(1, len(table) // _SAMPLES)
    for i in range(0, len(table), step)[:_SAMPLES]:
        span = slice(int(offsets[i]), int(offsets[i + 1]))
        first = int(table.positive_offsets[i])
        kept = zip(
            *(columns[name][span].tolist() for name in ("row", "score", "rank")), strict=True
        )
        samples.append(
            {
                "query": short(store.text(int(table.query[i]))),
                "positive": short(store.text(int(table.positive[first]))),
                "positive_score": round(float(positive[first]), 4),
                "negatives": [
                    {"text": short(store.text(r)), "score": _number(s), "rank": k}
                    for r, s, k in kept
                ],
            }
        )
    return {
        "examples": len(table),
        "kept": int(counts.sum()),
        "per_query": {str(n): int(c) for n, c in enumerate(np.bincount(counts)) if c},
        "audit": audit,
        "mean_positive_score": _mean(positive),
        "mean_negative_score": _mean(score[np.isfinite(score)]),
        "samples": samples,
    }


def audit_table(report: Mapping[str, Any]) -> str:
    """The audit of every task as lines of text.

    Args:
        report: what ``report.json`` of a mined directory holds.
    """
    lines = []
    for name, task in report["tasks"].items():
        audit = task["audit"]
        lines.append(f"{name}: {task['kept']:,} negatives for {task['examples']:,} examples")
        shown = [(key, audit[key]) for key in MEANING if audit.get(key)]
        width = max((len(f"{n:,}") for _, n in shown), default=0)
        lines += [f"  {key:<15}{n:>{width},}  {MEANING[key]}" for key, n in shown]
    return "\n".join(lines)


def _mean(values: Array) -> float | None:
    return round(float(np.mean(values)), 4) if len(values) else None


def _number(value: float) -> float | None:
    return round(value, 4) if np.isfinite(value) else None
