"""The reference of the Rust loader: from examples to the rows and keys of a batch, in numpy.

Losses never mask by row number: two rows may be the same text, or copies of each other. Each side
carries a key (the text's near-duplicate cluster, or the class), and a candidate is masked when its
key equals the positive's, or when its own query's key equals the row's: Gemini's rule
``q_i = q_j OR p_i = p_j``. Keys are re-indexed densely to int32 per batch, so they cannot collide.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from naive_draws import draws, key_of, sample

from embkit.errors import CorruptError, UsageError

KINDS = ("retrieval", "sts", "classification")


@dataclass(frozen=True, kw_only=True)
class Sides:
    """One batch as rows of the store and identity keys; B rows, H hard negatives each.

    Attributes:
        kind: of the task.
        query, positive: u64 [B] rows. hard: u64 [B, H] rows; absent ones repeat the positive,
            which costs nothing, as each distinct row is encoded once.
        query_key, positive_key: int32 [B]. hard_key: int32 [B, H].
        hard_mask: bool [B, H], False where a row has fewer than H hard negatives.
        score: float32 [B], gold similarity of an STS pair (zeros otherwise).
        weight: float32 [B] of each row in the loss.
    """

    kind: str
    query: np.ndarray
    positive: np.ndarray
    hard: np.ndarray
    query_key: np.ndarray
    positive_key: np.ndarray
    hard_key: np.ndarray
    hard_mask: np.ndarray
    score: np.ndarray
    weight: np.ndarray


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """The usable examples of one task, in store rows.

    Attributes:
        name, kind: of the task.
        query: u64 [m].
        positive_offsets, positive: jagged u64; empty for classification.
        hard_offsets, hard: jagged u64, the hard negatives to draw from.
        score, weight: float32 [m]. label: int32 [m].
        members: int64 [m], classification only: examples sorted by class;
        class_start: int64 [m], where the example's class begins in ``members``;
        class_size: int64 [m]; class_place: int64 [m], the example's own place in its class.
        skipped: examples that cannot be used, by reason.
    """

    name: str
    kind: str
    query: np.ndarray
    positive_offsets: np.ndarray
    positive: np.ndarray
    hard_offsets: np.ndarray
    hard: np.ndarray
    score: np.ndarray
    weight: np.ndarray
    label: np.ndarray
    members: np.ndarray
    class_start: np.ndarray
    class_size: np.ndarray
    class_place: np.ndarray
    skipped: dict[str, int]

    def __len__(self) -> int:
        return len(self.query)

    @classmethod
    def of(cls, table: Any, *, negatives: tuple[np.ndarray, np.ndarray] | None = None) -> TaskData:
        """Take over an examples table of the store.

        Args:
            table: an ``embkit.data.Examples`` (name, kind and its columns).
            negatives: mined (offsets u64 [m + 1], rows u64), aligned with the table; they replace
                the table's own.

        Raises:
            UsageError: an unknown kind, or no usable example.
            CorruptError: negatives that are not aligned with the table.
        """
        if table.kind not in KINDS:
            raise UsageError(
                f"Task {table.name!r} is of unknown kind {table.kind!r}.", fix=f"one of {KINDS}"
            )
        m = len(table.query)
        hard = (table.negative_offsets, table.negative) if negatives is None else negatives
        if len(hard[0]) != m + 1 or int(hard[0][-1]) != len(hard[1]):
            raise CorruptError(
                f"The mined negatives of task {table.name!r} are for {len(hard[0]) - 1} examples, "
                f"the store has {m}.",
                fix="mine again on this store",
            )
        usable, reason = _usable(table)
        if not usable.any():
            raise UsageError(
                f"Task {table.name!r} has no usable example: {reason}.",
                fix="give the task weight 0, or correct its data",
            )
        keep = np.flatnonzero(usable)
        p_off, p = _take(np.asarray(table.positive_offsets), np.asarray(table.positive), keep)
        h_off, h = _take(np.asarray(hard[0]), np.asarray(hard[1]), keep)
        label = np.asarray(table.label)[keep]
        dropped = m - len(keep)
        return cls(
            name=table.name,
            kind=table.kind,
            query=np.asarray(table.query)[keep].astype(np.uint64),
            positive_offsets=p_off,
            positive=p,
            hard_offsets=h_off,
            hard=h,
            score=np.nan_to_num(np.asarray(table.score, np.float32)[keep]),
            weight=np.asarray(table.weight, np.float32)[keep],
            label=label,
            skipped={reason: dropped} if dropped else {},
            **_classes(label),
        )

    def sides(self, examples: np.ndarray, *, seed: int, epoch: int, hard: int, store: Any) -> Sides:
        """The batch of some examples.

        Args:
            examples: u64 [B], numbers of usable examples.
            seed, epoch: with the task's name, the key of every draw.
            hard: hard negatives per row (retrieval only).
            store: gives ``cluster(rows)`` for the keys.
        """
        at = examples.astype(np.int64)
        empty = np.zeros((len(at), 0), np.uint64)
        base = Sides(
            kind=self.kind,
            query=self.query[at],
            positive=self._positives(at, key_of(seed, "positive", self.name, epoch)),
            hard=empty,
            query_key=np.arange(len(at), dtype=np.int32),
            positive_key=np.arange(len(at), dtype=np.int32),
            hard_key=empty.astype(np.int32),
            hard_mask=empty.astype(bool),
            score=self.score[at],
            weight=self.weight[at],
        )
        if self.kind == "sts":
            return base
        if self.kind == "classification":
            (key,) = dense(self.label[at])
            return replace(base, query_key=key, positive_key=key)
        rows, absent = self._hard(at, key_of(seed, "hard", self.name, epoch), hard)
        rows = np.where(absent, base.positive[:, None], rows)
        clusters = [np.asarray(store.cluster(np.ascontiguousarray(r))) for r in
                    (base.query, base.positive, rows.reshape(-1))]  # fmt: skip
        q_key, p_key, h_key = dense(*clusters)
        return replace(
            base,
            hard=rows,
            query_key=q_key,
            positive_key=p_key,
            hard_key=h_key.reshape(rows.shape),
            hard_mask=~absent,
        )

    def _positives(self, at: np.ndarray, key: int) -> np.ndarray:
        """One positive per example: of its own list, or another text of its class."""
        random = draws(key, at.astype(np.uint64))
        if self.kind == "classification":
            others = (self.class_size[at] - 1).astype(np.uint64)
            place = (random % others).astype(np.int64)
            place += place >= self.class_place[at]  # step over the example itself
            return self.query[self.members[self.class_start[at] + place]]
        start = self.positive_offsets[at]
        count = (self.positive_offsets[at + 1] - start).astype(np.uint64)
        return self.positive[start + (random % count).astype(np.int64)]

    def _hard(self, at: np.ndarray, key: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows u64 [B, count] drawn without replacement, and where there was none."""
        start = self.hard_offsets[at]
        chosen = sample(key, at.astype(np.uint64), self.hard_offsets[at + 1] - start, count)
        absent = chosen < 0
        if not len(self.hard):
            return np.zeros(chosen.shape, np.uint64), absent
        return self.hard[np.where(absent, 0, start[:, None] + chosen)], absent


