"""What the benches run on: real text and real vectors, built once by benches/data/make.py.

`EMBKIT_REAL_DATA` names a folder of the user's own (``texts.jsonl`` with a ``text`` column,
``vectors.npy`` float32 [n, d]); without it the cache folder of benches/data/make.py is used. With
``--quick`` the bundled demo text stands in, and seeded vectors with clusters.
"""

from __future__ import annotations

import io
import json
import os
from functools import cache
from pathlib import Path

import numpy as np

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
