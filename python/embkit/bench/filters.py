"""Bench row `filter.rules`: Gopher's rules on raw text, beside the same formulas in plain Python.

datatrove has these filters too, with word tokenizers and other formulas, so that its decisions
cannot be compared; the plain formulas give the same bits.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from embkit import _rust
from embkit.bench import Case
from embkit.bench.corpus import digest, text_shard, texts
from embkit.data.filter_rules import FilterRules

_TEXTS = 12_000  # of the corpus: the rival needs a second for each megabyte


def rules(quick: bool) -> Case:
    """Every rule of preset gopher but stop words, which ask for the language."""
    # ASCII, where str.split() and our words agree but for four control characters.
    odd = frozenset("\x1c\x1d\x1e\x1f")
    items = tuple(t for t in texts(quick)[:_TEXTS] if t.isascii() and not odd & set(t))
    shard = text_shard(items)
    chosen = FilterRules.preset("gopher", {"min_stop_words": "off"})
    checks = chosen.checks()
    return Case(
        name="filter.rules",
        unit="MB/s",
        work=len(shard[0]) / 1e6,
        ours=lambda: _rust.filter_texts([shard], checks)[0].tolist(),
        rivals={"plain Python": lambda: [_bits(t, checks) for t in items]},
        check=_equal,
        goal="100 MB/s",
        facts={"n": len(items), "rules": len(checks), "data": digest(shard[0])},
    )


def _equal(ours: Any, theirs: Any) -> None:
    assert ours == theirs, "the plain formulas decide otherwise"
    assert any(ours), "no text fails"


def _bits(text: str, checks: list[tuple[str, bool, float, int]]) -> int:
    values = _statistics(text)
    bits = 0
    for i, (name, least, bound, _) in enumerate(checks):
        value = values[name]
        bits |= (value < bound if least else value > bound) << i
    return bits


def _statistics(text: str) -> dict[str, float]:
    words = text.split()
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    sizes = np.cumsum([0, *map(len, words)])
    chars = int(sizes[-1])
    many, rows = max(len(words), 1), max(len(lines), 1)
    found: dict[str, float] = {
        "words": len(words),
        "mean_word_length": chars / many,
        "hash_ratio": text.count("#") / many,
        "ellipsis_ratio": text.count("...") / many,
        "alphabetic_words": sum(any(map(str.isalpha, w)) for w in words) / many if words else 1.0,
        "bullet_lines": sum(x[0] in "-*" and x[1:2].strip() == "" for x in lines) / rows,
        "ellipsis_lines": sum(x.endswith("...") for x in lines) / rows,
    }
    blocks, block = [], []
    for line in [*map(str.strip, text.split("\n")), ""]:
        if line:
            block.append(line)
        elif block:
            blocks.append("\n".join(block))
            block = []
    for name, parts in (("line", lines), ("paragraph", blocks)):
        seen: set[str] = set()
        again = [p for p in parts if p in seen or seen.add(p)]  # type: ignore[func-returns-value]
        found[f"duplicate_{name}s"] = len(again) / max(len(parts), 1)
        found[f"duplicate_{name}_chars"] = sum(len("".join(p.split())) for p in again) / max(
            chars, 1
        )
    for n in range(2, 11):
        grams = list(zip(*(words[i:] for i in range(n)), strict=False))
        if n <= 4:
            count = Counter(grams)
            most = max(count.values(), default=0)
            best = max((sum(map(len, g)) for g in grams if count[g] == most), default=0)
            found[f"top_{n}gram"] = min(most * best / max(chars, 1), 1.0) if most > 1 else 0.0
            continue
        known: set[tuple[str, ...]] = set()
        covered = to = 0
        for i, gram in enumerate(grams):
            if gram in known:
                covered += int(sizes[i + n] - sizes[max(i, to)])
                to = i + n
            known.add(gram)
        found[f"duplicate_{n}gram"] = covered / max(chars, 1)
    return found
