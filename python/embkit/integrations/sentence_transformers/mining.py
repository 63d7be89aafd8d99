"""`mine_hard_negatives` with embkit's exact search, and rules on whole arrays.

The candidates of a query are its `range_max + (most positives of a query)` nearest documents. From
them the positives go, then what a rule removes; of what is left `range_max` by score, without the
first `range_min`, are drawn from.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from sentence_transformers import util as st

from embkit.data.tables import Array, offsets_of, owners
from embkit.errors import UsageError
from embkit.integrations.sentence_transformers.mined import Mined, report, to_dataset
from embkit.search import search

logger = logging.getLogger(__name__)

FORMATS = ("triplet", "n-tuple", "labeled-pair", "labeled-list")
_PAIRS = 1 << 16  # that a cross-encoder gets at a time


@dataclass(frozen=True, kw_only=True)
class _Rules:
    range_min: int
    range_max: int
    max_score: float | None
    min_score: float | None
    absolute_margin: float | None
    relative_margin: float | None
    keep: int
    random: bool

    @property
    def any(self) -> bool:
        """Whether a score decides anything."""
        bounds = (self.max_score, self.min_score, self.absolute_margin, self.relative_margin)
        return any(bound is not None for bound in bounds)


@dataclass(frozen=True)
class _Pairs:
    """Distinct queries and documents, and the positives of each query in order of appearance."""

    queries: list[str]
    corpus: list[str]
    offsets: Array
    positive: Array
    most: int  # rows of the dataset that one query has
    of: Array = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "of", owners(self.offsets))


def mine_hard_negatives(
    dataset: Any,
    model: Any,
    anchor_column_name: str | None = None,
    positive_column_name: str | None = None,
    corpus: list[str] | None = None,
    cross_encoder: Any = None,
    range_min: int = 0,
    range_max: int | None = None,
    max_score: float | None = None,
    min_score: float | None = None,
    absolute_margin: float | None = None,
    relative_margin: float | None = None,
    num_negatives: int = 3,
    sampling_strategy: Literal["random", "top"] = "top",
    query_prompt_name: str | None = None,
    query_prompt: str | None = None,
    corpus_prompt_name: str | None = None,
    corpus_prompt: str | None = None,
    include_positives: bool = False,
    output_format: Literal["triplet", "n-tuple", "labeled-pair", "labeled-list"] = "triplet",
    output_scores: bool = False,
    batch_size: int = 32,
    faiss_batch_size: int = 16384,
    use_faiss: bool = False,
    use_multi_process: list[str] | bool = False,
    verbose: bool = True,
    cache_folder: str | None = None,
    as_triplets: bool | None = None,
    margin: float | None = None,
) -> Any:
    """Hard negatives of (anchor, positive) pairs, as `sentence_transformers.util` mines them.

    The same arguments, negatives, order of rows, random draws and cached embeddings; scores differ
    by rounding, so negatives of equal scores may change places. `use_faiss` and `faiss_batch_size`
    change nothing: the search is exact and bounds its memory itself (docs/mining.md). A model whose
    similarity is a distance is handed to the original.

    `embkit.mine` does more: near-duplicates of positives are no negatives, kills lose little.

    Returns:
        A `datasets.Dataset` with the columns of `output_format`.

    Raises:
        UsageError: an empty dataset, an unknown format or strategy, a range without
            `num_negatives` places.
    """
    given = dict(locals())
    if getattr(model, "similarity_fn_name", "cosine") not in ("cosine", "dot"):
        return st.mine_hard_negatives(**given)
    if as_triplets is not None:
        output_format = "triplet" if as_triplets else "n-tuple"
        logger.warning("as_triplets is deprecated: use output_format=%r", output_format)
    if margin is not None:
        absolute_margin = margin
        logger.warning("margin is deprecated: use absolute_margin or relative_margin")
    if include_positives and output_format != "n-tuple":
        logger.warning("include_positives has the output_format 'n-tuple', which keeps the order")
        output_format = "n-tuple"
    if output_format not in FORMATS or sampling_strategy not in ("top", "random"):
        raise UsageError(
            f"output_format {output_format!r} with sampling_strategy {sampling_strategy!r}.",
            fix=f"a format of {', '.join(FORMATS)}; top or random",
        )
    names = _columns(dataset, anchor_column_name, positive_column_name)
    pairs = _pairs(list(dataset[names[0]]), list(dataset[names[1]]), corpus)
    bounded = [absolute_margin, relative_margin, max_score]
    if cross_encoder is not None:
        bounded.append(min_score)
    if range_max is None:  # where a rule removes some, ten times as many to choose from
        spare = 10 if any(bound is not None for bound in bounded) else 1
        range_max = range_min + spare * num_negatives + pairs.most
        if verbose:
            print(f"range_max is {range_max}.")
    if num_negatives < 1 or range_min < 0 or range_max - range_min < num_negatives:
        raise UsageError(
            f"{num_negatives} negatives from the places {range_min} to {range_max}.",
            fix="num_negatives of at least 1 and at most range_max - range_min",
        )
    rules = _Rules(
        range_min=range_min, range_max=range_max, max_score=max_score, min_score=min_score,
        absolute_margin=absolute_margin, relative_margin=relative_margin, keep=num_negatives,
        random=sampling_strategy == "random",
    )  # fmt: skip
    with _pool(model, use_multi_process) as pool:
        options = {"pool": pool, "batch_size": batch_size, "verbose": verbose}
        documents = _embed(
            model, "corpus", pairs.corpus, corpus_prompt, corpus_prompt_name, cache_folder, options
        )
        queries = _embed(
            model, "query", pairs.queries, query_prompt, query_prompt_name, cache_folder, options
        )
    wanted = range_max + pairs.most
    found = search(queries, documents, min(wanted, len(pairs.corpus)))
    row, score = found.row.astype(np.int64), found.score
    own = np.einsum("nd,nd->n", queries[pairs.of], documents[pairs.positive], dtype=np.float32)
    positive = _is_positive(pairs, row)
    if cross_encoder is not None and rules.any:
        with _pool(cross_encoder, use_multi_process) as pool:
            skip = positive if not include_positives else np.zeros_like(positive)
            score, own = _rescored(cross_encoder, pairs, row, ~skip, pool, batch_size)
    score = score.astype(np.float32)
    if not include_positives:
        score[positive] = -np.inf
    removed = _apply(rules, score, own, pairs.offsets, len(pairs.queries) * wanted)
    kept_row, kept_score = _chosen(rules, row, score)
    mined = Mined(
        queries=pairs.queries, corpus=pairs.corpus, query=pairs.of, positive=pairs.positive,
        positive_score=own, row=kept_row, score=kept_score,
    )  # fmt: skip
    made = to_dataset(mined, names, output_format, output_scores)
    if verbose:
        report(mined, removed, made, output_format, len(dataset))
    return made


def _columns(dataset: Any, anchor: str | None, positive: str | None) -> tuple[str, str]:
    columns = dataset.column_names
    if len(dataset) == 0:
        raise UsageError("The dataset is empty.", fix="give (anchor, positive) pairs")
    if len(columns) < 2 and positive not in columns:
        raise UsageError("The dataset has one column.", fix="give anchors and positives")
    return (
        anchor if anchor is not None and anchor in columns else columns[0],
        positive if positive is not None and positive in columns else columns[1],
    )


def _pairs(anchors: list[str], positives: list[str], corpus: list[str] | None) -> _Pairs:
    most = max(Counter(anchors).values())
    documents = list(dict.fromkeys([*(corpus or ()), *positives]))
    place = {text: i for i, text in enumerate(documents)}
    of: dict[str, dict[int, None]] = {}
    for anchor, positive in zip(anchors, positives, strict=True):
        of.setdefault(anchor, {})[place[positive]] = None
    counts = np.array([len(rows) for rows in of.values()], np.int64)
    rows = np.array([row for found in of.values() for row in found], np.int64)
    return _Pairs(list(of), documents, offsets_of(counts), rows, most)


@contextmanager
def _pool(model: Any, wanted: list[str] | bool) -> Iterator[Any]:
    """The model's processes, where they are wanted."""
    if not wanted:
        yield None
        return
    pool = model.start_multi_process_pool(
        target_devices=None if isinstance(wanted, bool) else wanted
    )
    try:
        yield pool
    finally:
        model.stop_multi_process_pool(pool)


