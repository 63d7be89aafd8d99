"""The tables of the data path as numpy columns: raw texts and examples, with their files.

A jagged column is ``offsets`` U64 [m+1] plus values, here and on disk (docs/formats.md). Text rows
are numbered over all shards of a directory. Nothing here knows JSON or tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embkit import container
from embkit.errors import CorruptError, UsageError

Array = NDArray[Any]
Shard = tuple[Array, Array]  # text U8 [bytes], offsets U64 [n+1]

KINDS = ("retrieval", "sts", "classification")
_SHARD_BYTES = 64 << 20  # of text; a published file stays below 256 MiB
_PER_EXAMPLE = ("query", "score", "label", "weight", "provenance")


# ---------------------------------------------------------------- jagged columns


def offsets_of(counts: Array) -> Array:
    """Offsets U64 [m+1] of a jagged column with ``counts[i]`` values in row i."""
    out = np.zeros(len(counts) + 1, np.uint64)
    np.cumsum(counts, out=out[1:], dtype=np.uint64)
    return out


def counts_of(offsets: Array) -> Array:
    """Values in each row, int64 [m]."""
    return np.diff(offsets.astype(np.int64))


def owners(offsets: Array) -> Array:
    """The row that each value belongs to, int64 [values]."""
    counts = counts_of(offsets)
    return np.repeat(np.arange(len(counts), dtype=np.int64), counts)


def take_jagged(offsets: Array, rows: Array, *values: Array) -> tuple[Array, ...]:
    """Select ``rows`` (any order, repeats allowed) of jagged columns that share ``offsets``.

    Returns:
        The new offsets, then each value column gathered.
    """
    counts = counts_of(offsets)[rows]
    new = offsets_of(counts)
    starts = offsets[:-1].astype(np.int64)[rows]
    index = np.arange(int(new[-1]), dtype=np.int64)
    index += np.repeat(starts - new[:-1].astype(np.int64), counts)
    return (new, *(v[index] for v in values))


def keep_jagged(offsets: Array, keep: Array, *values: Array) -> tuple[Array, ...]:
    """Drop the values where ``keep`` is false; every row stays, perhaps empty."""
    counts = np.bincount(owners(offsets)[keep], minlength=len(offsets) - 1)
    return (offsets_of(counts), *(v[keep] for v in values))


def any_jagged(offsets: Array, flag: Array) -> Array:
    """Whether any value of each row is flagged, bool [m]."""
    hits = np.bincount(owners(offsets), weights=flag, minlength=len(offsets) - 1)
    return hits > 0


# ---------------------------------------------------------------- examples


@dataclass(frozen=True, kw_only=True)
class Examples:
    """The examples of one task, as row numbers of texts.

    Attributes:
        name: the task's name; also its file's.
        kind: ``"retrieval"``, ``"sts"`` (positive = the second sentence) or ``"classification"``.
        query: U64 [m].
        positive_offsets, positive: U64 [m+1], U64: the texts that answer the query.
        negative_offsets, negative, negative_score: U64 [m+1], U64, F32 (NaN: none).
        score: F32 [m], NaN where the task has none.
        label: I32 [m], -1 where the task has none; an index into ``labels``.
        weight: F32 [m].
        provenance: U32 [m], an index into the manifest's ``sources``.
        labels: the class names.
    """

    name: str
    kind: str
    query: Array
    positive_offsets: Array
    positive: Array
    negative_offsets: Array
    negative: Array
    negative_score: Array
    score: Array
    label: Array
    weight: Array
    provenance: Array
    labels: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.query)

    def take(self, rows: Array) -> Examples:
        """The examples at ``rows`` (int64), in that order."""
        p_off, p = take_jagged(self.positive_offsets, rows, self.positive)
        n_off, n, ns = take_jagged(self.negative_offsets, rows, self.negative, self.negative_score)
        return replace(
            self,
            positive_offsets=p_off,
            positive=p,
            negative_offsets=n_off,
            negative=n,
            negative_score=ns,
            **{name: getattr(self, name)[rows] for name in _PER_EXAMPLE},
        )

    def keep(self, mask: Array) -> Examples:
        """The examples where ``mask`` (bool [m]) holds."""
        return self.take(np.flatnonzero(mask))

    def rows(self) -> Array:
        """Every text row named anywhere in the table, sorted, distinct."""
        return np.unique(np.concatenate([self.query, self.positive, self.negative]))

    def mapped(self, row_of: Array, *, query_of: Array | None = None) -> Examples:
        """The same examples with each text row ``r`` replaced by ``row_of[r]``.

        Args:
            row_of: U64, indexed by old row; used for positives and negatives.
            query_of: U64 for queries, when their new rows differ (``row_of`` otherwise).
        """
        query_of = row_of if query_of is None else query_of
        return replace(
            self,
            query=query_of[self.query],
            positive=row_of[self.positive],
            negative=row_of[self.negative],
        )

    def save(self, directory: Path, *, index: int) -> None:
        """Write ``examples-<name>.safetensors``; ``index`` is the task's place in the manifest."""
        columns: dict[str, Array] = {"task": np.full(len(self), index, np.uint16)}
        columns |= {name: getattr(self, name) for name in _COLUMNS}
        container.save(directory / self.file(self.name), columns, kind="embkit.examples")

    @staticmethod
    def file(name: str) -> str:
        """The file of a task's examples."""
        return f"examples-{name}.safetensors"

    @classmethod
    def load(cls, directory: Path, task: dict[str, Any], *, rows: int | None = None) -> Examples:
        """Read a task's table and check that it is consistent.

        Args:
            directory: a records or store directory.
            task: its entry in the manifest: name, kind, labels.
            rows: number of texts; every row number must be below it.

        Raises:
            CorruptError: missing, damaged, or column lengths and row numbers that do not agree.
        """
        path = directory / cls.file(task["name"])
        if not path.is_file():
            raise CorruptError(
                f"The examples of task {task['name']!r} are missing.",
                where=path,
                fix="run the stage that wrote this directory again with --fresh",
            )
        columns = container.load(path, kind="embkit.examples")
        missing = [name for name in _COLUMNS if name not in columns]
        if missing:
            raise CorruptError(f"Columns are missing: {', '.join(missing)}.", where=path)
        table = cls(
            name=task["name"],
            kind=task["kind"],
            labels=tuple(task.get("labels") or ()),
            **{name: columns[name] for name in _COLUMNS},
        )
        table.check(path, rows)
        return table

    def check(self, path: Path, rows: int | None = None) -> None:
        """Raise CorruptError unless lengths, offsets and row numbers agree."""
        m = len(self)
        problem = None
        for name in _PER_EXAMPLE:
            if len(getattr(self, name)) != m:
                problem = f"column {name} has {len(getattr(self, name))} rows, query has {m}"
        for offsets, values in (
            (self.positive_offsets, self.positive),
            (self.negative_offsets, self.negative),
            (self.negative_offsets, self.negative_score),
        ):
            if len(offsets) != m + 1 or offsets[0] != 0 or int(offsets[-1]) != len(values):
                problem = "offsets do not cover their values"
            elif m and bool((offsets[1:] < offsets[:-1]).any()):
                problem = "offsets are not ascending"
        if rows is not None and problem is None and m:
            top = max(int(a.max()) for a in (self.query, self.positive, self.negative) if len(a))
            if top >= rows:
                problem = f"row {top} is named, there are {rows} texts"
        if problem:
            raise CorruptError(f"The examples table is inconsistent: {problem}.", where=path)


