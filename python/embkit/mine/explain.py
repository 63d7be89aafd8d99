"""Why each candidate of one query stayed or went: the same search and rules, run again for it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from embkit import container
from embkit.data.leaks import short
from embkit.data.loader import Store, as_store
from embkit.data.tables import Array
from embkit.errors import CorruptError, UsageError, nearest
from embkit.mine.classes import load_classes
from embkit.mine.miner import NONE
from embkit.mine.source import StoreVectors, check_together, stored
from embkit.mine.work import KIND, Task, load_table
from embkit.recipe import Rules
from embkit.stage import digest_of

# Numbers and names of the Rust filter's rules, in its order.
_RULES = (
    "positive", "cluster", "repeat", "skipped", "beyond", "above_max", "margin", "percent",
    "below_min", "near_duplicate", "rerank", "surplus", "kept", "relaxed",
)  # fmt: skip
_WHY = {
    "positive": "a positive, the query itself, or of its class",
    "cluster": "in the cluster of a positive or of the query",
    "repeat": "in the cluster of a nearer candidate",
    "skipped": "rank below skip = {0:g}",
    "beyond": "rank from candidates on",
    "above_max": "above max_score = {0:.4f}",
    "margin": "above {0:.4f}, the lowest positive less the margin",
    "percent": "above {0:.4f}, percent_of_positive of the lowest positive",
    "below_min": "below min_score = {0:.4f}",
    "near_duplicate": "Jaccard {0:.2f} with a positive or the query",
    "rerank": "the reranker's score is above {0:.4f}",
    "surplus": "not needed",
    "kept": "kept",
    "relaxed": "kept, taken back because there were too few",
}


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One neighbour of a query and what became of it.

    Attributes:
        row: of the store. score: inner product.
        rank: place among the candidates, None for what has none.
        rule: what decided, a name of the audit.
        number: what the rule compared with, None where it compared nothing.
        rerank: the reranker's score, or None.
    """

    row: int
    score: float
    rank: int | None
    rule: str
    number: float | None
    rerank: float | None = None

    def why(self) -> str:
        """The verdict in words."""
        return _WHY[self.rule].format(self.number if self.number is not None else np.nan)


def candidates_of(
    directory: Path | str,
    example: int,
    *,
    task: str,
    store: Store | Path | str | None = None,
    embeddings: Path | str | None = None,
    miner: int = 0,
) -> tuple[list[Candidate], list[float]]:
    """Every candidate of one example, nearest first, and the scores of its positives.

    Args:
        directory: what :func:`embkit.mine.mine` has written. example: number in the task.
        store: the store it was mined in; found beside ``directory`` when it is called ``store``.
        embeddings: where negatives were mined from given embeddings: these.
        miner: which of several.

    Raises:
        UsageError: no such example, store or embeddings. CorruptError: they are others.
    """
    directory = origin(Path(directory))
    manifest = container.read_manifest(directory, kind=KIND)
    opened = _store(directory, manifest, store)
    known = {t["name"]: t["examples"] for t in manifest["tasks"]}
    if task not in known:
        raise UsageError(f"No negatives of task {task!r}; {nearest(task, known)}", where=directory)
    if not 0 <= example < known[task]:
        raise UsageError(
            f"Task {task!r} has no example {example}.",
            where=directory,
            fix=f"give 0 to {known[task] - 1}",
        )
    about = manifest["explain"]
    if not 0 <= miner < len(about["miners"]):
        raise UsageError(f"There are {len(about['miners'])} miners, no number {miner}.")
    # For one query against everything exact is the quickest.
    rules = dataclasses.replace(Rules(**about["rules"]), engine="exact", recall=1.0)
    vectors = _vectors(directory, manifest, about["miners"][miner], embeddings)
    classes = load_classes(directory, task)
    with TemporaryDirectory(prefix="embkit-") as scratch:
        mined = Task(
            opened, opened.examples(task), vectors, rules, Path(scratch) / "corpus",
            classes=classes,
        )  # fmt: skip
        table = _reranked(directory, miner, task, example) if about["reranked"] else None
        block = mined.block(example, example + 1)
        row, score, found = mined.miner.trace(block, table)
    return _list(mined.rows[row[0]], score[0], found, table), block.score.tolist()


