"""Bench group `store`: text to token shards and shuffled padded batches, beside HF and numpy."""

from __future__ import annotations

import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from embkit import _rust, container
from embkit.bench import Case
from embkit.bench.corpus import digest
from embkit.bench.tokenizing import LENGTH, tokenize, tokenize_bpe, word_piece, write_store

_BATCH = 32


@cache
def _store(quick: bool) -> tuple[Any, Any]:
    """An open store, and the folder that lives as long as it."""
    home = tempfile.TemporaryDirectory(prefix="embkit-bench-")
    write_store(word_piece(quick), quick, home.name)
    return _rust.Store(home.name), home


def _all_tokens(store: Any) -> np.ndarray:
    rows = np.arange(store.rows, dtype=np.uint64)
    flat = np.empty(int(store.lengths(rows).sum()), np.int64)
    store.gather(rows, flat, np.empty(len(rows) + 1, np.int32))
    return flat


def batches(quick: bool) -> Case:
    """Shuffled padded int64 batches of 32 rows, ready for torch."""
    store, _home = _store(quick)
    n = int(store.rows)
    order = np.asarray(_rust.permute(n, 7, 0, n))
    groups = [order[i : i + _BATCH] for i in range(0, n - _BATCH + 1, _BATCH)]
    lengths = store.lengths(np.arange(n, dtype=np.uint64)).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    flat = _all_tokens(store)

    def ours() -> tuple[np.ndarray, np.ndarray]:
        """One call a batch, into buffers that stay; the views are what torch.from_numpy takes."""
        flat_ids = np.empty(_BATCH * LENGTH, np.int64)
        flat_mask = np.empty_like(flat_ids)
        for rows in groups:
            size = _BATCH * store.gather_padded(rows, flat_ids, flat_mask, 0)
            ids, mask = flat_ids[:size].reshape(_BATCH, -1), flat_mask[:size].reshape(_BATCH, -1)
        return ids, mask

    def collate() -> tuple[np.ndarray, np.ndarray]:
        """The best numpy way known: one scatter through the mask."""
        for rows in groups:
            at = rows.astype(np.int64)
            size = lengths[at]
            keep = np.arange(int(size.max())) < size[:, None]
            ids, mask = np.zeros(keep.shape, np.int64), keep.astype(np.int64)
            source = np.repeat(offsets[at] - np.concatenate([[0], np.cumsum(size)[:-1]]), size)
            ids[keep] = flat[source + np.arange(len(source))]
        return ids, mask

    tokens = float(sum(lengths[g.astype(np.int64)].sum() for g in groups))
    copy = np.empty_like(flat)
    started = time.process_time()
    for _ in range(8):
        np.copyto(copy, flat)
    rate = 8 * len(flat) / max(time.process_time() - started, 1e-9)
    return Case(
        name="store.batches",
        unit="tokens/s",
        work=tokens,
        ours=ours,
        rivals={"numpy collate": collate},
        check=np.testing.assert_equal,
        limit=("int64 copy", rate),
        floor="1.7x numpy collate",
        goal="250 Mtokens/s",
        facts={"n": n, "batch": _BATCH, "data": digest(flat)},
    )


def write(quick: bool) -> Case:
    """Token shards to disk; ours with checksum, fsync and rename."""
    tokens = np.random.default_rng(0).integers(0, 16_000, (4 if quick else 64) << 20, np.uint16)
    home = tempfile.TemporaryDirectory(prefix="embkit-bench-")
    path = Path(home.name)

    def ours() -> int:
        container.save(path / "a.safetensors", {"tokens": tokens}, kind="embkit.bench")
        return len(tokens)

    def plain() -> int:
        tokens.tofile(path / "b.bin")
        return len(tokens)

    case = Case(
        name="store.write",
        unit="tokens/s",
        work=len(tokens),
        ours=ours,
        rivals={"numpy tofile, no checksum or fsync": plain},
        check=np.testing.assert_equal,
        floor="1x numpy",
        goal="200 Mtokens/s",
        facts={"bytes": int(tokens.nbytes), "folder": home},
    )
    case.facts = {"bytes": int(tokens.nbytes)}
    case.ours.__dict__["folder"] = home  # lives as long as the case
    return case


CASES = (tokenize, tokenize_bpe, batches, write)
