"""Rewriting example tables after near-duplicates and leaks are known: pure numpy, no files.

What a task's examples may lose depends on its kind. Retrieval pairs say "this answers that", so
near-duplicate texts stand for each other: both sides move to the representative and examples with
the same query become one with several positives. Sentence pairs are *about* small differences, and
a class belongs to the text it was given for, so those keep their own texts; only repeats go.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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
CONFLICTS = ("keep", "drop")


@dataclass(frozen=True)
class Cleaned:
    """What became of one task.

    Attributes:
        table: the examples that are left.
        counts: before, leaked, leaked_negatives, duplicates, same_text, merged, conflicts,
            conflicting, after; for retrieval also duplicate_pairs and several_positives.
        conflicts: U64 [conflicts, 2], text rows: a query and the text that is a positive of it in
            one example and a negative in another; two sentences with different scores; a text with
            different labels, twice.
    """

    table: Examples
    counts: dict[str, int]
    conflicts: Array


def clean_examples(
    table: Examples,
    *,
    representative: Array,
    leaked: Array,
    action: str = "merge",
    conflicts: str = "keep",
) -> Cleaned:
    """Apply near-duplicates and leaks to one task.

    Every example of ``before`` is in ``after`` or in exactly one of leaked, duplicates, same_text,
    conflicting and merged.

    Args:
        table: the examples, in text rows.
        representative: U64 [texts], the row that stands for each text; its own when alone.
        leaked: bool [texts], texts that are in an evaluation set.
        action: ``"merge"``, ``"drop"`` (examples with a text that is not its representative go) or
            ``"mark"`` (texts stay as they are).
        conflicts: what becomes of examples that contradict each other: ``"keep"`` (a text that is
            both stays a positive, scores are averaged, labels stay) or ``"drop"``.
    """
    counts = {"before": len(table), "conflicting": 0}
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
    drop = conflicts == "drop"
    if table.kind == "retrieval":
        if action == "merge":
            table = table.mapped(representative)
        table, found = _retrieval(table, counts, merge=action == "merge", drop=drop)
    elif table.kind == "sts":
        table, found = _pairs(table, counts, drop=drop)
    else:
        groups = representative if action == "merge" else None
        table, found = _classes(table, counts, groups, drop=drop)
    counts |= {"conflicts": len(found), "after": len(table)}
    return Cleaned(table, counts, found)


def _negatives(table: Examples, keep: Array) -> Examples:
    offsets, negative, score = keep_jagged(
        table.negative_offsets, keep, table.negative, table.negative_score
    )
    return replace(table, negative_offsets=offsets, negative=negative, negative_score=score)


def _retrieval(
    table: Examples, counts: dict[str, int], *, merge: bool, drop: bool
) -> tuple[Examples, Array]:
    """Drop positives that are the query, then join examples of the same query."""
    own = owners(table.positive_offsets)
    table, gone = _positives(table, table.positive != table.query[own])
    counts["same_text"] = gone
    positives = _keys(table.query[owners(table.positive_offsets)], table.positive)
    negatives = _keys(table.query[owners(table.negative_offsets)], table.negative)
    distinct = np.unique(positives)
    both = np.intersect1d(distinct, negatives)
    counts["duplicate_pairs"] = len(positives) - len(distinct)
    if drop and len(both):
        table = _negatives(table, ~np.isin(negatives, both))
        table, counts["conflicting"] = _positives(table, ~np.isin(positives, both))
        distinct = np.setdiff1d(distinct, both)
    of_query = np.unique(distinct >> np.uint64(32), return_counts=True)[1]
    counts["several_positives"] = int((of_query > 1).sum())
    before = len(table)
    if merge:
        table = _merge_queries(table)
    counts["merged"] = before - len(table)
    return _negatives_of_others(table), _rows(both)


def _positives(table: Examples, keep: Array) -> tuple[Examples, int]:
    """Keep some positives, and the examples that still have one; the number of those that go."""
    offsets, positive = keep_jagged(table.positive_offsets, keep, table.positive)
    some = counts_of(offsets) > 0
    table = replace(table, positive_offsets=offsets, positive=positive)
    return table.keep(some), int((~some).sum())


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


def _pairs(table: Examples, counts: dict[str, int], *, drop: bool) -> tuple[Examples, Array]:
    """Sentence pairs: drop a text against itself, join repeats in either order (mean score)."""
    second = table.positive[table.positive_offsets[:-1].astype(np.int64)]
    different = second != table.query
    counts["same_text"] = int((~different).sum())
    table, second = table.keep(different), second[different]
    pair = _keys(np.minimum(table.query, second), np.maximum(table.query, second))
    group, first = _groups(pair)
    differs = np.zeros(len(first), bool)
    bits = table.score.view(np.uint32)  # so that no score equals no score
    differs[group[bits != bits[first][group]]] = True
    found = _rows(pair[first][differs])
    if drop:
        counts["conflicting"] = int(differs[group].sum())
        table = table.keep(~differs[group])
        group, first = _groups(pair[~differs[group]])
    counts["merged"] = len(table) - len(first)
    total = np.bincount(group, weights=table.score.astype(np.float64), minlength=len(first))
    mean = total / np.bincount(group, minlength=len(first)).clip(min=1)
    return replace(table.take(first), score=mean.astype(np.float32)), found


def _classes(
    table: Examples, counts: dict[str, int], representative: Array | None, *, drop: bool
) -> tuple[Examples, Array]:
    """Labelled texts: join copies with the same label."""
    text = table.query if representative is None else representative[table.query]
    counts["same_text"] = 0
    group, first = _groups(text)
    differs = np.zeros(len(first), bool)
    differs[group[table.label != table.label[first][group]]] = True
    found = text[first][differs]
    if drop:
        counts["conflicting"] = int(differs[group].sum())
        table, text = table.keep(~differs[group]), text[~differs[group]]
    _, first = _groups(_keys(text, table.label.astype(np.int64) + 1))
    counts["merged"] = len(table) - len(first)
    return table.take(first), np.stack([found, found], axis=1)


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


def _rows(keys: Array) -> Array:
    """The pairs of row numbers that :func:`_keys` joined, U64 [n, 2]."""
    return np.stack([keys >> np.uint64(32), keys & np.uint64(0xFFFFFFFF)], axis=1)


def _keys(a: Array, b: Array) -> Array:
    """One sortable key per pair of row numbers (each below 2^32, checked)."""
    a, b = a.astype(np.uint64), b.astype(np.uint64)
    for part in (a, b):
        if len(part) and int(part.max()) >> 32:
            raise OverflowError("more than 2^32 texts or examples in one directory")
    return (a << np.uint64(32)) | b