def explain(
    directory: Path | str,
    example: int,
    *,
    task: str | None = None,
    store: Store | Path | str | None = None,
    embeddings: Path | str | None = None,
) -> str:
    """One query, its positives and every candidate with its verdict, as text.

    Args:
        directory: what :func:`embkit.mine.mine` has written, or what was carried over from there
            to the store of a relabelled task. Of that task, or with the directory of
            :func:`embkit.synth.relabel`, the language model's ranking is shown.
        task: the first that has this example by default. The others: :func:`candidates_of`.

    Raises:
        UsageError: no such example, store or embeddings. CorruptError: they are others.
    """
    directory = Path(directory)
    if (ranking := ranking_of(directory, task)) is not None:
        return _ranked(ranking, store, example)
    directory = origin(directory)
    manifest = container.read_manifest(directory, kind=KIND)
    names = [t["name"] for t in manifest["tasks"] if 0 <= example < t["examples"]]
    if task is None and not names:
        most = max(t["examples"] for t in manifest["tasks"]) - 1
        raise UsageError(
            f"No task has an example {example}.", where=directory, fix=f"give 0 to {most}"
        )
    task = task or names[0]
    opened = _store(directory, manifest, store)
    lines = []
    for number in range(len(manifest["explain"]["miners"])):
        found, scores = candidates_of(
            directory, example, task=task, store=opened, embeddings=embeddings, miner=number
        )
        table = opened.examples(task)
        lines.append(f"task {task}, example {example}" + (f", miner {number}" if number else ""))
        lines.append(f"  query     {short(opened.text(int(table.query[example])))}")
        span = slice(*table.positive_offsets[example : example + 2].astype(int).tolist())
        for row, score in zip(table.positive[span].tolist(), scores, strict=True):
            lines.append(f"  positive  {score:7.4f}  {short(opened.text(row))}")
        for c in found:
            rank = "   -" if c.rank is None else f"{c.rank:4}"
            again = "" if c.rerank is None else f"  reranked {c.rerank:.4f}"
            lines.append(f"  {rank}  {c.score:7.4f}{again}  {c.why()}")
            lines.append(f"        {short(opened.text(c.row))}")
        lines += _drawn(directory, task, example, number, opened)
    rules = ", ".join(f"{k} {v}" for k, v in manifest["explain"]["rules"].items() if v is not None)
    return "\n".join([*lines, f"  rules: {rules}"])


def origin(directory: Path) -> Path:
    """Where negatives were mined: rules and vectors stay there when they are carried.

    Raises:
        UsageError: they were carried, and where from is not beside them.
    """
    manifest = container.read_manifest(directory, kind=KIND)
    if "explain" in manifest:
        return directory
    key = next(iter(manifest["inputs"]))
    before = directory.parent / key.split(":", 1)[1]
    if not before.is_dir() or digest_of(before) != manifest["inputs"][key]:
        raise UsageError(
            "These negatives were carried over from another store, and what was mined there is "
            "not beside them.",
            where=before,
            fix="embkit mine --out DIR --explain N with the directory of that mining",
        )
    return before


def ranking_of(directory: Path, task: str | None) -> Path | None:
    """The file of a task's ranking by a language model: in this directory, or beside it."""
    if task is None:
        return next(iter(sorted(directory.glob("relabel-*.safetensors"))), None)
    name = f"relabel-{task}.safetensors"
    places = (directory / name, directory.parent / "relabelled" / name)
    return next((path for path in places if path.is_file()), None)


