"""``write_tasks_report``: a page of what ``evaluate_tasks`` has found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from embkit.evaluate.table import differences, rows, variants
from embkit.report.charts import Line, line_chart
from embkit.report.plots import COLORS
from embkit.report.style import CSS


def write_tasks_report(result: Mapping[str, Any]) -> str:
    """Render scores by task, width and precision.

    Args:
        result: of :func:`embkit.evaluate.evaluate_tasks`, as ``result.json`` holds it.

    Returns:
        The HTML page; every number in it is in ``result``.
    """
    title = f"embkit: scores of {result['model']}"
    level = round(100 * result["bootstrap"]["level"])
    parts = [
        f'<p class="note">Percent, by mteb {escape(str(result["mteb"]))}. In brackets: {level}% '
        "bootstrap intervals over the examples. A mean is over the kinds of tasks.</p>",
        _table(rows(result)),
        _charts(result),
    ]
    if "against" in result:
        parts += ["<h2>Two models</h2>", _table(differences(result))]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body><main>"
        f"<h1>{escape(title)}</h1>{''.join(parts)}</main></body></html>\n"
    )


def _table(lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in lines[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>"
        for line in lines[1:]
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody>'
        "</table></div>"
    )


def _charts(result: Mapping[str, Any]) -> str:
    """The mean over widths by precision, and each kind of tasks in float; nothing for one width."""
    widths = sorted({int(w) for w, _ in variants(result)})
    if len(widths) < 2:
        return ""
    precisions = list(dict.fromkeys(p for _, p in variants(result)))
    means = {p: [result["mean"][str(w)][p] for w in widths] for p in precisions}
    first = precisions[0]
    kinds = {k: [of[str(w)][first] for w in widths] for k, of in result["types"].items()}
    figures = [("Mean over widths", means), (f"Kinds of tasks over widths, {first}", kinds)]
    return '<div class="charts">' + "".join(_figure(widths, *f) for f in figures) + "</div>"


def _figure(widths: Sequence[int], title: str, lines: Mapping[str, Sequence[float]]) -> str:
    drawn = [
        Line(name=name, x=list(map(float, widths)), y=list(ys), color=color, points=True)
        for (name, ys), color in zip(lines.items(), COLORS * 2, strict=False)
    ]
    ticks = [(float(w), str(w)) for w in widths]
    chart = line_chart(drawn, x_label="width", y_label="score", x_ticks=ticks, log_x=True)
    return f"<figure><figcaption>{escape(title)}</figcaption>{chart}</figure>"
