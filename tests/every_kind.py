"""A split folder with a small set of every kind, made of words of five topics."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TOPICS = {
    "text": "editor font spell line word page print letter",
    "image": "pixel photo camera colour draw paint scan view",
    "sound": "music audio player volume song record tone voice",
    "network": "server packet router socket remote client port link",
    "game": "puzzle chess arcade level score board card dice",
}


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make(folder: Path, seed: int = 0) -> Path:
    """Write the sets; the same for the same seed."""
    rng = random.Random(seed)
    names = list(TOPICS)

    def text(topic: str, size: int = 6) -> str:
        words = TOPICS[topic].split()
        other = [w for t in names for w in TOPICS[t].split()]
        return " ".join(rng.choice(words if rng.random() < 0.6 else other) for _ in range(size))

    for kind in ("retrieval", "instruction_retrieval"):
        corpus = [(i, names[i % 5], text(names[i % 5], 9)) for i in range(60)]
        write(
            folder / kind / "small" / "corpus.jsonl",
            ({"_id": f"d{i}", "title": t, "text": x} for i, t, x in corpus),
        )
        queries = [(i, names[i % 5]) for i in range(25)]
        write(
            folder / kind / "small" / "queries.jsonl",
            (
                {"_id": f"q{i}", "text": f"{i} {text(t, 3)}"}
                | ({"instruction": f"find what is about {t}"} if kind != "retrieval" else {})
                for i, t in queries
            ),
        )
        write(
            folder / kind / "small" / "qrels.jsonl",
            (
                {"query_id": f"q{i}", "corpus_id": f"d{j}", "score": 1 + (j % 3 == 0)}
                for i, t in queries
                for j, topic, _ in corpus
                if topic == t and (i + j) % 4 == 0
            ),
        )
    write(
        folder / "reranking" / "small.jsonl",
        (
            {
                "query": f"{i} {text(names[i % 5], 3)}",
                "positive": [text(names[i % 5]) for _ in range(1 + i % 2)],
                "negative": [text(names[(i + j) % 5]) for j in (1, 2, 3)],
            }
            for i in range(24)
        ),
    )
    pairs = [(names[i % 5], names[(i + (i % 3 == 0) + (i % 4 == 0)) % 5]) for i in range(60)]
    write(
        folder / "sts" / "small.jsonl",
        (
            {"sentence1": text(a), "sentence2": text(b), "score": 4 * (a == b) + rng.choice([0, 1])}
            for a, b in pairs
        ),
    )
    write(
        folder / "pairclass" / "small.jsonl",
        ({"sentence1": text(a), "sentence2": text(b), "label": int(a == b)} for a, b in pairs),
    )
    for part, size in (("train", 60), ("test", 40)):
        write(
            folder / "classification" / "small" / f"{part}.jsonl",
            ({"text": text(names[i % 5]), "label": names[i % 5]} for i in range(size)),
        )
        write(
            folder / "multilabel" / "small" / f"{part}.jsonl",
            (
                {
                    "text": text(names[i % 5], 3) + " " + text(names[(i + i // 5) % 5], 3),
                    "labels": sorted({names[i % 5], names[(i + i // 5) % 5]}),
                }
                for i in range(size)
            ),
        )
    write(
        folder / "clustering" / "small.jsonl",
        ({"text": f"{i} {text(names[i % 5])}", "label": names[i % 5]} for i in range(50)),
    )
    write(
        folder / "bitext" / "small.jsonl",
        (
            {"sentence1": (one := text(names[i % 5], 3)), "sentence2": one + " " + text("game", 3)}
            for i in range(40)
        ),
    )
    write(
        folder / "summarization" / "small.jsonl",
        (
            {
                "text": f"{i} " + text(names[i % 5], 20),
                "human_summaries": [text(names[i % 5]), text(names[i % 5])],
                "machine_summaries": [text(names[(i + j) % 5]) for j in range(5)],
                "relevance": [5 - j + rng.choice([0, 0.5]) for j in range(5)],
            }
            for i in range(12)
        ),
    )
    return folder
