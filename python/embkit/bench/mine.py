"""Bench group `mine`: exact top-k and the negative filter, beside faiss, torch and numpy."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from embkit import _rust
from embkit.bench import Case, isa
from embkit.bench.corpus import digest, vectors

_D, _K = 384, 100


def _gemm_limit(d: int) -> tuple[str, float]:
    """Queries/s of a bare float32 product of this width, one thread, per corpus row."""
    a = np.ones((512, d), np.float32)
    b = np.ones((d, 4096), np.float32)
    a @ b
    started = time.process_time()
    for _ in range(8):
        a @ b
    taken = max(time.process_time() - started, 1e-9)
    return "f32 GEMM", 8 * 512 * 4096 / taken


def _same_scores(ours: Any, theirs: Any) -> None:
    """Recall counted by score: ties between equal vectors may come in any order."""
    np.testing.assert_allclose(ours[1], theirs[1], rtol=0, atol=2e-5)


def _exact(n: int, quick: bool) -> Case:
    corpus = vectors(n, _D, quick)
    queries = np.ascontiguousarray(corpus[:: max(n // (256 if quick else 2048), 1)])
    name, pairs = _gemm_limit(_D)
    rivals: dict[str, Callable[[], Any]] = {"numpy": lambda: _numpy_topk(queries, corpus)}
    skipped = {}
    rivals["torch"] = lambda: _torch_topk(queries, corpus)
    try:
        import faiss

        index = faiss.IndexFlatIP(_D)
        index.add(corpus)

        def search() -> tuple[np.ndarray, np.ndarray]:
            score, row = index.search(queries, _K)
            return row, score

        rivals["faiss Flat"] = search
    except ImportError:
        skipped["faiss Flat"] = "it is not installed"
    return Case(
        name=f"mine.exact.{n // 1000}k",
        unit="queries/s",
        work=len(queries),
        ours=lambda: _rust.topk(queries, corpus, _K),
        rivals=rivals,
        check=_same_scores,
        limit=(name, pairs / n),
        floor="1x faiss Flat",
        goal="1.2x faiss Flat (AVX-512 f32)",
        facts={"n": n, "d": _D, "k": _K, "isa": isa(), "data": digest(corpus)},
        skipped=skipped,
    )


def _numpy_topk(queries: np.ndarray, corpus: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows, scores = [], []
    for start in range(0, len(queries), 256):
        s = queries[start : start + 256] @ corpus.T
        at = np.argpartition(-s, _K, axis=1)[:, :_K]
        top = np.take_along_axis(s, at, 1)
        order = np.argsort(-top, axis=1, kind="stable")
        rows.append(np.take_along_axis(at, order, 1))
        scores.append(np.take_along_axis(top, order, 1))
    return np.concatenate(rows), np.concatenate(scores)


def _torch_topk(queries: np.ndarray, corpus: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    import torch

    c = torch.from_numpy(corpus)
    found = [(torch.from_numpy(q) @ c.T).topk(_K) for q in np.array_split(queries, 8)]
    return (
        torch.cat([f.indices for f in found]).numpy(),
        torch.cat([f.values for f in found]).numpy(),
    )


def exact_64k(quick: bool) -> Case:
    """n = 64k, d = 384, k = 100."""
    return _exact(16_000 if quick else 64_000, quick)


CASES = (exact_64k,)