_COLUMNS = tuple(f.name for f in fields(Examples) if f.name not in ("name", "kind", "labels"))


def from_builder(part: dict[str, Any], *, provenance: int, labels: Sequence[str] = ()) -> Examples:
    """Make a table of one source of ``_rust.RecordsBuilder.finish()``."""
    columns = {name: part[name] for name in _COLUMNS if name != "provenance"}
    return Examples(
        name=part["task"],
        kind=part["kind"],
        provenance=np.full(len(part["query"]), provenance, np.uint32),
        labels=tuple(labels),
        **columns,
    )


def concatenate(tables: Sequence[Examples]) -> Examples:
    """Join tables of the same task, in order.

    Raises:
        UsageError: the parts are of different kinds.
    """
    first = tables[0]
    kinds = sorted({t.kind for t in tables})
    if len(kinds) > 1:
        raise UsageError(
            f"Task {first.name!r} has sources of different kinds: {', '.join(kinds)}.",
            fix="read them with different task names",
        )
    if len(tables) == 1:
        return first
    joined: dict[str, Any] = {}
    for name in _COLUMNS:
        parts = [getattr(t, name) for t in tables]
        if name.endswith("_offsets"):
            joined[name] = offsets_of(np.concatenate([counts_of(p) for p in parts]))
        else:
            joined[name] = np.concatenate(parts)
    return replace(first, **joined)


# ---------------------------------------------------------------- raw texts


_NO = np.zeros(0, np.int64)


