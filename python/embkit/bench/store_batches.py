"""Rows `store.batches`: shuffled batches of 32 rows of a store, padded or packed, for torch.

All ways that run here get the same order of rows; the rivals in other processes shuffle in their
own way. Before any timing the rows of an epoch are compared by a checksum of each.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from embkit import _rust
from embkit.bench import Case
from embkit.bench.rivals import Job
from embkit.bench.store_data import LENGTH, Rows, passages
from embkit.data.tables import Array
from embkit.errors import EmbkitError

BATCH = 32
_SEED = 7
_PEERS = {
    "MDS": "mds",
    "MDS by item": "mds-items",
    "litdata": "litdata",
    "webdataset": "webdataset",
    "HF datasets": "datasets",
}
Way = Callable[[Rows, Array], Iterator[tuple[Any, Any]]]


def batches(quick: bool) -> Case:
    """Padded int64 ids and masks."""
    made = passages(quick, 4_000 if quick else 60_000)
    job = Job({"flat": made.flat, "offsets": made.offsets}, {"batch": BATCH})
    running, skipped = job.start(_PEERS)
    ways: dict[str, Way] = {
        "numpy collate, row by row": _by_row,
        "numpy collate, one scatter": _scatter,
        "memmap + DataLoader": partial(_data_loader, str(job.path / "flat.npy")),
    }
    want = _sums(_padded(made, _order(made)))
    for name, way in ways.items():
        _same(name, _sums(way(made, _order(made))), want)
    for name, rival in running.items():
        said = rival.ask("check")
        _same(name, (said["rows"], said["tokens"], said["checksum"]), want)
    rivals: dict[str, Callable[[], Any]] = {
        name: partial(_drain, way, made) for name, way in ways.items()
    }
    rivals |= {name: partial(rival.round, "batches") for name, rival in running.items()}
    return Case(
        name="store.batches",
        unit="tokens/s",
        work=float(made.offsets[-1]),
        ours=partial(_drain, _padded, made),
        rivals=rivals,
        skipped=skipped,
        limit=("int64 copy", _copy_rate()),
        floor="1.7x numpy collate",
        goal="250 Mtokens/s",
        facts=_facts(made),
        close=job.close,
    )


def packed(quick: bool) -> Case:
    """Packed int64 ids and their int32 bounds."""
    made = passages(quick, 4_000 if quick else 60_000)
    order = _order(made)
    for ours, theirs in zip(_packed(made, order), _concatenated(made, order), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a.numpy(), b.numpy())
    return Case(
        name="store.batches.packed",
        unit="tokens/s",
        work=float(made.offsets[-1]),
        ours=partial(_drain, _packed, made),
        rivals={"numpy concatenate": partial(_drain, _concatenated, made)},
        limit=("int64 copy", _copy_rate()),
        floor="1.7x numpy concatenate",
        goal="250 Mtokens/s",
        facts=_facts(made),
    )


def _facts(made: Rows) -> dict[str, Any]:
    return {
        "n": len(made.rows),
        "batch": BATCH,
        "mean_length": round(float(made.lengths.mean()), 1),
        "max_length": LENGTH,
        "data": made.data,
    }


def _order(made: Rows) -> Array:
    """Places of an epoch in their order, u64 [n]."""
    n = len(made.rows)
    return _rust.permute(n, _SEED, 0, n)


def _slices(order: Array) -> Iterator[Array]:
    for start in range(0, len(order), BATCH):
        yield order[start : start + BATCH]


def _padded(made: Rows, order: Array) -> Iterator[tuple[Any, Any]]:
    """Ours: one call a batch into buffers that stay."""
    import torch

    store, first = made.store.rows_store, made.rows[0]
    ids, mask = (np.empty(BATCH * LENGTH, np.int64) for _ in range(2))
    for rows in _slices(order + first):
        n = len(rows)
        size = n * store.gather_padded(rows, ids, mask, 0)
        shape = (n, -1)
        yield (
            torch.from_numpy(ids[:size].reshape(shape)),
            torch.from_numpy(mask[:size].reshape(shape)),
        )


def _packed(made: Rows, order: Array) -> Iterator[tuple[Any, Any]]:
    import torch

    store, first = made.store.rows_store, made.rows[0]
    tokens, bounds = np.empty(BATCH * LENGTH, np.int64), np.empty(BATCH + 1, np.int32)
    for rows in _slices(order + first):
        ends = bounds[: len(rows) + 1]
        yield torch.from_numpy(tokens[: store.gather(rows, tokens, ends)]), torch.from_numpy(ends)


def _scatter(made: Rows, order: Array) -> Iterator[tuple[Any, Any]]:
    """The fastest numpy known for short rows: one scatter through the mask."""
    import torch

    flat, offsets, lengths = made.flat, made.offsets, made.lengths
    for rows in _slices(order.astype(np.int64)):
        size = lengths[rows]
        keep = np.arange(int(size.max())) < size[:, None]
        ids, mask = np.zeros(keep.shape, np.int64), keep.astype(np.int64)
        source = np.repeat(offsets[rows] - np.concatenate([[0], np.cumsum(size)[:-1]]), size)
        ids[keep] = flat[source + np.arange(len(source))]
        yield torch.from_numpy(ids), torch.from_numpy(mask)


def _by_row(made: Rows, order: Array) -> Iterator[tuple[Any, Any]]:
    """The fastest numpy known for long rows: two slices a row."""
    import torch

    flat, offsets, lengths = made.flat, made.offsets, made.lengths
    for rows in _slices(order.astype(np.int64)):
        size = lengths[rows]
        ids, mask = (np.zeros((len(rows), int(size.max())), np.int64) for _ in range(2))
        starts = offsets[rows].tolist()
        for own, flag, start, count in zip(ids, mask, starts, size.tolist(), strict=True):
            own[:count] = flat[start : start + count]
            flag[:count] = 1
        yield torch.from_numpy(ids), torch.from_numpy(mask)


def _concatenated(made: Rows, order: Array) -> Iterator[tuple[Any, Any]]:
    import torch

    flat, offsets, lengths = made.flat, made.offsets, made.lengths
    for rows in _slices(order.astype(np.int64)):
        pairs = zip(offsets[rows].tolist(), offsets[rows + 1].tolist(), strict=True)
        tokens = np.concatenate([flat[a:b] for a, b in pairs]).astype(np.int64)
        bounds = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(lengths[rows], out=bounds[1:])
        yield torch.from_numpy(tokens), torch.from_numpy(bounds)


def _data_loader(path: str, made: Rows, order: Array) -> Any:
    """A memory map under torch's DataLoader with a collate function as people write it."""
    import torch
    from torch.utils.data import DataLoader, Dataset

    flat, offsets = np.asarray(np.load(path, mmap_mode="r")), made.offsets.tolist()

    class Mapped(Dataset[Any]):
        def __len__(self) -> int:
            return len(offsets) - 1

        def __getitem__(self, i: int) -> Any:
            return flat[offsets[i] : offsets[i + 1]]

    def collate(rows: list[Any]) -> tuple[Any, Any]:
        shape = (len(rows), max(map(len, rows)))
        ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.from_numpy(row.astype(np.int64))
            mask[i, : len(row)] = 1
        return ids, mask

    return DataLoader(Mapped(), batch_size=BATCH, sampler=order.tolist(), collate_fn=collate)


