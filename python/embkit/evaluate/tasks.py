"""The evaluation sets of a folder: retrieval, sentence similarity, classification.

A split folder (``dev/`` or ``test/`` of a data folder) holds ``retrieval/<name>/{corpus,queries,
qrels}``, ``sts/<name>`` and ``classification/<name>/{train,test}``, each JSON lines, plain or
compressed. Nothing here needs torch. The other kinds are in :mod:`embkit.evaluate.kinds`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embkit.data.readers import JSONL, beir_file, joined, read_jsonl, read_qrels
from embkit.data.sources import stem
from embkit.errors import CorruptError, UsageError

TYPES = ("retrieval", "sts", "classification")


@dataclass(frozen=True, kw_only=True)
class RetrievalSet:
    """Queries, passages and who answers whom.

    Attributes:
        name: ``retrieval/<folder name>``.
        corpus, queries: texts; title and text joined as in training.
        judged: per query, positions in ``corpus`` with their grade (> 0).
        seen: positions in ``corpus`` that any judgement names, grade 0 included.
    """

    name: str
    corpus: list[str]
    queries: list[str]
    judged: list[dict[int, float]]
    seen: list[int]
    type: str = "retrieval"


@dataclass(frozen=True, kw_only=True)
class StsSet:
    """Sentence pairs with a graded similarity (float64 [n], any scale)."""

    name: str
    first: list[str]
    second: list[str]
    score: NDArray[np.float64]
    type: str = "sts"


@dataclass(frozen=True, kw_only=True)
class ClassificationSet:
    """Labelled texts, for a linear probe."""

    name: str
    train: list[str]
    train_label: list[str]
    test: list[str]
    test_label: list[str]
    type: str = "classification"


EvalSet = RetrievalSet | StsSet | ClassificationSet


def is_split(folder: Path) -> bool:
    """Whether a folder has at least one of the three kinds of sets."""
    return any((folder / kind).is_dir() for kind in TYPES)


def load_split(folder: Path | str) -> list[EvalSet]:
    """All sets of a split, by kind and name.

    Raises:
        UsageError: no sets here, or a data folder in place of its dev/ or test/.
        FileNotFoundError: no such folder, or a set without one of its files.
        CorruptError: missing columns, an empty corpus, judgements of ids that are not there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(2, "No such folder of evaluation sets", str(folder))
    if not is_split(folder):
        nested = [name for name in ("dev", "test") if is_split(folder / name)]
        fix = f"give {folder / nested[0]}" if nested else "see docs/quickstart.md for the layout"
        raise UsageError(
            "The folder holds no evaluation sets (retrieval/, sts/ or classification/).",
            where=folder,
            fix=fix,
        )
    sets: list[EvalSet] = []
    for path in folders(folder / "retrieval"):
        sets.append(load_retrieval(path))
    for path in files(folder / "sts"):
        sets.append(load_sts(path))
    for path in folders(folder / "classification"):
        sets.append(load_classification(path))
    if not sets:
        raise UsageError(
            "The folders of evaluation sets are empty.",
            where=folder,
            fix="add a set, e.g. retrieval/<name>/{corpus,queries,qrels}.jsonl",
        )
    return sets


def load_retrieval(folder: Path) -> RetrievalSet:
    """Read a BEIR triple; a query without a judgement above 0 is left out, as BEIR does."""
    corpus_rows = read_jsonl(set_file(folder, "corpus"))
    query_rows = read_jsonl(set_file(folder, "queries"))
    if not corpus_rows:
        raise CorruptError("The corpus is empty.", where=folder, fix="give corpus.jsonl passages")
    if not query_rows:
        raise CorruptError("There are no queries.", where=folder, fix="give queries.jsonl rows")
    position = _positions(corpus_rows, folder / "corpus")
    query_at = _positions(query_rows, folder / "queries")
    judged: list[dict[int, float]] = [{} for _ in query_rows]
    seen: set[int] = set()
    missing: list[str] = []
    for query, document, grade in read_qrels(_qrels(folder)):
        if query not in query_at or document not in position:
            missing.append(f"{query} -> {document}")
            continue
        seen.add(position[document])
        if grade > 0:
            judged[query_at[query]][position[document]] = grade
    if missing:
        raise CorruptError(
            f"{len(missing)} judgements name ids that are not in queries or corpus, first "
            f"{missing[0]}.",
            where=folder,
            fix="make qrels, queries and corpus belong together",
        )
    kept = [i for i, answers in enumerate(judged) if answers]
    if not kept:
        raise CorruptError("No query has a judged passage.", where=folder, fix="see qrels")
    texts = [text_of(row, "text", folder / "queries") for row in query_rows]
    return RetrievalSet(
        name=f"retrieval/{folder.name}",
        corpus=[joined(row) for row in corpus_rows],
        queries=[texts[i] for i in kept],
        judged=[judged[i] for i in kept],
        seen=sorted(seen),
    )


