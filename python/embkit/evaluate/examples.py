"""A task's score as a function of how often each example counts.

`mteb` gives one number per task. From its predictions and the labels the same number is made again
here, with a weight per example: drawn weights give bootstrap intervals, zeros leave out examples
that training has seen. With all weights 1 it is mteb's number; where it is not (a measure that is
not known here), there is no interval, and the result says so.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Weights = NDArray[np.integer]
Values = NDArray[np.float64]
_TREC = {"ndcg": "ndcg_cut", "map": "map_cut", "recall": "recall", "precision": "P"}


@dataclass(frozen=True, kw_only=True)
class Examples:
    """What a score is a mean, a correlation or a count of.

    Attributes:
        n: number of examples.
        score: the main score, 0 to 1, from int weights [n] of which some are above 0.
        texts: the texts of each example that training must not have seen, made when asked for.
    """

    n: int
    score: Callable[[Weights], float]
    texts: Callable[[], list[list[str]]]


class Recorder(random.Random):
    """A generator that remembers what it drew: clustering draws texts and does not say which."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.sampled: list[list[int]] = []
        self.chosen: list[list[int]] = []

    def sample(self, population: Any, k: int, **more: Any) -> list[Any]:
        """As ``random.Random.sample``."""
        self.sampled.append(super().sample(population, k, **more))
        return self.sampled[-1]

    def choices(self, population: Any, *more: Any, k: int = 1, **others: Any) -> list[Any]:
        """As ``random.Random.choices``."""
        self.chosen.append(super().choices(population, *more, k=k, **others))
        return self.chosen[-1]


def examples_of(task: Any, data: Any, found: Any, *, split: str) -> Examples | None:
    """The examples of one split and subset.

    Args:
        task: of mteb, evaluated; its generator a :class:`Recorder` where it clusters.
        data: the subset's part of ``task.dataset``: of the split, or of all splits where the task
            trains a classifier.
        found: mteb's predictions for them.
        split: its name.

    Returns:
        None where the task's main score is none that is known here.
    """
    kind, main = str(task.metadata.type), str(task.metadata.main_score)
    match kind:
        case "Retrieval" | "Reranking" | "InstructionRetrieval":
            return _retrieval(task, data, found, main)
        case "STS":
            return _sts(task, data, found, main)
        case "PairClassification":
            return _pairs(task, data, found, main)
        case "Classification":
            return _classification(task, data[split], found, main)
        case "MultilabelClassification":
            return _multilabel(task, data[split], found, main)
        case "Clustering":
            return _clustering(task, data, found, main)
        case "BitextMining":
            return _bitext(data, found, main)
        case "Summarization":
            return _summaries(task, data, found, main)
    return None


# ---------------------------------------------------------------- weighted measures


def mean(values: Values, weights: Weights) -> float:
    """Weighted mean."""
    return float(values @ weights / weights.sum())


def pearson(x: Values, y: Values, weights: Weights) -> float:
    """Weighted correlation; 0 when one side is constant."""
    there = weights > 0
    if np.ptp(x[there]) == 0 or np.ptp(y[there]) == 0:
        return 0.0
    w = weights / weights.sum()
    a, b = x - x @ w, y - y @ w
    return float(a * b @ w / np.sqrt((a * a @ w) * (b * b @ w)))


def spearman(x: Values, y: Values) -> Callable[[Weights], float]:
    """Rank correlation as a function of integer weights; ties share their mean rank."""
    places = [np.unique(v, return_inverse=True)[1] for v in (x, y)]

    def score(weights: Weights) -> float:
        ranks = []
        for at in places:
            count = np.bincount(at, weights)
            ranks.append((np.cumsum(count) - (count - 1) / 2)[at])
        return pearson(ranks[0], ranks[1], weights)

    return score


def average_precision(value: Values, label: NDArray[np.integer]) -> Callable[[Weights], float]:
    """Area under the steps of precision over recall, as a function of weights; 0 without a 1."""
    order = np.argsort(-value, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(value[order]) != 0, True))
    right = label[order]

    def score(weights: Weights) -> float:
        w = weights[order]
        hit, taken = np.cumsum(w * right)[ends], np.cumsum(w)[ends]
        if hit[-1] == 0:
            return 0.0
        precision = hit / np.maximum(taken, 1)
        return float(np.diff(hit, prepend=0) @ precision / hit[-1])

    return score


def macro_f1(
    truth: NDArray[np.integer], guess: NDArray[np.integer], weights: Weights, labels: int
) -> float:
    """Mean F1 of the labels that occur among truths and guesses."""
    right = np.bincount(truth, weights * (truth == guess), labels)
    both = np.bincount(truth, weights, labels) + np.bincount(guess, weights, labels)
    return float(np.mean(2 * right[both > 0] / both[both > 0]))


