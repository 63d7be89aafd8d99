"""Stores that the `store` benches read: the corpus as retrieval pairs, and made ones of any size.

The corpus store is built once beside the corpus: each text is a passage of up to 512 tokens, its
first eight words are the query, and the passages of two other texts are its hard negatives. Made
stores have random ids; their shards, checksums and manifests are those of real ones.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from embkit import _rust, container
from embkit.bench.corpus import digest, folder, text_shard, texts
from embkit.data import Store, vocabulary
from embkit.data.tables import Array, Examples
from embkit.stage import stage

LENGTH = 512
QUERY_LENGTH = 32
VOCABULARY = 16_000
_QUERY_WORDS = 8
_NEGATIVES = 2
_SHARD_TOKENS = 32 << 20  # 64 MiB of u16


class Rows(NamedTuple):
    """Token rows in memory, as the rivals get them.

    Attributes:
        flat: uint16 [tokens]. offsets: int64 [n + 1].
        rows: uint64 [n], the same rows in `store`.
        data: digest of the tokens.
    """

    flat: Array
    offsets: Array
    store: Store
    rows: Array
    data: str

    @property
    def lengths(self) -> Array:
        """Tokens of each row, int64 [n]."""
        return np.diff(self.offsets)


@cache
def corpus_store(quick: bool) -> Store:
    """The corpus as a store with one retrieval task, in the cache folder."""
    items = texts(quick)
    params = {"data": digest(text_shard(items)[0]), "length": LENGTH, "benches": 1}
    out = (Path(tempfile.gettempdir()) if quick else folder()) / f"store-{params['data']}"
    with stage(out, name="bench-store", params=params, kind="embkit.store") as work:
        if not work.done:
            _build(work, items)
    return Store(out)


@cache
def passages(quick: bool, most: int) -> Rows:
    """Up to ``most`` passages of the corpus store."""
    store = corpus_store(quick)
    n = min(store.rows // 2, most)
    rows = np.arange(store.rows // 2, store.rows // 2 + n, dtype=np.uint64)
    offsets = np.zeros(n + 1, np.int64)
    np.cumsum(store.lengths(rows), out=offsets[1:])
    wide = np.empty(int(offsets[-1]), np.int64)
    store.gather(rows, wide, np.empty(n + 1, np.int32))
    flat = wide.astype(np.uint16)
    return Rows(flat, offsets, store, rows, digest(flat))


@contextmanager
def made_store(
    rows: int,
    *,
    length: int = 100,
    examples: bool = False,
    clusters: int | None = None,
    negatives: int = 0,
) -> Iterator[Path]:
    """A store of random tokens in a temporary folder of the corpus's disk; removed at the end.

    Args:
        rows: its rows, of ``length // 2`` to ``length * 3 // 2`` tokens.
        examples: a retrieval task, row i to row i + rows / 2.
        clusters: near-duplicate clusters; None makes each row its own.
        negatives: hard negatives of an example.
    """
    home = Path(tempfile.mkdtemp(prefix="embkit-bench-", dir=roomy()))
    try:
        _make(home, rows, length, examples, clusters, negatives)
        yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)


def roomy() -> str | None:
    """A folder for large files: the corpus's, when there is one."""
    return str(folder()) if folder().is_dir() else None


