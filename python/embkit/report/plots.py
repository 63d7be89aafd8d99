"""What the plots of a run show: quality over width, by kind of task, and from stage to stage.

The page draws them as SVG; :func:`save_plots` draws the same as PNG with matplotlib (the extra
`plots`), for papers and model cards.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embkit import _rust
from embkit.errors import CorruptError, UsageError
from embkit.report import scores
from embkit.report.charts import Line
from embkit.report.style import CSS

COLORS = tuple(f"var(--c{i})" for i in range(1, 9))
_INCHES, _DPI = (6.4, 4.0), 160
_UNTRAINED = "untrained"  # far below the others: it would flatten the lines that matter


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A line chart before it is drawn.

    Attributes:
        name: of its file. title: above it.
        lines: what is drawn. x_label, y_label: of the axes.
        x_ticks: places and labels. log_x: whether the x axis is logarithmic.
        note: below it.
    """

    name: str
    title: str
    lines: Sequence[Line]
    x_label: str
    y_label: str
    x_ticks: Sequence[tuple[float, str]]
    log_x: bool = False
    note: str = ""


def plots(result: Mapping[str, Any], split: str) -> list[Plot]:
    """The plots of a split: mean over widths, each kind over widths, stages."""
    return [
        _by_width(result, split),
        *(_kind_by_width(result, split, kind) for kind in _kinds(result, split)),
        _by_stage(result, split),
    ]


