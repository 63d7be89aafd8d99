"""Work in a child under strace: what it asked of the file system, or what happens when it fails."""

from __future__ import annotations

import codecs
import mmap
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CALLS = (
    "openat,write,writev,pwrite64,ftruncate,fallocate,sendfile,copy_file_range,fsync,fdatasync,"
    "rename,renameat,renameat2,mkdir,mkdirat,unlink,unlinkat,rmdir,link,linkat,symlink,symlinkat"
)


def unavailable() -> str | None:
    """Why strace cannot be used here, or None."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    works = subprocess.run(["strace", "-f", "-o", os.devnull, "true"], capture_output=True)
    return None if works.returncode == 0 else "ptrace is not allowed here"


def in_child(
    work: Callable[[], object], *, before: Callable[[int], object] | None = None
) -> tuple[int, str]:
    """Run ``work`` in a forked child, and ``before(pid)`` first.

    Returns:
        The child's exit code and its exception as text: 0, the number of the OSError that ended
        it, or 255 for any other exception.
    """
    ready, go = os.pipe()
    said = mmap.mmap(-1, 4096)  # not a pipe: a write may be what fails
    child = os.fork()
    if child == 0:
        code = 255
        try:
            signal.alarm(120)
            os.close(go)
            os.read(ready, 1)  # until the parent closes it
            work()
            code = 0
        except OSError as error:
            code = error.errno or 255
            said.write(repr(error).encode()[:4000])
        except BaseException as error:  # noqa: BLE001
            said.write(repr(error).encode()[:4000])
        finally:
            os._exit(code)
    os.close(ready)
    try:
        if before is not None:
            before(child)
    finally:
        os.close(go)
        _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), said[:].rstrip(b"\0").decode()


def traced(work: Callable[[], object], log: Path | str, *options: str) -> tuple[int, str]:
    """:func:`in_child` with strace attached, which writes to ``log``."""
    tracers: list[subprocess.Popen[str]] = []

    def attach(child: int) -> None:
        command = ["strace", "-f", "-p", str(child), "-o", str(log), *options]
        tracers.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        assert tracers[0].stderr is not None
        assert "attached" in tracers[0].stderr.readline()

    result = in_child(work, before=attach)
    with tracers[0] as tracer:
        assert tracer.wait(30) == 0
    return result


@dataclass(frozen=True)
class Op:
    """A call that changed or synced something under a root; paths are relative to it.

    Kinds: create, write, sync, rename, exchange, mkdir, remove.
    """

    kind: str
    path: str
    to: str = ""
    data: bytes = b""


_LINE = re.compile(r"^(\d+\.\d+) (\w+)\((.*)\) += (-?\d+)[^\n]*$")
_PATH = re.compile(r'(?:(?:AT_FDCWD|\d+)<([^>]*)>, )?"((?:[^"\\]|\\.)*)"(\.\.\.)?')
_FD = re.compile(r"^\d+<([^>]*)>")


def record(work: Callable[[], object], root: Path, scratch: Path) -> list[Op]:
    """The operations of ``work`` on what lies under ``root``, in order."""
    scratch.mkdir()
    code, text = traced(
        work, scratch / "log", "-ff", "-ttt", "-y", "-s", "1000000", "-e", f"trace={CALLS}"
    )  # fmt: skip
    assert code == 0, text
    calls = []
    for log in scratch.glob("log.*"):  # one of each thread
        for line in log.read_text(encoding="latin-1").split("\n"):
            found = _LINE.match(line)
            if found and int(found[4]) >= 0:
                calls.append((float(found[1]), found[2], found[3]))
    calls.sort(key=lambda call: call[0])
    ops = (_op(call, arguments, f"{root}/") for _, call, arguments in calls)
    return [op for op in ops if op is not None]


def _op(call: str, arguments: str, root: str) -> Op | None:
    if call in ("write", "fsync", "fdatasync"):
        fd = _FD.match(arguments)
        if fd is None or not f"{fd[1]}/".startswith(root):
            return None
        path = fd[1].removeprefix(root[:-1]).removeprefix("/") or "."
        if call != "write":
            return Op("sync", path)
        content = _PATH.search(arguments.split(", ", 1)[1])
        assert content is not None and not content[3]
        return Op("write", path, data=_bytes(content[2]))
    found = [(m[1] or "", _bytes(m[2]).decode()) for m in _PATH.finditer(arguments)]
    paths = [str(Path(folder, name)) for folder, name in found]
    inner = [p.removeprefix(root) for p in paths if p.startswith(root)]
    if not inner:
        moved = call in ("writev", "pwrite64", "ftruncate", "fallocate", "sendfile",
                         "copy_file_range")  # fmt: skip
        assert not (moved and root in arguments), f"{call} is not in the model"
        return None
    assert len(inner) == len(paths), f"{call}({arguments}) leaves {root}"
    if call == "openat":
        writes = "O_CREAT" in arguments or "O_TRUNC" in arguments
        return Op("create", inner[0]) if writes else None
    if call.startswith("rename"):
        return Op("exchange" if "RENAME_EXCHANGE" in arguments else "rename", *inner)
    if call.startswith("mkdir"):
        return Op("mkdir", inner[0])
    assert call in ("unlink", "unlinkat", "rmdir"), f"{call} is not in the model: {arguments[:200]}"
    return Op("remove", inner[0])


def _bytes(text: str) -> bytes:
    """What strace quoted: C escapes."""
    return codecs.escape_decode(text.encode("latin-1"))[0]  # type: ignore[attr-defined]
