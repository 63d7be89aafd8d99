"""Interrupt every long call of the Rust half; print how long it took and what Python did meanwhile.

    python long_calls.py SCRATCH

A call is made with more and more work until it lasts. 0.1 s after its first report of progress a
thread sends SIGINT to the process. Printed per call: seconds from the signal to KeyboardInterrupt,
ticks of a Python thread per second of the call, threads and temporary files that are left.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from embkit import _rust

Call = Callable[[Callable[[int], object]], object]
SCRATCH = Path(sys.argv[1])
TOKENIZER = json.dumps({
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"[UNK]": 0, "a": 1}, "unk_token": "[UNK]"},
})  # fmt: skip


def shard(rows: int, words: int) -> tuple[np.ndarray, np.ndarray]:
    """Random texts."""
    rng = np.random.default_rng(rows)
    text = rng.integers(97, 123, (rows, words * 6), dtype=np.uint8)
    text[:, 5::6] = 32
    return text.reshape(-1), np.arange(rows + 1, dtype=np.uint64) * np.uint64(words * 6)


def vectors(rows: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((rows, 64)).astype(np.float32)


def jsonl(size: int) -> bytes:
    lines = [b'{"query":"q%d","positive":"the passage that answers %d"}\n' % (i, i)
             for i in range(2000)]  # fmt: skip
    return b"".join(lines) * size


def add_lines(size: int) -> Call:
    text = jsonl(size)
    return lambda progress: _rust.RecordsBuilder().add_lines(text, "s", "t", progress=progress)


def add_jsonl(size: int) -> Call:
    path = SCRATCH / "lines.jsonl"
    path.write_bytes(jsonl(size))
    return lambda progress: _rust.RecordsBuilder().add_jsonl(path, "s", "t", progress=progress)


def add_arrow(size: int) -> Call:
    import pyarrow as pa

    one = pa.table({"query": [f"q{i}" for i in range(2000)], "positive": ["a passage"] * 2000})
    rows = pa.concat_tables([one] * size)
    return lambda progress: _rust.RecordsBuilder().add_arrow(rows, "s", "t", progress=progress)


def text_ids(size: int) -> Call:
    one = shard(100_000 * size, 60)
    return lambda progress: _rust.text_ids([one], threads=1, progress=progress)


def first_fit(size: int) -> Call:
    n = 200_000 * size
    keys = np.random.default_rng(4).integers(0, n // 4, 2 * n).astype(np.uint64)
    rows = np.arange(n, dtype=np.uint64)
    return lambda progress: _rust.first_fit(keys, 2, rows, 64, progress=progress)


def near_duplicates(size: int) -> Call:
    one = shard(1000 * size, 60)
    return lambda progress: _rust.near_duplicates([one], threads=1, progress=progress)


def exact_duplicates(size: int) -> Call:
    one = shard(50_000 * size, 60)
    return lambda progress: _rust.exact_duplicates([one], threads=1, progress=progress)


def near_matches(size: int) -> Call:
    one, held = shard(1000 * size, 60), shard(300, 60)
    return lambda progress: _rust.near_matches([one], [held], threads=1, progress=progress)


def contamination(size: int) -> Call:
    one, held = shard(2000 * size, 100), shard(300, 100)
    return lambda progress: _rust.contamination([one], [held], threads=1, progress=progress)


def tokenize(size: int) -> Call:
    n = 2000 * size
    one, rows = shard(n, 40), np.arange(n, dtype=np.uint64)
    zeros = {kind: np.zeros(n, kind) for kind in (np.uint8, np.uint16)}
    out = SCRATCH / f"tokens-{size}"
    return lambda progress: _rust.tokenize(
        out, [one], rows, zeros[np.uint16], [""], zeros[np.uint8], zeros[np.uint16], rows, rows,
        TOKENIZER, [64], shard_bytes=1 << 16, threads=1, progress=progress,
    )  # fmt: skip


def part(copies: int) -> tuple[list[tuple[Path, int]], int]:
    """A small store, so many times over, and the rows of all."""
    n, out = 5000, SCRATCH / "part"
    one, rows = shard(n, 20), np.arange(n, dtype=np.uint64)
    zeros = {kind: np.zeros(n, kind) for kind in (np.uint8, np.uint16)}
    done = _rust.tokenize(
        out, [one], rows, zeros[np.uint16], [""], zeros[np.uint8], zeros[np.uint16], rows, rows,
        TOKENIZER, [64],
    )  # fmt: skip
    return [(out, done["shards"])] * copies, n * copies


def merge_rows(size: int) -> Call:
    stores, n = part(4 * size)
    form, source = np.zeros(n, np.uint8), np.zeros(n, np.uint16)
    return lambda progress: _rust.merge_rows(stores, form, source, [64] * 3, progress=progress)


def compose_store(size: int) -> Call:
    stores, n = part(4 * size)
    out = SCRATCH / f"composed-{size}"
    out.mkdir()
    rows = np.arange(n, dtype=np.uint64)[::-1].copy()  # backwards: no shard stays as it is
    role, source = np.zeros(n, np.uint8), np.zeros(n, np.uint16)
    return lambda progress: _rust.compose_store(
        out, stores, rows, rows, rows, role, source, "digest", [64] * 3, shard_bytes=1 << 16,
        progress=progress,
    )  # fmt: skip


def topk(size: int) -> Call:
    queries, corpus = vectors(500 * size), vectors(4000)
    return lambda progress: _rust.topk(queries, corpus, 50, threads=1, progress=progress)


def ivf_lists(size: int) -> Call:
    corpus = vectors(20_000 * size)
    return lambda progress: _rust.Ivf(corpus, 256, threads=1, progress=progress)


def ivf_search(size: int) -> Call:
    queries, corpus = vectors(2000 * size), vectors(4000)
    lists = _rust.Ivf(corpus, 64)
    return lambda progress: lists.search(queries, corpus, 50, 32, threads=1, progress=progress)


def filter_negatives(size: int) -> Call:
    nq, c, n = 500 * size, 50, 4000
    rng = np.random.default_rng(2)
    row = rng.integers(0, n, (nq, c), dtype=np.uint32)
    score = -np.sort(-rng.random((nq, c), np.float32))
    number, rows = np.arange(nq, dtype=np.uint64), np.arange(n, dtype=np.uint64)
    none, ones = np.zeros(0, np.uint64), np.ones(nq, np.float32)
    queries = (
        number.astype(np.uint32), number, none.astype(np.uint32), none, none,
        np.arange(nq + 1, dtype=np.uint64), np.zeros(nq, np.uint32), ones,
    )  # fmt: skip
    rules = _rust.NegativeFilter(rows, rows, [shard(n, 60)])
    return lambda progress: rules.run(row, score, queries, {"k": 30}, threads=1, progress=progress)


def filter_texts(size: int) -> Call:
    one, rules = (
        shard(4000 * size, 100),
        [("top_2gram", False, 0.2, 0), ("lorem_ipsum", False, 0, 0)],
    )
    return lambda progress: _rust.filter_texts([one], rules, threads=1, progress=progress)


CASES: dict[str, Callable[[int], Call]] = {
    "RecordsBuilder.add_arrow": add_arrow,
    "RecordsBuilder.add_jsonl": add_jsonl,
    "RecordsBuilder.add_lines": add_lines,
    "compose_store": compose_store,
    "exact_duplicates": exact_duplicates,
    "first_fit": first_fit,
    "near_matches": near_matches,
    "contamination": contamination,
    "NegativeFilter.run": filter_negatives,
    "filter_texts": filter_texts,
    "Ivf.__new__": ivf_lists,
    "Ivf.search": ivf_search,
    "merge_rows": merge_rows,
    "near_duplicates": near_duplicates,
    "text_ids": text_ids,
    "tokenize": tokenize,
    "topk": topk,
}


class Interrupt:
    """Sends SIGINT once, 0.1 s after the first report, if the call still runs then."""

    def __init__(self) -> None:
        self.sent = 0.0
        self.inside = True
        self.timer: threading.Timer | None = None

    def progress(self, done: int) -> None:
        if self.timer is None:
            self.timer = threading.Timer(0.1, self.send)
            self.timer.start()

    def send(self) -> None:
        if self.inside:
            self.sent = time.monotonic()
            os.kill(os.getpid(), signal.SIGINT)

    def close(self) -> None:
        self.inside = False
        if self.timer is not None:
            self.timer.join()


def threads() -> int:
    return len(os.listdir("/proc/self/task"))  # noqa: PTH208


def settled() -> int:
    """Threads of this process once those that have ended are gone from the kernel's list, too."""
    count, since = threads(), time.monotonic()
    while time.monotonic() < since + 0.02:
        if threads() != count:
            count, since = threads(), time.monotonic()
        time.sleep(0.001)
    return count


