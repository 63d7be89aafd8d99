"""A teacher's vectors of a store's rows: written once by any model, looked up in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from embkit import container
from embkit.data.loader import Store, as_store
from embkit.data.tables import Array
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
    """A teacher's scores of pairs of texts, whatever prompts are in front of them.

    A pair that is given twice has its first score.

    Args:
        query, passage: identities of the texts of each pair. score: float32, not finite for none.

    Attributes:
        any: whether there is a score at all.
    """

    def __init__(self, query: Array, passage: Array, score: Array) -> None:
        known = np.isfinite(score)
        self.any = bool(known.any())
        self._texts = np.unique(np.concatenate([query[known], passage[known]]))
        keys, _ = self._places(query[known], passage[known])
        self._keys, at = np.unique(keys, return_index=True)
        self._score = score[known][at].astype(np.float32)

    @classmethod
    def of_examples(cls, store: Store, task: str) -> Scores:
        """Of a table: ``score`` is that of the first positive, ``negative_score`` of the others."""
        table = store.examples(task)
        has = np.flatnonzero(np.diff(table.positive_offsets.astype(np.int64)) > 0)
        first = table.positive[table.positive_offsets[has].astype(np.int64)]
        counts = np.diff(table.negative_offsets.astype(np.int64))
        return cls(
            store.text_id(np.concatenate([table.query[has], np.repeat(table.query, counts)])),
            store.text_id(np.concatenate([first, table.negative])),
            np.concatenate([table.score[has], table.negative_score]),
        )

    @classmethod
    def of_reranked(cls, store: Store, task: str, mined: Path) -> Scores:
        """Of the reranker that mined negatives have met, and their positives with them.

        Args:
            mined: directory of the negatives. Without a reranker no pair has a score: a miner's
                are of the negatives alone.
        """
        table = store.examples(task)
        columns = container.load(mined / f"negatives-{task}.safetensors", kind="embkit.negatives")
        counts = np.diff(columns["offsets"].astype(np.int64))
        found = [(np.repeat(table.query, counts), columns["row"], columns.get("rerank"))]
        each = np.diff(table.positive_offsets.astype(np.int64))
        for path in sorted(mined.glob(f"reranked-*-{task}.safetensors"))[:1]:  # all say the same
            scores = container.load(path, kind="embkit.negatives")["rerank_positive"]
            found.append((np.repeat(table.query, each), table.positive, scores))
        found = [pairs for pairs in found if pairs[2] is not None]
        if len(found) < 2:
            found = [(np.zeros(0, np.uint64), np.zeros(0, np.uint64), np.zeros(0, np.float32))]
        query, passage, score = (np.concatenate(part) for part in zip(*found, strict=True))
        return cls(store.text_id(query), store.text_id(passage), score)

    def of(self, query: Array, passage: Array) -> Array:
        """Scores float32 of pairs of texts by identity, of the shape of ``passage``; NaN where
        there is none."""
        out = np.full(np.broadcast_shapes(query.shape, passage.shape), np.nan, np.float32)
        if not self.any:
            return out
        keys, there = self._places(*np.broadcast_arrays(query, passage))
        at = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        return np.where(there & (self._keys[at] == keys), self._score[at], out)

    def _places(self, query: Array, passage: Array) -> tuple[Array, Array]:
        """A number for each pair of known texts, and whether both are known."""
        count = len(self._texts)
        q, p = (np.searchsorted(self._texts, x).clip(max=count - 1) for x in (query, passage))
        there = (self._texts[q] == query) & (self._texts[p] == passage) if count else q < 0
        return q * np.int64(count) + p, there


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
