"""The rows of the group `recipes` as the tables of docs/ablations.md and docs/recipes.md.

python -m embkit.bench.recipes_table benches/results/DATE-MACHINE-recipes.json
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_NAMES = {"retrieval": "nDCG@10", "sts": "Spearman", "classification": "accuracy"}


def table(rows: Sequence[Row]) -> str:
    """A line per row: each kind's means and spreads, and the difference with its interval."""
    kinds = [kind for kind in _NAMES if any(kind in _means(row, "embkit") for row in rows)]
    heads = ["row", *(f"{_NAMES[k]}, with / without" for k in kinds)]
    heads += ["gained (95%)", "papers", "seen"]
    lines = [_line(heads), "|" + "---|" * len(heads)]
    for row in rows:
        cells = [row["name"].removeprefix("recipes.")]
        for kind in kinds:
            both = [_means(row, who).get(kind) for who in ("embkit", row["peer"])]
            cells.append(" / ".join(" ± ".join(f"{x:.1f}" for x in m) for m in both if m))
        low, high = row["interval"]
        of = _NAMES[row["difference_of"]]
        cells.append(f"{of} {row['difference']:+.2f} ({low:+.2f} to {high:+.2f})")
        cells += [row.get("expected", row.get("goal") or ""), seen(row)]
        lines.append(_line(cells))
    return "\n".join(lines)


def systems(rows: Sequence[Row]) -> str:
    """Of whole recipes, a line per row and kind: what each stage gives, and the peer."""
    heads = ["row", "measure", "untrained", "pre-finetuned", "exported", "sentence-transformers"]
    lines = [_line([*heads, "gained (95%)"]), "|" + "---|" * (len(heads) + 1)]
    for row in rows:
        for kind in _NAMES:
            if kind not in row["kinds"]:
                continue
            cells = [row["name"].removeprefix("recipes."), _NAMES[kind]]
            for name in ("untrained", "pre-finetuned"):
                cells.append(f"{statistics.fmean(b[name][kind] for b in row['before']):.1f}")
            for who in ("embkit", row["peer"]):
                cells.append(" ± ".join(f"{x:.1f}" for x in _means(row, who)[kind]))
            low, high = row["interval"]
            own = f"{row['difference']:+.1f} ({low:+.1f} to {high:+.1f})"
            means = [_means(row, who)[kind][0] for who in ("embkit", row["peer"])]
            is_own = kind == row["difference_of"]
            cells.append(own if is_own else f"{means[0] - means[1]:+.1f}")
            lines.append(_line(cells))
    return "\n".join(lines)


def seen(row: Row) -> str:
    """Whether something is gained: the interval is above zero, below it, or holds it."""
    low, high = row["interval"]
    return "better" if low > 0 else "worse" if high < 0 else "no difference seen"


def _means(row: Row, who: str) -> dict[str, list[float]]:
    return dict(row["kinds_mean_sd"][who])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    found = [row for path in sys.argv[1:] for row in json.loads(Path(path).read_text())]
    whole = [row for row in found if "recipe" in row]
    print(table([row for row in found if row not in whole]))
    if whole:
        print("\n" + systems(whole))
