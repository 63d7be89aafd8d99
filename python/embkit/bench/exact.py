"""Row `dedup.exact`: mapped text to the first row of every group of equal normalised texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from embkit import _rust
from embkit.bench import Case
from embkit.bench.corpus import digest, text_shard, texts


def exact(quick: bool) -> Case:
    """ASCII texts; a twentieth of them again in other case and spacing.

    The dictionary does what we do. pandas and polars compare lower-cased text: they leave white
    space and Unicode forms alone, so the copies differ in case only for them to agree.
    """
    items = tuple(t for t in texts(quick) if t.isascii())
    items += tuple(t.upper() for t in items[::20])
    shard = text_shard(items)
    rivals: dict[str, Callable[[], Any]] = {"python dict": lambda: _dictionary(items)}
    skipped = {}
    try:
        import pandas

        rivals["pandas (lower case only)"] = lambda: _pandas(items, pandas)
    except ImportError:
        skipped["pandas"] = "it is not installed"
    try:
        import polars

        rivals["polars (lower case only)"] = lambda: _polars(items, polars)
    except ImportError:
        skipped["polars"] = "it is not installed"
    return Case(
        name="dedup.exact",
        unit="MB/s",
        work=len(shard[0]) / 1e6,
        ours=lambda: _rust.exact_duplicates([shard]),
        rivals=rivals,
        check=_agrees,
        floor="2.5x a Python dictionary",
        goal="500 MB/s",
        facts={"n": len(items), "data": digest(shard[0])},
        skipped=skipped,
    )


def _agrees(ours: Any, theirs: Any) -> None:
    """A flag per row: it has an earlier equal. Case alone finds no more than we do."""
    flagged = np.asarray(ours) != np.arange(len(ours))
    theirs, whole = theirs
    assert not (theirs & ~flagged).any(), "a rival flags a row that we keep"
    if whole:
        assert (theirs == flagged).all(), "we flag a row that a rival keeps"
    else:
        assert theirs.sum() >= 0.9 * flagged.sum(), "a rival misses a tenth of the duplicates"


def _dictionary(items: tuple[str, ...]) -> tuple[np.ndarray, bool]:
    import unicodedata

    first: dict[str, int] = {}
    found = np.zeros(len(items), bool)
    for i, text in enumerate(items):
        form = " ".join(unicodedata.normalize("NFKC", text).lower().split())
        found[i] = first.setdefault(form, i) != i
    return found, True


def _pandas(items: tuple[str, ...], pandas: Any) -> tuple[np.ndarray, bool]:
    return pandas.Series(items).str.lower().duplicated().to_numpy(), False


def _polars(items: tuple[str, ...], polars: Any) -> tuple[np.ndarray, bool]:
    lower = polars.Series(items).str.to_lowercase()
    return ~lower.is_first_distinct().to_numpy(), False
