"""A result of ``evaluate_tasks`` as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from embkit.errors import EmbkitError
from embkit.evaluate.vectors import PRECISIONS


def table(result: Mapping[str, Any]) -> str:
    """A result as text: a row per task with score and interval at full width, a column per variant.

    Raises:
        EmbkitError: nothing was scored.
    """
    if not result["tasks"]:
        raise EmbkitError("The result has no tasks.")
    variants = [(w, p) for w, of in result["mean"].items() for p in of]
    variants.sort(key=lambda v: (-int(v[0]), PRECISIONS.index(v[1])))
    head = ["task", "measure"] + [w if p == "float" else f"{w} {p}" for w, p in variants]
    rows = [head]
    for name, of in result["tasks"].items():
        rows.append([name, of["measure"], *(_cell(of["scores"][w][p]) for w, p in variants)])
        if "clean" in of["scores"][variants[0][0]][variants[0][1]]:
            cells = [of["scores"][w][p]["clean"] for w, p in variants]
            label = f"  without {of['leaked']} leaked"
            rows.append([label, "", *(f"{value:.2f}" for value in cells)])
    rows.append(["mean over types", "", *(f"{result['mean'][w][p]:.2f}" for w, p in variants)])
    if "against" in result:
        other = result["against"]
        rows.append([f"minus {other['model']}", "", ""])
        for name, cell in [*other["tasks"].items(), ("mean over tasks", other["mean"])]:
            rows.append([f"  {name}", "", _signed(cell)])
    sizes = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(size) if i < 2 else cell.rjust(size)
            for i, (cell, size) in enumerate(zip(row, sizes, strict=False))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _cell(cell: Mapping[str, float]) -> str:
    if "low" not in cell:
        return f"{cell['score']:.2f}"
    return f"{cell['score']:.2f} [{cell['low']:.2f}, {cell['high']:.2f}]"


def _signed(cell: Mapping[str, float]) -> str:
    if "low" not in cell:
        return f"{cell['difference']:+.2f}"
    return f"{cell['difference']:+.2f} [{cell['low']:+.2f}, {cell['high']:+.2f}]"
