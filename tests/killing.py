"""Fork, watch, kill: what the kill tests of whole runs and of stores share.

A child is forked from a program that has imported everything, so that a kill costs no start-up. A
kill is aimed at an event that the parent sees, and falls up to ``jitter`` seconds after it.
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import struct
import sys
import time
from collections.abc import Callable

HANG = 120.0  # seconds after which a child counts as hung


class Counter:
    """A number and a word in memory that parent and children share."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, 64)

    def set(self, count: int, label: str = "") -> None:
        self._map[:] = struct.pack("q56s", count, label.encode())

    def add(self, label: str) -> None:
        self.set(self.count + 1, label)

    @property
    def count(self) -> int:
        return int(struct.unpack("q56s", self._map[:])[0])

    @property
    def label(self) -> str:
        return str(struct.unpack("q56s", self._map[:])[1].rstrip(b"\0").decode())


def attempt(
    work: Callable[[], object],
    due: Callable[[], bool],
    rng: random.Random,
    *,
    jitter: float,
    output: int = -1,
) -> bool:
    """Run ``work`` in a child; kill it once ``due()``. Return whether it was killed.

    Args:
        work: what the child does; an exception fails the test.
        due: asked by the parent again and again.
        rng: of the jitter.
        jitter: the most seconds between the event and the kill.
        output: a descriptor for the child's standard output.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if output >= 0:
                os.dup2(output, 1)
            work()
            code = 0
        except BaseException as error:  # noqa: BLE001
            print(f"child: {error!r}", file=sys.stderr, flush=True)
        finally:
            sys.stdout.flush()
            os._exit(code)
    deadline = time.monotonic() + HANG
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.WIFEXITED(status), f"the child died by itself: {status}"
            assert os.WEXITSTATUS(status) == 0, "an attempt failed"
            return False
        late = time.monotonic() > deadline
        if late or due():
            time.sleep(0 if late else rng.random() * jitter)
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            assert not late, "the child hangs"
            # It may have ended in the meantime.
            return os.WIFSIGNALED(status)
        time.sleep(0.0002)
