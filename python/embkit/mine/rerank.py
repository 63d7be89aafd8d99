"""A reranker or relabeller: any function that scores pairs of query and passage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from embkit.data.tables import Array
from embkit.errors import UsageError

BATCH = 4096  # pairs of one call


class Reranker(Protocol):
    """Scores ``passages[i]`` for ``queries[i]``: higher is more relevant."""

    def __call__(self, queries: Sequence[str], passages: Sequence[str]) -> Any: ...


def as_reranker(model: Any) -> Reranker | None:
    """A function as it is, or an object with ``predict(pairs)`` such as a cross-encoder.

    Raises:
        UsageError: neither.
    """
    if model is None:
        return None
    predict: Callable[[Any], Any] | None = getattr(model, "predict", None)
    if predict is not None:
        return lambda queries, passages: predict(list(zip(queries, passages, strict=True)))
    if callable(model):
        return model  # type: ignore[no-any-return]
    raise UsageError(
        f"A {type(model).__name__} is no reranker.",
        fix="give a function of (queries, passages) that returns scores, or a cross-encoder",
    )


def identity(model: Any) -> str | None:
    """What a stage's digest knows of a reranker: its ``name``, or that of its function or class."""
    if model is None:
        return None
    name = getattr(model, "name", None) or getattr(model, "__qualname__", None)
    return str(name or type(model).__qualname__)


def score_pairs(
    reranker: Reranker, queries: Array, passages: Array, text: Callable[[int], str]
) -> NDArray[np.float32]:
    """Scores F32 [n] of pairs of text rows, every pair once, in large batches of like length.

    Raises:
        UsageError: the reranker returned another number of scores, or NaN.
    """
    pairs, back = np.unique(np.stack([queries, passages], axis=1), axis=0, return_inverse=True)
    texts = {int(row): text(int(row)) for row in np.unique(pairs)}
    length = {row: len(value) for row, value in texts.items()}
    size = np.array([length[int(a)] + length[int(b)] for a, b in pairs], np.int64)
    order = np.argsort(-size, kind="stable")  # the longest first: memory runs out at once or never
    scores = np.empty(len(pairs), np.float32)
    for start in range(0, len(order), BATCH):
        at = order[start : start + BATCH]
        batch = pairs[at].tolist()
        got = reranker([texts[a] for a, _ in batch], [texts[b] for _, b in batch])
        values = np.asarray(got, np.float32)
        if values.shape != (len(at),) or np.isnan(values).any():
            raise UsageError(
                f"The reranker returned {values.dtype} {list(values.shape)} "
                f"{'with NaN ' if np.isnan(values).any() else ''}for {len(at)} pairs.",
                fix="return one finite number for each pair",
            )
        scores[at] = values
    return scores[back.reshape(-1)]
