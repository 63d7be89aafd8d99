"""Approximate indexes that embkit's search is measured beside, each in a long-lived process.

    python neighbours.py PEER FOLDER    peers: ivf, ivfpq, hnsw, hnswlib, usearch, voyager

FOLDER holds the work: `corpus.npy` float32 [n, d], `queries.npy` [nq, d], `edge.npy` [nq] (the k-th
best true score of each query) and `job.json` with k and the least recall. The peer builds its index
and takes the first of its settings, from fast to slow, that reaches the recall, or the last one. It
says so in one line of JSON with CPU seconds and bytes of the build; then each line on stdin is one
round over all queries, answered by its CPU and wall seconds. Rows lie in `rows.npy`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from embkit.bench import Sample, measure

Search = Callable[[], Any]  # rows [nq, k]
Settings = Iterator[tuple[str, Search]]
_LINKS, _BUILD = 16, 100  # of the graphs
_WIDTHS = (100, 200, 400, 800)  # of a search in them


def ivf(corpus: Any, queries: Any, k: int) -> Settings:
    import faiss

    n, d = corpus.shape
    lists = int(4 * n**0.5)
    quantizer = faiss.IndexFlatIP(d)
    index = faiss.IndexIVFFlat(quantizer, d, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.max_points_per_centroid = 128
    index.train(corpus)
    index.add(corpus)
    yield "", lambda: None
    for probes in (16, 32, 64, 128, 256):
        index.nprobe = probes
        yield f"IVF{lists},Flat nprobe {probes}", lambda: index.search(queries, k)[1]


def ivfpq(corpus: Any, queries: Any, k: int) -> Settings:
    import faiss

    n, d = corpus.shape
    lists = int(2 * n**0.5)
    name = f"IVF{lists},PQ{d // 4}x4fs,RFlat"
    index = faiss.index_factory(d, name, faiss.METRIC_INNER_PRODUCT)
    index.train(corpus[np.random.default_rng(0).permutation(n)[:65536]])
    index.add(corpus)
    yield "", lambda: None
    for probes, factor in ((16, 4), (32, 4), (64, 4), (64, 8), (128, 8), (256, 8), (256, 16)):
        faiss.extract_index_ivf(index.base_index).nprobe = probes
        index.k_factor = factor
        said = f"{name} nprobe {probes} k_factor {factor}"
        yield said, lambda: index.search(queries, k)[1]


def hnsw(corpus: Any, queries: Any, k: int) -> Settings:
    import faiss

    index = faiss.IndexHNSWFlat(corpus.shape[1], _LINKS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = _BUILD
    index.add(corpus)
    yield "", lambda: None
    for width in _WIDTHS:
        index.hnsw.efSearch = width
        yield f"M {_LINKS} ef {width}", lambda: index.search(queries, k)[1]


def hnswlib(corpus: Any, queries: Any, k: int) -> Settings:
    import hnswlib

    index = hnswlib.Index("ip", corpus.shape[1])
    index.set_num_threads(1)
    index.init_index(len(corpus), ef_construction=_BUILD, M=_LINKS)
    index.add_items(corpus, num_threads=1)
    yield "", lambda: None
    for width in _WIDTHS:
        index.set_ef(width)
        yield f"M {_LINKS} ef {width}", lambda: index.knn_query(queries, k, num_threads=1)[0]


def usearch(corpus: Any, queries: Any, k: int) -> Settings:
    from usearch.index import Index

    index = Index(
        ndim=corpus.shape[1], metric="ip", dtype="bf16", connectivity=_LINKS,
        expansion_add=_BUILD, expansion_search=_BUILD,
    )  # fmt: skip
    index.add(np.arange(len(corpus)), corpus, threads=1)
    yield "", lambda: None
    for width in _WIDTHS:
        index.expansion_search = width
        said = f"bf16 M {_LINKS} ef {width}"
        yield said, lambda: index.search(queries, k, threads=1).keys


def voyager(corpus: Any, queries: Any, k: int) -> Settings:
    import voyager

    index = voyager.Index(
        voyager.Space.InnerProduct, corpus.shape[1], M=_LINKS, ef_construction=_BUILD,
        max_elements=len(corpus),
    )  # fmt: skip
    index.add_items(corpus, num_threads=1)
    yield "", lambda: None
    for width in _WIDTHS:
        said = f"M {_LINKS} ef {width}"
        yield said, lambda w=width: index.query(queries, k, num_threads=1, query_ef=w)[0]


PEERS = {f.__name__: f for f in (ivf, ivfpq, hnsw, hnswlib, usearch, voyager)}
_PACKAGES = ("hnswlib", "usearch", "voyager")  # the others are faiss's


def recall(rows: Any, corpus: Any, queries: Any, edge: Any) -> float:
    """Share of the rows whose true score reaches the k-th best: equal vectors count alike."""
    rows = np.asarray(rows).astype(np.int64)
    there = (rows >= 0) & (rows < len(corpus))
    good = 0
    for i in range(0, len(rows), 64):
        part = slice(i, i + 64)
        found = np.einsum("qkd,qd->qk", corpus[np.where(there[part], rows[part], 0)], queries[part])
        good += int(((found >= edge[part, None] - 1e-5) & there[part]).sum())
    return good / rows.size


def main(peer: str, home: Path) -> None:
    try:
        import faiss

        faiss.omp_set_num_threads(1)
    except ImportError:
        pass
    about = json.loads((home / "job.json").read_text())
    corpus, queries, edge = (np.load(home / f"{x}.npy") for x in ("corpus", "queries", "edge"))
    settings = PEERS[peer](corpus, queries, about["k"])
    build: Sample = measure(lambda: next(settings))
    package = peer if peer in _PACKAGES else "faiss-cpu"
    ready: dict[str, Any] = {
        "build_cpu": build.cpu, "build_peak": build.peak, "version": version(package),
    }  # fmt: skip
    refused = RuntimeError("no setting")
    for setting, search in settings:
        try:
            rows = np.asarray(search()).astype(np.int64)
        except RuntimeError as error:  # hnswlib, where many vectors are equal
            refused = error
            continue
        ready |= {"setting": setting, "recall": recall(rows, corpus, queries, edge)}
        np.save(home / "rows.npy", rows)
        if ready["recall"] >= about["recall"]:
            break
    if "setting" not in ready:
        raise refused
    print(json.dumps(ready), flush=True)
    for _ in sys.stdin:
        took = measure(search)
        print(json.dumps({"cpu": took.cpu, "wall": took.wall, "peak": took.peak}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
