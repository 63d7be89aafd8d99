"""Nearest neighbours of many queries at once: exact by default, approximate on request.

All queries are known before the search starts, so blocks of queries meet blocks of the corpus.
Engines (docs/mining.md): ``exact`` screens with int8 products and proves per query that nothing was
missed; ``ivf`` visits the lists nearest to a query, list by list, as many as a measured recall asks
for; ``torch`` is exact on a CUDA device, its scores the same up to the rounding of float32.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embkit import _rust
from embkit.errors import UsageError, nearest

Vectors = NDArray[Any] | Sequence[NDArray[Any]]
ENGINES = ("auto", "exact", "ivf", "torch")

# Measured on one thread of the processors at hand (docs/benchmarks.md): billions of
# multiply-additions per second of a screened scan, by instruction set.
_RATES = {
    "amx-int8": 400.0,
    "avx512-vnni": 170.0,
    "avx512": 42.0,
    "avx2": 35.0,
    "neon": 15.0,
    "portable": 4.0,
}
_RESCORE = 0.6e-6  # seconds for one row in float32 from anywhere in memory
_SAMPLE = 768  # queries that are searched exactly to choose and measure the recall
_LEAST_ROWS = 4096  # a smaller corpus is searched faster than it is sorted into lists


@dataclass(frozen=True, kw_only=True)
class Found:
    """Neighbours of each query, best first, ties by lower row.

    Attributes:
        row: U32 [queries, k], positions in the corpus.
        score: F32 [queries, k], inner products.
        report: how it was done: ``engine``, ``recall`` (measured when approximate, with
            ``recall_error`` and ``recall_queries``), ``lists`` and ``probes``; JSON types only.
    """

    row: NDArray[np.uint32]
    score: NDArray[np.float32]
    report: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which engine a search takes and why.

    Attributes:
        engine: ``"exact"`` or ``"ivf"``. isa: what the processor offers.
        exact_seconds, ivf_seconds: estimates for one thread, building included.
    """

    engine: str
    isa: str
    exact_seconds: float
    ivf_seconds: float

    def __str__(self) -> str:
        other = "ivf" if self.engine == "exact" else "exact"
        seconds = {"exact": self.exact_seconds, "ivf": self.ivf_seconds}
        return (
            f"{self.engine} on {self.isa}: about {seconds[self.engine]:.3g} s on one thread "
            f"({other}: {seconds[other]:.3g} s)"
        )


def choose(
    n_queries: int, n_passages: int, d: int, k: int, recall: float = 1.0, isa: str | None = None
) -> Plan:
    """The faster engine for a search: a function of its arguments alone.

    Args:
        n_queries, n_passages, d, k: sizes of the search.
        recall: least recall that an approximate search must have; 1 means exact.
        isa: instruction set as ``embkit._rust.search_isa()`` names it; this machine's by default.
    """
    isa = isa or _rust.search_isa()
    rate = _RATES.get(isa, _RATES["portable"]) * 1e9
    scan = d / rate  # seconds for one query and one row
    exact = n_queries * (n_passages * scan + 1.9 * k * _RESCORE) + n_passages * d * 1e-9
    lists = max(1.5 * n_passages**0.5, 1)
    # The share of the corpus that a recall takes falls as lists get finer and grows as the rest to
    # find gets rarer; measured on sentence embeddings.
    share = min(1.0, 0.021 / max(1 - recall, 1e-9) ** 0.55 * (300_000 / max(n_passages, 1)) ** 0.2)
    assign = n_passages + 6 * min(n_passages, 64 * lists)
    build = assign * lists * scan * 1.8 + n_passages * d * 3e-9
    sample = min(n_queries, _SAMPLE) * (exact / max(n_queries, 1))
    each = lists * scan * 1.3 + share * n_passages * scan * 1.6 + 1.2 * k * _RESCORE / 2
    ivf = build + sample + n_queries * each
    approximate = recall < 1 and n_passages >= _LEAST_ROWS and ivf < exact
    return Plan(
        engine="ivf" if approximate else "exact", isa=isa, exact_seconds=exact, ivf_seconds=ivf
    )