class _Kept(Sequence[Shard]):
    """Some texts of other shards, made when they are asked for: a corpus need not fit memory."""

    def __init__(self, shards: Sequence[Shard], mask: Array) -> None:
        ends = np.cumsum([0, *(len(offsets) - 1 for _, offsets in shards)])
        masks = [mask[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]
        self.parts = [(s, m) for s, m in zip(shards, masks, strict=True) if m.any()]
        self.offsets = [offsets_of(counts_of(o)[m]) for (_, o), m in self.parts]

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, i: Any) -> Any:
        (text, offsets), mask = self.parts[i]
        base = text[int(offsets[0]) : int(offsets[-1])]
        return base[np.repeat(mask, counts_of(offsets))], self.offsets[i]


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Distinct texts with their identities, in shards.

    Attributes:
        shards: (text U8, offsets U64) pairs, as every Rust function takes them.
        text_id: U64 [n], identity of the text.
        cluster: U64 [n], text_id of the near-duplicate cluster's representative.
    """

    shards: Sequence[Shard]
    text_id: Array
    cluster: Array

    def __len__(self) -> int:
        return len(self.text_id)

    def lengths(self) -> Array:
        """Bytes of each text, int64 [n]."""
        return np.concatenate([np.zeros(0, np.int64), *(counts_of(o) for _, o in self.shards)])

    def get(self, row: int) -> str:
        """One text."""
        for text, offsets in self.shards:
            n = len(offsets) - 1
            if row < n:
                return bytes(text[int(offsets[row]) : int(offsets[row + 1])]).decode()
            row -= n
        raise IndexError(row)

    def __iter__(self) -> Any:
        for text, offsets in self.shards:
            data = text.tobytes()
            ends = offsets.tolist()
            for a, b in zip(ends[:-1], ends[1:], strict=True):
                yield data[a:b].decode()

    def keep(self, mask: Array) -> Texts:
        """The texts where ``mask`` (bool [n]) holds; a shard is copied each time it is taken."""
        return Texts(
            shards=_Kept(self.shards, mask),
            text_id=self.text_id[mask],
            cluster=self.cluster[mask],
        )

    def save(self, directory: Path) -> list[str]:
        """Write ``raw-*-of-*.safetensors``, cut at a fixed number of bytes; returns the names.

        Holds one shard at a time.
        """
        shards = self.shards if len(self.shards) else [(np.zeros(0, np.uint8), offsets_of(_NO))]
        ends = shards.offsets if isinstance(shards, _Kept) else [offsets for _, offsets in shards]
        total = sum(1 for offsets in ends for _ in _cuts(offsets))
        names: list[str] = []
        at = 0
        for text, offsets in (piece for shard in shards for piece in _cut(*shard)):
            n = len(offsets) - 1
            names.append(f"raw-{len(names):05d}-of-{total:05d}.safetensors")
            container.save(
                directory / names[-1],
                {
                    "offsets": offsets,
                    "text_id": self.text_id[at : at + n],
                    "cluster": self.cluster[at : at + n],
                    "text": text,
                },
                kind="embkit.raw",
            )
            at += n
        return names

    @classmethod
    def load(cls, directory: Path) -> Texts:
        """Map the raw shards of a records directory.

        Raises:
            CorruptError: a shard is missing or damaged.
        """
        shards, ids, clusters = [], [], []
        for path in shard_paths(directory, "raw"):
            columns = container.load(path, kind="embkit.raw")
            shards.append((columns["text"], columns["offsets"]))
            ids.append(columns["text_id"])
            clusters.append(columns["cluster"])
        one = len(ids) == 1
        return cls(
            shards=shards,
            text_id=ids[0] if one else np.concatenate(ids),
            cluster=clusters[0] if one else np.concatenate(clusters),
        )


def shard_paths(directory: Path, prefix: str) -> list[Path]:
    """The shards ``prefix-i-of-n.safetensors`` of a directory, in order, none missing.

    Raises:
        CorruptError: there is none, or the set is incomplete or mixed.
    """
    found = sorted(directory.glob(f"{prefix}-*-of-*.safetensors"))
    totals = {p.stem.rsplit("-", 1)[1] for p in found}
    names = {p.name for p in found}
    if len(totals) == 1:
        total = int(next(iter(totals)))
        wanted = [f"{prefix}-{i:05d}-of-{total:05d}.safetensors" for i in range(total)]
        missing = [name for name in wanted if name not in names]
        if not missing:
            return found
        what = f"Shards are missing: {', '.join(missing[:3])}."
    else:
        what = f"Shards of different sets ({', '.join(sorted(totals))})." if found else "No shards."
    raise CorruptError(
        what, where=directory, fix="copy the directory again, or run its stage again with --fresh"
    )


def task_name(text: str) -> str:
    """A task name that is safe in a file name; other characters become ``_``."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("._")
    if not name:
        raise UsageError(f"{text!r} is no usable task name.", fix="give task='name'")
    return name


def _cut(text: Array, offsets: Array) -> Iterable[Shard]:
    """Split a shard where it passes the size limit, at row boundaries, in order."""
    for start, stop in _cuts(offsets):
        part = offsets[start : stop + 1]
        yield text[int(part[0]) : int(part[-1])], (part - part[0]).astype(np.uint64)


def _cuts(offsets: Array) -> Iterable[tuple[int, int]]:
    """First row and row after the last of each piece of a shard."""
    ends = offsets.astype(np.int64)
    start, n = 0, len(ends) - 1
    while True:
        stop = int(np.searchsorted(ends, ends[start] + _SHARD_BYTES, side="right")) - 1
        stop = min(n, max(stop, start + 1))
        yield start, stop
        if stop == n:
            return
        start = stop
