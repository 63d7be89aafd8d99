"""Rivals of the searches in group `mine`, and the recall by which all are judged.

Recall counts by score: a row whose true score reaches the k-th best counts, because real corpora
hold many equal vectors. Approximate indexes run in processes of their own
(benches/rivals/neighbours.py), build once, and take their fastest setting that reaches the recall.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from embkit.bench import Reported, Sample, measure
from embkit.bench.rivals import Job, Rival

INDEXES = {
    "faiss IVFFlat": "ivf",
    "faiss IVFPQfs+refine": "ivfpq",
    "faiss HNSW": "hnsw",
    "hnswlib": "hnswlib",
    "usearch bf16": "usearch",
    "voyager": "voyager",
}
Exact = Callable[[], "Answer"]


@dataclass
class Answer:
    """Rows [nq, k] of a rival, scores when they are exact, and the recall that it must reach."""

    row: np.ndarray
    score: np.ndarray | None = None
    least: float = 0.9999


def best_scores(queries: np.ndarray, corpus: np.ndarray, k: int) -> np.ndarray:
    """The k best true scores of each query, float32 [nq, k], from numpy alone."""
    found = np.empty((len(queries), k), np.float32)
    for i in range(0, len(queries), 128):
        s = queries[i : i + 128] @ corpus.T
        found[i : i + 128] = -np.sort(np.partition(-s, k - 1, axis=1)[:, :k], axis=1)
    return found


def recall(row: np.ndarray, queries: np.ndarray, corpus: np.ndarray, edge: np.ndarray) -> float:
    """Share of the rows [nq, k] whose score is at least ``edge`` [nq], the k-th best one."""
    rows, good = np.asarray(row, np.int64), 0
    for i in range(0, len(rows), 256):
        part = slice(i, i + 256)
        own = np.einsum("qkd,qd->qk", corpus[rows[part]], queries[part])
        good += int((own >= edge[part, None] - 1e-5).sum())
    return good / rows.size


def exact_rivals(
    queries: np.ndarray, corpus: np.ndarray, k: int
) -> tuple[dict[str, Exact], dict[str, str]]:
    """Exhaustive searches with their corpus in place, and why others cannot run."""
    import torch

    ways: dict[str, Exact] = {"numpy": lambda: _numpy(queries, corpus, k)}
    single = torch.from_numpy(corpus)
    half = single.bfloat16()
    asked = torch.from_numpy(queries)
    ways["torch f32"] = lambda: _torch(asked, single, k, 0.9999)
    ways["torch bf16"] = lambda: _torch(asked.bfloat16(), half, k, 0.95)
    skipped = {}
    try:
        import faiss

        index = faiss.IndexFlatIP(corpus.shape[1])
        index.add(corpus)

        def search() -> Answer:
            score, row = index.search(queries, k)
            return Answer(row, score)

        ways["faiss Flat"] = search
    except ImportError:
        skipped["faiss Flat"] = "it is not installed"
    return ways, skipped


def _numpy(queries: np.ndarray, corpus: np.ndarray, k: int) -> Answer:
    rows, scores = [], []
    for start in range(0, len(queries), 256):
        s = queries[start : start + 256] @ corpus.T
        at = np.argpartition(-s, k - 1, axis=1)[:, :k]
        top = np.take_along_axis(s, at, 1)
        order = np.argsort(-top, axis=1, kind="stable")
        rows.append(np.take_along_axis(at, order, 1))
        scores.append(np.take_along_axis(top, order, 1))
    return Answer(np.concatenate(rows), np.concatenate(scores))


def _torch(queries: Any, corpus: Any, k: int, least: float) -> Answer:
    """Blocks of 256 queries and 16,384 rows, the best that we found for it, then a merge."""
    import torch

    rows, scores = [], []
    with torch.inference_mode():
        for q in queries.split(256):
            parts = [(q @ c.T).topk(min(k, len(c)), sorted=False) for c in corpus.split(16384)]
            value = torch.cat([p.values for p in parts], 1).float()
            at = torch.cat([p.indices + 16384 * i for i, p in enumerate(parts)], 1)
            best = value.topk(k)
            rows.append(at.gather(1, best.indices))
            scores.append(best.values)
    found = torch.cat(rows).numpy()
    return Answer(found, torch.cat(scores).numpy() if least > 0.99 else None, least)


class Indexes:
    """Running approximate rivals on one corpus.

    Attributes:
        edge: F32 [nq], k-th best true score of each query.
        facts: by rival: version, build CPU seconds and bytes, setting, recall.
    """

    def __init__(self, corpus: np.ndarray, queries: np.ndarray, k: int, least: float) -> None:
        self.corpus, self.queries, self.n = corpus, queries, len(corpus)
        self.edge = best_scores(queries, corpus, k)[:, -1]
        arrays = {"corpus": corpus, "queries": queries, "edge": self.edge}
        self.job = Job(arrays, {"k": k, "recall": least}, script="neighbours.py")
        self.running, self.skipped = self.job.start(INDEXES)
        self.facts = {
            name: {
                "build_cpu": round(r.ready["build_cpu"], 2),
                "build_peak": r.ready["build_peak"],
                "setting": r.ready["setting"],
                "version": r.ready["version"],
                "recall": round(r.ready["recall"], 4),
            }
            for name, r in self.running.items()
        }
        for name, about in self.facts.items():
            if about["recall"] < least:
                self.running.pop(name)
                self.skipped[name] = f"recall {about['recall']} at best, {about['setting']}"
        self.seconds: dict[str, float] = {}  # CPU of a query

    def search(self, name: str) -> Reported:
        """One round over the queries."""
        rival = self.running[name]
        found = rival.round("search", Answer(_rows(rival), None, 0.0))
        self.seconds[name] = found.sample.cpu / len(self.queries)
        return found

    def total(self, name: str) -> Reported:
        """Build and search of every corpus row, from the measured rate; one round if none was."""
        if name not in self.seconds:
            self.search(name)
        about = self.facts[name]
        cpu = about["build_cpu"] + self.seconds[name] * self.n
        return Reported(
            Answer(_rows(self.running[name]), None, 0.0), Sample(cpu, cpu, about["build_peak"])
        )

    def recall(self, row: np.ndarray) -> float:
        """Recall of rows [nq, k] found for the rivals' queries."""
        return recall(row, self.queries, self.corpus, self.edge)

    def close(self) -> None:
        """End the rivals; the next case starts them anew."""
        indexes.cache_clear()
        self.job.close()


@cache
def indexes(n: int, d: int, k: int, least: float, asked: int, quick: bool) -> Indexes:
    """The rivals on the bench vectors; the rows that share them build them once."""
    from embkit.bench.corpus import vectors

    corpus = vectors(n, d, quick)
    queries = np.ascontiguousarray(corpus[:: n // asked][:asked])
    return Indexes(corpus, queries, k, least)


def timed(work: Callable[[], Any]) -> tuple[Any, Sample]:
    """The result of one call, and what it took."""
    box: list[Any] = []
    sample = measure(lambda: box.append(work()))
    return box[0], sample


def _rows(rival: Rival) -> np.ndarray:
    return np.asarray(np.load(rival.folder / "rows.npy"))
