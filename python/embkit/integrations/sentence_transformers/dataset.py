"""Deduplication of a `datasets.Dataset`: the rows that stay, their columns untouched."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embkit import _rust
from embkit.data import leaks
from embkit.data.dedup import METHODS
from embkit.data.tables import Array, Shard, Texts
from embkit.errors import UsageError, nearest
from embkit.integrations.sentence_transformers.arrow import shard_of, tables

logger = logging.getLogger(__name__)


def dedup(
    dataset: Any,
    *,
    columns: Sequence[str] | None = None,
    method: str = "near",
    threshold: float = 0.8,
    punctuation: str = "keep",
    against: Any = None,
    words: int = 13,
    chars: int = 50,
    common: int = 10,
    seed: int = 0,
    memory: int = 0,
) -> Any:
    """The rows of a dataset without duplicates, and without what leaks into evaluation sets.

    A row goes when an earlier one has a duplicate of its text in each of the columns: of
    (anchor, positive) pairs only repeated pairs go, ``columns=["anchor"]`` leaves one row for each
    anchor. A text without a word is like no other. Duplicates and leaks are those of docs/dedup.md:
    clusters around a representative, by exact similarity.

    Args:
        dataset: rows in any order and format.
        columns: that are compared; None takes all columns of text.
        method: ``"near"``, or ``"exact"``: only texts with the same normalised form.
        threshold: Jaccard similarity from which two texts are near-duplicates, in (0, 1].
        punctuation: of ``"exact"``: ``"keep"``, or ``"drop"`` to compare words alone.
        against: paths of evaluation data (a data folder, a BEIR folder, JSON lines): a row goes
            when a text of its columns leaks into them.
        words, chars, common: of leaks: a run of so many words (characters in scripts without
            spaces) that no more than `common` texts have.
        seed: of the MinHash permutations.
        memory: bytes that near-duplicate search may use beside the texts; 0: no limit.

    Returns:
        A selection of the dataset, in its order.

    Raises:
        UsageError: a column that is not there or has no texts, a wrong method or threshold.
        FileNotFoundError: `against` names nothing.
    """
    if method not in METHODS:
        raise UsageError(f"Unknown method {method!r}; {nearest(method, METHODS)}")
    if not 0 < threshold <= 1:
        raise UsageError(f"threshold = {threshold} is out of range.", fix="above 0, at most 1")
    names = _text_columns(dataset, columns)
    if len(dataset) == 0:
        return dataset
    shards, place = _values(dataset, names)
    with tempfile.TemporaryDirectory(prefix="embkit-dedup-") as spill:
        options: dict[str, Any] = {"memory": memory, "spill": spill}
        keep = punctuation if method == "exact" else "keep"
        form = np.asarray(_rust.exact_duplicates(shards, punctuation=keep, **options), np.int64)
        texts, number = _distinct(shards, form)
        cluster = number
        if method == "near":
            found = _rust.near_duplicates(
                list(texts.shards), threshold=threshold, seed=seed, **options
            )
            cluster = np.asarray(found[0], np.int64)[number]
    _, first = np.unique(cluster[place], axis=0, return_index=True)
    stay = np.zeros(len(dataset), bool)
    stay[first] = True
    leaked: Array = np.zeros(len(dataset), bool)
    if against is not None:
        params = {
            "threshold": threshold, "words": words, "chars": chars, "units": "auto",
            "common": common, "seed": seed,
        }  # fmt: skip
        texts = Texts(shards=list(texts.shards), text_id=texts.text_id, cluster=texts.cluster)
        found_leaks = leaks.find(texts, leaks.held_out(_paths(against)), params).leaked
        leaked = np.any(found_leaks[number][place], axis=1)
    kept = np.flatnonzero(stay & ~leaked)
    logger.info(
        "%d of %d rows stay: %d are duplicates, %d leak",
        len(kept), len(dataset), int((~stay).sum()), int(leaked.sum()),
    )  # fmt: skip
    return dataset.select(kept)


def _text_columns(dataset: Any, columns: Sequence[str] | None) -> list[str]:
    kinds = {name: getattr(kind, "dtype", None) for name, kind in dataset.features.items()}
    texts = [name for name, kind in kinds.items() if kind in ("string", "large_string")]
    wanted = texts if columns is None else list(columns)
    wrong = next((name for name in wanted if name not in texts), None)
    if wrong is not None or not wanted:
        raise UsageError(
            f"{wrong!r} is no column of texts." if wrong else "The dataset has no column of texts.",
            fix=f"columns of {', '.join(texts)}" if texts else "give texts",
        )
    return wanted


def _values(dataset: Any, names: Sequence[str]) -> tuple[list[Shard], Array]:
    """The texts table by table, column by column; and which of them each row [n, columns] has."""
    shards: list[Shard] = []
    places, start = [], 0
    for table in tables(dataset.select_columns(list(names))):
        shards += [shard_of(table.column(name)) for name in names]
        size = table.num_rows * len(names)
        places.append(np.arange(start, start + size).reshape(len(names), -1).T)
        start += size
    return shards, np.concatenate(places)


def _distinct(shards: list[Shard], form: Array) -> tuple[Texts, Array]:
    """One text of each normalised form, and the number [values] of every value's among them."""
    first = form == np.arange(len(form))
    none = np.zeros(len(form), np.uint64)  # identities: nothing here asks for them
    texts = Texts(shards=shards, text_id=none, cluster=none).keep(first)
    return texts, (np.cumsum(first) - 1)[form]


def _paths(against: Any) -> list[Path]:
    paths = [Path(path) for path in (against if isinstance(against, (list, tuple)) else [against])]
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(2, "No such evaluation data", str(path))
    return paths
