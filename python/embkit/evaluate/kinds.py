"""Every kind of set that a split folder may hold, beside the three that training looks at.

    retrieval/NAME/{corpus,queries,qrels}               _id title text, _id text, ids and score
    instruction_retrieval/NAME/{corpus,queries,qrels}   queries have an `instruction`
    reranking/NAME                                      query, positive [..], negative [..]
    sts/NAME                                            sentence1, sentence2, score
    pairclass/NAME                                      sentence1, sentence2, label 0 or 1
    classification/NAME/{train,test}                    text, label
    multilabel/NAME/{train,test}                        text, labels [..]
    clustering/NAME                                     text, label
    bitext/NAME                                         sentence1, sentence2
    summarization/NAME                    text, human_summaries, machine_summaries, relevance [..]

Each is JSON lines, plain or compressed. `mteb` scores them (:mod:`embkit.evaluate.local`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embkit.data.readers import read_jsonl
from embkit.data.sources import stem
from embkit.errors import CorruptError, UsageError
from embkit.evaluate.tasks import (
    ClassificationSet,
    RetrievalSet,
    StsSet,
    files,
    folders,
    load_classification,
    load_retrieval,
    load_sts,
    set_file,
    text_of,
)


@dataclass(frozen=True, kw_only=True)
class InstructionSet:
    """A retrieval set whose queries come with an instruction each ("" for none)."""

    retrieval: RetrievalSet
    instructions: list[str]
    type: str = "instruction_retrieval"

    @property
    def name(self) -> str:
        """``instruction_retrieval/<folder name>``."""
        return self.retrieval.name


@dataclass(frozen=True, kw_only=True)
class RerankingSet:
    """Queries with passages to put in order: those that answer, and the others."""

    name: str
    queries: list[str]
    positive: list[list[str]]
    negative: list[list[str]]
    type: str = "reranking"


@dataclass(frozen=True, kw_only=True)
class PairSet:
    """Sentence pairs that belong together (1) or do not (0); label int64 [n]."""

    name: str
    first: list[str]
    second: list[str]
    label: NDArray[np.int64]
    type: str = "pairclass"


@dataclass(frozen=True, kw_only=True)
class MultilabelSet:
    """Texts with any number of labels each."""

    name: str
    train: list[str]
    train_labels: list[list[str]]
    test: list[str]
    test_labels: list[list[str]]
    type: str = "multilabel"


@dataclass(frozen=True, kw_only=True)
class ClusteringSet:
    """Texts with the class that clusters should find."""

    name: str
    texts: list[str]
    label: list[str]
    type: str = "clustering"


@dataclass(frozen=True, kw_only=True)
class BitextSet:
    """Sentences and their translations, row by row."""

    name: str
    first: list[str]
    second: list[str]
    type: str = "bitext"


@dataclass(frozen=True, kw_only=True)
class SummarySet:
    """Machine summaries with people's scores, and reference summaries of the same text."""

    name: str
    texts: list[str]
    human: list[list[str]]
    machine: list[list[str]]
    relevance: list[list[float]]
    type: str = "summarization"


AnySet = (
    RetrievalSet | InstructionSet | RerankingSet | StsSet | PairSet | ClassificationSet
    | MultilabelSet | ClusteringSet | BitextSet | SummarySet
)  # fmt: skip


def is_split(folder: Path) -> bool:
    """Whether a folder has at least one kind of sets."""
    return any((folder / kind).is_dir() for kind in KINDS)