def save_plots(result: Mapping[str, Any], out: Path | str) -> list[Path]:
    """Draw the plots of every split as PNG.

    Args:
        result: what ``result.json`` of a run holds, or :func:`load_results` gives.
        out: directory; files in it that have the same names are replaced.

    Returns:
        The files, ``SPLIT-NAME.png``.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("PNG plots need matplotlib.", fix="pip install 'embkit[plots]'") from error
    import io

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    made = []
    for split in scores.splits(result):
        for plot in plots(result, split):
            figure = Figure(figsize=_INCHES, dpi=_DPI, layout="constrained")
            FigureCanvasAgg(figure)
            _draw(figure.add_subplot(), plot)
            held = io.BytesIO()
            # No date and no version of the library: equal results give equal bytes.
            figure.savefig(held, format="png", metadata={"Software": None})
            path = out / f"{split}-{plot.name}.png"
            _rust.publish_file(str(path), held.getvalue())
            made.append(path)
    return made


def load_results(paths: Sequence[Path]) -> dict[str, Any]:
    """Results of a run, or of evaluations side by side, in the form of a run's.

    Args:
        paths: one run directory, or output directories of ``embkit evaluate``, each of which
            becomes a line under its own name.

    Raises:
        UsageError: no paths, a run beside others, or evaluations without a common width.
        CorruptError: no result.json, or one that holds no scores.
    """
    found = {}
    for path in paths:
        file = path / "result.json"
        if not file.is_file():
            raise CorruptError(
                "No result.json here.", where=path, fix="give a run, or what evaluate --out wrote"
            )
        try:
            found[path.name] = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CorruptError(f"Not JSON: {error}", where=file, fix="make it again") from error
    runs = [name for name, result in found.items() if "scores" in result]
    if len(found) != len(paths) or not found or (runs and len(found) > 1):
        raise UsageError(
            "Plots are of one run, or of evaluations with different names.",
            where=", ".join(map(str, paths)),
            fix="give one run directory, or several that evaluate --out wrote",
        )
    if runs:
        return dict(found[runs[0]])
    for name, result in found.items():
        if not {"mean", "types", "tasks"} <= set(result):
            raise CorruptError("This result.json has no scores.", where=name)
    dims = sorted({int(w) for result in found.values() for w in result["mean"]}, reverse=True)
    lines = {k: v for name, result in found.items() for k, v in _models(name, result).items()}
    return {"dims": dims, "scores": {"scores": lines}}


def _kinds(result: Mapping[str, Any], split: str) -> list[str]:
    """Kinds of tasks in a split: the usual ones first, then others of mteb."""
    usual = scores.kinds(result, split)
    found = {kind for model in result["scores"][split].values() for kind in model["types"]}
    return [*usual, *sorted(found - set(usual))]


def _models(name: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """Lines of an evaluation: one, or one a precision where tasks of mteb were scored."""
    first = next(iter(result["mean"].values()), None)
    if not isinstance(first, Mapping):
        return {name: result}
    return {
        name if precision == "float" else f"{name}, {precision}": {
            "tasks": {},
            "mean": {w: by[precision] for w, by in result["mean"].items()},
            "types": {
                kind: {w: by[precision] for w, by in widths.items()}
                for kind, widths in result["types"].items()
            },
        }
        for precision in first
    }


def _by_width(result: Mapping[str, Any], split: str) -> Plot:
    series = {
        name: {int(w): float(v) for w, v in found["mean"].items()}
        for name, found in result["scores"][split].items()
    }
    return _over_widths("mean", f"Trained models over widths, {split}", "mean", series, result)


def _kind_by_width(result: Mapping[str, Any], split: str, kind: str) -> Plot:
    series = {
        name: {int(w): float(v) for w, v in found["types"].get(kind, {}).items()}
        for name, found in result["scores"][split].items()
    }
    title = f"{scores.TITLES.get(kind, kind)}, over widths, {split}"
    return _over_widths(kind, title, scores.MAIN.get(kind, "score"), series, result)


def _over_widths(
    name: str,
    title: str,
    y_label: str,
    series: Mapping[str, Mapping[int, float]],
    result: Mapping[str, Any],
) -> Plot:
    widths = [int(w) for w in reversed(scores.widths(result))]
    lines = [
        Line(
            name=model, x=list(map(float, widths)), y=[found.get(w, math.nan) for w in widths],
            color=COLORS[i % len(COLORS)], points=True,
        )
        for i, (model, found) in enumerate(series.items())
        if model != _UNTRAINED
    ]  # fmt: skip
    return Plot(
        name=f"width-{name}", title=title, lines=lines, x_label="width", y_label=y_label,
        x_ticks=[(float(w), str(w)) for w in widths], log_x=True,
    )  # fmt: skip


def _by_stage(result: Mapping[str, Any], split: str) -> Plot:
    models = result["scores"][split]
    full = scores.widths(result)[0]
    places = [float(i + 1) for i in range(len(models))]
    lines = []
    for i, kind in enumerate(_kinds(result, split)):
        values = [float(m["types"].get(kind, {}).get(full, math.nan)) for m in models.values()]
        title = scores.TITLES.get(kind, kind)
        lines.append(
            Line(name=title, x=places, y=values, color=COLORS[i % len(COLORS)], points=True)
        )
    baseline = scores.bm25(result, split)
    if baseline is not None:
        ends = [places[0], places[-1]]
        lines.append(
            Line(name="BM25, nDCG@10", x=ends, y=[baseline] * 2, color="var(--muted)", dashed=True)
        )
    return Plot(
        name="stages", title=f"Stages at width {full}, {split}", lines=lines, x_label="model",
        y_label="score", x_ticks=[(x, str(int(x))) for x in places],
        note=", ".join(f"{i + 1} {name}" for i, name in enumerate(models)),
    )  # fmt: skip


# ---------------------------------------------------------------- PNG


def _draw(axes: Any, plot: Plot) -> None:
    """A plot on matplotlib's axes."""
    for line in plot.lines:
        kept = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
        axes.plot(
            [x for x, _ in kept], [y for _, y in kept], label=line.name, color=_hex(line.color),
            linestyle="--" if line.dashed else "-", marker="o" if line.points else None,
            linewidth=1.6, markersize=4,
        )  # fmt: skip
    if plot.log_x:
        axes.set_xscale("log")
    axes.set_xticks([x for x, _ in plot.x_ticks], [label for _, label in plot.x_ticks])
    axes.set_xticks([], minor=True)
    note = _wrapped(plot.note) if plot.note else ""
    axes.set_xlabel(f"{plot.x_label}\n{note}" if note else plot.x_label, fontsize=8)
    axes.set_ylabel(plot.y_label)
    axes.set_title(plot.title, fontsize=10)
    axes.grid(axis="y", alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if len(plot.lines) > 1:
        axes.legend(fontsize=7, frameon=False)


def _hex(color: str) -> str:
    """The light theme's value of a CSS variable."""
    found = re.search(re.escape(color[4:-1]) + r":(#[0-9a-f]{3,6})", CSS)
    return found.group(1) if found else color


def _wrapped(text: str) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, 90))