def v_measure(table: NDArray[Any]) -> float:
    """Harmonic mean of homogeneity and completeness of a table classes x clusters."""
    p = table / table.sum()

    def entropy(of: NDArray[np.floating]) -> float:
        of = of[of > 0]
        return float(-(of * np.log(of)).sum())

    classes, clusters = entropy(p.sum(axis=1)), entropy(p.sum(axis=0))
    shared = max(classes + clusters - entropy(p.reshape(-1)), 0.0)
    one = shared / classes if classes > 0 else 1.0
    other = shared / clusters if clusters > 0 else 1.0
    return 2 * one * other / (one + other) if one + other > 0 else 0.0


# ---------------------------------------------------------------- kinds of tasks


def _retrieval(task: Any, data: Any, found: Any, main: str) -> Examples | None:
    judged = {q: answers for q, answers in data["relevant_docs"].items() if q in found}
    if getattr(task, "ignore_identical_ids", False):
        found = {q: {d: s for d, s in docs.items() if d != q} for q, docs in found.items()}
    values = _per_query(judged, found, main)
    if values is None:
        return None
    names = list(judged)
    per_query = np.array([values[q] for q in names])

    def texts() -> list[list[str]]:
        wanted = {d for answers in judged.values() for d, grade in answers.items() if grade > 0}
        titles = data["corpus"]["title"] if "title" in data["corpus"].column_names else None
        passages = {}
        for i, (d, text) in enumerate(
            zip(data["corpus"]["id"], data["corpus"]["text"], strict=True)
        ):
            if d in wanted:
                passages[d] = f"{titles[i] or ''} {text}".strip() if titles else text
        queries = dict(zip(data["queries"]["id"], data["queries"]["text"], strict=True))
        return [
            [
                str(queries[q]),
                *(passages[d] for d, g in judged[q].items() if g > 0 and d in passages),
            ]
            for q in names
        ]

    return Examples(n=len(names), score=lambda w: mean(per_query, w), texts=texts)


def _per_query(judged: Any, found: Any, main: str) -> dict[str, float] | None:
    """The main score of each query, by the program that mteb uses too."""
    wanted = re.fullmatch(r"(ndcg|map|recall|precision|mrr)_at_(\d+)", main)
    if wanted is None:
        return None
    name, k = wanted[1], int(wanted[2])
    if name == "mrr":
        return {q: _reciprocal(found[q], judged[q], k) for q in judged}
    import pytrec_eval

    measure = _TREC[name]
    results = pytrec_eval.RelevanceEvaluator(judged, {f"{measure}.{k}"}).evaluate(found)
    return {q: results[q][f"{measure}_{k}"] if q in results else 0.0 for q in judged}


def _reciprocal(docs: Mapping[str, float], answers: Mapping[str, int], k: int) -> float:
    best = sorted(docs.items(), key=lambda item: (item[1], item[0]), reverse=True)[:k]
    return next((1 / (i + 1) for i, (d, _) in enumerate(best) if answers.get(d, 0) > 0), 0.0)


def _sts(task: Any, data: Any, found: Any, main: str) -> Examples | None:
    wanted = re.fullmatch(r"(?:(cosine|manhattan|euclidean)_)?(spearman|pearson)", main)
    if wanted is None:
        return None
    column = {
        "cosine": "cosine_scores",
        "manhattan": "manhattan_distances",
        "euclidean": "euclidean_distances",
        None: "similarity_scores",
    }[wanted[1]]
    truth = np.array(data["score"], np.float64)
    value = np.array(found[column], np.float64)
    if wanted[2] == "spearman":
        score = spearman(truth, value)
    else:
        score = lambda w: pearson(truth, value, w)  # noqa: E731
    return Examples(n=len(truth), score=score, texts=_columns(data, task.column_names))


def _pairs(task: Any, data: Any, found: Any, main: str) -> Examples | None:
    columns = {
        "similarity": ("similarity_scores", 1),
        "cosine": ("cosine_scores", 1),
        "manhattan": ("manhattan_distances", -1),
        "euclidean": ("euclidean_distances", -1),
        "dot": ("dot_scores", 1),
    }
    wanted = re.fullmatch(r"(max|similarity|cosine|manhattan|euclidean|dot)_ap", main)
    if wanted is None or len(data) == 1:
        return None
    label = np.array(data[task.label_column_name], np.int64)
    ways = [
        average_precision(sign * np.array(found[column], np.float64), label)
        for name, (column, sign) in columns.items()
        if wanted[1] in ("max", name)
    ]
    return Examples(
        n=len(label),
        score=lambda w: max(way(w) for way in ways),
        texts=_columns(data, (task.input1_column_name, task.input2_column_name)),
    )


