"""Two gloo ranks share the embedding of a corpus and a search: the result of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embkit import search_torch
from embkit.data import embeddings

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
import os
import sys
from pathlib import Path
import torch.distributed as dist
from embkit import search_torch
from embkit.errors import UsageError

rank, home = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{home}/meet", rank=rank, world_size=2)
group = dist.group.WORLD
made, calls = make(home / "ranks", group=group)
assert len(made.blocks) == 4 and sum(map(len, made.blocks)) == 50
print(calls, repr(float(made.get(made.rows).sum())))

q, c = np.load(home / "q.npy"), np.load(home / "c.npy", mmap_mode="r")
for name, corpus, k in (("many", c, 40), ("few", c[:3], 3), ("one", c[:1], 1)):
    row, score, report = search_torch.search(q, corpus, k, device="cpu", group=group)
    np.savez(home / f"{name}-{rank}.npz", row=row, score=score)
bad = np.array(c)
bad[-1] = np.nan
try:
    search_torch.search(q, bad, 4, device="cpu", group=group)
except UsageError as error:
    print(error)
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # torch has once ended a process with SIGABRT here, after all of this was done
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[str]]]:
    """What two ranks wrote, and what each said."""
    home = tmp_path_factory.mktemp("ranks")
    rng = np.random.default_rng(9)
    c, q = (rng.standard_normal((n, 24)).astype(np.float32) for n in (1001, 31))
    c[600:800] = c[100:300]
    np.save(home / "q.npy", q)
    np.save(home / "c.npy", c)
    source = str(Path(search_torch.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", MAKE + RANK, str(r), str(home)],
            env=env, stdout=subprocess.PIPE, text=True,
        )
        for r in range(2)
    ]  # fmt: skip
    said = [p.communicate(timeout=120)[0].strip().splitlines() for p in running]
    assert [p.returncode for p in running] == [0, 0]
    return home, said


def test_embeddings_have_the_bytes_of_one_process(
    ranks: tuple[Path, list[list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, said = ranks
    monkeypatch.setattr(embeddings, "BLOCK", 16)
    ways: dict[str, Any] = {}
    exec(MAKE, ways)
    alone, calls = ways["make"](tmp_path)
    total = repr(float(alone.get(alone.rows).sum()))
    assert [s[0] for s in said] == [f"[16, 16] {total}", f"[16, 2] {total}"]
    assert calls == [16, 16, 16, 2]
    one, two = ({p.name: p.read_bytes() for p in d.iterdir()} for d in (tmp_path, home / "ranks"))
    assert one == two and len(one) == 4


def test_a_search_equals_that_of_one_process(ranks: tuple[Path, list[list[str]]]) -> None:
    home, _ = ranks
    q, c = np.load(home / "q.npy"), np.load(home / "c.npy")
    for name, n, k in (("many", 1001, 40), ("few", 3, 3), ("one", 1, 1)):
        row, score, _ = search_torch.search(q, c[:n], k, device="cpu")
        for r in range(2):
            found: Any = np.load(home / f"{name}-{r}.npz")
            np.testing.assert_array_equal(found["row"], row)
            np.testing.assert_array_equal(found["score"], score)


def test_what_one_rank_refuses_all_refuse(ranks: tuple[Path, list[list[str]]]) -> None:
    assert "Another rank" in ranks[1][0][1] and "corpus row" in ranks[1][1][1]
