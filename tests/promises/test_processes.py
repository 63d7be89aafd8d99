"""Promises about threads, processes and what they hold: the GIL, Ctrl-C, fork, leaks."""

from __future__ import annotations

import ast
import gc
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small import REPO, full_count
from tiny import build, make_source

from embkit import _rust
from embkit.data import Store

pytestmark = pytest.mark.promise
HERE = Path(__file__).parent


def program(name: str, *args: str | Path) -> str:
    """Run a program of this directory; four minutes, on a busy machine too, count as a deadlock."""
    done = subprocess.run(
        [sys.executable, HERE / name, *args], capture_output=True, text=True, timeout=240,
        check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def one_shard(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    return build(make_source(folder / "source", rows=20), tokenizer, folder, shard_bytes=1 << 20)


# ---------------------------------------------------------------- P14


def long_bindings() -> set[str]:
    """Names of everything in the stub that reports progress."""
    tree = ast.parse((REPO / "python" / "embkit" / "_rust.pyi").read_text())
    found = set()
    for owner in ast.walk(tree):
        if not isinstance(owner, (ast.Module, ast.ClassDef)):
            continue
        prefix = "" if isinstance(owner, ast.Module) else f"{owner.name}."
        for node in owner.body:
            if isinstance(node, ast.FunctionDef):
                names = [a.arg for a in (*node.args.args, *node.args.kwonlyargs)]
                if "progress" in names:
                    found.add(prefix + node.name)
    return found


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """Each long call, interrupted; the quickest of up to three, for the machine may be busy."""
    best: dict[str, dict[str, float]] = {}
    for i in range(3):
        found = json.loads(program("long_calls.py", tmp_path_factory.mktemp(f"calls-{i}")))
        for name, result in found.items():
            if name not in best or result["latency"] < best[name]["latency"]:
                best[name] = result
        if all(r["latency"] < 0.3 and r["ticks"] > 20 for r in best.values()):
            break
    return best


def test_gil_is_free(calls: dict[str, dict[str, float]]) -> None:
    """P14: a Python thread goes on while each long call works."""
    assert set(calls) == long_bindings(), "tests/promises/long_calls.py needs a case for each"
    for name, result in calls.items():
        assert result["ticks"] > 20, f"{name}: {result['ticks']:.0f} ticks a second of 500"


def test_interrupt(calls: dict[str, dict[str, float]]) -> None:
    """P14: Ctrl-C ends each long call within 300 ms and leaves no thread and no file behind."""
    slowest = max(calls, key=lambda name: calls[name]["latency"])
    print(f"{len(calls)} calls, slowest to stop: {slowest}, {calls[slowest]['latency']:.3f} s")
    for name, result in calls.items():
        assert result["latency"] < 0.3, f"{name}: {result['latency']:.3f} s"
        assert result["threads"] == 0, name
        assert result["temporary"] == 0, name


# ---------------------------------------------------------------- P15


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_dataloader_workers(one_shard: Path, method: str) -> None:
    """P15: workers forked or spawned after the extension has used threads."""
    assert int(program("loaders.py", one_shard, method)) == Store(one_shard).rows


@pytest.mark.timeout(60)
def test_threads_share_a_store(built: Path) -> None:
    """P15: 4 threads read one store, first touch included."""
    reads = full_count(10_000, 1500)
    calm = Store(built / "store", verify="open")
    everything = np.arange(calm.rows, dtype=np.uint64)
    lengths = calm.lengths(everything)
    packed = np.zeros(int(lengths.sum()), np.int64)
    ends = np.zeros(calm.rows + 1, np.int32)
    calm.gather(everything, packed, ends)
    clusters = calm.cluster(everything)
    shared = Store(built / "store")
    wrong: list[str] = []

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(reads):
            rows = rng.integers(0, shared.rows, 5).astype(np.uint64)
            tokens = np.zeros(int(shared.lengths(rows).sum()), np.int64)
            cu = np.zeros(6, np.int32)
            shared.gather(rows, tokens, cu)
            want = np.concatenate([packed[ends[r] : ends[r + 1]] for r in rows.tolist()])
            if not np.array_equal(tokens, want):
                wrong.append(f"tokens of {rows.tolist()}")
            if not np.array_equal(shared.cluster(rows), clusters[rows.astype(np.int64)]):
                wrong.append(f"clusters of {rows.tolist()}")

    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:3]


# ---------------------------------------------------------------- P16


def held() -> tuple[int, int]:
    """Resident bytes of this process, and its open files."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def assert_nothing_stays(once: Callable[[], None], times: int) -> None:
    """Under 2 MiB more after so many calls, and no file more."""
    for _ in range(min(times, 200)):  # allocators and caches fill up first
        once()
    gc.collect()
    before = held()
    for _ in range(times):
        once()
    gc.collect()
    after = held()
    print(f"{times} times: {(after[0] - before[0]) / 1024:.0f} KiB more, {after[1]} open files")
    assert after[0] - before[0] < 2 << 20
    assert after[1] == before[1]


def test_no_leaks_of_text_functions(tmp_path: Path) -> None:
    """P16: many calls of what reads texts, capped so that files are used: nothing stays."""
    texts = [f"a text of some words {i % 40} and then a few more of them {i}" for i in range(400)]
    raw = [t.encode() for t in texts]
    ends = np.cumsum([0, *map(len, raw)]).astype(np.uint64)
    shards = [(np.frombuffer(b"".join(raw), np.uint8), ends)]
    capped = {"memory": 100_000, "spill": str(tmp_path), "threads": 2}

    def once() -> None:
        _rust.near_duplicates(shards, threshold=0.5, **capped)
        _rust.exact_duplicates(shards, **capped)
        _rust.near_matches(shards, shards, threads=2)
        _rust.contamination(shards, shards, words=5, threads=2)
        _rust.filter_texts(shards, [("words", True, 3.0, 0)], None, threads=2)

    assert_nothing_stays(once, full_count(300, 100))
    assert not list(tmp_path.iterdir())


def test_no_leaks(one_shard: Path) -> None:
    """P16: a store is opened, read and dropped 1,000 times: under 2 MiB more, no file more."""

    def once() -> None:
        store = Store(one_shard)
        rows = np.arange(store.rows, dtype=np.uint64)
        tokens = np.zeros(int(store.lengths(rows).sum()), np.int32)
        store.gather(rows, tokens, np.zeros(len(rows) + 1, np.int32))
        store.tasks()
        assert store.text(3)

    assert_nothing_stays(once, 1000)


def test_no_leaks_of_searches_and_vectors(tmp_path: Path) -> None:
    """P16: mapped embeddings of both kinds are opened, searched and dropped: nothing stays."""
    from embkit import container
    from embkit.data.vectors import load_vectors, vectors_origin
    from embkit.search import search

    x = np.random.default_rng(0).standard_normal((600, 48)).astype(np.float32)
    np.save(tmp_path / "v.npy", x)
    for i in range(2):
        path = tmp_path / "blocks" / f"v-{i:05d}-of-00002.safetensors"
        path.parent.mkdir(exist_ok=True)
        container.save(path, {"embedding": x[i * 300 : i * 300 + 300]}, kind="embkit.embeddings")

    def once() -> None:
        (whole,) = load_vectors(tmp_path / "v.npy")
        parts = load_vectors(tmp_path / "blocks")
        vectors_origin(tmp_path / "blocks")
        assert search(parts[0][:20], whole, 10, threads=2).row.shape == (20, 10)

    assert_nothing_stays(once, 300)
