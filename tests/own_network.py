"""Two processes, each in a network of its own, joined by one cable that either can cut.

Needs root (or CAP_SYS_ADMIN and CAP_NET_ADMIN) and `ip` of iproute2. The networks are nameless:
they go with the processes, however these end.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable

DEVICE = "cable0"
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET of sched.h


def missing() -> str | None:
    """Why there can be no such networks here; None where there can."""
    if shutil.which("ip") is None:
        return "there is no `ip` (iproute2)"
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            _leave()
            _ip("link", "set", "lo", "up")
            code = 0
        finally:
            os._exit(code)
    allowed = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return None if allowed else "networks of one's own need root"


def address(rank: int) -> str:
    """Of a rank's end of the cable."""
    return f"10.7.0.{rank + 1}"


def cut(*, silently: bool) -> None:
    """Part the two, from either: the cable is pulled, or packets leave and never arrive."""
    if not silently:
        _ip("link", "set", DEVICE, "down")
        return
    for rank in (0, 1):  # one of them is the other
        nobody = "02:00:00:00:00:99"
        _ip("neigh", "replace", address(rank), "lladdr", nobody, "nud", "permanent", "dev", DEVICE)


def start(
    work: Callable[[int], None], begin: Callable[[Callable[[int], None]], list[int]]
) -> list[int]:
    """Process ids of two ranks that do ``work`` on the two ends of a cable.

    Args:
        begin: starts both as processes, such as ``partial(ranks_driver.start, 2)``.
    """
    ready, told = [os.pipe() for _ in range(2)], [os.pipe() for _ in range(2)]

    def inside(rank: int) -> None:
        _leave()
        os.write(ready[rank][1], b"1")
        os.read(told[rank][0], 1)
        _ip("link", "set", "lo", "up")
        _ip("addr", "add", f"{address(rank)}/24", "dev", DEVICE)
        _ip("link", "set", DEVICE, "up")
        os.environ["GLOO_SOCKET_IFNAME"] = DEVICE
        work(rank)

    children = begin(inside)
    for end, _ in ready:
        os.read(end, 1)
    ends = [str(pid) for pid in children]
    _ip("link", "add", DEVICE, "netns", ends[0], "type", "veth", "peer", DEVICE, "netns", ends[1])
    for _, end in told:
        os.write(end, b"1")
    for pipe in (*ready, *told):
        for end in pipe:
            os.close(end)
    return children


def _leave() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_NETWORK):
        raise OSError(ctypes.get_errno(), "unshare")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, stdout=subprocess.DEVNULL)
