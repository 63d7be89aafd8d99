"""sentence-transformers on the same pairs, from the same start model, in a process of its own."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from embkit.bench.rivals import SCRIPTS, interpreter
from embkit.errors import EmbkitError


def cpu() -> float:
    """CPU seconds of this process and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def export(clean: Path, out: Path, plan: Any) -> Path:
    """The fine-tuning examples of cleaned records as JSON lines, a file per task.

    Rows are ``query, positive``; ``sentence1, sentence2, score`` (0 to 1); or ``text, label``.
    """
    from embkit.data.records import Records

    if out.is_dir():
        return out
    records = Records.open(clean)
    made = out.with_name(out.name + ".tmp")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    texts = records.texts
    for name, table in records.tasks().items():
        if name not in (*plan.fine, *plan.sts, *plan.labels):
            continue
        with (made / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            top = float(table.score.max()) if table.kind == "sts" else 1.0
            for i in range(len(table)):
                query = texts.get(int(table.query[i]))
                positives = table.positive[
                    int(table.positive_offsets[i]) : int(table.positive_offsets[i + 1])
                ]
                rows: list[dict[str, Any]]
                if table.kind == "sts":
                    other = texts.get(int(positives[0]))
                    rows = [
                        {
                            "sentence1": query,
                            "sentence2": other,
                            "score": float(table.score[i]) / top,
                        }
                    ]
                elif table.kind == "classification":
                    rows = [{"text": query, "label": int(table.label[i])}]
                else:
                    rows = [{"query": query, "positive": texts.get(int(p))} for p in positives]
                file.writelines(json.dumps(row) + "\n" for row in rows)
    made.replace(out)
    return out


def run(
    model: Path, rows: Path, out: Path, settings: Mapping[str, Any], *, dims: Sequence[int]
) -> dict[str, Any]:
    """Train; what the process says: CPU seconds, and of them until the first step's end.

    Raises:
        NotInstalled: no `make rivals`. EmbkitError: it ended without a word.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    about = {
        **settings,
        "start": str(model),
        "rows": str(rows),
        "dims": list(dims),
    }
    (out / "job.json").write_text(json.dumps(about))
    quiet = {
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "EMBKIT_PROGRESS": "off",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    }  # fmt: skip
    words = [str(interpreter()), str(SCRIPTS / "recipes_peer.py"), str(out)]
    done = subprocess.run(
        words, capture_output=True, text=True, env={**os.environ, **quiet}, check=False
    )
    if done.returncode or not (out / "said.json").is_file():
        raise EmbkitError(f"sentence-transformers ended: {done.stderr.strip()[-600:]}")
    shutil.rmtree(out / "hf", ignore_errors=True)
    return dict(json.loads((out / "said.json").read_text()))
