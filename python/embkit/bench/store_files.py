"""Rows about a store's files: written, opened, verified, and read from a disk that is cold."""

from __future__ import annotations

import ctypes
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from embkit import _rust, container
from embkit.bench import Case, Reported, Sample
from embkit.bench.rivals import Job
from embkit.bench.store_data import LENGTH, corpus_store, made_store, passages, roomy
from embkit.data import Batches, Store

_ROWS_OF_10_GB = 18_500_000  # of 256 tokens on average
_PEERS = {
    "MDS": "mds",
    "litdata": "litdata",
    "webdataset": "webdataset",
    "HF datasets": "datasets",
}


def write(quick: bool) -> Case:
    """Ids in memory to shards on the disk."""
    made = passages(quick, 4_000 if quick else 60_000)
    job = Job({"flat": made.flat, "offsets": made.offsets}, {"batch": 1})
    running, skipped = job.start(_PEERS)
    home = tempfile.TemporaryDirectory(prefix="embkit-bench-", dir=roomy())
    path = Path(home.name)
    n, tokens = len(made.rows), int(made.offsets[-1])
    number, zeros = np.arange(n, dtype=np.uint64), np.zeros(n, np.uint16)
    offsets = made.offsets.astype(np.uint64)

    def ours() -> None:
        """A shard as tokenization publishes it: checksums, fsync, rename."""
        columns = {
            "tokens": made.flat,
            "offsets": offsets,
            "text_id": number,
            "cluster": number,
            "role": np.zeros(n, np.uint8),
            "source": zeros,
            "prompt_len": zeros,
        }
        meta = {"first_row": "0", "rows": str(n), "params": "bench", "truncated": "0"}
        container.save(path / "a.safetensors", columns, kind="embkit.texts", metadata=meta)

    def by_record() -> None:
        ends = made.offsets.tolist()
        with (path / "b.bin").open("wb") as out:
            for a, b in zip(ends[:-1], ends[1:], strict=True):
                out.write(made.flat[a:b].tobytes())
        np.save(path / "b.npy", made.offsets)

    def whole() -> None:
        made.flat.tofile(path / "c.bin")
        np.save(path / "c.npy", made.offsets)

    rivals: dict[str, Callable[[], Any]] = {
        "numpy, record by record (no checksum, no fsync)": by_record,
        "numpy tofile of all (no checksum, no fsync)": whole,
    }
    rivals |= {name: partial(rival.round, "write") for name, rival in running.items()}

    def close() -> None:
        job.close()
        home.cleanup()

    return Case(
        name="store.write",
        unit="tokens/s",
        work=float(tokens),
        ours=ours,
        rivals=rivals,
        skipped=skipped,
        floor="1x numpy record by record",
        goal="200 Mtokens/s",
        facts={"bytes": int(made.flat.nbytes), "n": n, "data": made.data},
        close=close,
    )


def opened(quick: bool) -> Case:
    """Open a large store through the public class."""
    stack = ExitStack()
    rows = 90_000 if quick else _ROWS_OF_10_GB
    large = stack.enter_context(made_store(rows, length=256, examples=True, negatives=1))
    small = stack.enter_context(made_store(90_000, length=256))
    size = sum(p.stat().st_size for p in large.rglob("*") if p.is_file())
    drop(large)
    started = time.perf_counter()
    shards = Store(large).rows_store.shards
    cold = 1e3 * (time.perf_counter() - started)
    return Case(
        name="store.open",
        unit="ms",
        work=1.0,
        measure="wall",
        ours=partial(Store, large),
        rivals={"a store of one shard": partial(Store, small)},
        goal="20 ms, memory independent of size",
        facts={
            "bytes": size,
            "shards": shards,
            "first_open_from_disk_ms": cold,
            "own_memory_bytes": _own_memory(large),
        },
        close=stack.close,
    )


def verify(quick: bool) -> Case:
    """An epoch of training steps over a freshly opened store: checksums on first touch, or off."""

    def epoch(store: Store) -> Iterator[Any]:
        made = Batches(store, batch_size=256, hard_negatives=2)
        return made.stream(0, made.plan.batches_per_epoch(0))

    work = float(sum(batch.tokens for batch in epoch(corpus_store(quick))))
    return _verified("store.verify", quick, epoch, work)


