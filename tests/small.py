"""A small real data folder, and the settings of a run that fits it in seconds."""

from __future__ import annotations

import io
import json
import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
DEMO = REPO / "python" / "embkit" / "demo" / "data"

# A model and run so small that all stages take seconds. Sizes are odd on purpose.
TINY = (
    "tokenizer.vocab_size=1500",
    "tokenizer.max_length_query=16",
    "tokenizer.max_length_passage=48",
    "model.hidden=48",
    "model.layers=1",
    "model.heads=3",
    "model.intermediate=64",
    "model.dims=[40, 24, 8]",
    "prefinetune.steps=12",
    "prefinetune.batch_size=32",
    "prefinetune.checkpoint_every=5",
    "finetune.steps=9",
    "finetune.batch_size=24",
    "finetune.checkpoint_every=4",
    "finetune.hard_negatives=1",
    "mine.candidates=24",
)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a .jsonl.zst file."""
    import zstandard

    with path.open("rb") as handle:
        text = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(handle), "utf-8")
        return [json.loads(line) for line in text]


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write rows as plain JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_small_data(folder: Path, *, rows: int = 300, seed: int = 0) -> Path:
    """A data folder with some of the demo's real rows, plain .jsonl, same shape."""
    rng = random.Random(seed)
    for name in ("retrieval", "sts", "classification"):
        found = read_jsonl(DEMO / "train" / f"{name}.jsonl.zst")
        write_jsonl(folder / "train" / f"{name}.jsonl", rng.sample(found, rows))
    for split in ("dev", "test"):
        source = DEMO / split
        for sts in sorted((source / "sts").glob("*.zst")):
            target = folder / split / "sts" / sts.name.removesuffix(".zst")
            write_jsonl(target, read_jsonl(sts)[: rows // 3])
        for task in sorted((source / "classification").iterdir()):
            labels = sorted({row["label"] for row in read_jsonl(task / "train.jsonl.zst")})[:4]
            for part in ("train", "test"):
                found = read_jsonl(task / f"{part}.jsonl.zst")
                kept = [row for row in found if row["label"] in labels][: rows // 3]
                write_jsonl(folder / split / "classification" / task.name / f"{part}.jsonl", kept)
        for task in sorted((source / "retrieval").iterdir()):
            queries = read_jsonl(task / "queries.jsonl.zst")[: rows // 3]
            wanted = {row["_id"] for row in queries}
            qrels = [r for r in read_jsonl(task / "qrels.jsonl.zst") if r["query_id"] in wanted]
            needed = {row["corpus_id"] for row in qrels}
            corpus = read_jsonl(task / "corpus.jsonl.zst")
            corpus = [r for i, r in enumerate(corpus) if r["_id"] in needed or i < rows // 3]
            at = folder / split / "retrieval" / task.name
            write_jsonl(at / "queries.jsonl", queries)
            write_jsonl(at / "qrels.jsonl", qrels)
            write_jsonl(at / "corpus.jsonl", corpus)
    return folder


def full_count(full: int, reduced: int) -> int:
    """How often to repeat: the full count under ``make test-all``, fewer otherwise."""
    return full if os.environ.get("EMBKIT_TEST_FULL") else reduced
