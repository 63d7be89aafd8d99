"""A source so small that records, deduplication and a store of many shards take milliseconds."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_TEXT = (
    "package library tool server daemon kernel driver font text editor search index vector model "
    "query document table shard token batch file disk memory thread process signal socket parser "
    "format archive image sound video network mail web page cache driver naïve café 中文 überall"
)
WORDS = _TEXT.split()


def make_source(folder: Path, *, rows: int = 150, seed: int = 0) -> Path:
    """Retrieval, pairs and classes as JSON lines, with near-duplicates and repeats among them."""
    rng = random.Random(seed)

    def text(n: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(n))

    passages = [text(rng.randint(8, 30)) for _ in range(rows)]
    passages += [p + " extra" for p in passages[: rows // 10]]
    files: dict[str, list[dict[str, Any]]] = {
        "pairs": [
            {"query": text(4), "positive": p, "negative": [rng.choice(passages)]} for p in passages
        ],
        "alike": [
            {"sentence1": text(6), "sentence2": text(6), "score": rng.random()}
            for _ in range(rows // 3)
        ],
        "classes": [
            {"text": text(9), "label": rng.choice(["good", "bad"])} for _ in range(rows // 3)
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, found in files.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in found]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def make_tokenizer(folder: Path) -> Path:
    """A WordPiece for :data:`WORDS`."""
    from embkit.data import vocabulary

    vocabulary.write(folder, vocabulary.train_wordpiece([_TEXT] * 3, vocab_size=180), {})
    return folder


@contextmanager
def small_shards(shard_bytes: int) -> Iterator[None]:
    """Let tokenization cut its shards at this many token bytes: tens of them from a few rows."""
    from embkit import _rust

    real = _rust.tokenize

    def cut(*args: Any, **kwargs: Any) -> Any:
        return real(*args, **{**kwargs, "shard_bytes": shard_bytes})

    _rust.tokenize = cut
    try:
        yield
    finally:
        _rust.tokenize = real


def build(source: Path, tokenizer: Path | None, out: Path, *, shard_bytes: int = 600) -> Path:
    """``records``, ``clean`` and ``store`` under ``out``; returns the store."""
    from embkit import data

    records = data.read(source).save(out / "records")
    clean = data.dedup(records, out=out / "clean")
    with small_shards(shard_bytes):
        data.tokenize(
            clean, out=out / "store", tokenizer=tokenizer, vocab_size=300,
            max_length_query=12, max_length_passage=24, prompts={"query": "query: "},
        )  # fmt: skip
    return out / "store"


def tree(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, by its relative name."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def strays(folder: Path) -> list[str]:
    """Temporary and partial files that a finished run must not leave."""
    found = [p.relative_to(folder).as_posix() for p in folder.rglob("*")]
    return [n for n in found if ".partial-" in n or n.endswith(".tmp") or ".previous" in n]
