"""A teacher's vectors of a store's rows: written once by any model, looked up in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from embkit import container
from embkit.data.loader import Store, as_store
from embkit.data.tables import Array, Examples
from embkit.data.vectors import load_vectors
from embkit.errors import UsageError
from embkit.progress import bar
from embkit.stage import digest_of, stage

KIND = "embkit.teacher"
_BLOCK = 4096  # rows of a file
_ROLES = ("query", "passage", "both")


class Teacher:
    """Vectors of every row of a store, mapped: they need not fit memory.

    Args:
        path: what :func:`teach` wrote, or any embeddings that ``embkit.data.load_vectors`` reads,
            whose row i is that of the store's row i.
        store: the rows' store.

    Attributes:
        width: numbers of a vector.

    Raises:
        UsageError: another number of rows, or vectors of another store.
        CorruptError: as ``load_vectors``.
    """

    def __init__(self, path: Path | str, store: Store) -> None:
        self._blocks = load_vectors(path)
        self.width = int(self._blocks[0].shape[1])
        self._ends = np.cumsum([len(block) for block in self._blocks])
        if self._ends[-1] != store.rows:
            raise UsageError(
                f"The teacher has {self._ends[-1]} vectors, the store has {store.rows} rows.",
                where=path,
                fix="give one vector per row of the store: embkit.data.teach(store, encode, out)",
            )
        if (Path(path) / "manifest.json").is_file():
            manifest = container.read_manifest(Path(path), kind=KIND)
            if digest_of(store.path) not in manifest["inputs"].values():
                raise UsageError(
                    "The teacher's vectors are of another store.",
                    where=path,
                    fix="embkit.data.teach(store, encode, out) on this one",
                )

    def rows(self, rows: Array) -> Array:
        """Vectors float32 [n, width] of store rows."""
        block = np.searchsorted(self._ends, rows, side="right")
        out = np.empty((len(rows), self.width), np.float32)
        for i in np.unique(block).tolist():
            here = block == i
            start = self._ends[i] - len(self._blocks[i])
            out[here] = self._blocks[i][rows[here].astype(np.int64) - start]
        return out


class Scores:
    """A teacher's scores of the pairs of a task, by the rows of query and passage.

    From an examples table: ``score`` is that of the first positive, ``negative_score`` of the
    negatives. A pair that the table has twice has its first score.

    Args:
        table: of a retrieval task. rows: of the store.
    """

    def __init__(self, table: Examples, rows: int) -> None:
        self._rows = np.uint64(rows)
        has = np.flatnonzero(np.diff(table.positive_offsets.astype(np.int64)) > 0)
        first = table.positive[table.positive_offsets[has].astype(np.int64)]
        counts = np.diff(table.negative_offsets.astype(np.int64))
        keys = [
            table.query[has] * self._rows + first,
            np.repeat(table.query, counts) * self._rows + table.negative,
        ]
        score = np.concatenate([table.score[has], table.negative_score])
        known = np.isfinite(score)
        self._keys, at = np.unique(np.concatenate(keys)[known], return_index=True)
        self._score = score[known][at]

    def of(self, query: Array, passage: Array) -> Array:
        """Scores float32 of pairs of store rows, of the shape of ``passage``; NaN where none is."""
        keys = query * self._rows + passage
        at = np.searchsorted(self._keys, keys).clip(max=max(len(self._keys) - 1, 0))
        if not len(self._keys):
            return np.full(keys.shape, np.nan, np.float32)
        found = np.where(self._keys[at] == keys, self._score[at], np.nan)
        return found.astype(np.float32)


def teach(
    store: Store | Path | str,
    encode: Callable[[list[str], list[str]], Any],
    out: Path | str,
    *,
    name: str,
    fresh: bool = False,
) -> Path:
    """Write a teacher's vectors of all rows of a store; a killed call goes on where it stopped.

    Args:
        encode: from texts (without the store's prompts) and their roles ("query", "passage" or
            "both") to vectors [n, W], such as ``lambda texts, roles: model.encode(texts)``.
        name: of the model, with whatever decides its vectors; part of the digest.
        fresh: embed again what is there.

    Returns:
        ``out``.

    Raises:
        UsageError: ``encode`` gives no finite vectors [n, W], or of different widths.
    """
    store = as_store(store)
    with stage(
        out, name="teach", params={"model": name}, inputs=[store.path], kind=KIND, fresh=fresh
    ) as work:
        if work.done:
            return work.out
        total, width = max(1, -(-store.rows // _BLOCK)), None
        with bar("Teach", total=store.rows, unit="texts") as progress:
            for i, (rows, texts) in enumerate(_blocks(store)):
                path = work.dir / f"embeddings-{i:05d}-of-{total:05d}.safetensors"
                if not path.is_file():  # published whole, so it is whole
                    roles = [_ROLES[r] for r in store.role(rows).tolist()]
                    vectors = np.asarray(encode(texts, roles), np.float32)
                    shape = (len(texts), width or vectors.shape[-1])
                    if vectors.shape != shape or not np.isfinite(vectors).all():
                        raise UsageError(
                            f"encode gave {list(vectors.shape)} or numbers that are not finite for "
                            f"{len(texts)} texts, want {list(shape)}.",
                            fix="return one vector per text, all of one width",
                        )
                    container.save(
                        path, {"embedding": vectors}, kind="embkit.embeddings",
                        metadata={"model": name},
                    )  # fmt: skip
                width = load_vectors(path)[0].shape[1]
                progress.advance(len(texts))
        work.publish({"width": width, "rows": store.rows})
    return Path(out)


def _blocks(store: Store) -> Iterator[tuple[Array, list[str]]]:
    """Row numbers and texts, block by block."""
    texts, start = store.texts(), 0
    while block := list(islice(texts, _BLOCK)):
        yield np.arange(start, start + len(block), dtype=np.uint64), block
        start += len(block)
