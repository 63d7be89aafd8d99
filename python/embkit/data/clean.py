"""Rewriting example tables after near-duplicates and leaks are known: pure numpy, no files.

What a task's examples may lose depends on its kind. Retrieval pairs say "this answers that", so
near-duplicate texts stand for each other: both sides move to the representative and examples with
the same query become one with several positives. Sentence pairs are *about* small differences, and
a class belongs to the text it was given for, so those keep their own texts; only repeats go.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from embkit.data.tables import (
    Array,
    Examples,
    any_jagged,
    counts_of,
    keep_jagged,
    offsets_of,
    owners,
    take_jagged,
)

ACTIONS = ("merge", "drop", "mark")


def clean_examples(
    table: Examples, *, representative: Array, leaked: Array, action: str = "merge"
) -> tuple[Examples, dict[str, int]]:
    """Apply near-duplicates and leaks to one task.

    Args:
        table: the examples, in text rows.
        representative: U64 [texts], the row that stands for each text; its own when alone.
        leaked: bool [texts], texts that are in an evaluation set.
        action: ``"merge"``, ``"drop"`` (examples with a text that is not its representative go) or
            ``"mark"`` (texts stay as they are).

    Returns:
        The new table and its counts: before, leaked, leaked_negatives, duplicates, same_text,
        merged, conflicting_labels, after.
    """
    counts = {"before": len(table)}
    bad = leaked[table.query] | any_jagged(table.positive_offsets, leaked[table.positive])
    table = table.keep(~bad)
    counts["leaked"] = int(bad.sum())
    keep = ~leaked[table.negative]
    counts["leaked_negatives"] = int((~keep).sum())
    table = _negatives(table, keep)
    copies = representative != np.arange(len(representative), dtype=representative.dtype)
    counts["duplicates"] = 0
    if action == "drop":
        twice = copies[table.query]
        if table.kind == "retrieval":
            twice = twice | any_jagged(table.positive_offsets, copies[table.positive])
        counts["duplicates"] = int(twice.sum())
        table = table.keep(~twice)
    if table.kind == "retrieval":
        if action == "merge":
            table = table.mapped(representative)
        table = _retrieval(table, counts, merge=action == "merge")
    elif table.kind == "sts":
        table = _pairs(table, counts)
    else:
        groups = representative if action == "merge" else None
        table = _classes(table, counts, groups)
    counts["after"] = len(table)
    return table, counts


def _negatives(table: Examples, keep: Array) -> Examples:
    offsets, negative, score = keep_jagged(
        table.negative_offsets, keep, table.negative, table.negative_score
    )
    return replace(table, negative_offsets=offsets, negative=negative, negative_score=score)


def _retrieval(table: Examples, counts: dict[str, int], *, merge: bool) -> Examples:
    """Drop positives that are the query, then join examples of the same query."""
    own = owners(table.positive_offsets)
    keep = table.positive != table.query[own]
    offsets, positive = keep_jagged(table.positive_offsets, keep, table.positive)
    table = replace(table, positive_offsets=offsets, positive=positive)
    some = counts_of(offsets) > 0
    counts["same_text"] = int((~some).sum())
    table = table.keep(some)
    before = len(table)
    if merge:
        table = _merge_queries(table)
    counts["merged"] = before - len(table)
    return _negatives_of_others(table)


def _merge_queries(table: Examples) -> Examples:
    """One example per query, in order of first appearance, with the union of the texts."""
    group, first = _groups(table.query)
    p_off, positive = _union(group, table.positive_offsets, table.positive)[:2]
    n_off, negative, score = _union(
        group, table.negative_offsets, table.negative, table.negative_score
    )
    weight = np.zeros(len(first), np.float32)
    np.maximum.at(weight, group, table.weight)
    return replace(
        table,
        query=table.query[first],
        positive_offsets=p_off,
        positive=positive,
        negative_offsets=n_off,
        negative=negative,
        negative_score=score,
        score=table.score[first],
        label=table.label[first],
        weight=weight,
        provenance=table.provenance[first],
    )


def _negatives_of_others(table: Examples) -> Examples:
    """Remove negatives that are the query or one of the positives of their own example."""
    if not len(table.negative):
        return table
    own = owners(table.negative_offsets)
    pairs = _keys(own, table.negative)
    positives = _keys(owners(table.positive_offsets), table.positive)
    keep = (table.negative != table.query[own]) & ~np.isin(pairs, positives)
    return _negatives(table, keep)


def _pairs(table: Examples, counts: dict[str, int]) -> Examples:
    """Sentence pairs: drop a text against itself, join repeats in either order (mean score)."""
    second = table.positive[table.positive_offsets[:-1].astype(np.int64)]
    different = second != table.query
    counts["same_text"] = int((~different).sum())
    table, second = table.keep(different), second[different]
    low, high = np.minimum(table.query, second), np.maximum(table.query, second)
    group, first = _groups(_keys(low, high))
    counts["merged"] = len(table) - len(first)
    total = np.bincount(group, weights=table.score.astype(np.float64), minlength=len(first))
    mean = total / np.bincount(group, minlength=len(first)).clip(min=1)
    return replace(table.take(first), score=mean.astype(np.float32))


def _classes(table: Examples, counts: dict[str, int], representative: Array | None) -> Examples:
    """Labelled texts: join copies with the same label; copies with another label are counted."""
    text = table.query if representative is None else representative[table.query]
    counts["same_text"] = 0
    _, first = _groups(_keys(text, table.label.astype(np.int64) + 1))
    counts["merged"] = len(table) - len(first)
    table = table.take(first)
    texts = text[first]
    counts["conflicting_labels"] = len(texts) - len(np.unique(texts))
    return table


def _groups(key: Array) -> tuple[Array, Array]:
    """Number equal keys 0, 1, ... by first appearance: group of each item, first item of each."""
    _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return rank[inverse.reshape(-1)], first[order].astype(np.int64)


def _union(group: Array, offsets: Array, *values: Array) -> tuple[Array, ...]:
    """Regroup a jagged column by ``group`` of its rows, each value once, in first-seen order."""
    groups = int(group.max()) + 1 if len(group) else 0
    rows = np.argsort(group, kind="stable")  # rows of a group side by side, in their order
    offsets, *values_t = take_jagged(offsets, rows, *values)
    owner = group[rows][owners(offsets)]
    _, first = np.unique(_keys(owner, values_t[0]), return_index=True)
    first = np.sort(first)
    counts = np.bincount(owner[first], minlength=groups)
    return (offsets_of(counts), *(v[first] for v in values_t))


def _keys(a: Array, b: Array) -> Array:
    """One sortable key per pair of row numbers (each below 2^32, checked)."""
    a, b = a.astype(np.uint64), b.astype(np.uint64)
    for part in (a, b):
        if len(part) and int(part.max()) >> 32:
            raise OverflowError("more than 2^32 texts or examples in one directory")
    return (a << np.uint64(32)) | b
