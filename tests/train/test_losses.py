"""Losses: candidates, keys and masks against double loops over the examples."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from naive_batches import Sides as Rows
from naive_batches import TaskData, dense

from embkit.errors import CorruptError, UsageError
from embkit.losses import Known, Sides, compute, explain
from embkit.recipe import Dynamic, Loss, Part, Train

DIMS = (12, 5)


class Clusters:
    """The part of a store that keys need: the cluster of each row."""

    def __init__(self, cluster: np.ndarray) -> None:
        self._cluster = cluster

    def cluster(self, rows: np.ndarray) -> np.ndarray:
        return self._cluster[rows.astype(np.int64)]


def embeddings(rows: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, DIMS[0], generator=generator, dtype=torch.float64)


def run(rows: Rows, e: torch.Tensor, config: Train) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss with one embedding per store row."""
    index = [torch.from_numpy(r.astype(np.int64)) for r in (rows.query, rows.positive)]
    hard = torch.from_numpy(rows.hard.astype(np.int64))
    names = ("query_key", "positive_key", "hard_key", "hard_mask", "score", "weight")
    sides = Sides(kind=rows.kind, **{n: torch.from_numpy(getattr(rows, n)) for n in names})
    out = compute(e, *index, hard, sides, dims=DIMS, config=config)
    return out.loss, out.per_dim


def cosine(e: torch.Tensor, a: int, b: int, dim: int) -> float:
    x, y = e[a, :dim], e[b, :dim]
    return float(x @ y / (x.norm() * y.norm()))


def gemini(
    e: torch.Tensor, triples: list[tuple[int, int, list[int]]], same: Any, tau: float, dim: int
) -> float:
    """Gemini Embedding 2 as printed, row by row; ``same(a, b)``: the two rows are one identity."""
    total = 0.0
    for q, p, hard in triples:
        z = cosine(e, q, p, dim) / tau
        terms = [z]
        for other_q, other_p, _ in triples:
            if not same(q, other_q) and not same(p, other_p):
                terms.append(cosine(e, q, other_p, dim) / tau)
        terms += [cosine(e, q, h, dim) / tau for h in hard if not same(h, p)]
        top = max(terms)
        total += top + math.log(sum(math.exp(t - top) for t in terms)) - z
    return total / len(triples)


def test_retrieval_masks_equal_the_double_loop(table: Any) -> None:
    rng = np.random.default_rng(5)
    m = 24
    cluster = rng.integers(0, 30, 200).astype(np.uint64)  # many equal pairs among 200 rows
    cluster += np.uint64(2**63)  # keys are 64 bits wide
    query = rng.integers(0, 200, m).tolist()
    positive = [[int(v)] for v in rng.integers(0, 200, m)]
    negative = [rng.integers(0, 200, int(k)).tolist() for k in rng.integers(0, 4, m)]
    data = TaskData.of(table("r", "retrieval", query, positive, negative))
    sides = data.sides(
        np.arange(m, dtype=np.uint64), seed=0, epoch=0, hard=3, store=Clusters(cluster)
    )
    assert sides.query_key.dtype == sides.hard_key.dtype == np.int32
    e = embeddings(200).requires_grad_()
    config = Train(temperature=0.3)
    loss, per_dim = run(sides, e, config)

    def same(a: int, b: int) -> bool:
        return bool(cluster[a] == cluster[b])

    masked = sum(
        same(query[i], query[j]) or same(positive[i][0], positive[j][0])
        for i in range(m) for j in range(m) if i != j
    )  # fmt: skip
    assert masked > 20  # the case is about masks
    triples = [(query[i], positive[i][0], negative[i]) for i in range(m)]
    for dim, got in zip(DIMS, per_dim.tolist(), strict=True):
        assert got == pytest.approx(gemini(e.detach(), triples, same, 0.3, dim), rel=1e-9)
    assert loss.item() == pytest.approx(sum(per_dim.tolist()), rel=1e-12)


def test_masked_copies_get_no_gradient(table: Any) -> None:
    data = TaskData.of(table("r", "retrieval", [0, 1, 2], [[3], [4], [5]]))
    cluster = np.array([0, 1, 2, 9, 9, 9], np.uint64)  # three copies of one passage
    sides = data.sides(
        np.arange(3, dtype=np.uint64), seed=0, epoch=0, hard=0, store=Clusters(cluster)
    )
    e = embeddings(6).requires_grad_()
    loss, _ = run(sides, e, Train())
    assert loss.item() == 0.0
    loss.backward()
    assert e.grad is not None and not e.grad.any()


