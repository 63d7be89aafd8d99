"""Mined negatives as a `datasets.Dataset` in the formats of sentence-transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from embkit.data.tables import Array

_BLOCK = 1 << 14  # texts that are taken at once: Arrow's strings end at 2 GiB


@dataclass(frozen=True, kw_only=True)
class Mined:
    """Negatives of queries.

    Attributes:
        queries, corpus: distinct texts.
        query, positive: of each pair [n], in order of the queries. positive_score: f32 [n].
        row, score: of each query [queries, k], best first; score -inf where there is none.
    """

    queries: list[str]
    corpus: list[str]
    query: Array
    positive: Array
    positive_score: Array
    row: Array
    score: Array

    @property
    def there(self) -> Array:
        """Which negatives [n, k] of each pair there are."""
        found: Array = self.score[self.query] > -np.inf
        return found


def to_dataset(
    mined: Mined, names: tuple[str, str], output_format: str, output_scores: bool
) -> Any:
    """The rows of a format, with the columns of sentence-transformers' `mine_hard_negatives`."""
    import pyarrow as pa
    from datasets import Dataset

    queries = pa.array(mined.queries, pa.large_string())
    corpus = pa.array(mined.corpus, pa.large_string())
    made = _FORMATS[output_format](mined, output_scores)
    columns: dict[str, Any] = {
        names[0]: _taken(queries, made.pop("query")),
        names[1]: _listed(corpus, made.pop("document"), made.pop("offsets", None)),
    }
    for name, value in made.items():
        columns[name] = _taken(corpus, value) if name.startswith("negative") else value
    return Dataset(pa.table(columns))


def _triplet(mined: Mined, scores: bool) -> dict[str, Any]:
    pair, place = np.nonzero(mined.there)
    query = mined.query[pair]
    made = {
        "query": query, "document": mined.positive[pair], "negative": mined.row[query, place]
    }  # fmt: skip
    if scores:
        both = np.stack([mined.positive_score[pair], mined.score[query, place]], 1)
        made["scores"] = _lists(both.reshape(-1), np.arange(len(both) + 1) * 2)
    return made


def _tuple(mined: Mined, scores: bool) -> dict[str, Any]:
    pair = np.flatnonzero(mined.there.all(1))
    query = mined.query[pair]
    made = {"query": query, "document": mined.positive[pair]}
    for k in range(mined.row.shape[1]):
        made[f"negative_{k + 1}"] = mined.row[query, k]
    if scores:
        all_scores = np.column_stack([mined.positive_score[pair], mined.score[query]])
        width = all_scores.shape[1]
        made["scores"] = _lists(all_scores.reshape(-1), np.arange(len(pair) + 1) * width)
    return made


def _labeled_pair(mined: Mined, scores: bool) -> dict[str, Any]:
    """Of each query its positives, then its negatives."""
    query, place = np.nonzero(mined.score > -np.inf)
    owner = np.concatenate([mined.query, query])
    order = np.argsort(owner, kind="stable")  # positives stand before negatives
    document = np.concatenate([mined.positive, mined.row[query, place]])
    made = {"query": owner[order], "document": document[order]}
    if scores:
        score = np.concatenate([mined.positive_score, mined.score[query, place]])
        return made | {"score": score[order].astype(np.float64)}
    return made | {"label": (order < len(mined.query)).astype(np.int64)}


def _labeled_list(mined: Mined, scores: bool) -> dict[str, Any]:
    """Of each pair a list: the positive, then the negatives that there are."""
    pair = np.flatnonzero(mined.there.any(1))
    query = mined.query[pair]
    keep = np.column_stack([np.ones(len(pair), bool), mined.there[pair]])
    offsets = np.concatenate([[0], np.cumsum(keep.sum(1))])
    documents = np.column_stack([mined.positive[pair], mined.row[query]])[keep]
    made = {"query": query, "document": documents, "offsets": offsets}
    if scores:
        values = np.column_stack([mined.positive_score[pair], mined.score[query]])[keep]
        return made | {"scores": _lists(values, offsets)}
    labels = np.zeros(len(documents), np.int64)
    labels[offsets[:-1]] = 1
    return made | {"labels": _lists(labels, offsets)}


_FORMATS = {
    "triplet": _triplet,
    "n-tuple": _tuple,
    "labeled-pair": _labeled_pair,
    "labeled-list": _labeled_list,
}


def _taken(texts: Any, rows: Array) -> Any:
    """Texts by row as Arrow's strings."""
    import pyarrow as pa

    starts = range(0, len(rows), _BLOCK)
    parts = [texts.take(pa.array(rows[i : i + _BLOCK])).cast(pa.string()) for i in starts]
    return pa.chunked_array(parts, pa.string())


def _listed(texts: Any, rows: Array, offsets: Array | None) -> Any:
    import pyarrow as pa

    taken = _taken(texts, rows)
    if offsets is None:
        return taken
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), taken.combine_chunks())


def _lists(values: Array, offsets: Array) -> Any:
    """Lists of numbers; scores are float64 in a dataset, as Python's are."""
    import pyarrow as pa

    wide = values.astype(np.float64) if values.dtype.kind == "f" else values
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(wide))


def report(
    mined: Mined,
    removed: dict[str, tuple[float, int, float]],
    made: Any,
    output_format: str,
    rows: int,
) -> None:
    """Print scores of positives and negatives, what rules removed, and who has too few."""
    there = mined.there
    if output_format == "n-tuple":
        there = there & there.all(1, keepdims=True)
    negative = mined.score[mined.query][there]
    positive = np.broadcast_to(mined.positive_score[:, None], there.shape)[there]
    print(f"{'':8}{'positive':>12}{'negative':>12}{'difference':>12}")
    print(f"{'count':8}{len(mined.positive_score):>12,}{len(negative):>12,}")
    columns = (mined.positive_score, negative, positive - negative)
    for name, of in _STATISTICS.items():
        values = [of(c) if len(c) else float("nan") for c in columns]
        print(f"{name:8}" + "".join(f"{value:>12.4f}" for value in values))
    for name, (bound, count, share) in removed.items():
        print(f"{count:,} candidates ({share:.2%}) went by {name} = {bound}.")
    most = {
        "triplet": there.size,
        "labeled-pair": mined.row.size + rows,
    }.get(output_format, len(there))
    if len(made) < most:
        print(
            f"{most - len(made):,} rows of {most:,} have too few negatives: "
            "raise range_max, or loosen the other rules."
        )


_STATISTICS: dict[str, Callable[[Any], Any]] = {
    "mean": np.mean,
    "std": lambda x: np.std(x, ddof=1) if len(x) > 1 else float("nan"),
    "min": np.min,
    "25%": lambda x: np.quantile(x, 0.25),
    "median": np.median,
    "75%": lambda x: np.quantile(x, 0.75),
    "max": np.max,
}
