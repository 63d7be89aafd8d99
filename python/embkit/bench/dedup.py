"""Bench group `dedup`: raw text to verified near-duplicate clusters, beside other programs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from embkit import _rust
from embkit.bench import Case, filters
from embkit.bench.contamination import contamination, contamination_chars, contamination_mixed
from embkit.bench.corpus import digest, text_shard, texts
from embkit.bench.dedup_rivals import RIVALS, rivals
from embkit.bench.exact import exact
from embkit.bench.near_quality import flag_recall, growth, memory, precision, recall

_THRESHOLD = 0.7


def near(quick: bool) -> Case:
    """Word 3-grams, Jaccard >= 0.7, the whole corpus; the rivals that are fast enough for it."""
    return _near("dedup.near", texts(quick), ("rensa", "gaoya"))


def near_sample(quick: bool) -> Case:
    """The same on 20,000 texts, beside every rival."""
    return _near("dedup.near.20k", texts(quick)[:20_000], RIVALS)


def _near(name: str, items: tuple[str, ...], wanted: Sequence[str]) -> Case:
    shard = text_shard(items)
    ways, skipped = rivals(items, _THRESHOLD, wanted)
    return Case(
        name=name,
        unit="MB/s",
        work=len(shard[0]) / 1e6,
        ours=lambda: _rust.near_duplicates([shard], threshold=_THRESHOLD),
        rivals=ways,
        check=_covers,
        limit=_read_limit(shard[0]),
        floor="60 MB/s, 4x the best peer",
        goal="120 MB/s",
        facts={"n": len(items), "threshold": _THRESHOLD, "data": digest(shard[0])},
        skipped=skipped,
    )


def _covers(ours: Any, theirs: set[int]) -> None:
    """Estimates and misses differ, but a rival must see most clusters: one text of each."""
    representative = ours[0].astype(np.int64)
    size = np.bincount(representative, minlength=len(representative))
    clusters = set(np.flatnonzero(size > 1).tolist())
    seen = {int(representative[i]) for i in theirs}
    assert len(clusters & seen) >= 0.8 * len(clusters), "a rival misses a fifth of the clusters"


def _read_limit(data: np.ndarray) -> tuple[str, float]:
    started = time.process_time()
    for _ in range(4):
        int(data.sum(dtype=np.uint64))
    return "one read", 4 * len(data) / 1e6 / max(time.process_time() - started, 1e-9)


CASES = (
    near, near_sample, precision, recall, flag_recall, memory, growth,
    exact, contamination, contamination_mixed, contamination_chars,
    filters.rules,
)  # fmt: skip
