"""A result of ``evaluate_tasks`` as rows of text, for the terminal and the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from embkit.evaluate.vectors import PRECISIONS


def variants(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Widths and precisions of the first model, widest first, float first."""
    found = [(w, p) for w, of in result["mean"].items() for p in of]
    return sorted(found, key=lambda v: (-int(v[0]), PRECISIONS.index(v[1])))


def rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Titles, then a row per task with scores and intervals, one without leaked examples below it
    where there are any, and the mean over types; every row as long as the titles."""
    shown = variants(result)
    out = [["task", "measure", *(w if p == "float" else f"{w} {p}" for w, p in shown)]]
    for name, of in result["tasks"].items():
        cells = [of["scores"][w][p] for w, p in shown]
        out.append([name, of["measure"], *(_cell(cell) for cell in cells)])
        if "clean" in cells[0]:
            clean = [_cell(cell, "clean", "clean_") for cell in cells]
            out.append([f"  without {of['leaked']} leaked", "", *clean])
    out.append(["mean over types", "", *(f"{result['mean'][w][p]:.2f}" for w, p in shown)])
    return out


def differences(result: Mapping[str, Any]) -> list[list[str]]:
    """Titles, then a row per task: the second model's score and the first's lead over it."""
    other = result["against"]
    out = [["task", str(other["model"]), f"{result['model']} minus that"]]
    out += [
        [n, f"{c['score']:.2f}", _cell(c, "difference", sign="+")]
        for n, c in other["tasks"].items()
    ]
    return [*out, ["mean over tasks", "", _cell(other["mean"], "difference", sign="+")]]


def table(result: Mapping[str, Any]) -> str:
    """The rows as aligned text; with a second model, the differences below."""
    blocks = [_aligned(rows(result), 2)]
    if "against" in result:
        blocks.append(_aligned(differences(result), 1))
    return "\n\n".join(blocks)


def _aligned(lines: list[list[str]], left: int) -> str:
    sizes = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [
        "  ".join(
            cell.ljust(size) if i < left else cell.rjust(size)
            for i, (cell, size) in enumerate(zip(line, sizes, strict=True))
        )
        for line in lines
    ]
    return "\n".join(line.rstrip() for line in padded)


def _cell(cell: Mapping[str, float], value: str = "score", of: str = "", sign: str = "") -> str:
    shown = f"{cell[value]:{sign}.2f}"
    if f"{of}low" not in cell:
        return shown
    return f"{shown} [{cell[f'{of}low']:{sign}.2f}, {cell[f'{of}high']:{sign}.2f}]"