def _embed(
    model: Any,
    side: str,
    texts: list[str],
    prompt: str | None,
    prompt_name: str | None,
    folder: str | None,
    options: dict[str, Any],
) -> Array:
    """Unit vectors, from the cache where the original would find them."""
    path = None
    if folder is not None:
        name = model.model_card_data.base_model or ""
        key = repr((name, prompt, prompt_name, texts)).encode()
        path = Path(folder) / f"{side}_embeddings_{hashlib.sha256(key).hexdigest()}.npy"
        if path.exists():
            return np.ascontiguousarray(np.load(path), np.float32)
    encode = model.encode_query if side == "query" else model.encode_document
    vectors = encode(
        texts, pool=options["pool"], batch_size=options["batch_size"], normalize_embeddings=True,
        convert_to_numpy=True, show_progress_bar=options["verbose"], prompt_name=prompt_name,
        prompt=prompt,
    )  # fmt: skip
    vectors = np.ascontiguousarray(vectors, np.float32)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, vectors)
    return vectors


def _is_positive(pairs: _Pairs, row: Array) -> Array:
    """Which candidates [queries, k] are a positive of their query."""
    n = len(pairs.corpus)
    keys = np.sort(pairs.of * n + pairs.positive)
    wanted = np.arange(len(row))[:, None] * n + row
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    found: Array = keys[at] == wanted
    return found


