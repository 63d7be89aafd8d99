"""Scores of a model that were never measured, in the form that evaluation gives."""

from __future__ import annotations

from typing import Any


def scores(base: float, *, bm25: bool = False) -> dict[str, Any]:
    """Three kinds of tasks, two widths; every figure differs and grows with ``base``."""
    kinds = {"retrieval": "ndcg@10", "sts": "spearman", "classification": "accuracy"}
    tasks: dict[str, Any] = {
        f"{kind}/a": {
            "type": kind,
            "widths": {w: {name: base + i - 64 / int(w)} for w in ("128", "32")},
        }
        for i, (kind, name) in enumerate(kinds.items())
    }
    if bm25:
        tasks["retrieval/a"]["bm25"] = {"ndcg@10": 83.91}
    types = {
        kind: {w: tasks[f"{kind}/a"]["widths"][w][name] for w in ("128", "32")}
        for kind, name in kinds.items()
    }
    mean = {w: sum(types[k][w] for k in types) / 3 for w in ("128", "32")}
    return {"tasks": tasks, "types": types, "mean": mean}
