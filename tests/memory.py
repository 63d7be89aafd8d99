"""Growth of a process' own memory while it works, as the operating system counts it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

HANG = 120.0


def growth(work: Callable[[], object]) -> int:
    """The most bytes of anonymous memory that a forked child took beyond its first ones.

    Pages of mapped files do not count. Looked at every half millisecond.
    """
    ready, gate = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            ctypes.CDLL(None).malloc_trim(0)  # what the parent had freed is not there to reuse
            os.write(ready[1], b"1")
            os.read(gate[0], 1)
            work()
            code = 0
        except BaseException as error:  # noqa: BLE001
            print(f"child: {error!r}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    os.read(ready[0], 1)
    first = most = _anonymous(child)
    os.write(gate[1], b"1")
    for end in (*ready, *gate):
        os.close(end)
    last = time.monotonic() + HANG
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        most = max(most, _anonymous(child))
        if time.monotonic() > last:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.0005)
    assert os.waitstatus_to_exitcode(status) == 0, "the child failed"
    return most - first


def _anonymous(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    for line in status.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0  # it has ended
