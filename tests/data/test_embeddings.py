"""Blocks of embeddings: half as large in float16, redone when damaged. Ranks: test_two_ranks.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embkit import container
from embkit.data import embeddings
from embkit.data.embeddings import Embeddings
from embkit.errors import UsageError
from embkit.progress import Bar

ROWS = np.arange(3, 53, dtype=np.uint64)


class Encoder:
    """A vector that depends on the row alone."""

    pooling, dims = "mean", (8, 4)
    prompts = {"query": "q: ", "passage": ""}  # noqa: RUF012

    def __init__(self) -> None:
        self.calls: list[int] = []

    def encode_rows(self, store: Any, rows: Any, progress: Any = None) -> np.ndarray:
        self.calls.append(len(rows))
        x = np.stack([np.random.default_rng(int(r)).standard_normal(8) for r in rows])
        progress(len(rows))
        return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(autouse=True)
def block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "BLOCK", 16)


def make(folder: Path, **options: Any) -> tuple[Embeddings, list[int]]:
    """Embeddings on disk, and how many rows each call embedded for it."""
    encoder = Encoder()
    made = Embeddings(folder, encoder, encoder, rows=ROWS, **{"model": "m", **options})
    made.fill(Bar("Embed", 50, "rows"))
    return made, encoder.calls


def test_half_precision(tmp_path: Path) -> None:
    full, _ = make(tmp_path / "full")
    half, _ = make(tmp_path / "half", dtype="float16")
    assert half.blocks[0].dtype == np.float16 and half.get(ROWS[:3]).dtype == np.float32
    np.testing.assert_array_equal(half.get(ROWS), full.get(ROWS).astype(np.float16))
    a, b = np.repeat(ROWS, 50), np.tile(ROWS, 50)
    moved = np.abs(full.cosine(a, b) - half.cosine(a, b))
    assert moved.max() < 2**-10 and moved.mean() < 2e-4
    again, calls = make(tmp_path / "half", dtype="float16")
    assert calls == []
    again, calls = make(tmp_path / "half")  # another type is made anew
    assert calls == [16, 16, 16, 2] and again.blocks[0].dtype == np.float32
    with pytest.raises(UsageError, match="float8"):
        make(tmp_path / "half", dtype="float8")


def test_damaged_and_foreign_blocks_are_made_again(tmp_path: Path) -> None:
    home = tmp_path / "e"
    whole, _ = make(home)
    want = whole.get(ROWS)
    files = sorted(home.iterdir())
    sound = files[1].read_bytes()
    del whole

    def spoil(**changes: Any) -> None:
        files[1].unlink()
        x = np.zeros((16, 8), np.float32)
        meta = {**container.metadata(files[0]), **changes.pop("metadata", {})}
        own = ("format", "version", "header_crc32c")
        kept = {k: v for k, v in meta.items() if k not in own}
        kind = changes.pop("kind", embeddings.KIND)
        tensors = {"row": ROWS[16:32], "embedding": x, **changes}
        container.save(
            files[1], {k: v for k, v in tensors.items() if v is not None}, kind=kind, metadata=kept
        )

    def flip() -> None:
        broken = bytearray(sound)
        broken[4100] ^= 1
        files[1].unlink()
        files[1].write_bytes(broken)

    def cut(size: int) -> None:
        files[1].unlink()
        files[1].write_bytes(sound[:size])

    for spoiled in (
        files[1].unlink,
        flip,
        lambda: cut(0),
        lambda: cut(len(sound) // 2),
        lambda: spoil(metadata={"model": "another"}),
        lambda: spoil(metadata={"pooling": "cls"}),
        lambda: spoil(kind="embkit.negatives"),
        lambda: spoil(row=ROWS[:16]),
        lambda: spoil(row=None),
        lambda: spoil(embedding=None),
        lambda: spoil(embedding=np.zeros((15, 8), np.float32)),
        lambda: spoil(embedding=np.zeros((16, 4), np.float32)),
        lambda: spoil(embedding=np.zeros((16, 8), np.float16)),
    ):
        spoiled()
        again, calls = make(home)
        assert calls == [16]
        np.testing.assert_array_equal(again.get(ROWS), want)
        assert files[1].read_bytes() == sound