def _ranked(path: Path, given: Any, example: int) -> str:
    """What a language model has made of one query's passages, best first."""
    store = _beside(path.parent, given)
    task = path.stem.removeprefix("relabel-")
    table = container.load(path, kind="embkit.relabel")
    count = len(table["offsets"]) - 1
    if not 0 <= example < count:
        raise UsageError(
            f"Task {task!r} has no example {example}.", where=path, fix=f"give 0 to {count - 1}"
        )
    span = slice(*table["offsets"][example : example + 2].astype(int).tolist())
    columns = [table[c][span] for c in ("text_id", "likelihood", "relevance", "fused")]
    rows = np.arange(store.rows)
    row_of = dict(zip(store.text_id(rows).tolist(), rows.tolist(), strict=True))
    # What has no score comes last.
    order = np.argsort(-np.nan_to_num(columns[3], nan=-np.inf), kind="stable")
    query = short(store.text(int(store.examples(task).query[example])))
    lines = [f"task {task}, example {example}, ranked by a language model", f"  query     {query}"]
    lines.append("  rank    fused  likelihood  relevance")
    for rank, i in enumerate(order.tolist(), 1):
        text_id, likelihood, relevance, fused = (c[i] for c in columns)
        lines.append(f"  {rank:4}  {fused:7.4f}  {likelihood:10.4f}  {relevance:9.4f}")
        row = row_of.get(int(text_id))
        lines.append(f"        {short(store.text(row)) if row is not None else 'not in the store'}")
    return "\n".join(lines)


def _list(
    rows: Array, scores: Array, found: dict[str, Any], table: dict[str, Array] | None
) -> list[Candidate]:
    again = (
        dict(zip(table["rerank_rank"].tolist(), table["rerank_score"].tolist(), strict=True))
        if table
        else {}
    )
    columns = (rows, scores, found["trace_rule"], found["trace_rank"], found["trace_number"])
    return [
        Candidate(
            row=row,
            score=score,
            rank=None if rank == NONE else rank,
            rule=_RULES[rule],
            number=None if np.isnan(number) else number,
            rerank=again.get(rank),
        )
        for row, score, rule, rank, number in zip(*(c.tolist() for c in columns), strict=True)
    ]


def _drawn(directory: Path, task: str, example: int, miner: int, store: Store) -> list[str]:
    """The refills from outside the candidates, from the published table."""
    table = load_table(directory, task)
    span = slice(*table["offsets"][example : example + 2].astype(int).tolist())
    drawn = table["rank"][span] == NONE
    if "miner" in table:
        drawn &= table["miner"][span] == miner
    rows = table["row"][span][drawn].tolist()
    return [f"  drawn     {short(store.text(row))}" for row in rows]


def _reranked(directory: Path, miner: int, task: str, example: int) -> dict[str, Array]:
    """What the reranker said of one example, as a table of one query."""
    table = load_table(directory, task, f"reranked-{miner}")
    out = {}
    for offsets, columns in (
        ("rerank_offsets", ("rerank_rank", "rerank_score")),
        ("rerank_positive_offsets", ("rerank_positive",)),
    ):
        span = slice(*table[offsets][example : example + 2].astype(int).tolist())
        out[offsets] = np.array([0, span.stop - span.start], np.uint64)
        out |= {name: table[name][span] for name in columns}
    return out


def _vectors(
    directory: Path, manifest: dict[str, Any], folder: str | None, given: Path | str | None
) -> StoreVectors:
    if folder is not None:
        return stored(directory / folder)
    check_together(directory, manifest, Path(given) if given is not None else None)
    from embkit.data.vectors import load_vectors
    from embkit.mine.matrix import Matrix

    return StoreVectors(Matrix(load_vectors(Path(str(given))), "embeddings"), None)


def _store(directory: Path, manifest: dict[str, Any], given: Any) -> Store:
    """The store that was mined in.

    Raises:
        UsageError: it is not given, and not beside the negatives. CorruptError: it is another.
    """
    found = _beside(directory, given)
    if str(found.manifest.get("digest")) != manifest["store"]:
        raise CorruptError("The negatives were mined in another store.", where=found.path)
    return found


def _beside(directory: Path, given: Any) -> Store:
    beside = directory.parent / "store"
    if given is None and not (beside / "manifest.json").is_file():
        raise UsageError(
            "The store is not beside the negatives.", where=beside, fix="give the store"
        )
    return as_store(beside if given is None else given)