def load_all(folder: Path | str) -> list[AnySet]:
    """Every set of a split, by kind and name.

    Raises:
        UsageError: no sets here, or a data folder in place of its dev/ or test/.
        FileNotFoundError: no such folder, or a set without one of its files.
        CorruptError: missing columns, an empty set, labels that are none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(2, "No such folder of evaluation sets", str(folder))
    sets: list[AnySet] = []
    for kind, (load, in_folders) in KINDS.items():
        for path in folders(folder / kind) if in_folders else files(folder / kind):
            sets.append(load(path))
    if not sets:
        nested = [name for name in ("dev", "test") if is_split(folder / name)]
        raise UsageError(
            f"The folder holds no evaluation sets ({', '.join(KINDS)}).",
            where=folder,
            fix=f"give {folder / nested[0]}" if nested else "see docs/evaluation.md for the layout",
        )
    return sets


def load_instruction_retrieval(folder: Path) -> InstructionSet:
    """Read a BEIR triple whose queries have an ``instruction``."""
    rows = read_jsonl(set_file(folder, "queries"))
    by_text: dict[str, str] = {}
    for row in rows:
        text, instruction = text_of(row, "text", folder / "queries"), row.get("instruction") or ""
        if by_text.setdefault(text, str(instruction)) != str(instruction):
            raise CorruptError(
                f"The query {text[:60]!r} is there with two instructions.",
                where=folder / "queries",
                fix="put the instruction into the text of such queries",
            )
    found = load_retrieval(folder)
    named = RetrievalSet(
        name=f"instruction_retrieval/{folder.name}",
        corpus=found.corpus,
        queries=found.queries,
        judged=found.judged,
        seen=found.seen,
    )
    return InstructionSet(retrieval=named, instructions=[by_text[q] for q in found.queries])


def load_reranking(path: Path) -> RerankingSet:
    """Read ``query, positive, negative`` rows; one without either list is left out, as in MTEB."""
    rows = _rows(path)
    kept = [
        (text_of(row, "query", path), _texts(row, "positive", path), _texts(row, "negative", path))
        for row in rows
    ]
    kept = [row for row in kept if row[1] and row[2]]
    if not kept:
        raise CorruptError("No row has a positive and a negative passage.", where=path)
    query, positive, negative = zip(*kept, strict=True)
    return RerankingSet(
        name=f"reranking/{stem(path)}",
        queries=list(query),
        positive=list(positive),
        negative=list(negative),
    )


def load_pairs(path: Path) -> PairSet:
    """Read ``sentence1, sentence2, label`` rows with labels 0 and 1."""
    rows = _rows(path)
    label = [row.get("label") for row in rows]
    if {str(v) for v in label} != {"0", "1"}:
        raise CorruptError(
            f"The labels are {sorted({str(v) for v in label})[:4]}, not 0 and 1.",
            where=path,
            fix="1 for pairs that belong together, 0 for the others, some of each",
        )
    return PairSet(
        name=f"pairclass/{stem(path)}",
        first=[text_of(row, "sentence1", path) for row in rows],
        second=[text_of(row, "sentence2", path) for row in rows],
        label=np.array([int(str(v)) for v in label], np.int64),
    )


def load_multilabel(folder: Path) -> MultilabelSet:
    """Read ``text, labels`` rows of train and test."""
    parts = {}
    for part in ("train", "test"):
        path = set_file(folder, part)
        rows = _rows(path)
        parts[part] = (
            [text_of(r, "text", path) for r in rows],
            [[str(v) for v in _list(r, "labels", path)] for r in rows],
        )
    known = {v for labels in parts["train"][1] for v in labels}
    unknown = {v for labels in parts["test"][1] for v in labels} - known
    if unknown:
        raise CorruptError(
            f"The test part has a label that no training text has: {sorted(unknown)[0]!r}.",
            where=folder,
            fix="give each label examples to learn from",
        )
    return MultilabelSet(
        name=f"multilabel/{folder.name}",
        train=parts["train"][0],
        train_labels=parts["train"][1],
        test=parts["test"][0],
        test_labels=parts["test"][1],
    )


def load_clustering(path: Path) -> ClusteringSet:
    """Read ``text, label`` rows."""
    rows = _rows(path)
    if any(row.get("label") is None for row in rows):
        raise CorruptError("A row has no label.", where=path, fix="columns text and label")
    return ClusteringSet(
        name=f"clustering/{stem(path)}",
        texts=[text_of(row, "text", path) for row in rows],
        label=[str(row["label"]) for row in rows],
    )


def load_bitext(path: Path) -> BitextSet:
    """Read ``sentence1, sentence2`` rows."""
    rows = _rows(path)
    return BitextSet(
        name=f"bitext/{stem(path)}",
        first=[text_of(row, "sentence1", path) for row in rows],
        second=[text_of(row, "sentence2", path) for row in rows],
    )


def load_summaries(path: Path) -> SummarySet:
    """Read ``text, human_summaries, machine_summaries, relevance`` rows."""
    rows = _rows(path)
    machine = [_texts(row, "machine_summaries", path) for row in rows]
    relevance = [[float(v) for v in _list(row, "relevance", path)] for row in rows]
    if any(len(m) != len(r) for m, r in zip(machine, relevance, strict=True)):
        raise CorruptError(
            "A row has other numbers of machine_summaries and relevance.",
            where=path,
            fix="give each machine summary one score",
        )
    return SummarySet(
        name=f"summarization/{stem(path)}",
        texts=[text_of(row, "text", path) for row in rows],
        human=[_texts(row, "human_summaries", path) for row in rows],
        machine=machine,
        relevance=relevance,
    )


# kind -> its reader, and whether a set is a folder
KINDS: dict[str, tuple[Callable[[Path], AnySet], bool]] = {
    "retrieval": (load_retrieval, True),
    "instruction_retrieval": (load_instruction_retrieval, True),
    "reranking": (load_reranking, False),
    "sts": (load_sts, False),
    "pairclass": (load_pairs, False),
    "classification": (load_classification, True),
    "multilabel": (load_multilabel, True),
    "clustering": (load_clustering, False),
    "bitext": (load_bitext, False),
    "summarization": (load_summaries, False),
}


def held_out_sets(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Per set of a split, its name and the texts that training must not have seen."""
    for found in load_all(folder):
        yield found.name, texts_of(found)


def texts_of(found: AnySet) -> list[str]:
    """Texts of a set that training must not have seen.

    Queries and judged passages, sentence pairs, texts to cluster, summaries, and the test part of
    labelled sets. Unjudged passages and those to be ranked last are only distractors, and the train
    part of a probe is training data by definition.
    """
    match found:
        case RetrievalSet():
            return [*found.queries, *(found.corpus[i] for i in found.seen)]
        case InstructionSet():
            return texts_of(found.retrieval)
        case RerankingSet():
            return [*found.queries, *(text for texts in found.positive for text in texts)]
        case ClusteringSet():
            return list(found.texts)
        case SummarySet():
            return [
                *found.texts,
                *(text for texts in [*found.human, *found.machine] for text in texts),
            ]
        case ClassificationSet() | MultilabelSet():
            return list(found.test)
        case _:
            return [*found.first, *found.second]


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = read_jsonl(path)
    if not rows:
        raise CorruptError("The set is empty.", where=path, fix="add rows, or remove the file")
    return rows


def _list(row: dict[str, Any], column: str, where: Path) -> list[Any]:
    value = row.get(column)
    if not isinstance(value, list):
        raise CorruptError(
            f"A row has no list in column {column!r}.", where=where, fix=f"add {column!r}"
        )
    return value


def _texts(row: dict[str, Any], column: str, where: Path) -> list[str]:
    return [text_of({column: value}, column, where) for value in _list(row, column, where)]
