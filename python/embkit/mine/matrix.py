"""Vectors as one matrix of rows that may lie in several mapped arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embkit.data.tables import Array
from embkit.errors import UsageError

_STEP = 1 << 18  # numbers looked at together


class Matrix:
    """Float rows [n, d] in one array or several that follow one another; nothing is copied.

    Args:
        parts: float32 or float16 arrays [*, d].
        name: what errors call it.

    Raises:
        UsageError: not two-dimensional, no rows, another type, or different widths.
    """

    def __init__(self, parts: NDArray[Any] | Sequence[NDArray[Any]], name: str) -> None:
        self.parts = [parts] if isinstance(parts, np.ndarray) else [np.asarray(p) for p in parts]
        self.name = name
        shapes = {p.shape[1] if p.ndim == 2 else None for p in self.parts}
        if len(shapes) != 1 or None in shapes or any(p.dtype.kind != "f" for p in self.parts):
            found = ", ".join(sorted({f"{p.dtype} {list(p.shape)}" for p in self.parts}))
            raise UsageError(
                f"The vectors of the {name} are {found or 'missing'}.",
                fix="give a float32 array [rows, width], or several of one width",
            )
        self.width = int(self.parts[0].shape[1])
        self.starts = np.cumsum([0, *(len(p) for p in self.parts)])
        self.step = max(1, _STEP // max(1, self.width))  # rows

    def __len__(self) -> int:
        return int(self.starts[-1])

    def take(self, rows: Array) -> NDArray[np.float32]:
        """Rows as F32 [len(rows), d]."""
        if len(self.parts) == 1:
            return np.asarray(self.parts[0][rows], np.float32)
        out = np.empty((len(rows), self.width), np.float32)
        part = np.searchsorted(self.starts, rows, side="right") - 1
        for i in np.unique(part).tolist():
            here = part == i
            out[here] = self.parts[i][rows[here] - self.starts[i]]
        return out

    def span(self, start: int, stop: int) -> list[NDArray[Any]]:
        """Rows ``start`` to ``stop`` as views."""
        out = []
        for first, part in zip(self.starts[:-1].tolist(), self.parts, strict=True):
            a, b = max(start - first, 0), min(stop - first, len(part))
            if a < b:
                out.append(part[a:b])
        return out

    def dot(self, rows: Array, other: Matrix, others: Array) -> NDArray[np.float32]:
        """Inner products of row pairs, F32 [n], the same for a pair wherever it stands."""
        out = np.empty(len(rows), np.float32)
        for start in range(0, len(rows), self.step):
            part = slice(start, start + self.step)
            product = self.take(rows[part]) * other.take(others[part])
            out[part] = product.sum(axis=1, dtype=np.float32)
        return out

    def check(self) -> None:
        """Refuse rows that have no direction.

        Raises:
            UsageError: NaN, infinite or all-zero rows, which are named.
        """
        bad: list[int] = []
        kinds = set()
        for first, part in zip(self.starts[:-1].tolist(), self.parts, strict=True):
            for start in range(0, len(part), self.step):
                rows = np.asarray(part[start : start + self.step], np.float32)
                square = np.einsum("nd,nd->n", rows, rows)
                wrong = np.flatnonzero(~(np.isfinite(square) & (square > 0)))
                for row in wrong.tolist():
                    if np.isfinite(rows[row]).all() and rows[row].any():
                        continue  # only its square is out of range
                    kinds.add("zero" if not rows[row].any() else "NaN or infinite")
                    bad.append(first + start + row)
        if bad:
            shown = ", ".join(map(str, bad[:8])) + (" ..." if len(bad) > 8 else "")
            raise UsageError(
                f"{len(bad)} vectors of the {self.name} are {' or '.join(sorted(kinds))}.",
                where=f"rows {shown}",
                fix="embed these texts again, or leave them out",
            )
