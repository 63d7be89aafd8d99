"""Examples that training has seen: what the dedup stage has found, task by task."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embkit import container
from embkit.data.leaks import held_out as read
from embkit.errors import UsageError
from embkit.evaluate.examples import Examples


def leaked_texts(dedup: Path | str, held_out: Sequence[Path | str]) -> set[str]:
    """Evaluation texts that the dedup stage has found in training data.

    Each leaking training text names one evaluation text: that of its longest run, or a near one.

    Args:
        dedup: a directory of the dedup stage that compared with evaluation data.
        held_out: that data, the same paths in the same order.

    Raises:
        UsageError: the stage compared with nothing, or with other texts.
    """
    path = Path(dedup)
    table = path / "leaks.safetensors"
    if not table.is_file():
        raise UsageError(
            "This dedup stage has compared with no evaluation data.",
            where=path,
            fix="run `embkit dedup` with --against",
        )
    report = json.loads((path / "report.json").read_text(encoding="utf-8"))["leaks"]["sets"]
    held = read([Path(p) for p in held_out])
    sizes = np.bincount(held.set_of, minlength=len(held.names)).tolist()
    if dict(zip(held.names, sizes, strict=True)) != {
        name: of["evaluation_texts"] for name, of in report.items()
    }:
        raise UsageError(
            "The evaluation data is not what the dedup stage compared with.",
            where=path,
            fix=f"give the folders of {', '.join(sorted(report)[:4])}, as in --against",
        )
    rows = np.unique(container.load(table, kind="embkit.leaks")["evaluation"]).tolist()
    return {held.get(row) for row in rows}


def clean(parts: Sequence[Examples], leaked: Collection[str]) -> list[NDArray]:
    """Bool [n] per part: which examples have no text among those that training has seen.

    Texts are compared with white space collapsed.
    """
    seen = {squeezed(text) for text in leaked}
    return [
        np.array([not any(squeezed(t) in seen for t in texts) for texts in part.texts()], bool)
        for part in parts
    ]


def squeezed(text: str) -> str:
    """A text with each run of white space as one blank."""
    return " ".join(text.split())
