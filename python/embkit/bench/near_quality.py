"""Rows of group `dedup` that are not rates: quality against an exact join, memory, growth."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from functools import cache
from typing import Any

import numpy as np

from embkit import _rust
from embkit.bench import Case
from embkit.bench.corpus import digest, text_shard, texts

_THRESHOLDS = (0.7, 0.8)
_WORD = re.compile(r"[a-z0-9_][a-z0-9_+#]*")
_SAMPLE = 25_000
_ALONE = """
import sys
import numpy as np
from embkit import _rust
from embkit.bench import peak_of
shard = tuple(np.load(f"{sys.argv[1]}/{name}.npy") for name in ("text", "offsets"))
print(peak_of(lambda: _rust.near_duplicates([shard], threshold=0.7, threads=1)))
"""


def precision(quick: bool) -> Case:
    """Edges whose exact Jaccard similarity reaches the threshold, of all edges."""
    return _quality("precision", quick, floor="1.0")


def recall(quick: bool) -> Case:
    """Exactly similar pairs whose two texts share a cluster."""
    return _quality("recall", quick, floor="0.98")


def flag_recall(quick: bool) -> Case:
    """Texts with an exactly similar partner that are not alone."""
    return _quality("flag_recall", quick, floor="0.995")


def memory(quick: bool) -> Case:
    """Peak growth of resident memory per text, beside the texts, without a cap.

    In a process of its own: this one's allocator has memory left over from other rows.
    """
    shard = text_shard(texts(quick))
    rows = len(shard[1]) - 1

    def alone() -> int:
        with tempfile.TemporaryDirectory(prefix="embkit-bench-") as home:
            for name, array in zip(("text", "offsets"), shard, strict=True):
                np.save(f"{home}/{name}.npy", array)
            command = [sys.executable, "-c", _ALONE, home]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(done.stdout)

    return Case(
        name="dedup.memory",
        unit="bytes/text",
        work=rows,
        ours=alone,
        score=lambda peak: peak / rows,
        rounds=1,
        floor="700 bytes/text",
        facts={"n": rows, "threshold": 0.7, "data": digest(shard[0])},
    )


def growth(quick: bool) -> Case:
    """CPU time per text of 1,000,000 texts over that of 10,000: distinct texts, a tenth copies."""
    few, many = (1000, 10_000) if quick else (10_000, 1_000_000)
    shards = {n: text_shard(_generated(n)) for n in (few, many)}

    def seconds(n: int) -> float:
        started = time.process_time()
        _rust.near_duplicates([shards[n]], threshold=0.7, threads=1)
        return (time.process_time() - started) / n

    return Case(
        name="dedup.growth",
        unit="x per text",
        work=many,
        ours=lambda: seconds(many) / min(seconds(few) for _ in range(5)),
        score=float,
        rounds=1,
        floor="near linear",
        goal="2",
        facts={"n": many, "from": few, "threshold": 0.7},
    )


def _generated(n: int) -> tuple[str, ...]:
    rng = np.random.default_rng(0)
    vocabulary = [f"w{i}" for i in range(50_000)]
    out: list[str] = []
    for i in range(n):
        if i % 10 == 9:
            out.append(out[int(rng.integers(i))] + " again")
        else:
            out.append(" ".join([vocabulary[k] for k in rng.integers(50_000, size=40)]))
    return tuple(out)


def _quality(name: str, quick: bool, floor: str) -> Case:
    shard, items = _sample(quick)
    return Case(
        name=f"dedup.{name}",
        unit="share",
        work=len(items),
        ours=lambda: {t: _rust.near_duplicates([shard], threshold=t) for t in _THRESHOLDS},
        score=lambda found: min(_scores(quick, t, found[t])[name] for t in _THRESHOLDS),
        rounds=1,
        floor=floor,
        facts={"n": len(items), "thresholds": list(_THRESHOLDS), "data": digest(shard[0])},
    )


@cache
def _sample(quick: bool) -> tuple[tuple[np.ndarray, np.ndarray], tuple[str, ...]]:
    """ASCII texts, where a regular expression finds the words that the core finds."""
    items = tuple(t for t in texts(quick) if t.isascii())
    take = min(_SAMPLE, len(items))
    chosen = np.random.default_rng(0).choice(len(items), size=take, replace=False)
    sample = tuple(items[i] for i in chosen)
    return text_shard(sample), sample


@cache
def _sets(quick: bool) -> list[frozenset[tuple[str, ...]]]:
    out: list[frozenset[tuple[str, ...]]] = []
    for text in _sample(quick)[1]:
        norm = " ".join(text.lower().split())
        words = _WORD.findall(norm)
        grams = zip(words, words[1:], words[2:], strict=False)
        out.append(frozenset(grams) if len(words) >= 3 else frozenset([(norm,)] if norm else []))
    return out


def _similarity(a: frozenset[Any], b: frozenset[Any]) -> float:
    shared = len(a & b)
    return shared / max(len(a) + len(b) - shared, 1)


@cache
def _join(quick: bool, threshold: float) -> list[tuple[int, int]]:
    """All pairs at or above the threshold, found through their rarest shingles.

    Two sets that similar share one of the first ``|a| - ceil(t |a|) + 1`` shingles of each, in any
    fixed order of the shingles.
    """
    sets = _sets(quick)
    count = Counter(gram for grams in sets for gram in grams)
    index: dict[tuple[str, ...], list[int]] = defaultdict(list)
    pairs = []
    for i, grams in enumerate(sets):
        prefix = len(grams) - int(np.ceil(threshold * len(grams) - 1e-9)) + 1
        rare = sorted(grams, key=lambda gram: (count[gram], gram))[:prefix]
        near = {j for gram in rare for j in index[gram]}
        pairs += [(j, i) for j in near if _similarity(grams, sets[j]) >= threshold]
        for gram in rare:
            index[gram].append(i)
    return pairs


def _scores(quick: bool, threshold: float, found: Any) -> dict[str, float]:
    representative = found[0].astype(np.int64)
    sets, pairs = _sets(quick), np.array(_join(quick, threshold)).reshape(-1, 2)
    members = np.flatnonzero(representative != np.arange(len(representative)))
    true = [_similarity(sets[i], sets[representative[i]]) >= threshold for i in members]
    size = np.bincount(representative, minlength=len(representative))[representative]
    together = representative[pairs[:, 0]] == representative[pairs[:, 1]]
    flagged = size[np.unique(pairs)] > 1
    return {
        "precision": float(np.mean(true)) if true else 1.0,
        "recall": float(together.mean()) if len(together) else 1.0,
        "flag_recall": float(flagged.mean()) if len(flagged) else 1.0,
    }
