"""Line charts as inline SVG: no script, no network, colours from the page's CSS variables.

Each chart is drawn in a fixed coordinate system and scales with its container. Every point carries
a <title>, which browsers show on hover, and the numbers are in a table of the page as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 22, 10, 34


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a chart.

    Attributes:
        name: in the legend and in hover texts.
        x, y: the points, in order.
        color: a CSS colour, e.g. ``var(--c1)``.
        faint: a background line (raw values behind a smoothed line): thin, no points, no legend.
        points: draw a dot at each point.
        dashed: a baseline.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: str
    faint: bool = False
    points: bool = False
    dashed: bool = False


def line_chart(
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    x_ticks: Sequence[tuple[float, str]] | None = None,
    log_x: bool = False,
    size: tuple[int, int] = (460, 260),
) -> str:
    """A line chart with axes and a legend.

    Args:
        lines: at least one with a finite point.
        x_label, y_label: axis titles.
        x_ticks: positions and labels; round numbers by default.
        log_x: logarithmic x axis.
        size: width and height in user units.
    """
    width, height = size
    shown = [(x, y) for line in lines for x, y in zip(line.x, line.y, strict=True) if _ok(x, y)]
    if not shown:
        return '<p class="none">no data</p>'
    warp = math.log if log_x else float
    left, right = min(warp(x) for x, _ in shown), max(warp(x) for x, _ in shown)
    # A line of single steps may spike: the axis follows the lines that are meant to be read.
    main = [
        y for line in lines if not line.faint for x, y in zip(line.x, line.y, strict=True)
        if _ok(x, y)
    ] or [y for _, y in shown]  # fmt: skip
    ticks = nice_ticks(min(main), max(main))
    low, high = min(ticks[0], min(main)), max(ticks[-1], max(main))
    x_room, y_room = width - _LEFT - _RIGHT, height - _TOP - _BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        across = (warp(x) - left) / (right - left) if right > left else 0.5
        up = (min(max(y, low), high) - low) / (high - low) if high > low else 0.5
        return _LEFT + across * x_room, _TOP + (1 - up) * y_room

    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(y_label)} over {escape(x_label)}">'
    ]
    for value in ticks:
        _, y = at(shown[0][0], value)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(_text(_LEFT - 6, y + 3.5, _short(value), anchor="end"))
    for value, label in x_ticks or [(v, _short(v)) for v in nice_ticks(*_range(shown))]:
        if log_x or left <= value <= right:
            parts.append(_text(at(value, low)[0], height - 18, label))
    parts.append(_text(_LEFT + x_room / 2, height - 4, x_label, kind="axis"))
    for line in lines:
        parts.append(_draw(line, at))
    parts.append("</svg>")
    return "".join(parts) + legend(lines)


def legend(lines: Sequence[Line]) -> str:
    """Names beside their colours; nothing for a single line."""
    named = {line.name: line for line in lines if not line.faint}
    if len(named) < 2:
        return ""
    items = "".join(
        f'<span><i class="{"dash" if line.dashed else "bar"}" style="--c:{line.color}"></i>'
        f"{escape(name)}</span>"
        for name, line in named.items()
    )
    return f'<div class="legend">{items}</div>'


def nice_ticks(low: float, high: float, *, count: int = 5) -> list[float]:
    """About ``count`` round numbers that cover [low, high]."""
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / count
    base = 10.0 ** math.floor(math.log10(rough))
    step = next((base * m for m in (1, 2, 2.5, 5, 10) if base * m >= rough), base * 10)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def smooth(values: Sequence[float], *, span: int) -> list[float]:
    """Running mean over the last ``span`` values."""
    out: list[float] = []
    total = 0.0
    for i, value in enumerate(values):
        total += value
        if i >= span:
            total -= values[i - span]
        out.append(total / min(i + 1, span))
    return out


def _draw(line: Line, at: Callable[[float, float], tuple[float, float]]) -> str:
    spots = [at(x, y) for x, y in zip(line.x, line.y, strict=True) if _ok(x, y)]
    if not spots:
        return ""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
    style = f'style="stroke:{line.color}"'
    kind = "faint" if line.faint else "base" if line.dashed else "line"
    out = [f'<polyline class="{kind}" fill="none" {style} points="{path}"/>']
    if line.points:
        for (cx, cy), x, y in zip(spots, line.x, line.y, strict=False):
            out.append(
                f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="3.5" style="fill:{line.color}">'
                f"<title>{escape(line.name)}: {y:.2f} at {_short(x)}</title></circle>"
            )
    return "".join(out)


def _text(x: float, y: float, text: str, *, anchor: str = "middle", kind: str = "tick") -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _range(shown: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return min(x for x, _ in shown), max(x for x, _ in shown)


def _ok(x: float, y: float) -> bool:
    return math.isfinite(x) and math.isfinite(y)


def _short(value: float) -> str:
    return f"{value:.6g}"
