"""Where the vectors of a store's rows come from: an encoder, or files that are there already."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from embkit import container
from embkit.data.embeddings import KIND, Embeddings
from embkit.data.loader import Store
from embkit.data.tables import Array, shard_paths
from embkit.data.vectors import load_vectors, vectors_origin
from embkit.errors import CorruptError, UsageError
from embkit.mine.matrix import Matrix
from embkit.progress import bar

if TYPE_CHECKING:
    from embkit.model import Encoder

_IN_MEMORY = 256 << 20  # bytes of a corpus that is gathered, when there is no cap


class StoreVectors:
    """Vectors of store rows.

    Args:
        matrix: the vectors. rows: U64, sorted: their store rows; None when they are all rows.
    """

    def __init__(self, matrix: Matrix, rows: Array | None) -> None:
        self.matrix, self.rows = matrix, rows

    def at(self, rows: Array) -> Array:
        """Places in the matrix of store rows, int64."""
        if self.rows is None:
            return rows.astype(np.int64)
        return np.searchsorted(self.rows, rows)

    def corpus(self, rows: Array, scratch: Path, *, capped: bool) -> Matrix:
        """The rows as a matrix to search in: views where they lie together, else a copy that goes
        to the file ``scratch`` when it is large or memory is ``capped``."""
        at = self.at(rows)
        if len(at) and np.array_equal(at, np.arange(at[0], at[0] + len(at))):
            return Matrix(self.matrix.span(int(at[0]), int(at[0]) + len(at)), "corpus")
        shape = (len(at), self.matrix.width)
        if not capped and 4 * shape[0] * shape[1] <= _IN_MEMORY:
            return Matrix(self.matrix.take(at), "corpus")
        scratch.parent.mkdir(parents=True, exist_ok=True)
        out: Any = np.memmap(scratch, np.float32, "w+", shape=shape)
        step = max(1, (1 << 20) // (4 * shape[1]))
        for start in range(0, len(at), step):
            out[start : start + step] = self.matrix.take(at[start : start + step])
        return Matrix(out, "corpus")


def embed(directory: Path, encoder: Encoder, store: Store, rows: Array) -> StoreVectors:
    """Embed rows of a store, block by block; whole blocks of a killed run are adopted."""
    made = Embeddings(directory, encoder, store, rows=rows, model=encoder.digest())
    with bar("Embed", total=len(rows), unit="rows") as progress:
        made.fill(progress)
    return StoreVectors(Matrix(made.blocks, "store's rows"), rows)


def stored(directory: Path) -> StoreVectors:
    """The embeddings that mining wrote.

    Raises:
        CorruptError: a file is missing or damaged.
    """
    blocks = [container.load(p, kind=KIND) for p in shard_paths(directory, "embeddings")]
    rows = np.concatenate([b["row"] for b in blocks])
    return StoreVectors(Matrix([b["embedding"] for b in blocks], "store's rows"), rows)


def precomputed(path: Path, store: Store, encoder: Encoder | None = None) -> StoreVectors:
    """Row-aligned embeddings of a store from files.

    Raises:
        UsageError: another number of rows, or made by another model than ``encoder`` or with other
            prompts, pooling or width, or not normalised, as far as the files say.
    """
    matrix = Matrix(load_vectors(path), f"embeddings in {path.name}")
    if len(matrix) != store.rows:
        raise UsageError(
            f"{len(matrix)} embeddings for the {store.rows} rows of the store.",
            where=path,
            fix="embed every row of the store, in its order: Store.texts() gives them",
        )
    origin = vectors_origin(path)
    if origin is None:
        return StoreVectors(matrix, None)
    want: dict[str, Any] = {"normalised": True, "width": matrix.width, "prompts": store.prompts}
    if encoder is not None:
        want |= {"model": encoder.digest(), "pooling": encoder.pooling, "width": max(encoder.dims)}
    for name, value in want.items():
        found = getattr(origin, name)
        if found is not None and found != value:
            raise UsageError(
                f"The embeddings have {name} {found!r}, not {value!r}.",
                where=path,
                fix="embed the store again with the model that shall mine",
            )
    return StoreVectors(matrix, None)


def check_together(directory: Path, manifest: dict[str, Any], given: Path | None) -> None:
    """Refuse to explain with other embeddings than those that were mined.

    Raises:
        UsageError: none were given where they are needed. CorruptError: they are others.
    """
    from embkit.stage import digest_of

    if given is None:
        raise UsageError(
            "These negatives were mined from embeddings that lie elsewhere.",
            where=directory,
            fix="give them with --embeddings",
        )
    if digest_of(given) not in manifest["inputs"].values():
        raise CorruptError("These are not the embeddings that were mined.", where=given)
