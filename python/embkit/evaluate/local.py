"""Sets of a folder as tasks of `mteb`: the texts are ours to read, the measures are theirs."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from embkit.errors import UsageError
from embkit.evaluate.kinds import (
    AnySet,
    BitextSet,
    ClusteringSet,
    InstructionSet,
    MultilabelSet,
    PairSet,
    RerankingSet,
    SummarySet,
    load_all,
)
from embkit.evaluate.tasks import ClassificationSet, RetrievalSet, StsSet

_SPLIT = "test"
# kind -> mteb's type and main score: those of the leaderboard's tasks of that type
_MAIN = {
    "retrieval": ("Retrieval", "ndcg_at_10"),
    "instruction_retrieval": ("InstructionRetrieval", "ndcg_at_20"),
    "reranking": ("Reranking", "map_at_1000"),
    "sts": ("STS", "cosine_spearman"),
    "pairclass": ("PairClassification", "max_ap"),
    "classification": ("Classification", "accuracy"),
    "multilabel": ("MultilabelClassification", "accuracy"),
    "clustering": ("Clustering", "v_measure"),
    "bitext": ("BitextMining", "f1"),
    "summarization": ("Summarization", "cosine_spearman"),
}
_MOST = 16_384  # texts of one clustering, mteb's own limit


def local_tasks(folder: Path | str) -> list[Any]:
    """Each set of a split as a task of mteb, named ``kind-name``.

    Raises:
        UsageError, FileNotFoundError, CorruptError: of :func:`embkit.evaluate.kinds.load_all`.
    """
    return [as_task(found) for found in load_all(folder)]


def as_task(found: AnySet, name: str | None = None) -> Any:
    """One set as a task of mteb.

    Args:
        found: the set.
        name: of the task; ``kind-name`` by default.
    """
    from mteb.abstasks.task_metadata import TaskMetadata

    base, fill, more = _made(found)
    kind, main = _MAIN[found.type]
    name = name or re.sub(r"[^\w.-]", "_", found.name.replace("/", "-"))
    metadata = TaskMetadata(
        name=name,
        description=f"{found.type} set of a folder",
        type=kind,
        category="t2t",
        eval_splits=[_SPLIT],
        eval_langs=["und"],  # not said
        main_score=main,
        dataset={"path": "local", "revision": "local"},
    )

    def load_data(self: Any, *_: Any, **__: Any) -> None:
        self.dataset, self.data_loaded = fill(), True

    made = type("LocalTask", (base,), {"metadata": metadata, "load_data": load_data, **more})
    return made()


def _made(found: AnySet) -> tuple[Any, Callable[[], Any], dict[str, Any]]:
    """The class of mteb, what fills its dataset, and its further settings."""
    from mteb import abstasks as base

    match found:
        case RetrievalSet():
            return base.AbsTaskRetrieval, lambda: _retrieval(found, None), {}
        case InstructionSet():
            fill = lambda: _retrieval(found.retrieval, found.instructions)  # noqa: E731
            return base.AbsTaskRetrieval, fill, {}
        case RerankingSet():
            return base.AbsTaskRetrieval, lambda: _reranking(found), {}
        case StsSet():
            low, high = float(found.score.min()), float(found.score.max())
            columns = {"sentence1": found.first, "sentence2": found.second}
            fill = lambda: _split({**columns, "score": found.score.tolist()})  # noqa: E731
            return base.AbsTaskSTS, fill, {"min_score": low, "max_score": high}
        case PairSet():
            columns = {"sentence1": found.first, "sentence2": found.second}
            fill = lambda: _split({**columns, "labels": found.label.tolist()})  # noqa: E731
            return base.AbsTaskPairClassification, fill, {}
        case ClassificationSet():
            number = _numbers([*found.train_label, *found.test_label])
            fill = lambda: _split(  # noqa: E731
                {"text": found.test, "label": [number[v] for v in found.test_label]},
                {"text": found.train, "label": [number[v] for v in found.train_label]},
            )
            return base.AbsTaskClassification, fill, {}
        case MultilabelSet():
            every = _numbers([v for row in [*found.train_labels, *found.test_labels] for v in row])
            numbers = lambda rows: [[every[v] for v in row] for row in rows]  # noqa: E731
            fill = lambda: _split(  # noqa: E731
                {"text": found.test, "label": numbers(found.test_labels)},
                {"text": found.train, "label": numbers(found.train_labels)},
            )
            return base.AbsTaskMultilabelClassification, fill, {}
        case ClusteringSet():
            fill = lambda: _split({"sentences": found.texts, "labels": found.label})  # noqa: E731
            every_text = {
                "max_fraction_of_documents_to_embed": None,
                "max_document_to_embed": None,
                "max_documents_per_cluster": min(len(found.texts), _MOST),
            }
            return base.AbsTaskClustering, fill, every_text
        case BitextSet():
            fill = lambda: _split({"sentence1": found.first, "sentence2": found.second})  # noqa: E731
            return base.AbsTaskBitextMining, fill, {}
        case SummarySet():
            scores = [v for row in found.relevance for v in row]
            fill = lambda: _split(  # noqa: E731
                {
                    "text": found.texts,
                    "human_summaries": found.human,
                    "machine_summaries": found.machine,
                    "relevance": found.relevance,
                }
            )
            limits = {"min_score": min(scores), "max_score": max(scores)}
            return base.AbsTaskSummarization, fill, limits


def _split(test: dict[str, Any], train: dict[str, Any] | None = None) -> Any:
    from datasets import Dataset, DatasetDict

    parts = {_SPLIT: test} if train is None else {"train": train, _SPLIT: test}
    return DatasetDict({name: Dataset.from_dict(columns) for name, columns in parts.items()})


def _retrieval(found: RetrievalSet, instructions: list[str] | None) -> dict[str, Any]:
    queries: dict[str, Any] = {
        "id": [_id("q", i) for i in range(len(found.queries))],
        "text": found.queries,
    }
    if instructions is not None:
        queries["instruction"] = instructions
    corpus = {"id": [_id("d", i) for i in range(len(found.corpus))], "text": found.corpus}
    judged = {
        _id("q", i): {_id("d", row): _grade(grade, found.name) for row, grade in answers.items()}
        for i, answers in enumerate(found.judged)
    }
    return _triple(corpus, queries, judged, None)


def _reranking(found: RerankingSet) -> dict[str, Any]:
    queries = {"id": [_id("q", i) for i in range(len(found.queries))], "text": found.queries}
    ids: list[str] = []
    texts: list[str] = []
    judged: dict[str, dict[str, int]] = {}
    ranked: dict[str, list[str]] = {}
    for i, (positive, negative) in enumerate(zip(found.positive, found.negative, strict=True)):
        query = _id("q", i)
        here = [f"{query}-{_id('d', j)}" for j in range(len(positive) + len(negative))]
        judged[query] = {name: int(j < len(positive)) for j, name in enumerate(here)}
        ranked[query] = here
        ids += here
        texts += [*positive, *negative]
    return _triple({"id": ids, "text": texts}, queries, judged, ranked)


def _triple(corpus: Any, queries: Any, judged: Any, ranked: Any) -> dict[str, Any]:
    from datasets import Dataset

    triple = {
        "corpus": Dataset.from_dict(corpus),
        "queries": Dataset.from_dict(queries),
        "relevant_docs": judged,
        "top_ranked": ranked,
    }
    return {"default": {_SPLIT: triple}}


def _id(side: str, i: int) -> str:
    return f"{side}{i:08d}"


def _grade(grade: float, where: str) -> int:
    if grade != int(grade):
        raise UsageError(
            f"A judgement has the grade {grade}; mteb's measures take whole ones.",
            where=where,
            fix="multiply the grades, or round them",
        )
    return int(grade)


def _numbers(labels: Sequence[str]) -> dict[str, int]:
    """Labels as numbers, in the order of the labels (numeric ones by value)."""
    known = set(labels)
    whole = all(re.fullmatch(r"-?\d+", v) for v in known)
    return {v: i for i, v in enumerate(sorted(known, key=int if whole else str))}