def dense(*keys: np.ndarray) -> list[np.ndarray]:
    """Re-index arrays of keys of any integer type together: equal keys, equal int32 from 0."""
    _, index = np.unique(np.concatenate([k.reshape(-1) for k in keys]), return_inverse=True)
    cuts = np.cumsum([k.size for k in keys])[:-1]
    return [part.astype(np.int32) for part in np.split(index.reshape(-1), cuts)]


def _usable(table: Any) -> tuple[np.ndarray, str]:
    """Which examples can be trained on, and why the others cannot."""
    if table.kind == "classification":
        label = np.asarray(table.label)
        size = np.bincount(label[label >= 0], minlength=int(label.max(initial=0)) + 1)
        return (label >= 0) & (size[np.maximum(label, 0)] >= 2), "no other text of its class"
    positives = np.diff(np.asarray(table.positive_offsets).astype(np.int64))
    if table.kind == "sts":
        return (positives > 0) & np.isfinite(np.asarray(table.score)), "no second text or no score"
    return positives > 0, "no positive"


def _classes(label: np.ndarray) -> dict[str, np.ndarray]:
    members = np.argsort(label, kind="stable").astype(np.int64)
    first = np.searchsorted(label[members], label, side="left").astype(np.int64)
    after = np.searchsorted(label[members], label, side="right").astype(np.int64)
    place = np.empty(len(label), np.int64)
    place[members] = np.arange(len(label))
    return {
        "members": members,
        "class_start": first,
        "class_size": after - first,
        "class_place": place - first,
    }


def _take(
    offsets: np.ndarray, values: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a jagged column: int64 offsets, u64 values."""
    offsets = offsets.astype(np.int64)
    counts = np.diff(offsets)[rows]
    new = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(counts, out=new[1:])
    index = np.repeat(offsets[:-1][rows] - new[:-1], counts) + np.arange(new[-1])
    return new, values[index].astype(np.uint64)