def interrupted(call: Call, ticks: list[float]) -> dict[str, float] | None:
    """Make the call; None when it was over before the signal."""
    before, begin = settled(), time.monotonic()
    interrupt = Interrupt()
    caught = 0.0
    try:
        call(interrupt.progress)
    except KeyboardInterrupt:
        caught = time.monotonic()
    try:
        interrupt.close()
    except KeyboardInterrupt:  # the signal came just after the call
        caught = 0.0
    if not caught:
        return None
    while threads() > before and time.monotonic() < caught + 1:
        time.sleep(0.001)
    during = sum(begin < t < interrupt.sent for t in ticks)
    return {
        "latency": caught - interrupt.sent,
        "ticks": during / (interrupt.sent - begin),
        "threads": threads() - before,
        "temporary": len(list(SCRATCH.rglob("*.tmp"))),
    }


def main() -> None:
    ticks: list[float] = []

    def tick() -> None:
        while True:
            ticks.append(time.monotonic())
            time.sleep(0.002)

    threading.Thread(target=tick, daemon=True).start()
    found = {}
    for name, make in CASES.items():
        size, result = 1, None
        while result is None:
            size *= 4
            assert size <= 4096, f"{name} cannot be interrupted"
            result = interrupted(make(size), ticks)
        found[name] = {**result, "size": size}
    print(json.dumps(found))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
    main()