def _classification(task: Any, data: Any, found: Any, main: str) -> Examples | None:
    if main not in ("accuracy", "f1") or getattr(task, "is_cross_validation", False):
        return None
    truth = list(data[task.label_column_name])
    number = {v: i for i, v in enumerate(sorted({*truth, *(v for row in found for v in row)}))}
    right = np.array([number[v] for v in truth])
    guesses = np.array([[number[v] for v in row] for row in found])
    hits = (guesses == right).mean(axis=0)

    def f1(w: Weights) -> float:
        return float(np.mean([macro_f1(right, row, w, len(number)) for row in guesses]))

    return Examples(
        n=len(truth),
        score=f1 if main == "f1" else lambda w: mean(hits, w),
        texts=_columns(data, (task.input_column_name,)),
    )


def _multilabel(task: Any, data: Any, found: Any, main: str) -> Examples | None:
    from sklearn.preprocessing import MultiLabelBinarizer

    guesses = np.array(found)
    if main != "accuracy" or guesses.shape[1] != len(data):
        return None  # mteb has drawn a part of a long test split, and does not say which
    truth = MultiLabelBinarizer().fit_transform(data[task.label_column_name])
    hits = (guesses == truth).all(axis=2).mean(axis=0)
    texts = _columns(data, (task.input_column_name,))
    return Examples(n=len(data), score=lambda w: mean(hits, w), texts=texts)


def _clustering(task: Any, data: Any, found: Any, main: str) -> Examples | None:
    drawn = task.rng_state
    if main != "v_measure" or not isinstance(drawn, Recorder) or not isinstance(found, dict):
        return None
    rows = np.array(drawn.sampled[-1] if drawn.sampled else range(len(data)), np.int64)
    labels = [v if isinstance(v, list) else [v] for v in data[task.label_column_name]]
    cells, shapes, docs = [], [], []
    turn = iter(drawn.chosen)
    for level, (_, assignments) in enumerate(found.items()):
        there = [i for i in rows.tolist() if len(labels[i]) > level]
        known = {v: i for i, v in enumerate(sorted({labels[i][level] for i in there}, key=str))}
        kind = np.array([known[labels[i][level]] for i in there])
        for clusters in assignments:
            picks = np.array(next(turn))
            cluster = np.array(clusters)
            wide = int(cluster.max()) + 1
            cells.append(kind[picks] * wide + cluster)
            shapes.append((len(known), wide))
            docs.append(np.array(there)[picks])

    def score(w: Weights) -> float:
        each = []
        for cell, shape, doc in zip(cells, shapes, docs, strict=True):
            table = np.bincount(cell, w[doc], shape[0] * shape[1]).reshape(shape)
            each.append(v_measure(table) if table.any() else 0.0)
        return float(np.mean(each))

    return Examples(n=len(data), score=score, texts=_columns(data, (task.input_column_name,)))


def _bitext(data: Any, found: Any, main: str) -> Examples | None:
    if main not in ("f1", "accuracy") or len(found) != 1 or "gold" in data:
        return None
    ((pair, nearest),) = found.items()
    guess = np.array([row["corpus_id"] for row in nearest], np.int64)
    n = len(guess)
    hit = guess == np.arange(n)

    def score(w: Weights) -> float:
        if main == "accuracy":
            return mean(hit.astype(np.float64), w)
        # Each row is a label of its own: the weighted mean of 2 hits / (rows + guesses of it).
        both = w + np.bincount(guess, w, n)
        return float((w * (2 * w * hit / np.maximum(both, 1))).sum() / w.sum())

    return Examples(n=n, score=score, texts=_columns(data, pair.split("-")))


def _summaries(task: Any, data: Any, found: Any, main: str) -> Examples | None:
    if main not in ("cosine_spearman", "cosine_pearson"):
        return None
    from scipy.stats import pearsonr, spearmanr

    measure: Any = spearmanr if main == "cosine_spearman" else pearsonr
    pairs = list(zip(found["human_scores"], found["cosine_scores"], strict=True))
    values = np.array([float(measure(human, cosine).statistic) for human, cosine in pairs])

    def texts() -> list[list[str]]:
        # mteb leaves out texts whose summaries all score alike; the others keep their order.
        low, span = task.min_score, task.max_score - task.min_score
        rows, out = iter(data), []
        for human, _ in pairs:
            for row in rows:
                scores = [(v - low) / span for v in row[task.relevancy_column_name]]
                if np.allclose(scores, human) if len(scores) == len(human) else False:
                    out.append([row[task.text_column_name]])
                    break
        return out

    return Examples(n=len(values), score=lambda w: mean(values, w), texts=texts)


def _columns(data: Any, names: Sequence[Any]) -> Callable[[], list[list[str]]]:
    """Row by row, the texts of some columns."""

    def texts() -> list[list[str]]:
        rows = zip(*(data[name] for name in names), strict=True)
        return [[str(v) for v in row] for row in rows]

    return texts
