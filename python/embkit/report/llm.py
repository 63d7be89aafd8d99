"""What a language model was asked in a run, and what became of its answers: synth, judge, relabel.

Texts of these stages are a model's, or of passages that nobody has read: they are only ever cells
of a table, escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from embkit.report.pieces import decimal, details, table

Report = Mapping[str, Any]
_SHOWN = 8  # samples of each kind


def asked(result: Report, usage: Mapping[str, Report]) -> str:
    """The section of a run with a language model; nothing for one without.

    Args:
        result: ``result.json``. usage: by stage, ``llm-usage.json``.
    """
    parts = [
        *(_written(name, report) for name, report in (result.get("synth") or {}).items()),
        _judged(result.get("judge") or {}),
        _relabelled(result.get("relabel") or {}),
    ]
    if not any(parts):
        return ""
    return "<h2>Language model</h2>" + _costs(usage) + "".join(parts)


def _costs(usage: Mapping[str, Report]) -> str:
    if not usage:
        return ""
    head = ["stage", "requests", "from the cache", "tokens read", "written", "retried", "rejected"]
    names = ("requests", "cached", "prompt_tokens", "completion_tokens")
    body = [
        [stage, *(f"{of.get(n, 0):,}" for n in names), *map(_each, (of["retries"], of["rejected"]))]
        for stage, of in usage.items()
    ]
    return '<p class="note">Over all attempts of this run.</p>' + table(head, body)


def _written(name: str, report: Report) -> str:
    """Queries, labelled texts or graded pairs of one task."""
    prompt = report.get("prompt") or {}
    items, kept = report.get("items", 0), report.get("kept", 0)
    said = (
        f"{report.get('model', '?')} with prompt {prompt.get('name', '?')}: {items:,} items, "
        f"{kept:,} kept, of which {report.get('mended', 0):,} had their JSON mended; "
        f"{report.get('prompt_tokens', 0):,} tokens read, "
        f"{report.get('completion_tokens', 0):,} written."
    )
    dropped = sorted((report.get("dropped") or {}).items(), key=lambda kv: (-kv[1], kv[0]))
    body = [[why, f"{n:,}", _share(n, items)] for why, n in dropped]
    out = [_head(f"synth: {name}", said), table(["dropped", "count", "share"], body)]
    if labels := report.get("labels"):
        rows = [
            [label, f"{of['kept']:,}", f"{of['share']:.1%}", f"{of['wanted']:.1%}"]
            for label, of in labels.items()
        ]
        out.append(table(["label", "kept", "share", "wanted"], rows))
    samples = [
        [why, _words(sample)]
        for why, found in (report.get("samples") or {}).items()
        for sample in found[:_SHOWN]
    ]
    return "".join(out) + _samples(["dropped", "such as"], samples)


def _judged(report: Report) -> str:
    tasks = report.get("tasks") or {}
    if not tasks:
        return ""
    said = (
        f"{report['model']} graded {report['pairs']:,} pairs; {report['ungraded']:,} it could not."
    )
    if (agreement := report.get("agreement") or {}).get("pairs"):
        said += (
            f" Two judges decide alike in {agreement['same_decision']:.1%} of "
            f"{agreement['pairs']:,} pairs, Cohen's kappa {agreement['kappa']:.3f}."
        )
    columns = ("before", "after", "weak_positives", "strong_negatives")
    body = [[name, *(f"{of[c]:,}" for c in columns)] for name, of in tasks.items()]
    samples = [
        [side, f"{s['grade']:.2f}", s["query"], s["passage"]]
        for of in tasks.values()
        for side, found in of["samples"].items()
        for s in found[:_SHOWN]
    ]
    head = ["examples", *(c.replace("_", " ") for c in columns)]
    more = _samples(["dropped", "grade", "query", "passage"], samples)
    return _head("judge", said) + table(head, body) + more


def _relabelled(report: Report) -> str:
    tasks = report.get("tasks") or {}
    if not tasks:
        return ""
    out = [_head("relabel", f"{report['model']} ranked the nearest passages of each query.")]
    for name, of in tasks.items():
        rejected = _each(of["rejected_candidates"])
        body = [
            ["examples", f"{of['examples']:,}"],
            ["judged", f"{of['judged']:,}"],
            ["not judged, as they were", f"{of['unjudged']:,}"],
            ["the best passage is another than the seed", f"{of['best_is_not_seed']:,}"],
            ["share of those", f"{of['share_best_is_not_seed']:.1%}"],
            ["mean rank of the seed", decimal(of["seed_rank_mean"])],
            ["mean reciprocal rank of the seed", decimal(of["seed_mrr"])],
            ["hard negatives", f"{of['negatives']:,}"],
            ["candidates", f"{of['candidates']:,}"],
            ["candidates without a score", rejected],
        ]
        out.append(table([name, ""], body))
    samples = [[s["query"], s["seed"], s["best"]] for s in report.get("samples") or ()]
    return "".join(out) + _samples(["query", "seed", "the best instead"], samples)


def _head(title: str, said: str) -> str:
    return f"<h3>{escape(title)}</h3><p>{escape(said)}</p>"


def _samples(head: list[str], rows: Iterable[list[str]]) -> str:
    found = list(rows)
    return details("Samples", table(head, found, text=True)) if found else ""


def _words(sample: Report) -> str:
    return "  ".join(f"{key}: {value}" for key, value in sample.items())


def _each(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n:,} x {why}" for why, n in sorted(counts.items())) or "0"


def _share(n: int, total: int) -> str:
    return f"{n / total:.1%}" if total else "–"