def test_absent_hard_negatives_cost_nothing(table: Any) -> None:
    rows = np.arange(4, dtype=np.uint64)
    store = Clusters(np.arange(40, dtype=np.uint64))
    positive, negative = [[4], [5], [6], [7]], [[], [10], [11, 12], [13, 14, 15]]
    data = TaskData.of(table("r", "retrieval", [0, 1, 2, 3], positive, negative))
    e = embeddings(40)
    sides = data.sides(rows, seed=0, epoch=0, hard=3, store=store)
    assert sides.hard_mask.sum(1).tolist() == [0, 1, 2, 3]
    assert sides.hard[0].tolist() == [4, 4, 4]
    want = gemini(
        e, [(i, 4 + i, negative[i]) for i in range(4)], lambda a, b: a == b, 0.02, DIMS[0]
    )
    assert run(sides, e, Train())[1][0].item() == pytest.approx(want, rel=1e-9)


def test_hard_negatives_and_positives_are_drawn_anew_each_epoch(table: Any) -> None:
    m = 60
    data = TaskData.of(
        table("r", "retrieval", list(range(m)), [[100, 101, 102]] * m, [list(range(200, 220))] * m)
    )
    store, rows = Clusters(np.arange(300, dtype=np.uint64)), np.arange(m, dtype=np.uint64)
    epochs = [data.sides(rows, seed=0, epoch=e, hard=2, store=store) for e in (0, 0, 1)]
    assert np.array_equal(epochs[0].hard, epochs[1].hard)
    assert not np.array_equal(epochs[0].hard, epochs[2].hard)
    assert not np.array_equal(epochs[0].positive, epochs[2].positive)
    assert set(epochs[0].positive.tolist()) == {100, 101, 102}
    part = data.sides(rows[7:9], seed=0, epoch=0, hard=2, store=store)
    assert np.array_equal(part.hard, epochs[0].hard[7:9])  # a draw belongs to its example


def test_classification_equals_the_double_loop(table: Any) -> None:
    rng = np.random.default_rng(2)
    label = np.r_[rng.integers(0, 4, 40), 4].astype(np.int32)  # class 4 has one text
    query = (np.arange(41) + 7).tolist()
    data = TaskData.of(table("c", "classification", query, label=label))
    assert len(data) == 40 and data.skipped == {"no other text of its class": 1}
    of_row = dict(zip(query, label.tolist(), strict=True))
    positives = set()
    for epoch in range(30):
        examples = rng.permutation(40)[:16].astype(np.uint64)
        sides = data.sides(examples, seed=1, epoch=epoch, hard=5, store=None)
        for q, p in zip(sides.query.tolist(), sides.positive.tolist(), strict=True):
            assert q != p and of_row[q] == of_row[p]
            positives.add((q, p))
        assert sides.hard.shape == (16, 0)
    assert len(positives) > 200
    e = embeddings(60)
    triples = [(int(q), int(p), []) for q, p in zip(sides.query, sides.positive, strict=True)]
    want = gemini(e, triples, lambda a, b: of_row[a] == of_row[b], 0.1, DIMS[1])
    assert run(sides, e, Train(temperature=0.1))[1][1].item() == pytest.approx(want, rel=1e-9)


def test_sts_equals_the_double_loop(table: Any) -> None:
    score = np.array([1, 0, 0.5, 0.5, 3, np.nan], np.float32)
    data = TaskData.of(
        table("s", "sts", [0, 1, 2, 3, 4, 5], [[6 + i] for i in range(6)], score=score)
    )
    assert len(data) == 5
    sides = data.sides(np.arange(5, dtype=np.uint64), seed=0, epoch=0, hard=0, store=None)
    e = embeddings(12)
    _, per_dim = run(sides, e, Train(cosent_scale=15.0))
    for dim, got in zip(DIMS, per_dim.tolist(), strict=True):
        s = [cosine(e, i, 6 + i, dim) for i in range(5)]
        terms = [
            math.exp(15 * (s[j] - s[i])) for i in range(5) for j in range(5) if score[i] > score[j]
        ]
        assert got == pytest.approx(math.log(1 + sum(terms)), rel=1e-9)


