"""Hard negatives: embed, search exactly, filter by the positive's score, count every decision.

Each retrieval task is mined in its own corpus: every text that is a positive or negative of one of
its examples. Queries and corpus are embedded from the store's tokens, so mining sees exactly what
training sees. The search and the filters are Rust's; the rules are NV-Retriever's positive-aware
ones (docs/recipes.md).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from embkit import _rust, container
from embkit.data.embeddings import Embeddings, after
from embkit.data.loader import Store, as_store
from embkit.data.tables import Array, Examples, counts_of, offsets_of, owners
from embkit.errors import CorruptError, UsageError, nearest
from embkit.progress import Bar, bar
from embkit.stage import stage

if TYPE_CHECKING:
    from embkit.model import Encoder

KIND = "embkit.negatives"
_SAMPLES = 8
_POSITIVES = 256  # places kept free for positives among the neighbours


def mine(
    encoder: Encoder,
    store: Store | Path | str,
    *,
    out: Path | str,
    k: int = 4,
    candidates: int = 64,
    percent_of_positive: float | None = 0.95,
    margin: float | None = None,
    skip: int = 0,
    max_score: float | None = None,
    min_score: float | None = None,
    near_duplicate: float | None = 0.7,
    sample: str = "top",
    seed: int = 0,
    tasks: Sequence[str] | None = None,
    fresh: bool = False,
) -> Path:
    """Mine hard negatives for the retrieval tasks of a store.

    Args:
        encoder: the model that ranks; its full width is used.
        store: a token store made with the encoder's tokenizer.
        out: the directory to publish: one negatives table per task, aligned with its examples.
        k: negatives kept per query; a query with fewer candidates left gets fewer.
        candidates: neighbours looked at per query, its positives not counted.
        percent_of_positive: drop candidates above this share of the lowest positive's score
            (``s - |s| (1 - share)`` for a negative score ``s``).
        margin: drop candidates above the lowest positive's score minus this.
        skip: pass over this many of the nearest candidates.
        max_score, min_score: drop candidates outside these scores.
        near_duplicate: drop candidates whose word-3-gram Jaccard with a positive (or the query)
            reaches this; those in the same near-duplicate cluster always go.
        sample: ``"top"`` keeps the best k, ``"random"`` draws k with ``seed``.
        tasks: names of retrieval tasks (all).
        fresh: do it again even when it is done.

    Returns:
        ``out``.

    Raises:
        UsageError: no retrieval task, an unknown task, a wrong number, or another tokenizer.
    """
    store = as_store(store)
    chosen = _tasks(store, tasks)
    _check(k, candidates, skip, sample, percent_of_positive)
    if encoder.tokenizer.fingerprint != store.fingerprint:
        raise UsageError(
            "The encoder and the store have different tokenizers.",
            where=store.path,
            fix="tokenize the records with the encoder's tokenizer",
        )
    rules = {
        "skip": skip,
        "max_score": max_score,
        "min_score": min_score,
        "margin": margin,
        "percent": percent_of_positive,
        "near_jaccard": near_duplicate,
        "k": k,
        "sample": sample,
        "seed": seed,
    }
    params = {
        "model": encoder.digest(),
        "rules": rules,
        "candidates": candidates,
        "tasks": [t.name for t in chosen],
    }
    with stage(
        out, name="mine", params=params, inputs=[store.path], kind=KIND, fresh=fresh
    ) as work:
        if not work.done:
            _run(encoder, store, chosen, work, params)
    return Path(out)


def _run(
    encoder: Encoder, store: Store, tables: list[Examples], work: Any, params: dict[str, Any]
) -> None:
    rows = np.unique(np.concatenate([table.rows() for table in tables]))
    vectors = Embeddings(work.dir / "embeddings", encoder, store, rows=rows, model=params["model"])
    with bar("Embed", total=len(rows), unit="rows") as progress:
        vectors.fill(progress)
    report: dict[str, Any] = {"rows": len(rows), "tasks": {}}
    with bar("Search", total=sum(map(len, tables)), unit="queries") as progress:
        for table in tables:
            found = _task(store, table, vectors, params, progress)
            container.save(
                work.dir / f"negatives-{table.name}.safetensors",
                {
                    "offsets": found.offsets,
                    "row": found.row,
                    "score": found.score,
                    "rank": found.rank,
                },
                kind=KIND,
                metadata={"task": table.name},
            )
            report["tasks"][table.name] = _audit(store, table, found)
    text = json.dumps(report, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    (work.dir / "report.json").write_text(text + "\n", encoding="utf-8")
    work.publish(
        {
            "tasks": [
                {"name": t.name, "examples": len(t), "negatives": report["tasks"][t.name]["kept"]}
                for t in tables
            ],
            "store": str(store.manifest.get("digest")),
            "explain": {"candidates": params["candidates"], **params["rules"]},
        }
    )


@dataclass(frozen=True, kw_only=True)
class Negatives:
    """Mined negatives of one task, aligned with its examples.

    Attributes:
        offsets: U64 [m+1].
        row: U64, store rows. score: F32, cosine. rank: U32, place among the candidates from 0.
        positive: F32 [positives], cosine of each positive with its query (not stored).
        audit: why candidates went, by reason.
    """

    offsets: Array
    row: Array
    score: Array
    rank: Array
    positive: Array
    audit: dict[str, int]


def load_negatives(directory: Path | str, task: str) -> tuple[Array, Array, Array, Array]:
    """The table of one task: offsets U64 [m+1], row U64, score F32, rank U32.

    Raises:
        CorruptError: damaged, or no negatives of that task.
    """
    directory = Path(directory)
    manifest = container.read_manifest(directory, kind=KIND)
    names = [t["name"] for t in manifest["tasks"]]
    if task not in names:
        raise CorruptError(
            f"No negatives of task {task!r}; {nearest(task, names)}", where=directory
        )
    t = container.load(directory / f"negatives-{task}.safetensors", kind=KIND)
    return t["offsets"], t["row"], t["score"], t["rank"]


def _task(
    store: Store, table: Examples, vectors: Embeddings, params: dict[str, Any], progress: Bar
) -> Negatives:
    corpus = np.unique(np.concatenate([table.positive, table.negative]))
    # Positives come on top, so that a query with many of them has as many candidates as others.
    most = int(counts_of(table.positive_offsets).max())
    n = min(params["candidates"] + min(most, _POSITIVES), len(corpus))
    queries = np.unique(table.query)  # the same query in several examples is searched once
    start = progress.done
    local, score = _rust.topk(
        vectors.get(queries),
        vectors.get(corpus),
        n,
        progress=after(progress, start, len(table) / max(len(queries), 1)),
    )
    progress.update(start + len(table))
    at = np.searchsorted(queries, table.query)
    row = corpus[np.asarray(local, np.int64)][at]
    score = np.ascontiguousarray(np.asarray(score, np.float32)[at])
    positive = vectors.cosine(table.query[owners(table.positive_offsets)], table.positive)
    offsets, blocked, blocked_score = _with_query(table, positive)
    everything = np.arange(store.rows, dtype=np.uint64)
    off, kept, kept_score, rank, audit = _rust.filter_negatives(
        np.ascontiguousarray(row.astype(np.uint32)),
        score,
        offsets,
        blocked,
        blocked_score,
        store.cluster(everything),
        store.raw,
        params["rules"],
    )
    return Negatives(
        offsets=np.asarray(off, np.uint64),
        row=np.asarray(kept, np.uint64),
        score=np.asarray(kept_score, np.float32),
        rank=np.asarray(rank, np.uint32),
        positive=positive,
        audit={str(key): int(value) for key, value in dict(audit).items()},
    )


def _with_query(table: Examples, positive: Array) -> tuple[Array, Array, Array]:
    """The positives of each example plus its own query, which must not be its negative either.

    The query's score is that of its best positive: it never lowers the limit that the filters take
    from the lowest one.
    """
    m, counts = len(table), counts_of(table.positive_offsets)
    best = np.full(m, -1.0, np.float32)
    np.maximum.at(best, owners(table.positive_offsets), positive)
    order = np.argsort(
        np.concatenate([owners(table.positive_offsets), np.arange(m)]), kind="stable"
    )
    rows = np.concatenate([table.positive, table.query])[order]
    scores = np.concatenate([positive, best])[order].astype(np.float32)
    return offsets_of(counts + 1), rows, scores


# ---------------------------------------------------------------- the report, and one query


def _audit(store: Store, table: Examples, found: Negatives) -> dict[str, Any]:
    counts = counts_of(found.offsets)
    samples = []
    step = max(1, len(table) // _SAMPLES)
    for i in range(0, len(table), step)[:_SAMPLES]:
        span = slice(int(found.offsets[i]), int(found.offsets[i + 1]))
        first = int(table.positive_offsets[i])
        samples.append(
            {
                "query": _short(store.text(int(table.query[i]))),
                "positive": _short(store.text(int(table.positive[first]))),
                "positive_score": round(float(found.positive[first]), 4),
                "negatives": [
                    {
                        "text": _short(store.text(int(r))),
                        "score": round(float(s), 4),
                        "rank": int(k),
                    }
                    for r, s, k in zip(
                        found.row[span], found.score[span], found.rank[span], strict=True
                    )
                ],
            }
        )
    return {
        "examples": len(table),
        "kept": int(counts.sum()),
        "per_query": {str(n): int(c) for n, c in enumerate(np.bincount(counts)) if c},
        "audit": found.audit,
        "mean_positive_score": _mean(found.positive),
        "mean_negative_score": _mean(found.score),
        "samples": samples,
    }


def explain(directory: Path | str, query: int, *, store: Store | Path | str | None = None) -> str:
    """One query's negatives as text.

    Args:
        directory: what :func:`mine` has written.
        query: number of the example (in the first mined task that has it).
        store: the store it was mined in, to show texts; found beside ``directory`` when it is
            called ``store``.

    Raises:
        UsageError: no such example.
    """
    directory = Path(directory)
    manifest = container.read_manifest(directory, kind=KIND)
    texts = _texts_of(directory, manifest, store)
    lines = []
    for task in manifest["tasks"]:
        offsets, row, score, rank = load_negatives(directory, task["name"])
        if not 0 <= query < len(offsets) - 1:
            continue
        lines.append(f"task {task['name']}, example {query}")
        if texts is not None:
            table = texts.examples(task["name"])
            lines.append(f"  query     {_short(texts.text(int(table.query[query])))}")
            span = slice(*table.positive_offsets[query : query + 2].astype(int).tolist())
            for positive in table.positive[span].tolist():
                lines.append(f"  positive  {_short(texts.text(positive))}")
        span = slice(int(offsets[query]), int(offsets[query + 1]))
        for r, s, place in zip(row[span].tolist(), score[span], rank[span], strict=True):
            shown = _short(texts.text(r)) if texts is not None else f"row {r}"
            lines.append(f"  negative  rank {int(place):>3}  score {float(s):.4f}  {shown}")
        if span.start == span.stop:
            lines.append("  no candidate passed the filters")
    if not lines:
        raise UsageError(
            f"No task has an example {query}.",
            where=directory,
            fix=f"give 0 to {max(t['examples'] for t in manifest['tasks']) - 1}",
        )
    rules = ", ".join(f"{k} {v}" for k, v in manifest["explain"].items() if v is not None)
    return "\n".join([*lines, f"  rules: {rules}"])


def _texts_of(directory: Path, manifest: dict[str, Any], store: Any) -> Store | None:
    if store is not None:
        return as_store(store)
    beside = directory.parent / "store"
    if (beside / "manifest.json").is_file():
        found = Store(beside)
        if str(found.manifest.get("digest")) == manifest["store"]:
            return found
    return None


def _tasks(store: Store, names: Sequence[str] | None) -> list[Examples]:
    known = {t["name"]: t["kind"] for t in store.manifest["tasks"]}
    for name in names or ():
        if name not in known:
            raise UsageError(f"Unknown task {name!r}; {nearest(name, known)}")
        if known[name] != "retrieval":
            raise UsageError(f"Task {name!r} is {known[name]}; only retrieval tasks are mined.")
    chosen = [n for n in known if known[n] == "retrieval" and (names is None or n in names)]
    tables = [table for name in chosen if len(table := store.examples(name))]
    if not tables:
        raise UsageError(
            "The store has no retrieval examples to mine for.",
            where=store.path,
            fix="add a task with query and positive columns",
        )
    return tables


def _check(k: int, candidates: int, skip: int, sample: str, percent: float | None) -> None:
    if k < 1 or candidates < 1 or skip < 0:
        raise UsageError(f"k = {k}, candidates = {candidates}, skip = {skip} is out of range.")
    if candidates < k + skip:
        raise UsageError(
            f"candidates = {candidates} is less than k + skip = {k + skip}.",
            fix="look at more candidates than are kept, 16 times k or more",
        )
    if sample not in ("top", "random"):
        raise UsageError(f"Unknown sample {sample!r}; {nearest(sample, ('top', 'random'))}")
    if percent is not None and not 0 < percent <= 1:
        raise UsageError(f"percent_of_positive = {percent} is out of range.", fix="e.g. 0.95")


def _mean(values: Array) -> float | None:
    return round(float(np.mean(values)), 4) if len(values) else None


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 160 else text[:159] + "…"