def _make(
    home: Path, rows: int, length: int, examples: bool, clusters: int | None, negatives: int
) -> None:
    rng = np.random.default_rng(0)
    low, high = length // 2, length * 3 // 2
    pool = rng.integers(5, VOCABULARY, _SHARD_TOKENS, np.uint16)
    per_shard = min(rows, _SHARD_TOKENS // high)
    starts = range(0, rows, per_shard)
    files: dict[str, Any] = {}
    total = 0
    for index, first in enumerate(starts):
        n = min(per_shard, rows - first)
        offsets = np.zeros(n + 1, np.uint64)
        np.cumsum(rng.integers(low, high + 1, n), out=offsets[1:])
        ids = np.arange(first, first + n, dtype=np.uint64)
        name = f"texts-{index:05d}-of-{len(starts):05d}.safetensors"
        columns = {
            "tokens": pool[: int(offsets[-1])],
            "offsets": offsets,
            "text_id": ids,
            "cluster": ids if clusters is None else ids * np.uint64(0x9E3779B97F4A7C15) % clusters,
            "role": np.full(n, 2, np.uint8),
            "source": np.zeros(n, np.uint16),
            "prompt_len": np.ones(n, np.uint16),
        }
        meta = {"first_row": str(first), "rows": str(n), "params": "bench", "truncated": "0"}
        files[name] = container.save(home / name, columns, kind="embkit.texts", metadata=meta)
        total += int(offsets[-1])
    tokenizer = vocabulary.train_wordpiece(["no text"], vocab_size=300)
    vocabulary.write(home / "tokenizer", tokenizer, {})
    tasks = []
    if examples:
        half = np.arange(rows // 2, dtype=np.uint64)
        drawn = rng.integers(0, rows, (len(half), negatives), np.uint64)
        table = _pairs("pairs", half, half + np.uint64(rows // 2), drawn)
        table.save(home, index=0)
        tasks.append({"name": "pairs", "kind": "retrieval", "labels": [], "examples": len(table)})
    for path in sorted(p for p in home.rglob("*") if p.is_file() and p.name not in files):
        name = path.relative_to(home).as_posix()
        if path.suffix == ".safetensors":
            files[name] = dict(_rust.file_info(str(path)))
        else:
            blake3 = _rust.blake3_file(str(path))
            files[name] = {"length": path.stat().st_size, "blake3": blake3}
    fields = _fields(home, tasks, rows, total)
    container.write_manifest(
        home, {"format": "embkit.store", "version": 1, "files": files, **fields}
    )


def _build(work: Any, items: tuple[str, ...]) -> None:
    n = len(items)
    queries = [" ".join(text.split()[:_QUERY_WORDS]) for text in items]
    tokenizer = vocabulary.train_wordpiece(items[:20_000], vocab_size=VOCABULARY)
    shard = text_shard((*queries, *items))
    row = np.arange(2 * n, dtype=np.uint64)
    zeros = np.zeros(2 * n, np.uint16)
    role = np.repeat(np.array([0, 1], np.uint8), n)
    limits = [QUERY_LENGTH, LENGTH, LENGTH]
    done = _rust.tokenize(
        str(work.dir), [shard], row, zeros, [""], role, zeros, row, row, tokenizer, limits
    )
    vocabulary.write(work.dir / "tokenizer", tokenizer, {})
    drawn = np.random.default_rng(1).integers(n, 2 * n, (n, _NEGATIVES)).astype(np.uint64)
    _pairs("pairs", row[:n], row[n:], drawn).save(work.dir, index=0)
    task = {"name": "pairs", "kind": "retrieval", "labels": [], "examples": n}
    work.publish(_fields(work.dir, [task], 2 * n, done["tokens"]))


def _pairs(name: str, query: Array, positive: Array, negative: Array) -> Examples:
    m = len(query)
    return Examples(
        name=name,
        kind="retrieval",
        query=query,
        positive_offsets=np.arange(m + 1, dtype=np.uint64),
        positive=positive,
        negative_offsets=np.arange(m + 1, dtype=np.uint64) * np.uint64(negative.shape[1]),
        negative=negative.reshape(-1),
        negative_score=np.full(negative.size, np.nan, np.float32),
        score=np.full(m, np.nan, np.float32),
        label=np.full(m, -1, np.int32),
        weight=np.ones(m, np.float32),
        provenance=np.zeros(m, np.uint32),
    )


def _fields(home: Path, tasks: list[Any], rows: int, tokens: int) -> dict[str, Any]:
    """What a store's manifest has beside its files."""
    fingerprint = _rust.blake3_file(str(home / "tokenizer" / "tokenizer.json"))
    return {
        "tasks": tasks,
        "sources": [],
        "tokenizer": {
            "fingerprint": fingerprint,
            "vocab_size": VOCABULARY,
            "backend": "bench",
        },
        "prompts": {"query": "", "passage": ""},
        "max_length": {"query": QUERY_LENGTH, "passage": LENGTH},
        "counts": {"rows": rows, "tokens": tokens},
    }
