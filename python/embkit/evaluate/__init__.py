"""Score an encoder on a folder of evaluation sets, every MRL width from one encode of each text."""

from __future__ import annotations

from embkit.evaluate.benchmark import evaluate_tasks
from embkit.evaluate.compare import Difference, ndcg_per_query, paired_bootstrap
from embkit.evaluate.leaked import leaked_texts
from embkit.evaluate.run import MAIN, evaluate, judge
from embkit.evaluate.tasks import load_split

__all__ = [
    "MAIN",
    "Difference",
    "evaluate",
    "evaluate_tasks",
    "judge",
    "leaked_texts",
    "load_split",
    "ndcg_per_query",
    "paired_bootstrap",
]
