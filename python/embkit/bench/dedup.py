"""Bench group `dedup`: raw text to verified near-duplicate clusters, beside rensa and others."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from embkit import _rust
from embkit.bench import Case, filters
from embkit.bench.contamination import contamination, contamination_chars, contamination_mixed
from embkit.bench.corpus import digest, text_shard, texts
from embkit.bench.exact import exact
from embkit.bench.near_quality import flag_recall, growth, memory, precision, recall

_THRESHOLD = 0.7


def near(quick: bool) -> Case:
    """Word 3-grams, Jaccard >= 0.7."""
    items = texts(quick)
    shard = text_shard(items)
    megabytes = len(shard[0]) / 1e6
    rivals: dict[str, Callable[[], Any]] = {}
    skipped = {}
    try:
        from rensa import RMinHash, RMinHashLSH

        rivals["rensa"] = lambda: _rensa(items, RMinHash, RMinHashLSH)
    except ImportError:
        skipped["rensa"] = "it is not installed"
    try:
        import datasketch

        rivals["datasketch"] = lambda: _datasketch(items, datasketch)
    except ImportError:
        skipped["datasketch"] = "it is not installed"
    return Case(
        name="dedup.near",
        unit="MB/s",
        work=megabytes,
        ours=lambda: _rust.near_duplicates([shard], threshold=_THRESHOLD),
        rivals=rivals,
        check=_covers,
        limit=_read_limit(shard[0]),
        floor="60 MB/s, 4x the best peer",
        goal="120 MB/s",
        facts={"n": len(items), "threshold": _THRESHOLD, "data": digest(shard[0])},
        skipped=skipped,
    )


def _covers(ours: Any, theirs: Any) -> None:
    """The peers do not verify candidates: their flags must agree with ours on most texts."""
    flagged = {i for i, r in enumerate(ours[0]) if int(r) != i}
    assert len(flagged & theirs) >= 0.8 * len(flagged), "a rival misses a fifth of the duplicates"


def _shingles(text: str) -> list[str]:
    words = text.lower().split()
    return [" ".join(words[i : i + 3]) for i in range(max(len(words) - 2, 1))]


def _rensa(items: tuple[str, ...], minhash: Any, lsh: Any) -> set[int]:
    index = lsh(threshold=_THRESHOLD, num_perm=128, num_bands=16)
    signatures: list[Any] = []
    flagged = set()
    for i, text in enumerate(items):
        m = minhash(num_perm=128, seed=42)
        m.update(_shingles(text))
        if any(signatures[j].jaccard(m) >= _THRESHOLD for j in index.query(m)):
            flagged.add(i)
        signatures.append(m)
        index.insert(i, m)
    return flagged | _partners(items)


def _datasketch(items: tuple[str, ...], datasketch: Any) -> set[int]:
    index = datasketch.MinHashLSH(threshold=_THRESHOLD, num_perm=128)
    flagged = set()
    for i, text in enumerate(items):
        m = datasketch.MinHash(num_perm=128)
        m.update_batch([s.encode() for s in _shingles(text)])
        if index.query(m):
            flagged.add(i)
        index.insert(i, m)
    return flagged | _partners(items)


def _partners(items: tuple[str, ...]) -> set[int]:
    """First members of exact groups: rivals flag the later copy, we may flag either."""
    first: dict[str, int] = {}
    return {first.setdefault(" ".join(t.lower().split()), i) for i, t in enumerate(items)}


def _read_limit(data: np.ndarray) -> tuple[str, float]:
    started = time.process_time()
    for _ in range(4):
        int(data.sum(dtype=np.uint64))
    return "one read", 4 * len(data) / 1e6 / max(time.process_time() - started, 1e-9)


CASES = (
    near, precision, recall, flag_recall, memory, growth,
    exact, contamination, contamination_mixed, contamination_chars,
    filters.rules,
)  # fmt: skip
