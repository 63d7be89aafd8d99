"""Few-shot grades of existing data: positives that are too weak go, negatives that are too strong.

Each pair of query and passage is graded once. With two judges (two prompts) the mean of their
grades decides, and the report says how far they agree.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embkit import container
from embkit.data.dedup import compact
from embkit.data.leaks import short
from embkit.data.records import KIND, Records, as_directory, write_records
from embkit.data.tables import Examples, Texts, any_jagged, counts_of, keep_jagged, owners
from embkit.errors import UsageError
from embkit.recipe.schema import one_of
from embkit.stage import stage
from embkit.synth.asking import retrieval_tasks
from embkit.synth.llm import LLM
from embkit.synth.prompts import Prompt, load, plain
from embkit.synth.score import graded
from embkit.synth.shards import Row, finish, run_shards

_SAMPLES = 10  # of each side of each task


@dataclass(frozen=True, kw_only=True)
class Judge:
    """What grades decide.

    Attributes:
        tasks: retrieval tasks that are graded; all when empty.
        prompts: one or two prompts with labels, of the same scale.
        min_positive: positives with a lower grade go; an example without positives goes too.
        max_negative: negatives with a higher grade go.
        action: ``"drop"``, or ``"mark"``: only write the grades.
        shard: pairs of a shard.
    """

    tasks: tuple[str, ...] = ()
    prompts: tuple[str | Path | Prompt, ...] = ("relevance",)
    min_positive: float = 1.0
    max_negative: float = 2.0
    action: str = "drop"
    shard: int = 256

    def __post_init__(self) -> None:
        one_of("action", self.action, ("drop", "mark"))
        if not 1 <= len(self.prompts) <= 2 or self.shard < 1:
            raise UsageError("There are one or two judges, and shards of at least one pair.")


def judge(
    records: Any, *, llm: LLM, out: Path | str, how: Judge | None = None, fresh: bool = False
) -> Records:
    """Grade the pairs of every retrieval task and drop those that do not hold; a stage.

    Args:
        records: what :func:`embkit.data.read` takes.
        llm: a backend.
        out: records directory to publish, with ``judged-TASK.safetensors`` and ``report.json``.
        how: settings.
        fresh: do it again even when it is done.

    A pair that cannot be graded (too long, refused) stays, and is counted.

    Raises:
        UsageError: no retrieval task, a prompt without grades, or judges of different scales.
    """
    how = how or Judge()
    prompts = [load(prompt) for prompt in how.prompts]
    steps = [prompt.graded for prompt in prompts]
    if len({tuple(sorted(step.labels.values())) for step in steps}) > 1:
        raise UsageError("The judges grade on different scales.", fix="give labels equal values")
    records = as_directory(records, out)
    params: dict[str, Any] = {
        "llm": llm.params(), "prompts": [prompt.digest for prompt in prompts],
        "min_positive": how.min_positive, "max_negative": how.max_negative,
        "action": how.action, "shard": how.shard,
        **({"tasks": list(how.tasks)} if how.tasks else {}),
    }  # fmt: skip
    with stage(out, name="judge", params=params, inputs=[records.dir], kind=KIND,
               fresh=fresh) as work:  # fmt: skip
        if work.done:
            return Records.open(out)
        texts, tables = records.texts, records.tasks()
        retrieval = retrieval_tasks(tables, how.tasks, records.dir)
        pairs = np.unique(np.concatenate([_pairs(t) for t in retrieval.values()]), axis=0)

        def grade(start: int, stop: int) -> list[Row]:
            values = [
                {"query": plain(texts.get(int(q)), one_line=True), "passage": texts.get(int(p))}
                for q, p in pairs[start:stop]
            ]
            rows: list[Row] = [{"grades": [], "why": ""} for _ in values]
            for step in steps:
                asked = [step.render(value) for value in values]
                found, why = graded(llm, asked, list(step.labels.items()))
                for row, one, reason in zip(rows, found.tolist(), why, strict=True):
                    row["grades"].append(None if reason else one)
                    row["why"] = row["why"] or reason
            return rows

        rows = run_shards(
            work.dir, len(pairs), how.shard, grade, llm=llm, label="Judge", unit="pairs"
        )
        finish(work.dir)
        each = np.array([[np.nan if g is None else g for g in row["grades"]] for row in rows])
        report: dict[str, Any] = {"model": llm.name, "pairs": len(pairs), "tasks": {}}
        report["ungraded"] = int(np.isnan(each).any(1).sum())
        if len(steps) == 2:
            report["agreement"] = agreement(each, how.min_positive)
        mean = each.mean(1)
        after = dict(tables)
        for name, table in retrieval.items():
            part = np.searchsorted(_keys(pairs, len(texts)), _keys(_pairs(table), len(texts)))
            kept = _keep(table, texts, mean[part], how, report, work.dir)
            after[name] = kept if how.action == "drop" else table
        if how.action == "drop":
            texts, after = compact(texts, after)
        write_records(work, texts, after, records.manifest["sources"], report)
    return Records.open(out)


def agreement(grades: NDArray[np.float64], threshold: float) -> dict[str, float]:
    """How far two judges agree.

    Args:
        grades: F64 [pairs, 2]; pairs with NaN do not count.
        threshold: of the decision that both make.

    Returns:
        ``pairs``, ``same_decision`` (a share), ``kappa`` (Cohen's, of the decisions; 1 when chance
        alone decides the same), ``mean_difference`` of the grades.
    """
    grades = grades[~np.isnan(grades).any(1)]
    if not len(grades):
        return {"pairs": 0}
    yes = grades >= threshold
    same = float((yes[:, 0] == yes[:, 1]).mean())
    a, b = yes.mean(0)
    chance = float(a * b + (1 - a) * (1 - b))
    kappa = 1.0 if chance == 1 else (same - chance) / (1 - chance)
    apart = float(np.abs(grades[:, 0] - grades[:, 1]).mean())
    return {"pairs": len(grades), "same_decision": round(same, 6), "kappa": round(kappa, 6),
            "mean_difference": round(apart, 6)}  # fmt: skip


def _pairs(table: Examples) -> NDArray[np.int64]:
    """(query, passage) of all positives, then all negatives, int64 [n, 2]."""
    parts = [
        np.stack([table.query[owners(offsets)], passage], axis=1)
        for offsets, passage in (
            (table.positive_offsets, table.positive), (table.negative_offsets, table.negative)
        )
    ]  # fmt: skip
    return np.concatenate(parts).astype(np.int64)


def _keys(pairs: NDArray[np.int64], texts: int) -> NDArray[np.int64]:
    return pairs[:, 0] * texts + pairs[:, 1]


def _keep(
    table: Examples, texts: Texts, grades: NDArray[np.float64], how: Judge,
    report: dict[str, Any], directory: Path,
) -> Examples:  # fmt: skip
    border = len(table.positive)
    weak, strong = grades[:border] < how.min_positive, grades[border:] > how.max_negative
    p_off, p = keep_jagged(table.positive_offsets, ~weak, table.positive)
    n_off, n, n_score = keep_jagged(
        table.negative_offsets, ~strong, table.negative, table.negative_score
    )
    stays = any_jagged(table.positive_offsets, ~weak) | (counts_of(table.positive_offsets) == 0)
    own = (owners(table.positive_offsets), owners(table.negative_offsets))
    samples = {}
    for side, at, row, values in (
        ("positives", np.flatnonzero(weak), table.positive, grades[:border]),
        ("negatives", np.flatnonzero(strong), table.negative, grades[border:]),
    ):
        query = table.query[own[side == "negatives"]]
        samples[side] = [
            {"query": short(texts.get(int(query[i]))), "passage": short(texts.get(int(row[i]))),
             "grade": round(float(values[i]), 4)} for i in at[:_SAMPLES].tolist()
        ]  # fmt: skip
    report["tasks"][table.name] = {
        "before": len(table), "after": int(stays.sum()), "weak_positives": int(weak.sum()),
        "strong_negatives": int(strong.sum()), "samples": samples,
    }  # fmt: skip
    container.save(
        directory / f"judged-{table.name}.safetensors",
        {
            "positive_offsets": table.positive_offsets,
            "positive": grades[:border].astype(np.float32),
            "negative_offsets": table.negative_offsets,
            "negative": grades[border:].astype(np.float32),
        },
        kind="embkit.judged",
        metadata={"task": table.name},
    )
    thin = replace(table, positive_offsets=p_off, positive=p, negative_offsets=n_off, negative=n,
                   negative_score=n_score)  # fmt: skip
    return thin.keep(stays)
