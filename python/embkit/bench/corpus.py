"""What the benches run on: real text and real vectors, built once by benches/data/make.py.

`EMBKIT_REAL_DATA` names a folder of the user's own (``texts.jsonl`` with a ``text`` column,
``pairs.jsonl`` with ``query`` and ``positive``, ``vectors.npy`` float32 [n, d]); without it the
cache folder of benches/data/make.py is used. With ``--quick`` the bundled demo text stands in, and
seeded vectors with clusters.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice
from pathlib import Path

import numpy as np

PASSAGES = 64_000  # texts that are embedded whole; vectors.npy goes on with sentences
_HEAD = 200
_SENTENCE = re.compile(r"(?<=[.!?;:])\s+")
DEMO = Path(__file__).resolve().parents[1] / "demo" / "data"


class NotBuilt(ImportError):
    """The corpus is not there; the row says so and is not emitted."""


def folder() -> Path:
    """Where benches/data/make.py keeps the corpus, or the folder of EMBKIT_REAL_DATA."""
    if given := os.environ.get("EMBKIT_REAL_DATA"):
        return Path(given)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "embkit" / "bench"


@cache
def texts(quick: bool) -> tuple[str, ...]:
    """Distinct real texts: the bench corpus, or the demo's passages when quick."""
    if quick:
        return tuple(dict.fromkeys(row["positive"] for row in demo_rows("retrieval")))
    path = _need("texts.jsonl")
    with path.open(encoding="utf-8") as handle:
        return tuple(json.loads(line)["text"] for line in handle)


def pairs_of_text(quick: bool) -> list[dict[str, str]]:
    """Real pairs of ``query`` and ``positive``, distinct on both sides; the demo's when quick."""
    if quick:
        found = {row["positive"]: row["query"] for row in demo_rows("retrieval")}
        found = dict(zip(found.values(), found, strict=True))
        return [{"query": q, "positive": p} for q, p in found.items()]
    with _need("pairs.jsonl").open(encoding="utf-8") as handle:
        return [json.loads(line) for line in handle]


def demo_rows(task: str) -> list[dict[str, str]]:
    """Rows of a training file of the bundled demo data."""
    import pyarrow

    raw = (DEMO / "train" / f"{task}.jsonl.zst").read_bytes()
    stream = pyarrow.CompressedInputStream(io.BytesIO(raw), "zstd")
    return [json.loads(line) for line in stream.read().decode().splitlines()]


@cache
def vectors(n: int, d: int, quick: bool) -> np.ndarray:
    """Unit float32 [n, d]; real embeddings unless quick (then seeded, in clusters).

    Raises:
        NotBuilt: no vectors, or fewer than n, or of another width.
    """
    if quick:
        rng = np.random.default_rng(0)
        centres = rng.standard_normal((max(n // 50, 1), d), dtype=np.float32)
        x = centres[rng.integers(len(centres), size=n)]
        x = x + 0.7 * rng.standard_normal((n, d), dtype=np.float32)
    else:
        x = np.load(_need("vectors.npy"), mmap_mode="r")
        if x.shape[0] < n or x.shape[1] != d:
            raise NotBuilt(f"vectors.npy is {x.shape}, needed [{n}, {d}]")
        x = np.array(x[:n], np.float32)
    return np.ascontiguousarray(x / np.linalg.norm(x, axis=1, keepdims=True))


def embedded(rows: Iterable[str], count: int) -> list[str]:
    """The texts of vectors.npy, in its order: whole texts, then distinct sentences of all."""
    rows = list(rows)
    sentences = (s for t in rows for s in sentences_of(t))
    return list(islice(dict.fromkeys(chain(rows[:PASSAGES], sentences)), count))


def sentences_of(text: str) -> Iterator[str]:
    """Sentences of 25 to 400 characters."""
    return (s for s in _SENTENCE.split(text) if 25 <= len(s) <= 400)


@dataclass(frozen=True)
class Pairs:
    """Queries with one positive passage each, and their unit vectors, float32 [*, d]."""

    queries: list[str]
    passages: list[str]
    positive: np.ndarray  # int64 [queries], positions in passages
    query_vectors: np.ndarray
    passage_vectors: np.ndarray


@cache
def pairs(n: int, d: int, quick: bool) -> Pairs:
    """n passages and about as many queries: a query is a sentence, its positive the text it is in.

    Sentences start in a text's first 200 characters, as its vector is one of its first 64 tokens.
    When quick, demo pairs, and a query's vector lies near its passage's.

    Raises:
        NotBuilt: as :func:`vectors`.
    """
    if quick:
        found = {row["positive"]: row["query"] for row in demo_rows("retrieval")}
        found = dict(zip(found.values(), found, strict=True))  # distinct on both sides
        asked, passages = list(found)[:n], list(found.values())[:n]
        p = vectors(len(passages), d, True)
        q = p + 0.03 * np.random.default_rng(1).standard_normal(p.shape).astype(np.float32)
        q /= np.linalg.norm(q, axis=1, keepdims=True)
        return Pairs(asked, passages, np.arange(len(p)), q, p)
    x = np.load(_need("vectors.npy"), mmap_mode="r")
    items = texts(False)
    names = embedded(items, len(x))
    place = {name: i for i, name in enumerate(names)}
    wanted: dict[int, int] = {}  # row of a sentence: the first passage that has it
    for i, text in enumerate(items[:n]):
        for sentence in sentences_of(text):
            if text.find(sentence) >= _HEAD:
                break
            at = place.get(sentence, -1)
            if at >= PASSAGES:
                wanted.setdefault(at, i)
    rows = np.array(sorted(wanted), np.int64)
    if len(rows) < n // 4 or len(x) < n:
        raise NotBuilt(f"vectors.npy has {len(x)} rows: too few sentences of the first {n} texts")
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(n, len(rows))).astype(np.int64))]
    unit = [np.array(part, np.float32) for part in (x[rows], x[:n])]
    unit = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in unit]
    positive = np.array([wanted[r] for r in rows.tolist()])
    return Pairs([names[r] for r in rows.tolist()], list(items[:n]), positive, *unit)


def digest(data: np.ndarray) -> str:
    """Which data a row was measured on: the first 16 hex digits of the BLAKE3 of its bytes."""
    from embkit import _rust

    return _rust.blake3(np.ascontiguousarray(data).reshape(-1).view(np.uint8).tobytes())[:16]


def text_shard(items: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Texts as the Rust core takes them: bytes u8 and offsets u64 [n + 1]."""
    encoded = [t.encode() for t in items]
    offsets = np.zeros(len(encoded) + 1, np.uint64)
    np.cumsum([len(t) for t in encoded], out=offsets[1:])
    return np.frombuffer(b"".join(encoded), np.uint8), offsets


def _need(name: str) -> Path:
    path = folder() / name
    if not path.is_file():
        raise NotBuilt(f"{path} is missing: run `python benches/data/make.py`, or use --quick")
    return path
