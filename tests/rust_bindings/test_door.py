"""The one door of long calls: the GIL is free, Ctrl-C works, exceptions come through."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from embkit import _rust
from embkit.errors import CorruptError, EmbkitError, UsageError


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((6000, 96)).astype(np.float32)


def test_the_gil_is_free_while_rust_works(vectors: np.ndarray) -> None:
    """A Python thread counts on while the search runs, and two searches overlap."""
    ticks, stop, spans = [], threading.Event(), []

    def count() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    def search() -> None:
        start = time.perf_counter()
        _rust.topk(vectors, vectors, 10, threads=1)
        spans.append((start, time.perf_counter()))

    threads = [threading.Thread(target=f) for f in (count, search, search)]
    for thread in threads:
        thread.start()
    for thread in threads[1:]:
        thread.join()
    stop.set()
    threads[0].join()
    (a, b), (c, d) = spans
    assert max(a, c) < min(b, d), "the searches ran one after the other"
    inside = [t for t in ticks if a < t < b]
    assert len(inside) > (b - a) / 0.1


def test_progress_ascends_to_the_total(vectors: np.ndarray) -> None:
    seen: list[int] = []
    _rust.topk(vectors, vectors, 5, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == len(vectors)


def test_an_exception_in_the_callback_stops_the_work(vectors: np.ndarray) -> None:
    class Stop(Exception):
        pass

    def progress(done: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        _rust.topk(vectors, vectors, 5, progress=progress)


def test_ctrl_c_is_a_keyboard_interrupt_within_300_ms() -> None:
    """SIGINT in the middle of a deduplication that would take far longer."""
    script = textwrap.dedent("""
        import signal, sys, time
        import numpy as np
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
        from embkit import _rust
        words = np.random.default_rng(0).integers(0, 20000, (60000, 80)).astype("U6")
        rows = [" ".join(r).encode() for r in words]
        shard = np.frombuffer(b"".join(rows), np.uint8), np.cumsum([0, *map(len, rows)])
        shard = shard[0], shard[1].astype(np.uint64)
        told = []
        def progress(done):
            if not told:
                told.append(1)
                print("running", flush=True)
        try:
            while True:
                told.clear()
                _rust.near_duplicates([shard] * 8, progress=progress)
        except KeyboardInterrupt:
            print(time.time(), flush=True)
    """)
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    ) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "running\n"
            time.sleep(0.3)
            sent = time.time()
            child.send_signal(signal.SIGINT)
            said = child.stdout.readline()
            while said == "running\n":
                said = child.stdout.readline()
            assert float(said) - sent < 0.3
            assert child.wait(20) == 0
        finally:
            child.kill()


def test_errors_are_of_the_right_class_and_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as missing:
        _rust.open_tensors(tmp_path / "none")
    assert missing.value.errno == errno.ENOENT
    assert missing.value.filename == str(tmp_path / "none")
    with pytest.raises(IsADirectoryError):
        _rust.publish_file(tmp_path, b"x")
    (tmp_path / "bad").write_bytes(b"x" * 5000)
    with pytest.raises(CorruptError) as corrupt:
        _rust.open_tensors(tmp_path / "bad")
    assert corrupt.value.where == str(tmp_path / "bad")
    assert corrupt.value.fix
    with pytest.raises(UsageError, match="first-touch"):
        _rust.open_tensors(tmp_path / "bad", "sometimes")
    with pytest.raises(ValueError, match="64 bits"):
        _rust.write_manifest(tmp_path / "m", '{"a": 18446744073709551616}')
    with pytest.raises(EmbkitError, match="Tensor 'a' of U16"):
        _rust.write_tensors(
            tmp_path / "t",
            [("a", "U16", [3], np.zeros(2, np.uint16))],
            {"format": "embkit.test", "version": "1"},
        )
    with pytest.raises(TypeError):
        _rust.topk(np.zeros((1, 2)), np.zeros((1, 2), np.float32), 1)
    with pytest.raises(UsageError, match="contiguous"):
        _rust.topk(np.zeros((4, 4), np.float32)[:, ::2], np.zeros((1, 2), np.float32), 1)
    assert sorted(os.listdir(tmp_path)) == ["bad"]  # noqa: PTH208


def test_a_forked_child_may_use_it_too(vectors: np.ndarray) -> None:
    """No pool is kept, so nothing is lost in the child."""
    want, _ = _rust.topk(vectors[:50], vectors, 3, threads=2)
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)
        got, _ = _rust.topk(vectors[:50], vectors, 3, threads=2)
        os._exit(0 if np.array_equal(got, want) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