class Searcher:
    """One search in pieces: prepared for all of its queries, run for any range of them.

    The pieces have the same rows and scores as one call for all queries, whatever the pieces are.

    Attributes:
        engine: the engine taken. plan: why, when engine ``"auto"`` chose between the CPU's.

    Args:
        queries: float [nq, d], or several such arrays that follow one another; float32 and float16
            are used where they lie (they may be mapped files), others are copied.
        corpus: likewise [n, d].
        k: neighbours per query, at most n.
        engine: ``"auto"`` (see :func:`choose`; ``"torch"`` when the process has a CUDA device),
            ``"exact"``, ``"ivf"`` or ``"torch"``.
        recall: least share of the true neighbours, by score, that ``"ivf"`` must find.
        memory: bytes beside the vectors and the result; 0 lets embkit choose (2 GiB). ``"ivf"``
            holds d + 8 bytes per corpus row whatever is said here.
        group: a ``torch.distributed`` group that shares a search by ``"torch"``.
        seed: of the clustering and of the sample on which recall is measured.
        threads: 0 for all; no effect on the result.

    Raises:
        UsageError: an unknown engine, shapes that do not fit, a k or recall out of range.
    """

    def __init__(
        self,
        queries: Vectors,
        corpus: Vectors,
        k: int,
        *,
        engine: str = "auto",
        recall: float = 1.0,
        memory: int = 0,
        group: Any = None,
        seed: int = 0,
        threads: int = 0,
    ) -> None:
        if engine not in ENGINES:
            raise UsageError(f"Unknown engine {engine!r}; {nearest(engine, ENGINES)}")
        if not 0 < recall <= 1:
            raise UsageError(
                f"recall = {recall} is out of range.", fix="above 0 and at most 1, e.g. 0.95"
            )
        self.queries, self.corpus = _parts(queries, "queries"), _parts(corpus, "corpus")
        self.k, self.recall, self.memory, self.group = k, recall, memory, group
        self.seed, self.threads = seed, threads
        self.total = sum(map(len, self.queries))
        self.report: dict[str, Any] = {"engine": engine, "recall": 1.0}
        self.plan: Plan | None = None  # of engine "auto" without a GPU
        self._ivf: Any = None
        self._probes = 0
        if engine == "auto":
            engine = self._choose()
        self.engine = engine

    def search(
        self,
        start: int = 0,
        stop: int | None = None,
        *,
        progress: Callable[[int], object] | None = None,
    ) -> Found:
        """Neighbours of queries ``start`` to ``stop`` (all by default).

        Raises:
            UsageError: NaN or infinite values; it names the row.
        """
        stop = self.total if stop is None else stop
        queries, corpus = _slice(self.queries, start, stop), self.corpus
        if self.engine == "torch":
            from embkit import search_torch

            row, score, report = search_torch.search(
                queries, corpus, self.k, memory=self.memory, group=self.group, progress=progress
            )
            self.report = report
        elif self.engine == "ivf":
            ivf = self._prepare()
            row, score = ivf.search(
                _bits(queries), _bits(corpus), self.k, self._probes, threads=self.threads,
                progress=progress,
            )  # fmt: skip
        else:
            row, score = _rust.topk(
                _bits(queries), _bits(corpus), self.k, memory=self.memory, threads=self.threads,
                progress=progress,
            )  # fmt: skip
            self.report = {"engine": "exact", "recall": 1.0}
        return Found(row=row, score=score, report=dict(self.report))

    def bytes_kept(self) -> int:
        """Memory that the engine holds whatever ``memory`` says: the lists of ``"ivf"``."""
        n, d = sum(map(len, self.corpus)), self.corpus[0].shape[1]
        return n * (d + 64 + 24) + int(1.5 * n**0.5) * 12 * d if self.engine == "ivf" else 0

    def bytes_least(self) -> int:
        """Memory that a search takes at the least, beside the vectors and its result."""
        threads, d = self.threads or os.cpu_count() or 1, self.corpus[0].shape[1]
        each = 0  # of a query in a thread's block: candidates, and lists to visit
        if self.engine == "ivf":
            each = 64 * self.k + 12 * int(1.5 * sum(map(len, self.corpus)) ** 0.5)
        return (2 << 20) + 2 * 4096 * d + threads * ((1 << 20) + 1024 * each)

    def _choose(self) -> str:
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            return "torch"
        n, d = sum(map(len, self.corpus)), self.corpus[0].shape[1]
        self.plan = choose(self.total, n, d, self.k, self.recall)
        return self.plan.engine

    def _prepare(self) -> Any:
        """Lists and probes, from all queries: a later piece, or another process, finds the same."""
        if self._ivf is None:
            corpus = _bits(self.corpus)
            self._ivf = _rust.Ivf(corpus, seed=self.seed, threads=self.threads)
            self._probes, recall, error, queries = self._ivf.calibrate(
                _bits(self.queries), corpus, self.k, self.recall, seed=self.seed,
                memory=self.memory, threads=self.threads,
            )  # fmt: skip
            self.report = {
                "engine": "ivf", "lists": self._ivf.lists, "probes": self._probes,
                "recall": round(recall, 5), "recall_error": round(error, 5),
                "recall_queries": queries,
            }  # fmt: skip
        return self._ivf


def search(
    queries: Vectors,
    corpus: Vectors,
    k: int,
    *,
    engine: str = "auto",
    recall: float = 1.0,
    memory: int = 0,
    group: Any = None,
    seed: int = 0,
    threads: int = 0,
    progress: Callable[[int], object] | None = None,
) -> Found:
    """The k corpus rows with the largest inner product for each query.

    Args:
        queries, corpus, k, engine, recall, memory, group, seed, threads: see :class:`Searcher`.
        progress: called with the number of queries done.

    Raises:
        UsageError: as :class:`Searcher`, and for NaN or infinite values.
    """
    searcher = Searcher(
        queries, corpus, k, engine=engine, recall=recall, memory=memory, group=group, seed=seed,
        threads=threads,
    )  # fmt: skip
    return searcher.search(progress=progress)


def _parts(vectors: Vectors, name: str) -> list[NDArray[Any]]:
    parts = [vectors] if isinstance(vectors, np.ndarray) else list(vectors)
    if not parts or any(part.ndim != 2 for part in parts):
        raise UsageError(
            f"{name} must be [rows, width] arrays, not {[np.shape(p) for p in parts]}.",
            fix="pass one two-dimensional array or a list of them",
        )
    kept = (np.float32, np.float16)
    return [np.ascontiguousarray(p, p.dtype if p.dtype in kept else np.float32) for p in parts]


def _bits(parts: list[NDArray[Any]]) -> list[NDArray[Any]]:
    """As Rust takes them: half floats by their bits."""
    return [p.view(np.uint16) if p.dtype == np.float16 else p for p in parts]


def _slice(parts: list[NDArray[Any]], start: int, stop: int) -> list[NDArray[Any]]:
    """Rows ``start`` to ``stop`` of arrays that follow one another, without copying."""
    found, first = [], 0
    for part in parts:
        here = part[max(start - first, 0) : max(stop - first, 0)]
        if len(here):
            found.append(here)
        first += len(part)
    return found or [parts[0][:0]]
