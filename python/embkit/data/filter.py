"""Rule and score filters of records: broken texts go, and pairs that do not belong together.

Rust says which rules each text fails; here that is joined with the example tables, counted and
explained in ``report.json``. Which rules there are, and why: docs/filters.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from embkit import _rust, container
from embkit.data.dedup import compact
from embkit.data.filter_rules import LANGUAGE, FilterRules, Rule, language_codes
from embkit.data.filter_score import ScoreFilter, Scores, score_pairs
from embkit.data.leaks import short
from embkit.data.records import KIND, Records, as_directory, write_records
from embkit.data.tables import Array, Examples, Texts, any_jagged, counts_of, keep_jagged
from embkit.errors import UsageError, nearest
from embkit.progress import bar
from embkit.stage import stage

ACTIONS = ("drop", "mark")
_SAMPLES = 20
_LANGUAGE_BIT = 31


def filter(
    records: Any,
    *,
    out: Path | str,
    rules: FilterRules | str = "default",
    languages: Sequence[str] | None = None,
    action: str = "drop",
    score: ScoreFilter | None = None,
    fresh: bool = False,
) -> Records:
    """Remove examples whose texts break rules, and pairs that a model finds unlike.

    A positive or negative that fails is taken out of its example; an example goes when its query
    fails, or all its positives do.

    Args:
        records: a Records, a records directory, or anything :func:`embkit.data.read` takes.
        out: the directory to publish (again records), with ``filters.safetensors`` and
            ``report.json``.
        rules: bounds, or the name of a preset: ``"default"``, ``"gopher"``, ``"off"``.
        languages: codes (``"en"`` or ``"eng"``) of the languages that stay; a text whose language
            is not clear stays too. None for all.
        action: ``"drop"``, or ``"mark"``: only write what would go.
        score: also compare queries and positives of retrieval tasks with a model.
        fresh: do it again even when it is done.

    Raises:
        UsageError: unknown action, preset, rule or language, or a bound out of range.
    """
    if action not in ACTIONS:
        raise UsageError(f"Unknown action {action!r}; {nearest(action, ACTIONS)}")
    if isinstance(rules, str):
        rules = FilterRules.preset(rules)
    codes = language_codes(languages)
    records = as_directory(records, out)
    params: dict[str, Any] = {
        "rules": rules.to_json(),
        "languages": [_rust.filter_names()[1][c] for c in codes],
        "action": action,
        "score": None if score is None else score.params(),
    }
    with stage(
        out, name="filter", params=params, inputs=[records.dir], kind=KIND, fresh=fresh
    ) as work:
        if not work.done:
            _run(records, work, rules, codes, action, score)
    return Records.open(out)


@dataclass(frozen=True)
class _Found:
    """What each text fails in each use: bits U32 [texts]."""

    query: Array
    passage: Array

    def sides(self, table: Examples) -> tuple[Array, Array, Array]:
        """Bits of the query, of each positive and of each negative of a task's examples."""
        if table.kind == "sts":
            return self.query[table.query], self.query[table.positive], self.query[table.negative]
        first = self.query if table.kind == "retrieval" else self.passage
        return first[table.query], self.passage[table.positive], self.passage[table.negative]


def _run(
    records: Records,
    work: Any,
    rules: FilterRules,
    codes: list[int],
    action: str,
    score: ScoreFilter | None,
) -> None:
    texts = records.texts
    with bar("Rules", total=len(texts), unit="texts") as progress:
        failed, language = _rust.filter_texts(
            texts.shards, rules.checks(), codes or None, progress=progress.update
        )
        progress.update(len(texts))
    found = _Found(
        failed & np.uint32(rules.mask("query")), failed & np.uint32(rules.mask("passage"))
    )
    tables = records.tasks()
    report = _rule_report(texts, tables, found, rules, codes, language)
    scores: dict[str, Scores] = {}
    if score is not None:
        kept = {
            name: tuple(side == 0 for side in found.sides(table)) for name, table in tables.items()
        }
        scores, report["score"] = score_pairs(score, texts, tables, kept, work.dir)
    report["examples"], after = {}, {}
    for name, table in tables.items():
        after[name], report["examples"][name] = _filtered(table, found, scores.get(name))
    container.save(
        work.dir / "filters.safetensors",
        {
            "text_id": texts.text_id,
            "failed_query": found.query,
            "failed_passage": found.passage,
            "language": language,
        },
        kind="embkit.filters",
        metadata={
            "rules": " ".join(rule.name for rule in rules.active()),
            "languages": " ".join(_rust.filter_names()[1]),
        },
    )
    report["texts"] |= {"before": len(texts), "after": len(texts)}
    if action == "drop":
        texts, tables = compact(texts, after)
        report["texts"]["after"] = len(texts)
    report["action"] = action
    write_records(work, texts, tables, records.manifest["sources"], report)


