"""The numbers of a result, arranged: models by widths, models by kinds of tasks, BM25.

A result is what ``embkit.pipeline.run`` returns and ``result.json`` holds. Nothing is computed here
but selection and rounding, so that every number in a table can be found in that file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MAIN = {"retrieval": "ndcg@10", "sts": "spearman", "classification": "accuracy"}
TITLES = {
    "retrieval": "Retrieval, nDCG@10",
    "sts": "Similarity, Spearman",
    "classification": "Classification, accuracy",
}


def splits(result: Mapping[str, Any]) -> list[str]:
    """The splits that were scored, test first."""
    return sorted(result["scores"], key=lambda name: (name != "test", name))


def widths(result: Mapping[str, Any]) -> list[str]:
    """MRL widths, widest first, as JSON keys."""
    return [str(w) for w in sorted(map(int, result["dims"]), reverse=True)]


def kinds(result: Mapping[str, Any], split: str) -> list[str]:
    """Kinds of tasks in a split, in the usual order."""
    there = {kind for model in result["scores"][split].values() for kind in model["types"]}
    return [kind for kind in MAIN if kind in there]


def bm25(result: Mapping[str, Any], split: str) -> float | None:
    """Mean nDCG@10 of BM25 over the retrieval sets, when it was scored."""
    for model in result["scores"][split].values():
        found = [t["bm25"]["ndcg@10"] for t in model["tasks"].values() if "bm25" in t]
        if found:
            return float(sum(found) / len(found))
    return None


def rows(result: Mapping[str, Any], split: str) -> list[tuple[str, list[float | None]]]:
    """One row per model: the mean at each width, then the main measure per kind at full width."""
    full = widths(result)[0]
    out: list[tuple[str, list[float | None]]] = []
    for name, scores in result["scores"][split].items():
        cells = [scores["mean"].get(w) for w in widths(result)]
        cells += [scores["types"].get(kind, {}).get(full) for kind in kinds(result, split)]
        out.append((name, cells))
    baseline = bm25(result, split)
    if baseline is not None:
        blank: list[float | None] = [None] * len(widths(result))
        measures = [baseline if kind == "retrieval" else None for kind in kinds(result, split)]
        out.append(("BM25", blank + measures))
    return out


def header(result: Mapping[str, Any], split: str) -> list[str]:
    """Column titles of :func:`rows`."""
    return [f"mean @{w}" for w in widths(result)] + [
        f"{kind} {MAIN[kind]}" for kind in kinds(result, split)
    ]


def table(result: Mapping[str, Any]) -> str:
    """Stages by widths as text, one block per split, test first."""
    blocks = []
    for split in splits(result):
        head = header(result, split)
        body = rows(result, split)
        left = max(len(name) for name, _ in [*body, (split, [])])
        sizes = [max(len(title), 6) for title in head]
        lines = [
            f"{split:<{left}}  " + "  ".join(f"{t:>{s}}" for t, s in zip(head, sizes, strict=True))
        ]
        for name, cells in body:
            shown = [f"{number(c):>{s}}" for c, s in zip(cells, sizes, strict=True)]
            lines.append(f"{name:<{left}}  " + "  ".join(shown))
        blocks.append("\n".join(line.rstrip() for line in lines))
    return "\n\n".join(blocks)


def number(value: float | None) -> str:
    """Two decimals, or a dash."""
    return "–" if value is None else f"{value:.2f}"