def _rescored(
    cross_encoder: Any, pairs: _Pairs, row: Array, wanted: Array, pool: Any, batch_size: int
) -> tuple[Array, Array]:
    """A cross-encoder's scores of the wanted candidates and of all positives."""

    def scores(query: Array, document: Array) -> Array:
        found = np.empty(len(query), np.float32)
        for start in range(0, len(query), _PAIRS):
            at = slice(start, start + _PAIRS)
            both = zip(query[at].tolist(), document[at].tolist(), strict=True)
            found[at] = cross_encoder.predict(
                [(pairs.queries[q], pairs.corpus[d]) for q, d in both],
                batch_size=batch_size, convert_to_numpy=True, pool=pool,
            )  # fmt: skip
        return found

    query, column = np.nonzero(wanted)
    score = np.full(row.shape, -np.inf, np.float32)
    score[query, column] = scores(query, row[query, column])
    return score, scores(pairs.of, pairs.positive)


def _apply(
    rules: _Rules, score: Array, own: Array, offsets: Array, total: int
) -> dict[str, tuple[float, int, float]]:
    """Remove candidates (score -inf); by rule its bound, how many went, and their share."""
    lowest = np.minimum.reduceat(own, offsets[:-1].astype(np.int64)).astype(np.float32)[:, None]
    removed: dict[str, tuple[float, int, float]] = {}
    for name in ("absolute_margin", "relative_margin", "max_score", "min_score"):
        bound = getattr(rules, name)
        if bound is None:
            continue
        if name == "absolute_margin":
            gone = score + np.float32(bound) > lowest
        elif name == "relative_margin":
            gone = score > lowest - np.abs(lowest) * np.float32(bound)
        else:
            gone = score > bound if name == "max_score" else score < bound
        gone &= score > -np.inf
        count = int(gone.sum())
        if count:
            removed[name] = (bound, count, count / total)
            total -= count
        score[gone] = -np.inf
    return removed


def _chosen(rules: _Rules, row: Array, score: Array) -> tuple[Array, Array]:
    """Rows and scores [queries, keep], best first; -inf where there are too few."""
    order = np.argsort(-score, axis=1, kind="stable")[:, rules.range_min : rules.range_max]
    width = rules.range_max - rules.range_min
    if not rules.random:
        order = order[:, : rules.keep]
    row, score = (np.take_along_axis(x, order, 1) for x in (row, score))
    missing = (rules.keep if not rules.random else width) - row.shape[1]
    if missing > 0:  # a corpus of fewer documents
        row = np.pad(row, ((0, 0), (0, missing)))
        score = np.pad(score, ((0, 0), (0, missing)), constant_values=-np.inf)
    if rules.random:
        options = np.maximum((score > -np.inf).sum(1), rules.keep).tolist()
        # Drawn one by one from `random`, as the original does: a seed gives the same negatives.
        drawn = np.array([random.sample(range(n), k=rules.keep) for n in options])
        row, score = (np.take_along_axis(x, drawn, 1) for x in (row, score))
        order = np.argsort(-score, axis=1, kind="stable")
        row, score = (np.take_along_axis(x, order, 1) for x in (row, score))
    return row, score
