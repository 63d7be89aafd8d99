"""Sections of a recipe that decide the hard negatives: mined, and replaced during training."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from embkit.recipe.schema import one_of, require

_CONAN = {
    "conan-v1": {"every": 100, "ratio": 1.15, "ceiling": 0.8, "floor": -1.0},
    "conan-v2": {"every": 1, "ratio": 1.2, "ceiling": 0.7, "floor": 0.4},
}


@dataclass(frozen=True, kw_only=True)
class Dynamic:
    """Hard negatives that are replaced when they are no longer hard (docs/training.md).

    Each example trains on a slice of its mined list, ``hard_negatives`` long. With S the mean
    cosine of the slice with the query, now and when it was first seen, a check moves the example
    to the next slice where ``ratio * S_now < S_first`` and ``|S_now| < ceiling`` (v2: ``S_now <
    ceiling``), or where ``S_first < floor``.

    Attributes:
        rule: off, conan-v1 or conan-v2.
        first: place in the list where the first slice begins; 0 when mining has already skipped
            the nearest.
        every: steps between checks. ratio, ceiling, floor: of the rule. None takes the paper's:
            100, 1.15, 0.8 and -1 (never) for v1; 1, 1.2, 0.7 and 0.4 for v2.
        lag: steps from a check to the first batch that has the new slice; batches are assembled
            ahead, by at most ``lag - 2`` threads.
    """

    rule: str = "off"
    first: int = 10
    every: int | None = None
    ratio: float | None = None
    ceiling: float | None = None
    floor: float | None = None
    lag: int = 8

    def __post_init__(self) -> None:
        one_of("dynamic.rule", self.rule, ("off", *_CONAN))
        require(
            self.first >= 0 and self.lag >= 3 and (self.every is None or self.every >= 1),
            f"dynamic.first = {self.first}, lag = {self.lag}, every = {self.every}: one is out of "
            "range.",
            "first is at least 0, lag at least 3, every at least 1",
        )

    @property
    def on(self) -> bool:
        """Whether negatives are replaced at all."""
        return self.rule != "off"

    def resolved(self) -> Dynamic:
        """With the paper's numbers where none are given."""
        given = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        return Dynamic(**{**_CONAN.get(self.rule, {}), **given})


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Which neighbours of a query become its hard negatives (docs/mining.md).

    The rules run in this order, each candidate is counted under the first that removes it, and
    ``s+`` is the lowest score of the query's positives. None (``"off"`` in a recipe) switches a
    rule off. Numbers are those of NV-Retriever (arXiv 2407.15831) where a source is not named.

    Attributes:
        k: negatives kept per query. NV-Retriever: 4 for a small model, 1 and 5 in its two stages.
        candidates: how many ranks are looked at. Positives, their near-duplicate clusters, and
            repeats of a cluster have no rank. Ours; sampling 4 of the top 10 is the paper's.
        skip: pass over the first ranks; the paper's "top-k shifted by N" has 10.
        max_score: keep ``s <= max_score`` ("TopK-Abs", 0.7).
        margin: keep ``s <= s+ - margin`` ("TopK-MarginPos", 0.05).
        percent_of_positive: keep ``s <= s+ - |s+| (1 - percent)``, which is ``percent * s+`` for a
            positive ``s+`` ("TopK-PercPos", 0.95, the best of the paper).
        min_score: keep ``s >= min_score``. Ours.
        near_duplicate: word-3-gram Jaccard with a positive or the query from which a candidate is
            its copy. Ours; 6 to 9 % of the negatives of other miners reach 0.7.
        rerank_candidates: how many of those that are left a reranker scores, where there is one;
            k at the least.
        rerank_max_score, rerank_margin, rerank_percent: as above on the reranker's scores.
        sample: ``"top"`` keeps the best k, ``"random"`` draws k of what is left with ``seed``.
        refill: what a query gets that has fewer than k: ``"none"``; ``"relax"``, candidates that
            max_score, margin or percent_of_positive had removed, lowest score first;
            ``"random"``, passages from outside its candidates, drawn with ``seed``.
        seed: of the draws.
        ensemble: with several miners (the paper's intra-sample ensembling): ``"keep"`` each
            miner's negatives as they are, or ``"merge"`` equal ones.
        engine: of the search: auto, exact, ivf or torch.
        recall: least share of the true neighbours that an approximate engine finds; 1 is exact.
    """

    k: int = 4
    candidates: int = 64
    skip: int = 0
    max_score: float | None = None
    margin: float | None = None
    percent_of_positive: float | None = 0.95
    min_score: float | None = None
    near_duplicate: float | None = 0.7
    rerank_candidates: int = 16
    rerank_max_score: float | None = None
    rerank_margin: float | None = None
    rerank_percent: float | None = None
    sample: str = "top"
    refill: str = "none"
    seed: int = 0
    ensemble: str = "keep"
    engine: str = "auto"
    recall: float = 1.0

    def __post_init__(self) -> None:
        require(
            self.k >= 1 and self.skip >= 0,
            f"mine.k = {self.k}, mine.skip = {self.skip}: one is out of range.",
            "k is at least 1, skip at least 0",
        )
        require(
            self.candidates >= self.k + self.skip,
            f"mine.candidates = {self.candidates} is less than k + skip = {self.k + self.skip}.",
            "look at more candidates than are kept, 16 times k or more",
        )
        for name in ("percent_of_positive", "rerank_percent", "near_duplicate"):
            value = getattr(self, name)
            require(
                value is None or 0 < value <= 1,
                f"mine.{name} = {value} is out of range.",
                "give a share above 0 and at most 1, e.g. 0.95",
            )
        for name in ("margin", "rerank_margin"):
            value = getattr(self, name)
            require(
                value is None or value >= 0,
                f"mine.{name} = {value} is negative.",
                "give a distance of at least 0, e.g. 0.05",
            )
        require(
            0 < self.recall <= 1 and self.seed >= 0,
            f"mine.recall = {self.recall}, mine.seed = {self.seed}: one is out of range.",
            "recall is above 0 and at most 1, seed at least 0",
        )
        one_of("mine.sample", self.sample, ("top", "random"))
        one_of("mine.refill", self.refill, ("none", "relax", "random"))
        one_of("mine.ensemble", self.ensemble, ("keep", "merge"))
        one_of("mine.engine", self.engine, ("auto", "exact", "ivf", "torch"))
