"""One block of queries after the other: search, rules, reranker, and deeper where it is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embkit import _rust
from embkit.data.tables import Array, Shard, offsets_of, owners, take_jagged
from embkit.mine.matrix import Matrix
from embkit.mine.memory import PER_PASSAGE, PER_QUERY, share
from embkit.mine.rerank import Reranker, score_pairs
from embkit.recipe import Rules
from embkit.search import Searcher, search

NONE = 0xFFFFFFFF  # a rank or row that is none
DEEPEST = 4096  # candidates of a query whose first list was full of copies
MOST = 1 << 17  # queries of a block: what a killed run loses
_EXTRA = 256  # places kept free for positives and their clusters

Progress = Callable[[int], object] | None


@dataclass(frozen=True, kw_only=True)
class Negatives:
    """Mined negatives, aligned with the queries or examples.

    Attributes:
        offsets: U64 [m+1].
        row: U64, store rows or rows of the corpus.
        score: F32, inner product with the query; NaN for a passage drawn as a refill.
        rank: U32, place among the query's candidates from 0, its positives and repeats of a
            cluster not counted. A refill has 2^31 added to it (``"relax"``) or 2^32 - 1
            (``"random"``), and stands after the others.
        positive: F32 [positives], score of each positive.
        audit: what each rule decided, in the order of the rules.
        rerank: F32, the reranker's scores of the negatives, or None.
        report: of the search.
    """

    offsets: Array
    row: Array
    score: Array
    rank: Array
    positive: Array
    audit: dict[str, int]
    rerank: Array | None = None
    report: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Passages:
    """The corpus of a miner.

    Attributes:
        vectors: of the passages.
        name: U64 [n], what a passage is called in the result; its row in ``shards``.
        cluster: U64 [n], near-duplicate cluster.
        shards: texts; none when the rules need none.
    """

    vectors: Matrix
    name: Array
    cluster: Array
    shards: list[Shard]


@dataclass(frozen=True, kw_only=True)
class Block:
    """Some queries with their positives.

    Attributes:
        query: int64 [m], the vector of each query among all of the miner's.
        number: U64 [m], its number among all.
        own: U32 [m], its row in the corpus, or NONE; may be empty.
        cluster: U64 [m]; may be empty. text: U64 [m], its row in the texts; may be empty.
        offsets: U64 [m+1]; positive: U32, rows in the corpus; score: F32, of the positives.
        label: int32 [m], class of each query, -1 where it is not known; empty without classes.
    """

    query: Array
    number: Array
    own: Array
    cluster: Array
    text: Array
    offsets: Array
    positive: Array
    score: Array
    label: Array = field(default_factory=lambda: np.zeros(0, np.int32))

    def take(self, at: Array) -> Block:
        """The queries at ``at``."""
        offsets, positive, score = take_jagged(self.offsets, at, self.positive, self.score)
        some = {n: v[at] if len(v) else v for n in _PER_QUERY for v in [getattr(self, n)]}
        return replace(self, offsets=offsets, positive=positive, score=score, **some)


_PER_QUERY = ("query", "number", "own", "cluster", "text", "label")


class Miner:
    """Mines block after block in one corpus.

    Args:
        passages: the corpus. queries: the vectors of all queries.
        rules: all of them.
        room: most rows that positives and their clusters may take of one query's list.
        memory: bytes for all but mapped files, what was there before and the result; 0 for a
            default. held: those that the caller holds beside the tables of this miner.
        text: the text of a row, for the reranker.
        classes: int32 [n], class of each passage, -1 where it is not known. One of the query's
            class is no negative, nor is one of an unknown class.

    Raises:
        UsageError: the memory is less than mining takes at the least.
    """

    def __init__(
        self,
        passages: Passages,
        queries: Matrix,
        rules: Rules,
        *,
        room: int,
        memory: int = 0,
        held: int = 0,
        threads: int = 0,
        reranker: Reranker | None = None,
        text: Callable[[int], str] | None = None,
        classes: Array | None = None,
    ) -> None:
        self.passages, self.queries, self.classes = passages, queries, classes
        self.rules, self.threads = rules, threads
        self.reranker, self.text = reranker, text
        self.filter = _rust.NegativeFilter(passages.cluster, passages.name, passages.shards)
        self.n = len(passages.vectors)
        self.pool = max(rules.rerank_candidates, rules.k)  # of a reranker
        self.depth = min(rules.candidates + min(room, _EXTRA), self.n)
        # Prepared for all queries, so that no result depends on how they are cut into blocks.
        self.searcher = Searcher(
            queries.parts, passages.vectors.parts, self.depth, engine=rules.engine,
            recall=rules.recall, seed=rules.seed, threads=threads,
        )  # fmt: skip
        each = 28 * self.depth + 48 * rules.k + (64 * self.pool if reranker else 0)
        budget = share(
            memory, held + PER_PASSAGE * self.n + PER_QUERY * len(queries), each, self.searcher
        )
        self.memory = self.searcher.memory = budget.search
        self.block = min(budget.block // each, MOST)

    def mine(self, block: Block, progress: Progress = None) -> dict[str, Any]:
        """Negatives of a block: offsets, row, score, rank, audit, and rerank tables.

        A query whose list ends before it has enough, because copies filled it, is searched again
        four times as deep: what is found does not depend on how many copies the corpus has.
        """
        depth = self.depth
        found = self._settle(block, depth, progress)
        shallow = found.pop("shallow").astype(np.int64)
        while len(shallow):
            depth = min(4 * depth, self.n, max(DEEPEST, depth))
            parts, again = [], np.zeros(0, np.int64)
            for first, last in spans(len(shallow), max(1, self.block * self.depth // depth)):
                parts.append(self._settle(block.take(shallow[first:last]), depth, None))
                again = np.append(again, parts[-1].pop("shallow").astype(np.int64) + first)
            found = _replaced(found, shallow, joined(parts))
            shallow = shallow[again] if depth < self._deepest() else again[:0]
        return found

    def trace(self, block: Block, table: Any = None) -> tuple[Array, Array, dict[str, Any]]:
        """Every candidate of one query: rows and scores [1, depth], and their verdicts.

        Args:
            block: of one query. table: its reranked candidates, as :meth:`mine` returned them.
        """
        depth = self.depth
        while True:
            row, score, lists = self._search(block, depth, None)
            options = self._options(depth, trace=True)
            options |= {"pool": self.pool} if table else {}
            given = _tuple(table) if table else None
            found = self._run(block, (row, score, lists), options, given)
            if not len(found["shallow"]) or depth >= self._deepest():
                return row, score, found
            depth = min(4 * depth, self._deepest())

    def _deepest(self) -> int:
        return min(self.n, max(DEEPEST, self.depth))

    def _search(self, block: Block, depth: int, progress: Progress) -> tuple[Array, Array, Array]:
        """Rows and scores [u, depth] of the block's distinct queries, and each query's list."""
        distinct, back = np.unique(block.query, return_inverse=True)
        back = back.reshape(-1).astype(np.uint32)
        if depth != self.depth:  # a few queries, deeper: exactly, whatever the engine
            found = search(
                self.queries.take(distinct), self.passages.vectors.parts, depth, engine="exact",
                memory=self.memory, threads=self.threads,
            )  # fmt: skip
            return found.row, found.score, back
        ends = np.flatnonzero(np.diff(distinct) != 1) + 1  # of runs of successive queries
        parts, done = [], 0
        for run in np.split(distinct, ends):
            first, last = int(run[0]), int(run[-1]) + 1
            parts.append(self.searcher.search(first, last, progress=shifted(progress, done)))
            done += last - first
        if len(parts) == 1:
            return parts[0].row, parts[0].score, back
        row, score = ([getattr(p, name) for p in parts] for name in ("row", "score"))
        return np.concatenate(row), np.concatenate(score), back

    @property
    def report(self) -> dict[str, Any]:
        """How it was searched; nothing that differs between machines."""
        return dict(self.searcher.report)

    def _options(self, depth: int, **more: Any) -> dict[str, Any]:
        return {**rust_rules(self.rules), "defer": depth < self._deepest(), **more}

    def _run(self, block: Block, lists: Any, options: Any, rerank: Any) -> Any:
        row, score, own = lists if self.classes is None else self._of_other_classes(block, lists)
        queries = (
            own, block.number, block.own, block.cluster, block.text, block.offsets,
            block.positive, block.score,
        )  # fmt: skip
        return self.filter.run(row, score, queries, options, rerank, threads=self.threads)

    def _of_other_classes(self, block: Block, lists: Any) -> tuple[Array, Array, Array]:
        """A list for each query, in which passages of its own class stand as its positive does: the
        filter passes over a positive and gives it no rank."""
        row, score, own = lists
        row, score = row[own], score[own]
        assert self.classes is not None
        theirs = self.classes[np.minimum(row, self.n - 1)]
        same = (theirs == block.label[:, None]) | (theirs < 0) | (block.label[:, None] < 0)
        first = block.positive[block.offsets[:-1].astype(np.int64)]
        row = np.where(same, first[:, None], row).astype(np.uint32)
        return row, np.ascontiguousarray(score), np.arange(len(row), dtype=np.uint32)

    def _settle(self, block: Block, depth: int, progress: Progress) -> dict[str, Any]:
        """Search and rules at one depth; the reranker sees what the rules leave."""
        lists = self._search(block, depth, progress)
        options = self._options(depth)
        if self.reranker is None:
            return dict(self._run(block, lists, options, None))
        pool = {**options, "pool": self.pool}
        left = self._run(block, lists, pool, None)
        table = self._rerank(block, left)
        found = dict(self._run(block, lists, pool, _tuple(table)))
        return found | table

    def _rerank(self, block: Block, left: dict[str, Any]) -> dict[str, Array]:
        assert self.reranker is not None and self.text is not None
        queries = block.text
        positive = self.passages.name[block.positive]
        at, of = owners(left["offsets"]), owners(block.offsets)
        scores = score_pairs(
            self.reranker,
            np.concatenate([queries[at], queries[of]]),
            np.concatenate([left["row"], positive]),
            self.text,
        )
        return {
            "rerank_offsets": left["offsets"],
            "rerank_rank": left["rank"],
            "rerank_score": scores[: len(at)],
            "rerank_positive_offsets": block.offsets,
            "rerank_positive": scores[len(at) :],
        }


def rust_rules(rules: Rules) -> dict[str, Any]:
    """The rules under the names of the Rust filter."""
    return {
        "skip": rules.skip,
        "last": rules.candidates,
        "max_score": rules.max_score,
        "margin": rules.margin,
        "percent": rules.percent_of_positive,
        "min_score": rules.min_score,
        "near_jaccard": rules.near_duplicate,
        "rerank_max_score": rules.rerank_max_score,
        "rerank_margin": rules.rerank_margin,
        "rerank_percent": rules.rerank_percent,
        "k": rules.k,
        "sample": rules.sample,
        "refill": rules.refill,
        "seed": rules.seed,
    }


def room_for(offsets: Array, positive: Array, cluster: Array) -> int:
    """The most corpus rows that one query's positives, their clusters and its own text take.

    Args:
        offsets, positive: jagged, rows of the corpus. cluster: of every corpus row.
    """
    ids, sizes = np.unique(cluster, return_counts=True)
    if len(ids) == len(cluster):
        per = np.ones(len(positive), np.int64)
    else:
        per = sizes[np.searchsorted(ids, cluster[positive])]
    m = len(offsets) - 1
    taken = np.bincount(owners(offsets), weights=per, minlength=m)
    return int(taken.max(initial=0)) + 1


def spans(n: int, step: int) -> Iterator[tuple[int, int]]:
    """The blocks of ``n`` queries: first and one after the last."""
    for start in range(0, n, step):
        yield start, min(start + step, n)


def shifted(progress: Progress, start: int) -> Progress:
    """A progress callback that counts on from ``start``."""
    return progress and (lambda done: progress(start + done))


def added(audits: list[dict[str, int]]) -> dict[str, int]:
    """The sum of several audits."""
    return {name: sum(a[name] for a in audits) for name in audits[0]} if audits else {}


_JAGGED = (
    ("offsets", ("row", "score", "rank")),
    ("rerank_offsets", ("rerank_rank", "rerank_score")),
    ("rerank_positive_offsets", ("rerank_positive",)),
)


def _replaced(found: dict[str, Any], at: Array, deeper: dict[str, Any]) -> dict[str, Any]:
    """``found`` with the queries ``at`` in place of which ``deeper`` has others."""
    out: dict[str, Any] = {"audit": added([found["audit"], deeper["audit"]])}
    m = len(found["offsets"]) - 1
    order = np.arange(m)
    order[at] = m + np.arange(len(at))
    for offsets, columns in _JAGGED:
        if offsets in found:
            both = np.concatenate([found[offsets], found[offsets][-1] + deeper[offsets][1:]])
            values = [np.concatenate([found[c], deeper[c]]) for c in columns]
            taken = take_jagged(both, order, *values)
            out |= dict(zip((offsets, *columns), taken, strict=True))
    return out


def _tuple(table: dict[str, Array]) -> tuple[Array, Array, Array, Array]:
    """Reranked candidates as the Rust filter takes them."""
    return (
        np.ascontiguousarray(table["rerank_offsets"], np.uint64),
        np.ascontiguousarray(table["rerank_rank"], np.uint32),
        np.ascontiguousarray(table["rerank_score"], np.float32),
        np.ascontiguousarray(table["rerank_positive"], np.float32),
    )


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Blocks one after the other; they lose their columns to it."""
    out: dict[str, Any] = {"audit": added([p["audit"] for p in parts])}
    for offsets, columns in _JAGGED:
        if parts and offsets in parts[0]:
            counts = [np.diff(p[offsets].astype(np.int64)) for p in parts]
            out[offsets] = offsets_of(np.concatenate(counts))
            for c in columns:  # one at a time, so that a result is not there twice
                out[c] = np.concatenate([p.pop(c) for p in parts])
    return out


def reranked(table: dict[str, Any]) -> NDArray[np.float32] | None:
    """The reranker's score of each negative, NaN for refills; None without a reranker."""
    if "rerank_offsets" not in table:
        return None
    m = len(table["offsets"]) - 1
    key = owners(table["rerank_offsets"]) << 32 | table["rerank_rank"].astype(np.int64)
    want = owners(table["offsets"]) << 32 | table["rank"].astype(np.int64)
    out = np.full(len(want), np.nan, np.float32)
    if m and len(key):
        at = np.minimum(np.searchsorted(key, want), len(key) - 1)
        hit = key[at] == want
        out[hit] = table["rerank_score"][at[hit]]
    return out
