"""Rows `dedup.contamination*`: training text against 5,000 evaluation texts with planted leaks."""

from __future__ import annotations

import random
import re
from typing import Any

import numpy as np

from embkit import _rust
from embkit.bench import Case
from embkit.bench.corpus import digest, text_shard, texts

_PLANTS = 200
_SPAN = 40
_WORD = re.compile(r"[a-z0-9_\x80-\U0010ffff]+")


def contamination(quick: bool) -> Case:
    """ASCII texts, runs of 13 words; beside a Python dictionary of them."""
    return _case("dedup.contamination", [t for t in texts(quick) if t.isascii()], goal="120 MB/s")


def contamination_mixed(quick: bool) -> Case:
    """Texts with characters beyond ASCII only: words, or characters where there are no spaces."""
    items = [t for t in texts(quick) if not t.isascii()]
    return _case("dedup.contamination.mixed", items, goal="40% of dedup.contamination")


def contamination_chars(quick: bool) -> Case:
    """The ASCII texts again, by runs of 50 characters."""
    items = [t for t in texts(quick) if t.isascii()]
    return _case("dedup.contamination.chars", items, units="chars")


def _case(name: str, items: list[str], *, units: str = "auto", goal: str | None = None) -> Case:
    train, held, planted = _plant(items)
    shard, against = text_shard(train), text_shard(held)

    def ours() -> tuple[Any, set[int]]:
        # No n-gram is common here: the dictionary does not have the notion.
        return _rust.contamination([shard], [against], common=2**32 - 1, units=units), planted

    found = ours()[0]
    return Case(
        name=name,
        unit="MB/s",
        work=len(shard[0]) / 1e6,
        ours=ours,
        rivals={} if units == "chars" else {"python dict of 13-grams": lambda: _grams(train, held)},
        check=_finds_all,
        floor="12x a Python dictionary",
        goal=goal,
        facts={
            "n": len(train),
            "evaluation texts": len(held),
            "planted": len(planted),
            "planted found": len(planted & set(found["train_row"].tolist())),
            "rows": len(found["train_row"]),
            "data": digest(shard[0]),
        },
    )


def _plant(items: list[str]) -> tuple[tuple[str, ...], tuple[str, ...], set[int]]:
    """Training texts, evaluation texts, and the training rows that got a text of the latter.

    200 get 40 words of an evaluation text in their middle, 200 become one of them; the texts
    planted have at least 60 words. At most one text in 32 is held out, as of the large corpus, so
    that rows of different corpora compare.
    """
    rng = random.Random(3)
    rng.shuffle(items)
    count = min(5000, len(items) // 32)
    held, train = items[:count], items[count:]
    long = [t.split() for t in held if len(t.split()) >= _SPAN + 20]
    plants = min(_PLANTS, len(train) // 4)
    rows = rng.sample(range(len(train)), 2 * plants)
    for row in rows[:plants]:
        words, own = rng.choice(long), train[row].split()
        at = rng.randrange(len(words) - _SPAN)
        train[row] = " ".join(
            [*own[: len(own) // 2], *words[at : at + _SPAN], *own[len(own) // 2 :]]
        )
    for row in rows[plants:]:
        train[row] = " ".join(rng.choice(long))
    return tuple(train), tuple(held), set(rows)


def _finds_all(ours: Any, theirs: set[int]) -> None:
    found, planted = ours
    rows = set(found["train_row"].tolist())
    assert planted <= rows, f"{len(planted - rows)} of {len(planted)} planted rows are missed"
    assert planted <= theirs, f"the rival misses {len(planted - theirs)} planted rows"
    # Its words are cut a little differently.
    partial = set(found["train_row"][np.asarray(found["overlap"]) < 1].tolist())
    assert len(theirs ^ rows) <= 0.1 * len(rows) or not partial, "more than a tenth differs"


def _grams(train: tuple[str, ...], held: tuple[str, ...], n: int = 13) -> set[int]:
    index: dict[str, set[int]] = {}
    for row, text in enumerate(held):
        words = _WORD.findall(text.lower())
        for i in range(len(words) - n + 1):
            index.setdefault(" ".join(words[i : i + n]), set()).add(row)
    hits = set()
    for row, text in enumerate(train):
        words = _WORD.findall(text.lower())
        if any(" ".join(words[i : i + n]) in index for i in range(len(words) - n + 1)):
            hits.add(row)
    return hits