def _drain(way: Way, made: Rows) -> None:
    """One epoch, its order included; with two threads each takes half of it."""
    order = _order(made)
    threads = int(os.environ.get("EMBKIT_THREADS", "1"))
    if threads == 1:
        _consume(way(made, order))
        return
    half = len(order) // threads // BATCH * BATCH
    with ThreadPoolExecutor(threads) as pool:
        parts = (order[:half], order[half:])
        for done in [pool.submit(_consume, way(made, part)) for part in parts]:
            done.result()


def _consume(made: Iterator[Any]) -> None:
    for _ in made:
        pass


def _sums(made: Iterator[tuple[Any, Any]]) -> tuple[int, int, int]:
    """Rows, tokens and the sum of the rows' checksums of padded batches."""
    rows = tokens = total = 0
    for ids, mask in made:
        for row, size in zip(ids.numpy(), mask.numpy().sum(1).tolist(), strict=True):
            assert not row[size:].any()
            total += zlib.crc32(row[:size].astype(np.uint16).tobytes())
            tokens += size
        rows += len(ids)
    return rows, tokens, total


def _same(name: str, found: tuple[int, int, int], want: tuple[int, int, int]) -> None:
    if found != want:
        raise EmbkitError(f"store.batches: {name} gives other rows than embkit: {found}, {want}")


def _copy_rate() -> float:
    """int64 elements copied per CPU-second inside a buffer as large as a batch's."""
    import time

    source = np.ones(BATCH * LENGTH, np.int64)
    target = np.empty_like(source)
    started = time.process_time()
    for _ in range(3000):
        np.copyto(target, source)
    return 3000 * len(source) / max(time.process_time() - started, 1e-9)
