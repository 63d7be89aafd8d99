"""Small hand-made records whose every duplicate and leak is known."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest


def lines(rows: Iterable[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


RETRIEVAL = [
    {"query": "capital of france", "positive": "Paris is the capital and largest city of France."},
    {"query": "capital of france", "positive": "The capital of France has been Paris since 987."},
    {"query": "Île de beauté", "positive": "Corsica is an island in the Mediterranean Sea."},
    {
        "query": "largest ocean",
        "positive": ["The Pacific Ocean is the largest ocean on Earth."],
        "negative": ["The Arctic Ocean is the smallest of the five oceans."],
    },
]
STS = [
    {"sentence1": "a cat sits", "sentence2": "a cat is sitting", "score": 4.5},
    {"sentence1": "a dog runs", "sentence2": "stocks fell sharply", "score": 0.0},
    {"sentence1": "two men talk", "sentence2": "men are talking", "score": 4.0},
]
CLASSES = [
    {"text": "the battery died after a week", "label": "bad"},
    {"text": "works like a charm every day", "label": "good"},
    {"text": "arrived broken and late", "label": "bad"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """train/ with one file of each kind."""
    train = tmp_path / "raw" / "train"
    train.mkdir(parents=True)
    (train / "facts.jsonl").write_bytes(lines(RETRIEVAL))
    (train / "pairs.jsonl").write_bytes(lines(STS))
    (train / "reviews.jsonl").write_bytes(lines(CLASSES))
    return tmp_path / "raw"


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Iterable[dict[str, Any]]], Path]:
    """Write rows as JSON lines under tmp_path and return the file."""

    def make(name: str, rows: Iterable[dict[str, Any]]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(lines(rows))
        return path

    return make


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For the words of composed.py and the records here."""
    from embkit.data import vocabulary

    from .composed import WORDS

    out = tmp_path_factory.mktemp("tokenizer")
    corpus = [*WORDS, "query: passage: text:"] + [
        json.dumps(r) for r in [*RETRIEVAL, *STS, *CLASSES]
    ]
    vocabulary.write(out, vocabulary.train_wordpiece(corpus, vocab_size=300), {})
    return out


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Shards of 64 bytes of tokens, when tokenising and when composing."""
    from embkit import _rust

    for name in ("tokenize", "compose_store"):
        whole = getattr(_rust, name)
        monkeypatch.setattr(
            _rust, name, lambda *a, _whole=whole, **k: _whole(*a, **{**k, "shard_bytes": 64})
        )
    yield
