"""Retrieval as `mteb` evaluates it with sentence-transformers; for the bench group `evaluate`.

    python evaluation.py mteb FOLDER

FOLDER has job.json: `model` (a directory that sentence-transformers loads), `corpus` and `queries`
(texts), `judged` (per query, grades by row of the corpus). When the model is there it says so with
one line of JSON. For each line that it is sent, widths with commas between them, it evaluates the
task once per width, as mteb does for a model that is truncated, and answers with one line: CPU and
wall seconds, the growth of memory, and nDCG@10 in percent by width.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mteb
import torch
from datasets import Dataset
from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from sentence_transformers import SentenceTransformer

from embkit.bench import measure


def task_of(about: dict[str, Any]) -> Any:
    """The texts as a retrieval task of mteb."""
    corpus = {"id": [f"d{i}" for i in range(len(about["corpus"]))], "text": about["corpus"]}
    queries = {"id": [f"q{i}" for i in range(len(about["queries"]))], "text": about["queries"]}
    judged = {
        f"q{i}": {f"d{row}": int(grade) for row, grade in answers}
        for i, answers in enumerate(about["judged"])
    }
    triple = {
        "corpus": Dataset.from_dict(corpus),
        "queries": Dataset.from_dict(queries),
        "relevant_docs": judged,
        "top_ranked": None,
    }
    metadata = TaskMetadata(
        name="Local",
        description="a folder of texts",
        type="Retrieval",
        category="t2t",
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_10",
        dataset={"path": "local", "revision": "local"},
    )

    def load_data(self: Any, *_: Any, **__: Any) -> None:
        self.dataset, self.data_loaded = {"default": {"test": triple}}, True

    return type("Local", (AbsTaskRetrieval,), {"metadata": metadata, "load_data": load_data})()


def evaluated(model: SentenceTransformer, about: dict[str, Any], width: int) -> float:
    """nDCG@10 in percent, from texts to score."""
    model.truncate_dim = width
    found = mteb.evaluate(model, task_of(about), cache=None, show_progress_bar=False)
    return 100 * float(found[0].get_score())


def main() -> None:
    """Answer until the input ends."""
    torch.set_num_threads(1)
    about = json.loads((Path(sys.argv[2]) / "job.json").read_text("utf-8"))
    model = SentenceTransformer(about["model"], device="cpu")
    answers, sys.stdout = sys.stdout, sys.stderr  # mteb may print
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        scores: dict[int, float] = {}

        def work(widths: str = line) -> None:
            for width in widths.split(","):
                scores[int(width)] = evaluated(model, about, int(width))  # noqa: B023

        sample = measure(work)
        said = {"cpu": sample.cpu, "wall": sample.wall, "peak": sample.peak, "scores": scores}
        print(json.dumps(said), file=answers, flush=True)


if __name__ == "__main__":
    main()
