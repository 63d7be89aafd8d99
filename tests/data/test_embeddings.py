"""Blocks of embeddings: shared by ranks, half as large in float16, redone when damaged."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embkit import container
from embkit.data import embeddings
from embkit.data.embeddings import Embeddings
from embkit.errors import UsageError

ROWS = np.arange(3, 53, dtype=np.uint64)
MAKE = """
import numpy as np
from embkit.data import embeddings
from embkit.progress import Bar

class Encoder:
    pooling, dims = "mean", (8, 4)
    prompts = {"query": "q: ", "passage": ""}
    calls = []
    def encode_rows(self, store, rows, progress=None):
        self.calls.append(len(rows))
        x = np.stack([np.random.default_rng(int(r)).standard_normal(8) for r in rows])
        progress(len(rows))
        return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)

def make(folder, **options):
    encoder = Encoder()
    encoder.calls = []
    embeddings.BLOCK = 16
    rows = np.arange(3, 53, dtype=np.uint64)
    options = {"model": "m", **options}
    made = embeddings.Embeddings(folder, encoder, encoder, rows=rows, **options)
    made.fill(Bar("Embed", 50, "rows"))
    return made, encoder.calls
"""
RANK = """
import sys
from pathlib import Path
import torch.distributed as dist
rank, home = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{home}/meet", rank=rank, world_size=2)
made, calls = make(home / "ranks", group=dist.group.WORLD)
assert len(made.blocks) == 4 and sum(map(len, made.blocks)) == 50
print(calls, repr(float(made.get(made.rows).sum())))
dist.destroy_process_group()
"""
WAYS: dict[str, Any] = {}
exec(MAKE, WAYS)  # the same encoder here and in the ranks


@pytest.fixture(autouse=True)
def block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "BLOCK", 16)


def make(folder: Path, **options: Any) -> tuple[Embeddings, list[int]]:
    made: tuple[Embeddings, list[int]] = WAYS["make"](folder, **options)
    return made


def test_two_ranks_write_the_bytes_of_one(tmp_path: Path) -> None:
    source = str(Path(embeddings.__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", MAKE + RANK, str(r), str(tmp_path)],
            env=env, stdout=subprocess.PIPE, text=True,
        )
        for r in range(2)
    ]  # fmt: skip
    alone, calls = make(tmp_path / "alone")
    said = [p.communicate(timeout=120)[0].strip() for p in ranks]
    assert [p.returncode for p in ranks] == [0, 0]
    total = repr(float(alone.get(alone.rows).sum()))
    assert said == [f"[16, 16] {total}", f"[16, 2] {total}"] and calls == [16, 16, 16, 2]
    one, two = (
        {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("alone", "ranks")
    )
    assert one == two and len(one) == 4


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