def load_sts(path: Path) -> StsSet:
    """Read ``sentence1, sentence2, score`` rows."""
    rows = read_jsonl(path)
    if len(rows) < 2:
        raise CorruptError("A correlation needs two pairs or more.", where=path, fix="add pairs")
    try:
        score = np.array([float(row["score"]) for row in rows], np.float64)
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptError(
            f"A row has no numeric score ({error}).", where=path, fix="columns sentence1, "
            "sentence2, score",
        ) from error  # fmt: skip
    return StsSet(
        name=f"sts/{stem(path)}",
        first=[text_of(row, "sentence1", path) for row in rows],
        second=[text_of(row, "sentence2", path) for row in rows],
        score=score,
    )


def load_classification(folder: Path) -> ClassificationSet:
    """Read ``text, label`` rows of train and test."""
    parts: dict[str, tuple[list[str], list[str]]] = {}
    for part in ("train", "test"):
        path = set_file(folder, part)
        rows = read_jsonl(path)
        if not rows:
            raise CorruptError(f"The {part} part is empty.", where=path, fix="add labelled texts")
        missing = next((i for i, row in enumerate(rows, 1) if row.get("label") is None), None)
        if missing:
            raise CorruptError(
                f"Row {missing} has no label.", where=path, fix="columns text and label"
            )
        parts[part] = ([text_of(r, "text", path) for r in rows], [str(r["label"]) for r in rows])
    if len(set(parts["train"][1])) < 2:
        raise CorruptError("There is only one label.", where=folder, fix="add a second class")
    return ClassificationSet(
        name=f"classification/{folder.name}",
        train=parts["train"][0],
        train_label=parts["train"][1],
        test=parts["test"][0],
        test_label=parts["test"][1],
    )


def folders(folder: Path) -> list[Path]:
    """Folders in a folder that may not be there, by name."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def files(folder: Path) -> list[Path]:
    """JSON lines files in a folder that may not be there, by name."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.is_file() and p.name.endswith(JSONL))


def set_file(folder: Path, name: str) -> Path:
    """One of a set's files, whatever its suffix."""
    path = beir_file(folder, name)
    if path is None:
        raise FileNotFoundError(2, "The set has no such file", str(folder / f"{name}.jsonl[.zst]"))
    return path


def _qrels(folder: Path) -> Path:
    tables = sorted((folder / "qrels").glob("*.tsv"))
    return beir_file(folder, "qrels") or (tables[0] if tables else set_file(folder, "qrels"))


def _positions(rows: list[dict[str, Any]], where: Path) -> dict[str, int]:
    out: dict[str, int] = {}
    for i, row in enumerate(rows):
        key = row.get("_id", row.get("id"))
        if key is None:
            raise CorruptError(f"Row {i + 1} has no _id.", where=where, fix="columns _id and text")
        if str(key) in out:
            raise CorruptError(f"The _id {key!r} is there twice.", where=where, fix="make it one")
        out[str(key)] = i
    return out


def text_of(row: dict[str, Any], column: str, where: Path) -> str:
    """The text in a column; CorruptError without one."""
    value = row.get(column)
    if not isinstance(value, str):
        raise CorruptError(
            f"A row has no text in column {column!r}.", where=where, fix=f"add {column!r}"
        )
    return value
