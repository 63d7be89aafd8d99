"""The rows of the group `recipes` as a table of docs/ablations.md.

python -m embkit.bench.recipes_table benches/results/DATE-MACHINE-recipes.json
"""

from __future__ import annotations

import json
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


def seen(row: Row) -> str:
    """Whether something is gained: the interval is above zero, below it, or holds it."""
    low, high = row["interval"]
    return "better" if low > 0 else "worse" if high < 0 else "no difference seen"


def _means(row: Row, who: str) -> dict[str, list[float]]:
    return dict(row["kinds_mean_sd"][who])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(table([row for path in sys.argv[1:] for row in json.loads(Path(path).read_text())]))
