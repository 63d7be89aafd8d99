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
from embkit.errors import CorruptError, UsageError
from embkit.progress import Bar

KIND = "embkit.embeddings"
BLOCK = 16384  # rows of a file


class Embeddings:
    """Unit vectors of some rows of a store; :meth:`fill` makes them, :meth:`get` reads them.

    Args:
        directory: where the blocks are; one file system for all ranks.
        encoder: an ``embkit.model.Encoder``; full width, fp32, normalised.
        store: the rows' store, or what else has prompts and rows that the encoder embeds.
        rows: U64 [n], sorted, distinct: which store rows are embedded, in file order.
        model: digest of the encoder, kept in every file.
        dtype: of the files, ``"float32"`` or ``"float16"``. Rounding to float16 takes half the
            disk and moves an inner product of unit vectors by less than 2^-10, by about 1e-5 as a
            rule; the vectors are read as float32 either way.
        group: a ``torch.distributed`` group whose ranks call :meth:`fill` together and share the
            work: rank r embeds blocks r, r + world, ... and then opens those of all. The files
            are the same for any number of ranks.

    Attributes:
        blocks: float [16384, d] each (the last is shorter), mapped.
    """

    def __init__(
        self,
        directory: Path,
        encoder: Any,
        store: Any,
        *,
        rows: Array,
        model: str,
        dtype: str = "float32",
        group: Any = None,
    ) -> None:
        if dtype not in ("float32", "float16"):
            raise UsageError(f"Unknown dtype {dtype!r}.", fix="float32 or float16")
        self.directory, self.encoder, self.store, self.rows = directory, encoder, store, rows
        self.dtype, self.group = np.dtype(dtype), group
        self.metadata = {
            "model": model,
            "pooling": str(encoder.pooling),
            "width": str(max(encoder.dims)),
            "normalised": "true",
            "prompts": json.dumps(store.prompts, sort_keys=True),
        }
        self.blocks: list[Array] = []

    def fill(self, progress: Bar) -> None:
        """Embed every block that is not there yet, or is damaged, or is of something else.

        Memory: one block of vectors beside the encoder's own.

        Raises:
            CorruptError: a block of another rank cannot be read.
        """
        self.directory.mkdir(exist_ok=True)
        _rust.sweep_tmp(str(self.directory))
        rank, world = self._place()
        total = max(1, -(-len(self.rows) // BLOCK))
        parts = [
            (
                self.directory / f"embeddings-{i:05d}-of-{total:05d}.safetensors",
                self.rows[i * BLOCK : (i + 1) * BLOCK],
            )
            for i in range(total)
        ]
        mine = {i: self._make(*parts[i], progress) for i in range(rank, total, world)}
        if world > 1:
            import torch.distributed as dist

            dist.barrier(group=self.group)
        for i, (path, rows) in enumerate(parts):
            block = mine[i] if i in mine else self._adopt(path, rows)
            if block is None:
                raise CorruptError(
                    "This block of embeddings, made by another rank, is not there or is damaged.",
                    where=path,
                    fix="give all ranks one file system, and run again",
                )
            self.blocks.append(block)
        progress.update(len(self.rows))

    def _make(self, path: Path, rows: Array, progress: Bar) -> Array:
        """A block from an earlier run, or a new one."""
        block = self._adopt(path, rows)
        start = progress.done
        if block is None:
            vectors = self.encoder.encode_rows(self.store, rows, progress=after(progress, start))
            container.save(
                path,
                {"row": rows, "embedding": np.asarray(vectors).astype(self.dtype, copy=False)},
                kind=KIND,
                metadata=self.metadata,
            )
            block = self._adopt(path, rows)
            if block is None:
                raise CorruptError("This block cannot be read back.", where=path)
        progress.update(start + len(rows))
        return block

    def _place(self) -> tuple[int, int]:
        if self.group is None:
            return 0, 1
        import torch.distributed as dist

        return dist.get_rank(self.group), dist.get_world_size(self.group)

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
        """A block that is there, if it is whole and of the same rows, model and type."""
        if not path.is_file():
            return None
        try:
            tensors, meta = _rust.open_tensors(str(path), "open")
        except CorruptError:
            return None
        code, block = tensors.get("embedding", ("", np.empty(0)))
        wanted = {"format": KIND, **self.metadata}
        if any(meta.get(key) != value for key, value in wanted.items()):
            return None
        if code != ("F16" if self.dtype == np.float16 else "F32"):
            return None
        if block.shape != (len(rows), int(self.metadata["width"])):
            return None
        if not np.array_equal(tensors.get("row", ("", np.empty(0)))[1], rows):
            return None
        return block.view(self.dtype)


def after(progress: Bar, start: float, scale: float = 1.0) -> Callable[[int], None]:
    """A progress callback that counts on from ``start``, ``scale`` units for each reported one."""

    def report(done: int) -> None:
        progress.update(start + done * scale)

    return report