def _filtered(
    table: Examples, found: _Found, scores: Scores | None
) -> tuple[Examples, dict[str, int]]:
    """The examples that stay, and why others went."""
    query, positive, negative = (side != 0 for side in found.sides(table))
    unlike = np.zeros(len(positive), bool) if scores is None else scores.unlike
    left = any_jagged(table.positive_offsets, ~positive)
    left_alike = any_jagged(table.positive_offsets, ~positive & ~unlike)
    some = counts_of(table.positive_offsets) > 0
    by_positive = some & ~left & ~query
    by_score = some & left & ~left_alike & ~query
    keep = ~(query | by_positive | by_score)
    p_off, p = keep_jagged(table.positive_offsets, ~positive & ~unlike, table.positive)
    n_off, n, n_score = keep_jagged(
        table.negative_offsets, ~negative, table.negative, table.negative_score
    )
    owner = np.repeat(keep, counts_of(table.positive_offsets))
    owner_n = np.repeat(keep, counts_of(table.negative_offsets))
    thin = replace(table, positive_offsets=p_off, positive=p, negative_offsets=n_off, negative=n,
                   negative_score=n_score)  # fmt: skip
    return thin.keep(keep), {
        "before": len(table),
        "query": int(query.sum()),
        "positives": int(by_positive.sum()),
        "score": int(by_score.sum()),
        "dropped_positives": int((owner & (positive | unlike)).sum()),
        "dropped_negatives": int((owner_n & negative).sum()),
        "after": int(keep.sum()),
    }


# ---------------------------------------------------------------- the report


def _rule_report(
    texts: Texts,
    tables: dict[str, Examples],
    found: _Found,
    rules: FilterRules,
    codes: list[int],
    language: Array,
) -> dict[str, Any]:
    """Per rule: formula, bound, texts that fail, examples that go with it, samples."""
    n = len(texts)
    as_query, as_passage = np.zeros(n, bool), np.zeros(n, bool)
    for table in tables.values():
        others = np.concatenate([table.positive, table.negative])
        (as_query if table.kind != "classification" else as_passage)[table.query] = True
        (as_query if table.kind == "sts" else as_passage)[others] = True
    failed = np.where(as_query, found.query, 0) | np.where(as_passage, found.passage, 0)
    entries = []
    names = _rust.filter_names()
    active: list[tuple[int, Rule | None]] = list(enumerate(rules.active()))
    if codes:
        active.append((_LANGUAGE_BIT, None))
    for i, rule in active:
        bit = np.uint32(1 << i)
        rows = np.flatnonzero(failed & bit)
        chosen = rows[np.linspace(0, len(rows) - 1, min(len(rows), _SAMPLES)).astype(int)]
        if rule is None:
            values: list[Any] = [names[1][c] for c in language[chosen].tolist()]
        else:
            table_of = _rust.text_statistics(texts.shards, chosen.astype(np.uint64))
            column = table_of.reshape(-1, len(names[0]))[:, names[0].index(rule.statistic)]
            values = [round(v, 4) for v in column.tolist()]
        about: dict[str, Any] = {
            "rule": LANGUAGE,
            "formula": "the language, where it is clear, is one of those wanted",
            "threshold": [names[1][c] for c in codes],
            "scope": "both",
            "from_words": 0,
        }
        if rule is not None:
            about = {
                "rule": rule.name,
                "formula": rule.formula,
                "threshold": getattr(rules, rule.name),
                "scope": rules.scope(rule),
                "from_words": rules.words(rule),
            }
        about["texts"] = len(rows)
        about["examples"] = {name: _touched(t, found, bit) for name, t in tables.items()}
        about["samples"] = [
            {"text": short(texts.get(int(row))), "value": value}
            for row, value in zip(chosen, values, strict=True)
        ]
        entries.append(about)
    report: dict[str, Any] = {"texts": {"failed": int((failed != 0).sum())}, "rules": entries}
    if codes:
        counts = np.bincount(language, minlength=len(names[1]))
        report["languages"] = {names[1][c]: int(counts[c]) for c in np.flatnonzero(counts).tolist()}
    return report


def _touched(table: Examples, found: _Found, bit: Any) -> int:
    """Examples that go, a rule being among the reasons."""
    query, positive, _ = found.sides(table)
    none_left = (counts_of(table.positive_offsets) > 0) & ~any_jagged(
        table.positive_offsets, positive == 0
    )
    broken = none_left & any_jagged(table.positive_offsets, (positive & bit) != 0)
    return int((((query & bit) != 0) | broken).sum())
