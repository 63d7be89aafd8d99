"""``write_report``: one HTML file that opens from disk, in light and dark, with nothing to load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from embkit.report import scores
from embkit.report.charts import Line, line_chart, smooth
from embkit.report.llm import asked
from embkit.report.pieces import clock, decimal, details, figure, table
from embkit.report.plots import COLORS, Plot, plots
from embkit.report.style import CSS


def write_report(
    result: Mapping[str, Any],
    *,
    logs: Mapping[str, Path] | None = None,
    settings: str = "",
    seconds: Mapping[str, float] | None = None,
    usage: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """Render a run.

    Args:
        result: what ``result.json`` holds (``embkit.pipeline.run``).
        logs: log.jsonl of each training run, by the run's name.
        settings: the resolved recipe as TOML.
        seconds: wall time of each stage.
        usage: what stages asked of a language model, ``llm-usage.json``.

    Returns:
        The HTML page. Every number in it comes from ``result``, the logs, ``seconds`` or ``usage``.
    """
    sections = [
        _tiles(result, seconds or {}),
        _scores(result),
        _curves(logs or {}),
        _soup(result.get("soup") or {}),
        _dedup(result.get("dedup") or {}),
        _mining(result.get("mine") or {}),
        asked(result, usage or {}),
        _time(seconds or {}),
        _settings(settings),
    ]
    title = f"embkit: {result.get('recipe', 'run')}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body><main>"
        f"<h1>{escape(title)}</h1>{''.join(sections)}</main></body></html>\n"
    )


# ---------------------------------------------------------------- sections


def _tiles(result: Mapping[str, Any], seconds: Mapping[str, float]) -> str:
    split = scores.splits(result)[0]
    full = scores.widths(result)[0]
    models = result["scores"][split]
    name = next((n for n in models if "greedy" in n), list(models)[-1])
    tiles = [
        (scores.TITLES[kind], scores.number(models[name]["types"][kind][full]), f"{split}, {name}")
        for kind in scores.kinds(result, split)
        if kind in models[name]["types"]
    ]
    baseline = scores.bm25(result, split)
    if baseline is not None:
        tiles.append(("BM25, nDCG@10", scores.number(baseline), f"{split}, the same sets"))
    difference = (result.get("export") or {}).get("max_abs_difference")
    if difference is not None:
        tiles.append(("Export, max |difference|", f"{difference:.1e}", "sentence-transformers"))
    if seconds:
        tiles.append(("Wall time", clock(sum(seconds.values())), "all stages"))
    cells = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(title)}</span>'
        f"<small>{escape(note)}</small></div>"
        for title, value, note in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _scores(result: Mapping[str, Any]) -> str:
    out = ["<h2>Scores</h2>", '<p class="note">Percent. A mean is over the kinds of tasks; every '
           "width is a prefix of the same embedding, from one encode.</p>"]  # fmt: skip
    for split in scores.splits(result):
        body = [[name, *map(scores.number, cells)] for name, cells in scores.rows(result, split)]
        out.append(f"<h3>{escape(split)}</h3>" + table(["", *scores.header(result, split)], body))
        mean, *kinds, stages = plots(result, split)
        out.append(f'<div class="charts">{_chart(mean)}{_chart(stages)}</div>')
        inner = "".join(_chart(plot) for plot in kinds)
        out.append(details("By kind of task", f'<div class="charts">{inner}</div>'))
    return "".join(out)


def _chart(plot: Plot) -> str:
    chart = line_chart(
        plot.lines, x_label=plot.x_label, y_label=plot.y_label, x_ticks=plot.x_ticks,
        log_x=plot.log_x,
    )  # fmt: skip
    note = f'<p class="note">{escape(plot.note)}</p>' if plot.note else ""
    return figure(plot.title, chart + note)


def _curves(logs: Mapping[str, Path]) -> str:
    """One chart per task and group of runs; runs that share tasks are drawn together."""
    groups: dict[tuple[str, str], list[Line]] = {}
    for i, (run, path) in enumerate(logs.items()):
        family = run.rstrip("0123456789").rstrip("-_") or run
        by_task: dict[str, tuple[list[float], list[float]]] = {}
        for entry in _log(path):
            xs, ys = by_task.setdefault(str(entry.get("task", "all")), ([], []))
            xs.append(float(entry["step"]))
            ys.append(float(entry["loss"]))
        for task, (xs, ys) in by_task.items():
            color = COLORS[i % len(COLORS)]
            xs, ys = _thin(xs, smooth(ys, span=max(1, len(ys) // 40)))
            line = Line(name=run, x=xs, y=ys, color=color)
            groups.setdefault((family, task), []).append(line)
    if not groups:
        return ""
    figures = "".join(
        figure(f"{family}: {task}", line_chart(lines, x_label="step", y_label="loss"))
        for (family, task), lines in sorted(groups.items(), key=lambda g: (g[0][0] != "pre", g[0]))
    )
    note = "Running mean over a fortieth of the steps of each task."
    return f'<h2>Loss</h2><p class="note">{note}</p><div class="charts">{figures}</div>'


def _soup(soups: Mapping[str, Any]) -> str:
    report = soups.get("greedy") or next(iter(soups.values()), None)
    if not report or not report.get("candidates"):
        return ""
    kept = set(report.get("kept", ()))
    body = [
        [c["run"], scores.number(c["dev"]), "yes" if c["run"] in kept else "no"]
        for c in report["candidates"]
    ]
    tried = {s["run"]: s for s in report.get("steps", ())}
    for row in body:
        step = tried.get(row[0])
        row.insert(2, scores.number(step["dev"]) if step else "–")
    if report.get("uniform"):
        body.append(["uniform average", scores.number(report["uniform"]["dev"]), "–", "–"])
    body.append(["greedy soup", scores.number(report.get("dev")), "–", f"{len(kept)} kept"])
    head = ["", "dev mean alone", "dev mean when added", "kept"]
    return "<h2>Soup</h2>" + table(head, body)


def _dedup(report: Mapping[str, Any]) -> str:
    if not report:
        return ""
    texts, leaks = report.get("texts", {}), report.get("leaks", {})
    facts = [
        f"{texts.get('before', 0):,} distinct texts, {texts.get('duplicates', 0):,} of them "
        f"duplicates in {report.get('clusters', {}).get('count', 0):,} clusters",
        f"{leaks.get('texts', 0):,} texts leak into the evaluation sets: {leaks.get('exact', 0):,} "
        f"exactly, {leaks.get('near', 0):,} nearly, {leaks.get('span', 0):,} by a run of words",
    ]
    columns = ["before", "leaked", "duplicates", "same_text", "conflicting", "merged", "after"]
    body = [
        [name, *(f"{counts.get(c, 0):,}" for c in columns)]
        for name, counts in report.get("examples", {}).items()
    ]
    out = ["<h2>Cleaning</h2>", "".join(f"<p>{escape(f)}.</p>" for f in facts)]
    out.append(table(["examples", *(c.replace("_", " ") for c in columns)], body))
    largest = report.get("clusters", {}).get("largest", [])[:8]
    if largest:
        rows = [
            [c["representative"], f"{c['size']:,}", c["members"][0]["text"] if c["members"] else ""]
            for c in largest
        ]
        out.append(details("Largest clusters", table(["kept", "size", "such as"], rows, text=True)))
    spans = leaks.get("spans", [])[:8]
    if spans:
        rows = [[s["span"], f"{s['overlap']:.2f}", s["evaluation"]] for s in spans]
        head = ["span in training", "overlap", "evaluation text"]
        out.append(details("Leaks", table(head, rows, text=True)))
    return "".join(out)


def _mining(report: Mapping[str, Any]) -> str:
    out = []
    for name, task in (report.get("tasks") or {}).items():
        audit = [[k.replace("_", " "), f"{v:,}"] for k, v in task.get("audit", {}).items()]
        out.append(f"<h3>{escape(name)}</h3>")
        out.append(
            f"<p>{task['kept']:,} negatives for {task['examples']:,} examples; mean score of "
            f"positives {decimal(task.get('mean_positive_score'))}, of negatives "
            f"{decimal(task.get('mean_negative_score'))}.</p>"
        )
        out.append(table(["candidates", "count"], audit))
        rows = [
            [s["query"], f"{s['positive_score']:.3f}", s["positive"], _first(s["negatives"])]
            for s in task.get("samples", [])
        ]
        if rows:
            head = ["query", "score", "positive", "hardest negative"]
            out.append(details("Samples", table(head, rows, text=True)))
    return "<h2>Hard negatives</h2>" + "".join(out) if out else ""


def _time(seconds: Mapping[str, float]) -> str:
    if not seconds:
        return ""
    longest = max(seconds.values()) or 1.0
    bars = "".join(
        f'<div class="meter"><span>{escape(name)}</span>'
        f'<i><b style="width:{100 * s / longest:.1f}%"></b></i><span>{clock(s)}</span></div>'
        for name, s in seconds.items()
    )
    return f"<h2>Time</h2>{bars}"


def _settings(settings: str) -> str:
    return (
        f"<h2>Settings</h2>{details('recipe.toml', f'<pre>{escape(settings)}</pre>')}"
        if settings
        else ""
    )


# ---------------------------------------------------------------- cells and lines


def _first(negatives: list[dict[str, Any]]) -> str:
    return f"{negatives[0]['score']:.3f}  {negatives[0]['text']}" if negatives else "none"


def _thin(xs: list[float], ys: list[float], most: int = 300) -> tuple[list[float], list[float]]:
    """At most ``most`` points, the last one kept."""
    step = max(1, -(-len(xs) // most))
    at = list(range(0, len(xs), step))
    if xs and at[-1] != len(xs) - 1:
        at.append(len(xs) - 1)
    return [xs[i] for i in at], [ys[i] for i in at]


def _log(path: Path) -> list[dict[str, Any]]:
    entries = []
    for line in Path(path).read_text("utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if isinstance(entry, dict) and "step" in entry and "loss" in entry:
            entries.append(entry)
    return entries
