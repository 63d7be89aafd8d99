"""Rows `dedup.contamination*`: training text against 5,000 evaluation texts with planted leaks."""

from __future__ import annotations

import random
import re
from typing import Any

from embkit import _rust
from embkit.bench import Case
from embkit.bench.corpus import digest, text_shard, texts

_PLANTS = 200
_SPAN = 40
_WORD = re.compile(r"[a-z0-9_\x80-\U0010ffff]+")
_UNSPACED = (
    "\u0e00-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u312f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
)


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
        check=_same if all(t.isascii() for t in items) else _finds_all,
        floor="12x a Python dictionary" if name == "dedup.contamination" else None,
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
    long = [t for t in held if len(t.split()) >= _SPAN + 20]
    plants = min(_PLANTS, len(train) // 4)
    rows = rng.sample(range(len(train)), 2 * plants)
    for row in rows[:plants]:
        train[row] = _insert(rng, train[row], long)
    for row in rows[plants:]:
        train[row] = " ".join(rng.choice(long).split())
    return tuple(train), tuple(held), set(rows)


def _insert(rng: random.Random, text: str, sources: list[str]) -> str:
    """`text` with 40 words of a source in its middle; all three are of words or all of characters:
    a text is compared by one of them (``units="chars"`` compares everything by characters).
    """
    own = text.split()
    half = len(own) // 2
    while True:
        source = rng.choice(sources)
        words = source.split()
        at = rng.randrange(len(words) - _SPAN)
        made = " ".join([*own[:half], *words[at : at + _SPAN], *own[half:]])
        if _by_chars(made) == _by_chars(source):
            return made


def _by_chars(text: str) -> bool:
    unspaced = len(re.findall(f"[{_UNSPACED}]", text))
    return unspaced > 0 and unspaced >= len(re.findall(rf"[^\W{_UNSPACED}]+", text))


def _finds_all(ours: Any, theirs: set[int]) -> None:
    found, planted = ours
    missed = planted - set(found["train_row"].tolist())
    assert not missed, f"{len(missed)} of {len(planted)} planted rows are missed"


def _same(ours: Any, theirs: set[int]) -> None:
    """Beyond the planted rows the two cut words a little differently."""
    _finds_all(ours, theirs)
    found, planted = ours
    assert planted <= theirs, f"the rival misses {len(planted - theirs)} planted rows"
    long = set(found["train_row"][~found["whole"]].tolist())
    assert len(long ^ (theirs & long)) <= 0.1 * len(long), "a tenth of the rows differs"


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
