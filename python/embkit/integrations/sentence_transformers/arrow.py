"""Columns of a `datasets.Dataset` as embkit's Rust functions take texts: bytes and offsets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from embkit import _rust
from embkit.data.tables import Array, Shard

_ROWS = 100_000  # of a table at a time


def tables(dataset: Any) -> Iterator[Any]:
    """The rows of a dataset in its order, as Arrow tables."""
    return iter(dataset.with_format("arrow").iter(batch_size=_ROWS))


def shard_of(column: Any) -> Shard:
    """A column's texts; of what is no text, Python's `str`, and "None" for what is missing.

    Texts of Arrow's large strings are not copied.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # of several chunks that no one array can hold
        array = pa.concat_arrays([chunk.cast(pa.large_string()) for chunk in array.chunks])
    if not (pa.types.is_string(array.type) or pa.types.is_large_string(array.type)):
        array = pa.array([str(value) for value in array.to_pylist()], pa.large_string())
    array = pc.fill_null(array.cast(pa.large_string()), "None")
    _, offsets, data = array.buffers()
    if len(array) == 0 or offsets is None:
        return np.zeros(0, np.uint8), np.zeros(1, np.uint64)
    ends = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
    raw = np.zeros(0, np.uint8) if data is None else np.frombuffer(data, np.uint8)
    return raw[ends[0] : ends[-1]], (ends - ends[0]).astype(np.uint64)


def row_keys(dataset: Any, columns: Sequence[str]) -> Array:
    """The identity of every value, U64 [rows x columns], equal for equal texts of any column."""
    keys = np.empty((len(dataset), len(columns)), np.uint64)
    start = 0
    for table in tables(dataset.select_columns(list(columns))):
        for place, name in enumerate(columns):
            found = _rust.text_ids([shard_of(table.column(name))])
            keys[start : start + len(found), place] = found
        start += table.num_rows
    return keys