def verify_gather(quick: bool) -> Case:
    """As verify, for bare batches of 32 rows: the least work that checksums can be beside."""

    def epoch(store: Store) -> Iterator[Any]:
        rows = store.rows
        ids, mask = (np.empty(32 * LENGTH, np.int64) for _ in range(2))
        order = _rust.permute(rows, 1, 0, rows)
        for start in range(0, rows, 32):
            yield store.rows_store.gather_padded(order[start : start + 32], ids, mask, 0)

    return _verified("store.verify.gather", quick, epoch, float(corpus_store(quick).tokens))


def _verified(name: str, quick: bool, epoch: Callable[[Store], Iterator[Any]], work: float) -> Case:
    path = corpus_store(quick).path
    first: dict[str, list[float]] = {"first-touch": [], "off": []}

    def run(mode: str) -> None:
        started = time.perf_counter()
        for i, _ in enumerate(epoch(Store(path, verify=mode))):
            if i == 0:
                first[mode].append(time.perf_counter() - started)

    def derive(found: Any) -> dict[str, float]:
        checked, unchecked = found["embkit"].cpu, found['verify="off"'].cpu
        return {
            "share": checked / unchecked - 1,
            "first_batch_ms": 1e3 * float(np.median(first["first-touch"])),
            "first_batch_off_ms": 1e3 * float(np.median(first["off"])),
        }

    return Case(
        name=name,
        unit="tokens/s",
        work=work,
        ours=partial(run, "first-touch"),
        rivals={'verify="off"': partial(run, "off")},
        goal="share < 5 % of an epoch of steps",
        facts={"n": len(corpus_store(quick))},
        derive=derive,
    )


def cold(quick: bool) -> Case:
    """Batches of rows at random places of a store that is not in the page cache."""
    stack = ExitStack()
    rows = 90_000 if quick else 10_000_000
    home = stack.enter_context(made_store(rows, length=200, examples=True, negatives=1))
    size = 64
    steps = 4 if quick else 48
    epoch = iter(range(1 << 30))

    def read(ahead: bool, verify: str) -> Reported:
        """Seconds of all steps but the first, which waits for the tables, too."""
        drop(home)
        store = Store(home, verify=verify)
        store.rows_store = _rust.Store(str(home), verify, read_ahead=ahead)
        made = Batches(store, batch_size=size, hard_negatives=1, seed=next(epoch))
        rows, first, cpu = 0, 0.0, 0.0
        for batch in made.stream(0, steps + 1):
            rows += len(batch.rows) if first else 0
            first, cpu = first or time.perf_counter(), cpu or time.process_time()
        seconds = time.perf_counter() - first
        return Reported(rows, Sample(time.process_time() - cpu, seconds, 0))

    work = float(read(True, "first-touch").value)
    biggest = max(home.glob("*.safetensors"), key=lambda p: p.stat().st_size)
    return Case(
        name="store.cold",
        unit="us/row",
        work=work,
        measure="wall",
        ours=partial(read, True, "first-touch"),
        rivals={
            "without reading ahead": partial(read, False, "first-touch"),
            'verify="off"': partial(read, True, "off"),
        },
        derive=lambda found: {
            # With checksums the whole block of 64 KiB around a row is read.
            "block_bytes_per_s": 65536 * work / found["embkit"].wall,
        },
        goal="disk bandwidth",
        facts={"n": rows, "batch": size, "sequential_bytes_per_s": _sequential(biggest)},
        close=stack.close,
    )


def _own_memory(home: Path) -> int | None:
    """Bytes that an open store takes beside the pages of its files; None without glibc's count."""
    try:
        count = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return None
    count.restype = type(
        "MallInfo",
        (ctypes.Structure,),
        {"_fields_": [(f"f{i}", ctypes.c_size_t) for i in range(10)]},
    )

    def used() -> int:
        now = count()
        return int(now.f7 + now.f4)  # in the heap, and mapped for large blocks

    kept = [Store(home)]
    before = used()
    kept += [Store(home) for _ in range(10)]
    return (used() - before) // 10


def drop(home: Path) -> None:
    """Drop a folder's files from the page cache; they must not be mapped."""
    os.sync()
    for path in home.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def _sequential(path: Path) -> float:
    """Bytes a second of a cold file, read from beginning to end."""
    drop(path.parent)
    started = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.read(4 << 20):
            pass
    return path.stat().st_size / (time.perf_counter() - started)
