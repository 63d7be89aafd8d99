"""Mining without a store: vectors and positives in, negatives out, no files."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embkit import _rust
from embkit.data.tables import Array, Shard, offsets_of, owners
from embkit.errors import UsageError
from embkit.mine.matrix import Matrix
from embkit.mine.memory import PER_SKETCH
from embkit.mine.miner import (
    Block,
    Miner,
    Negatives,
    Passages,
    Progress,
    joined,
    reranked,
    room_for,
    shifted,
    spans,
)
from embkit.mine.rerank import as_reranker
from embkit.recipe import Rules

_NO = np.zeros(0, np.uint64)


def mine_vectors(
    queries: NDArray[Any] | Sequence[NDArray[Any]],
    corpus: NDArray[Any] | Sequence[NDArray[Any]],
    positives: Any,
    *,
    texts: Sequence[str] | None = None,
    query_texts: Sequence[str] | None = None,
    clusters: Array | None = None,
    query_ids: Sequence[Hashable] | None = None,
    passage_ids: Sequence[Hashable] | None = None,
    rules: Rules | None = None,
    reranker: Any = None,
    memory: int = 0,
    threads: int = 0,
    progress: Progress = None,
    **settings: Any,
) -> Negatives:
    """Hard negatives of queries among passages, from vectors that any model made.

    Args:
        queries: float [m, d], or several arrays that follow one another (mapped ones stay so).
        corpus: float [n, d], likewise. Scores are inner products: give unit vectors for cosine.
        positives: of each query: a row of the corpus, or a list of rows; or ``(offsets, rows)``;
            with ``passage_ids`` their ids in place of rows; with ``query_ids`` perhaps a mapping.
        texts: the passages, for the near-duplicate rule and the reranker; equal texts count as one.
        query_texts: the queries, so that no copy of a query becomes its negative.
        clusters: integers [n], near-duplicate clusters of the passages.
        query_ids, passage_ids: names; each only once.
        rules: what is kept (docs/mining.md); **settings: single rules in place of those.
        reranker: ``f(queries, passages) -> scores`` on texts, or an object with ``predict``.
        memory: bytes beside the inputs and the result; 0 lets embkit choose. A copy of the texts,
            where they are given, is among them.
        threads: 0 for all; no effect on the result.
        progress: called with the number of queries done.

    Returns:
        Negatives by query, ``row`` being rows of the corpus.

    Raises:
        UsageError: widths that differ, NaN or zero vectors (which), fewer passages than k, a
            positive that is not in the corpus, an id that comes twice, a query without a positive,
            rules that need texts when there are none, or less memory than mining takes.
    """
    chosen = replace(rules or Rules(), **settings)
    q, c = Matrix(queries, "queries"), Matrix(corpus, "corpus")
    if q.width != c.width:
        raise UsageError(
            f"Queries have {q.width} dimensions, the corpus has {c.width}.",
            fix="embed both with the same model and width",
        )
    if len(c) < chosen.k:
        raise UsageError(
            f"The corpus has {len(c)} passages for k = {chosen.k} negatives.",
            fix="lower k, or give more passages",
        )
    offsets, rows = _positives(positives, len(q), len(c), query_ids, passage_ids)
    q.check()
    c.check()
    _needs_texts(chosen, texts, query_texts, reranker)
    shards = [*_shard(texts, len(c), "passages"), *_shard(query_texts, len(q), "queries")]
    cluster, own = _clusters(clusters, len(c), shards if texts is not None else [], len(q))
    if query_texts is None:
        own = _NO
    held = sum(len(text) + PER_SKETCH * len(offsets) for text, offsets in shards)
    everything = list(texts or ()) + list(query_texts or ())
    miner = Miner(
        Passages(
            vectors=c, name=np.arange(len(c), dtype=np.uint64), cluster=cluster,
            shards=shards if chosen.near_duplicate is not None else [],
        ),
        q, chosen, room=room_for(offsets, rows, cluster), memory=memory,
        held=held + 16 * len(rows), threads=threads,
        reranker=as_reranker(reranker), text=everything.__getitem__,
    )  # fmt: skip
    score = q.dot(owners(offsets), c, rows.astype(np.int64))
    text = np.arange(len(c), len(c) + len(q), dtype=np.uint64) if query_texts is not None else _NO
    parts = []
    for first, last in spans(len(q), miner.block):
        span = slice(int(offsets[first]), int(offsets[last]))
        block = Block(
            query=np.arange(first, last),
            number=np.arange(first, last, dtype=np.uint64),
            own=np.zeros(0, np.uint32),
            cluster=own[first:last],
            text=text[first:last],
            offsets=offsets[first : last + 1] - offsets[first],
            positive=rows[span],
            score=score[span],
        )
        parts.append(miner.mine(block, shifted(progress, first)))
    table = joined(parts)
    return Negatives(
        offsets=table["offsets"], row=table["row"], score=table["score"], rank=table["rank"],
        positive=score, audit=table["audit"], rerank=reranked(table), report=miner.report,
    )  # fmt: skip


def _needs_texts(rules: Rules, texts: Any, query_texts: Any, reranker: Any) -> None:
    if texts is None and rules.near_duplicate is not None:
        raise UsageError(
            "The near-duplicate rule compares texts, and there are none.",
            fix="give texts=..., or near_duplicate=None",
        )
    if reranker is not None and (texts is None or query_texts is None):
        raise UsageError(
            "A reranker reads texts, and there are none.", fix="give texts and query_texts"
        )


def _shard(texts: Sequence[str] | None, n: int, name: str) -> list[Shard]:
    if texts is None:
        return []
    if len(texts) != n:
        raise UsageError(f"{len(texts)} texts for {n} {name}.", fix="give one text for each vector")
    joined_texts, counts = bytearray(), np.empty(n, np.int64)
    for i, text in enumerate(texts):  # one by one: a list of all encoded ones is a second copy
        data = text.encode()
        joined_texts += data
        counts[i] = len(data)
    return [(np.frombuffer(joined_texts, np.uint8), offsets_of(counts))]


def _clusters(given: Array | None, n: int, shards: list[Shard], m: int) -> tuple[Array, Array]:
    """Clusters of passages and, where their texts are known, of queries."""
    if given is not None:
        cluster = np.asarray(given)
        if cluster.shape != (n,) or cluster.dtype.kind not in "iu":
            raise UsageError(
                f"clusters is {cluster.dtype} {list(cluster.shape)} for {n} passages.",
                fix="give one integer for each passage",
            )
        return np.ascontiguousarray(cluster.astype(np.uint64)), _NO
    if not shards:
        return np.arange(n, dtype=np.uint64), _NO
    same = np.asarray(_rust.exact_duplicates(shards), np.uint64)  # equal texts are one cluster
    return np.ascontiguousarray(same[:n]), np.ascontiguousarray(same[n:])


def _positives(
    given: Any,
    m: int,
    n: int,
    query_ids: Sequence[Hashable] | None,
    passage_ids: Sequence[Hashable] | None,
) -> tuple[Array, Array]:
    """Offsets U64 [m+1] and corpus rows U32."""
    place = _index(passage_ids, n, "passages")
    queries = _index(query_ids, m, "queries")
    if isinstance(given, Mapping):
        if queries is None:
            raise UsageError("positives is a mapping.", fix="give query_ids, which it maps")
        unknown = [key for key in given if key not in queries]
        if unknown:
            raise UsageError(f"positives name the query {unknown[0]!r}, which is not there.")
        given = [given.get(key, ()) for key in query_ids or ()]
    arrays = isinstance(given, tuple) and all(isinstance(a, np.ndarray) for a in given)
    if isinstance(given, np.ndarray) and given.ndim == 1 and place is None:
        offsets, rows = np.arange(len(given) + 1, dtype=np.uint64), given
    elif arrays and len(given) == 2 and place is None:
        offsets, rows = np.asarray(given[0], np.uint64), np.asarray(given[1])
    else:
        lists = [_as_list(one) for one in given]
        offsets = offsets_of(np.array([len(one) for one in lists], np.int64))
        flat = [p for one in lists for p in one]
        if place is not None:
            missing = next((p for p in flat if p not in place), None)
            if missing is not None:
                raise UsageError(
                    f"The positive {missing!r} is not in the corpus.",
                    fix="add it to the corpus, or leave it out",
                )
            flat = [place[p] for p in flat]
        rows = np.array(flat) if flat else np.zeros(0, np.int64)
    if len(offsets) != m + 1 or int(offsets[-1]) != len(rows):
        raise UsageError(f"Positives of {len(offsets) - 1} queries for {m}.", fix="give them all")
    if rows.dtype.kind not in "iu":
        raise UsageError(f"Positives are {rows.dtype}, not rows.", fix="give passage_ids for names")
    wrong = np.flatnonzero((rows < 0) | (rows >= n))
    if len(wrong):
        raise UsageError(
            f"The positive {rows[wrong[0]]} is not in the corpus of {n}.",
            where=f"query {owners(offsets)[wrong[0]]}",
            fix="add it to the corpus, or leave it out",
        )
    empty = np.flatnonzero(np.diff(offsets.astype(np.int64)) <= 0)
    if len(empty):
        raise UsageError(
            f"{len(empty)} queries have no positive.",
            where=f"query {empty[0]}",
            fix="leave them out",
        )
    return offsets, rows.astype(np.uint32)


def _as_list(one: Any) -> list[Any]:
    return list(one) if isinstance(one, (list, tuple, set, np.ndarray)) else [one]


def _index(ids: Sequence[Hashable] | None, n: int, name: str) -> dict[Hashable, int] | None:
    if ids is None:
        return None
    if len(ids) != n:
        raise UsageError(f"{len(ids)} ids for {n} {name}.", fix="give one id for each vector")
    place = {key: i for i, key in enumerate(ids)}
    if len(place) != n:
        twice = next(key for i, key in enumerate(ids) if place[key] != i)
        raise UsageError(f"The id {twice!r} of the {name} comes twice.", fix="give each id once")
    return place