def test_row_weights_divide_by_their_sum(table: Any) -> None:
    base = table("r", "retrieval", [0, 1, 2, 3], [[4], [5], [6], [7]])
    data = TaskData.of(dataclasses.replace(base, weight=np.array([1, 0, 2, 0], np.float32)))
    store = Clusters(np.arange(8, dtype=np.uint64))
    sides = data.sides(np.arange(4, dtype=np.uint64), seed=0, epoch=0, hard=0, store=store)
    e, config = embeddings(8), Train(temperature=0.5)
    triples = [(i, 4 + i, []) for i in range(4)]

    def row(i: int) -> float:
        rest = [t for j, t in enumerate(triples) if j != i]
        z = cosine(e, i, 4 + i, 12) / 0.5
        others = sum(math.exp(cosine(e, i, p, 12) / 0.5 - z) for _, p, _ in rest)
        return math.log1p(others)

    assert run(sides, e, config)[1][0].item() == pytest.approx((row(0) + 2 * row(2)) / 3, rel=1e-6)


def test_dense_keys() -> None:
    a, b = dense(np.array([2**64 - 1, 5], np.uint64), np.array([5, 7, 2**64 - 1], np.uint64))
    assert a.tolist() == [2, 0] and b.tolist() == [0, 1, 2] and a.dtype == np.int32


def test_explain_of_the_default() -> None:
    want = """\
retrieval: InfoNCE as gemini-v2, temperature 0.05, 64 rows of one task.
  in the denominator of a query: its positive, the 63 other rows' positives and its own
    3 hard negatives, drawn anew each epoch from those mined for it.
  candidates of a query: 67, less what is masked, fewer where a row has fewer hard
    negatives.
  not there: the 63 other queries; other rows' hard negatives.
  masked: rows whose query is in its query's near-duplicate cluster, or whose positive
    is in its positive's; hard negatives in its positive's cluster.
classification: InfoNCE as gemini-v2, temperature 0.05, 64 rows of one task.
  positive of a text: another text of its class, drawn anew each epoch.
  in the denominator of a query: its positive and the 63 other rows' positives.
  candidates of a query: 64, less what is masked.
  not there: the 63 other queries.
  masked: texts of its own class.
sts: CoSENT, scale 15, 64 pairs of one task.
  each pair is ranked against every pair of another gold score; no other negatives."""
    config = Train(batch_size=64, hard_negatives=3, temperature=0.05, cosent_scale=15.0)
    assert explain(config) == want
    moving = dataclasses.replace(config, dynamic=Dynamic(rule="conan-v1"))
    words = "its own 3 hard negatives, a slice of those mined for it, which moves on by conan-v1"
    assert words in " ".join(explain(moving).split())


FORM_TEXTS = {
    "gemini-v1": """\
  in the denominator of a query: the 3 other rows' positives and its own 2 hard
    negatives, the first of those mined for it.
  candidates of a query: 5, less what is masked, fewer where a row has fewer hard
    negatives.
  not there: its positive; the 3 other queries; other rows' hard negatives.
  masked: rows whose query is in its query's near-duplicate cluster, or whose positive
    is in its positive's; hard negatives in its positive's cluster.""",
    "gecko": """\
  in the denominator of a query: its positive, the 3 other rows' positives, the 3 other
    queries and its own 2 hard negatives, the first of those mined for it.
  candidates of a query: 9, less what is masked, fewer where a row has fewer hard
    negatives.
  not there: other rows' hard negatives.
  masked: rows whose query is in its query's near-duplicate cluster, or whose positive
    is in its positive's; hard negatives in its positive's cluster.""",
    "conan": """\
  in the denominator of a query: its positive and its own 2 hard negatives, the first of
    those mined for it.
  candidates of a query: 3, less what is masked, fewer where a row has fewer hard
    negatives.
  not there: the 3 other rows' positives; the 3 other queries; other rows' hard
    negatives.
  masked: hard negatives in its positive's near-duplicate cluster.""",
    "qwen3": """\
  in the denominator of a query: its positive, the 3 other rows' positives, the 3 other
    queries and its own 2 hard negatives, the first of those mined for it.
  also there: the cosines of its positive with the 3 other rows' positives.
  candidates of a query: 12, less what is masked, fewer where a row has fewer hard
    negatives.
  not there: other rows' hard negatives.
  masked: rows whose query is in its query's near-duplicate cluster, or whose positive
    is in its positive's; hard negatives in its positive's cluster.
  dropped, at each width: negatives with a cosine above its positive's plus 0.1.""",
    "embedding-gemma": """\
  in the denominator of a query: the 3 other rows' positives and its own 2 hard
    negatives, the first of those mined for it.
  candidates of a query: 5, less what is masked, fewer where a row has fewer hard
    negatives.
  not there: its positive; the 3 other queries; other rows' hard negatives.
  masked: rows whose query is in its query's near-duplicate cluster, or whose positive
    is in its positive's; hard negatives in its positive's cluster.
  a hard negative with cosine s weighs exp(5 s).""",
}


