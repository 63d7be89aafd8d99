"""Embeddings of store rows on disk: unit vectors in blocks, each file whole or absent.

A block is written once and carries what made it (model digest, pooling, width, prompts): a killed
run embeds at most one block again, and vectors of two models are never mixed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embkit import _rust, container
from embkit.data.tables import Array
from embkit.errors import CorruptError
from embkit.progress import Bar

KIND = "embkit.embeddings"
BLOCK = 16384  # rows of a file


class Embeddings:
    """Unit vectors of some rows of a store; :meth:`fill` makes them, :meth:`get` reads them.

    Args:
        directory: where the blocks are.
        encoder: an ``embkit.model.Encoder``; full width, fp32, normalised.
        store: the rows' store, or what else has prompts and rows that the encoder embeds.
        rows: U64 [n], sorted, distinct: which store rows are embedded, in file order.
        model: digest of the encoder, kept in every file.
    """

    def __init__(
        self, directory: Path, encoder: Any, store: Any, *, rows: Array, model: str
    ) -> None:
        self.directory, self.encoder, self.store, self.rows = directory, encoder, store, rows
        self.metadata = {
            "model": model,
            "pooling": str(encoder.pooling),
            "width": str(max(encoder.dims)),
            "normalised": "true",
            "prompts": json.dumps(store.prompts, sort_keys=True),
        }
        self.blocks: list[Array] = []

    def fill(self, progress: Bar) -> None:
        """Embed every block that is not there yet."""
        self.directory.mkdir(exist_ok=True)
        _rust.sweep_tmp(str(self.directory))
        total = max(1, -(-len(self.rows) // BLOCK))
        for i in range(total):
            path = self.directory / f"embeddings-{i:05d}-of-{total:05d}.safetensors"
            rows = self.rows[i * BLOCK : (i + 1) * BLOCK]
            block = self._adopt(path, rows)
            if block is None:
                report = after(progress, progress.done)
                vectors = self.encoder.encode_rows(self.store, rows, progress=report)
                container.save(
                    path,
                    {"row": rows, "embedding": np.asarray(vectors, np.float32)},
                    kind=KIND,
                    metadata=self.metadata,
                )
                block = container.load(path)["embedding"]
            self.blocks.append(block)
            progress.update(min((i + 1) * BLOCK, len(self.rows)))

    def get(self, rows: Array) -> NDArray[np.float32]:
        """Vectors F32 [n, d] of store rows."""
        at = np.searchsorted(self.rows, rows)
        block, local = at // BLOCK, at % BLOCK
        out = np.empty((len(rows), self.blocks[0].shape[1]), np.float32)
        for i in np.unique(block).tolist():
            here = block == i
            out[here] = self.blocks[i][local[here]]
        return out

    def cosine(self, a: Array, b: Array) -> NDArray[np.float32]:
        """Cosine of row pairs, F32 [n], in blocks."""
        out = np.empty(len(a), np.float32)
        for start in range(0, len(a), BLOCK):
            part = slice(start, start + BLOCK)
            out[part] = np.einsum("nd,nd->n", self.get(a[part]), self.get(b[part]))
        return out

    def _adopt(self, path: Path, rows: Array) -> Array | None:
        """A block that an earlier, killed run has finished, if it is whole and the same."""
        if not path.is_file():
            return None
        try:
            tensors = container.load(path, kind=KIND, verify="open")
            meta = container.metadata(path)
        except CorruptError:
            return None
        same = all(meta.get(key) == value for key, value in self.metadata.items())
        return tensors["embedding"] if same and np.array_equal(tensors["row"], rows) else None


def after(progress: Bar, start: float, scale: float = 1.0) -> Callable[[int], None]:
    """A progress callback that counts on from ``start``, ``scale`` units for each reported one."""

    def report(done: int) -> None:
        progress.update(start + done * scale)

    return report
