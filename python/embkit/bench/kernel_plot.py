"""Rows of the kernel benches as one HTML page of charts; `make gpu` writes it beside its JSON.

python -m embkit.bench.kernel_plot benches/results/kernels.json kernels.html
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from embkit.report.charts import Line, line_chart
from embkit.report.style import CSS

Rows = Sequence[Mapping[str, Any]]


def page(rows: Rows, title: str) -> str:
    """Render rows (of `--json`, one per peer and row) as a page that loads nothing.

    Args:
        rows: at least `name`, `d`, and the facts `ms`, `floor_ms`, `extra_bytes` where measured.
        title: heading, e.g. the GPU and the date.
    """
    by_name = list({row["name"]: row for row in rows if "ms" in row}.values())
    loss = [r for r in by_name if r["name"].split(".")[-1].isdigit() and "infonce" in r["name"]]
    square = sorted((r for r in loss if r["n"] == r["columns"]), key=lambda r: r["d"])
    charts = [
        ("MRL InfoNCE, three widths, both passes: ms by D", _ways(square, "ms", 1.0, floor=True))
    ]
    if any("extra_bytes" in r for r in square):
        charts.append(
            ("The same: MB besides inputs and results", _ways(square, "extra_bytes", 1e-6))
        )
    for layout in ("padded", "packed"):
        pooled = sorted((r for r in by_name if r.get("layout") == layout), key=lambda r: r["d"])
        charts.append(
            (f"Mean pooling, {layout}, both passes: ms by H", _ways(pooled, "ms", 1.0, floor=True))
        )
    figures = "".join(
        f"<figure><figcaption>{escape(caption)}</figcaption>"
        f"{line_chart(lines, x_label='width', y_label=caption.rsplit(': ', 1)[-1])}</figure>"
        for caption, lines in charts
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body><main>"
        f'<h1>{escape(title)}</h1><div class="charts">{figures}</div>'
        f"<h2>Times</h2>{_table(by_name)}</main></body></html>\n"
    )


def _ways(rows: Rows, fact: str, scale: float, *, floor: bool = False) -> list[Line]:
    """One line a way over the width, and the floor dashed."""
    names = dict.fromkeys(way for row in rows for way in row.get(fact, {}))
    lines = [
        Line(
            name=name,
            x=[r["d"] for r in rows if name in r.get(fact, {})],
            y=[r[fact][name] * scale for r in rows if name in r.get(fact, {})],
            color=f"var(--c{i % 8 + 1})",
            points=True,
        )
        for i, name in enumerate(names)
    ]
    if floor and rows:
        x, y = [r["d"] for r in rows], [r["floor_ms"] for r in rows]
        lines.append(Line(name="floor", x=x, y=y, color="var(--muted)", dashed=True))
    return lines


def _table(rows: Rows) -> str:
    ways = list(dict.fromkeys(way for row in rows for way in row["ms"]))
    head = _cells("th", ["row", *(f"{way}, ms" for way in ways), "floor, ms"])
    body = "".join(
        _cells("td", [r["name"], *(_number(r["ms"].get(way)) for way in ways),
                      _number(r.get("floor_ms"))])
        for r in rows
    )  # fmt: skip
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def _cells(tag: str, texts: Iterable[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(text)}</{tag}>' for text in texts)}</tr>"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command: JSON of `embkit bench kernels` or of `make gpu` to a page."""
    source, target = (Path(x) for x in (sys.argv[1:] if argv is None else argv))
    found = json.loads(source.read_text())
    rows = found if isinstance(found, list) else found.get("rows", [])
    machine = rows[0]["machine"] if rows else "nothing measured"
    target.write_text(page(rows, f"Kernels: {machine}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