@pytest.mark.parametrize("form", FORM_TEXTS)
def test_explain_of_a_tasks_form(form: str) -> None:
    config = Train(batch_size=4, hard_negatives=2, hard_rule="top", losses={"faq": {"form": form}})
    head = f"faq (retrieval): InfoNCE as {form}, temperature 0.02, 4 rows of one task."
    assert explain(config).partition(head + "\n")[2] == FORM_TEXTS[form]


def test_explain_of_parts_and_of_what_is_added() -> None:
    config = Train(
        parts=(
            Part(tasks={"faq": 1.0}, batch_size=4, hard_negatives=2, loss={"hard": "shared"}),
            Part(tasks={"graded": 1.0}, batch_size=8, weight=0.8),
        ),
        loss=Loss(
            spread_out=0.1, distill=2.0, distill_scores=0.5, symmetric=True, mask="positives",
            margin=-0.05, margin_rule="relative", learn_temperature=True,
            dim_weights={"64": 0.5}, dims_schedule="progressive",
        ),
        losses={"graded": {"distill_scores": 0.0}},
        teacher="vectors",
    )  # fmt: skip
    want = """\
part 0, weight 1: faq.
  faq (retrieval): InfoNCE as gemini-v2, temperature learned from 0.02 on, 4 rows of one task.
    in the denominator of a query: its positive, the 3 other rows' positives and the 2
      hard negatives of every row, drawn anew each epoch from those mined for it.
    candidates of a query: 12, less what is masked, fewer where a row has fewer hard
      negatives.
    not there: the 3 other queries.
    masked: rows whose positive is in its positive's near-duplicate cluster; hard
      negatives in its positive's cluster.
    dropped, at each width: negatives with a cosine above 95 % of its positive's.
    the mean of that and of the opposite direction, in the denominator of a positive: its
      query and the 3 other queries.
    widths: 64 x 0.5; the others x 1.
    widths join one after another, the smallest first.
    added: 0.1 x the mean squared cosine of different queries, and of different positives.
    added: 2 x the cosine distance of queries, positives and hard negatives from the
      teacher's vectors.
    added: 0.5 x the divergence from the teacher's softmax over positive and own hard
      negatives, its scores over 1.
part 1, weight 0.8: graded.
  graded (sts): CoSENT, scale 20, 8 pairs of one task.
    each pair is ranked against every pair of another gold score; no other negatives.
    widths: 64 x 0.5; the others x 1.
    widths join one after another, the smallest first.
    added: 2 x the cosine distance of both sides from the teacher's vectors."""
    tasks = {"faq": Known(kind="retrieval"), "graded": Known(kind="sts")}
    assert explain(config, tasks, complete=True) == want


def test_bad_tables(table: Any) -> None:
    with pytest.raises(UsageError, match="unknown kind"):
        TaskData.of(table("x", "ranking", [0], [[1]]))
    with pytest.raises(UsageError, match="no usable example: no positive"):
        TaskData.of(table("x", "retrieval", [0], [[]]))
    short = (np.array([0, 1], np.uint64), np.array([3], np.uint64))
    with pytest.raises(CorruptError, match="for 1 examples, the store has 2"):
        TaskData.of(table("x", "retrieval", [0, 1], [[1], [2]]), negatives=short)
