"""Records as Hugging Face ``datasets``, one per task, so that other trainers can read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from embkit.data.records import Records
from embkit.data.tables import Examples


def to_datasets(records: Records | Path | str, *, tasks: list[str] | None = None) -> Any:
    """Export a records directory.

    Columns by kind: ``query, positive (list), negative (list)``; ``sentence1, sentence2, score``;
    ``text, label``. Rows keep their order.

    Args:
        records: saved records or their directory.
        tasks: names to export (all).

    Returns:
        A ``datasets.DatasetDict``, one dataset per task.
    """
    from datasets import Dataset, DatasetDict

    records = records if isinstance(records, Records) else Records.open(records)
    texts = list(records.texts)
    return DatasetDict(
        {
            name: Dataset.from_dict(_columns(table, texts))
            for name, table in records.tasks().items()
            if tasks is None or name in tasks
        }
    )


def _columns(table: Examples, texts: list[str]) -> dict[str, Any]:
    query = [texts[r] for r in table.query.tolist()]
    if table.kind == "classification":
        labels = [table.labels[i] if i >= 0 else None for i in table.label.tolist()]
        return {"text": query, "label": labels}
    positive = _jagged(table.positive_offsets, table.positive, texts)
    if table.kind == "sts":
        return {
            "sentence1": query,
            "sentence2": [p[0] for p in positive],
            "score": table.score.tolist(),
        }
    columns: dict[str, Any] = {"query": query, "positive": positive}
    if len(table.negative):
        columns["negative"] = _jagged(table.negative_offsets, table.negative, texts)
    if not np.isnan(table.score).all():
        columns["score"] = table.score.tolist()
    return columns


def _jagged(offsets: Any, rows: Any, texts: list[str]) -> list[list[str]]:
    ends, flat = offsets.tolist(), [texts[r] for r in rows.tolist()]
    return [flat[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]
