"""A stage is a function from directories to a directory: whole or absent, and free when done.

A stage's digest covers its name and format version, its parameters and the digests of its inputs.
Work goes to a hidden partial directory beside the output that carries the digest in its name, so
that a killed stage finds its own shards or checkpoints again, and nothing else ever reads them.
Publishing writes the manifest last and renames the directory as one step.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from embkit import __version__, _rust
from embkit.container import VERSION, read_manifest, write_manifest
from embkit.errors import CorruptError, FormatError, UsageError
from embkit.progress import say

_HASH_CACHE_FROM = 64 << 20  # smaller files are hashed faster than a cache is opened


class Stage:
    """One run of a stage; made by :func:`stage`.

    Attributes:
        out: the directory this stage publishes.
        dir: the partial directory to write into while :attr:`done` is false, else ``out``.
        digest: hex BLAKE3 over name, version, parameters and inputs.
        done: the output is there with this digest; skip the work.
        record: what the digest covers, and the version of embkit.
    """

    def __init__(self, out: Path, kind: str, digest: str, record: dict[str, Any]) -> None:
        self.out = out
        self.kind = kind
        self.digest = digest
        self.record = record
        self.done = is_done(out, digest)
        self.dir = out if self.done else partial_dir(out, digest)

    def publish(self, extra: Mapping[str, Any] | None = None) -> Path:
        """Write the manifest over every file in :attr:`dir`, then rename it to :attr:`out`.

        Args:
            extra: further manifest fields (counts, tokenizer, tasks ...), JSON types only.
        """
        manifest = {**self.record, **(extra or {}), "files": _files(self.dir)}
        write_manifest(self.dir, manifest)
        _rust.publish_dir(str(self.dir), str(self.out))
        for stale in partials(self.out):
            shutil.rmtree(stale, ignore_errors=True)
        self.dir, self.done = self.out, True
        return self.out


@contextmanager
def stage(
    out: Path | str,
    *,
    name: str,
    version: int = 1,
    params: Mapping[str, Any],
    inputs: Sequence[Path | str] = (),
    kind: str | None = None,
    fresh: bool = False,
) -> Iterator[Stage]:
    """Open a stage for work, alone: a second process on the same output waits for the first.

    Args:
        out: the directory to publish.
        name: the stage's name, part of the digest.
        version: the stage's own format version; raise it when the same inputs give other bytes.
        params: everything else that decides the output; JSON types only.
        inputs: files and directories that are read.
        kind: the manifest's ``format`` (default ``"embkit." + name``).
        fresh: forget a finished output and any partial work first.

    Raises:
        UsageError: ``out`` exists and is not an embkit output, or a parameter is no JSON type.
    """
    out = local(out)
    if out.exists() and not (out / "manifest.json").is_file() and any(out.iterdir()):
        raise UsageError(
            "The output directory exists and was not written by embkit.",
            where=out,
            fix="choose another directory, or empty this one",
        )
    digests = {f"{i}:{Path(p).name}": digest_of(p) for i, p in enumerate(inputs)}
    record: dict[str, Any] = {
        "format": kind or f"embkit.{name}",
        "version": VERSION,
        "stage": name,
        "stage_version": version,
        "params": dict(params),
        "inputs": digests,
    }
    try:
        digest = _rust.blake3(json.dumps(record, sort_keys=True, allow_nan=False).encode())
    except (TypeError, ValueError) as error:
        raise UsageError(f"A parameter of stage {name} is no JSON value: {error}") from error
    record |= {"digest": digest, "embkit": __version__}
    out.parent.mkdir(parents=True, exist_ok=True)
    if fresh:
        shutil.rmtree(partial_dir(out, digest), ignore_errors=True)
        try:
            there = is_done(out, digest)
        except FormatError:
            there = True  # the user says that it may go
        if there:
            (out / "manifest.json").unlink()
            shutil.rmtree(out)
    work = Stage(out, record["format"], digest, record)
    if work.done:
        say(f"{out.name}: there already, nothing to do")
        # What a kill between publishing and cleaning up may have left.
        shutil.rmtree(partial_dir(out, digest), ignore_errors=True)
        yield work
        return
    lock = _lock(work.dir)
    try:
        work.done = is_done(out, digest)  # another process may have finished it while we waited
        if work.done:
            shutil.rmtree(work.dir, ignore_errors=True)
            work.dir = out
        else:
            _sweep(work.dir)
        yield work
    finally:
        os.close(lock)


def local(out: Path | str) -> Path:
    """The path of an output.

    Raises:
        UsageError: a remote address.
    """
    if "://" in str(out):  # before Path, which would make one slash of the two
        raise UsageError(
            "Outputs are local directories.", where=out, fix="write locally, then copy it away"
        )
    return Path(out)


def partial_dir(out: Path, digest: str) -> Path:
    """Where a stage with this digest works until it publishes."""
    return out.parent / f".partial-{out.name}-{digest[:16]}"


def partials(out: Path) -> list[Path]:
    """Partial directories of an output, of any digest; those of ``NAME-2`` are not ``NAME``'s."""
    wanted = re.compile(re.escape(f".partial-{out.name}-") + "[0-9a-f]{16}")
    return sorted(p for p in out.parent.iterdir() if p.is_dir() and wanted.fullmatch(p.name))


def is_done(out: Path, digest: str) -> bool:
    """Whether ``out`` is a published output with this digest and none of its files is damaged.

    Raises:
        FormatError: a newer embkit wrote it; that is no reason to replace it.
    """
    if not (out / "manifest.json").is_file():
        return False
    try:
        manifest = read_manifest(out)
        if manifest.get("digest") != digest:
            return False
        check_files(out, manifest)
    except FormatError:
        raise
    except CorruptError:
        return False
    return True


def check_files(directory: Path, manifest: Mapping[str, Any] | None = None) -> None:
    """Check that each file of a manifest is there with its length, header and checksum table.

    Raises:
        CorruptError: a file is missing, has another length or another header.
    """
    manifest = manifest or read_manifest(directory)
    for name, want in manifest["files"].items():
        path = inside(directory, name)
        if not path.is_file():
            raise CorruptError(
                "A file that the manifest lists is missing.",
                where=path,
                fix="copy the directory again, or run its stage again with --fresh",
            )
        if _file_record(path) != want:
            raise CorruptError(
                "A file is not the one that was published: its length or checksum differs.",
                where=path,
                fix="copy the directory again, or run its stage again with --fresh",
            )


def inside(directory: Path, name: str) -> Path:
    """The path of a file that a manifest names.

    Raises:
        CorruptError: the name is no plain relative path, or passes through a symbolic link: what
            lies elsewhere is not part of what was published.
    """
    parts = name.split("/")
    plain = all(p not in ("", ".", "..") and "\\" not in p and "\0" not in p for p in parts)
    path = directory
    for part in parts if plain else ():
        path = path / part
        plain = plain and not path.is_symlink()
    if not plain:
        raise CorruptError(
            f"The manifest names a file outside its directory: {name!r}.",
            where=directory,
            fix="do not use this directory: embkit does not write such names",
        )
    return path


def digest_of(path: Path | str) -> str:
    """Digest of an input: a manifest's for embkit outputs, else BLAKE3 of names and contents."""
    path = Path(path)
    if path.is_file():
        return _hash_file(path)
    if (path / "manifest.json").is_file():
        manifest = read_manifest(path)
        content = {"digest": manifest.get("digest"), "files": manifest.get("files")}
        return _rust.blake3(json.dumps(content, sort_keys=True).encode())
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        lines = [f"{p.relative_to(path).as_posix()} {_hash_file(p)}" for p in files]
        return _rust.blake3("\n".join(lines).encode())
    raise FileNotFoundError(2, "No such file or directory", str(path))


def _files(directory: Path) -> dict[str, dict[str, Any]]:
    names = sorted(
        p.relative_to(directory).as_posix()
        for p in directory.rglob("*")
        if p.is_file() and p != directory / "manifest.json"
    )
    return {name: _file_record(directory / name) for name in names}


def _sweep(directory: Path) -> None:
    """Remove the temporary files of writers that were killed: they would be published too."""
    _rust.sweep_tmp(str(directory))
    for inner in sorted(directory.iterdir()):  # after the sweep, which takes folders away too
        if inner.is_dir():
            _sweep(inner)


def _file_record(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        try:
            return dict(_rust.file_info(str(path)))
        except FormatError:
            raise  # sound, and only newer: that is what the user must hear
        except CorruptError:
            pass  # a plain file of another program, or damaged: then its hash will differ
    return {"length": path.stat().st_size, "blake3": _hash_file(path)}


def _hash_file(path: Path) -> str:
    """BLAKE3 of a file; for large ones remembered by size and modification time."""
    stat = path.stat()
    if stat.st_size < _HASH_CACHE_FROM:
        return _rust.blake3_file(str(path))
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = _rust.blake3(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode())
    cached = home / "embkit" / "blake3" / key
    with suppress(OSError):
        return cached.read_text()
    digest = _rust.blake3_file(str(path))
    with suppress(OSError):  # a cache that cannot be written is only slower
        cached.parent.mkdir(parents=True, exist_ok=True)
        _rust.publish_file(str(cached), digest.encode())
    return digest


def _lock(directory: Path) -> int:
    """Hold the partial directory itself, so that no lock file is left behind."""
    while True:
        # Another executor may publish the directory, which takes it away, between any two lines.
        with suppress(FileExistsError):
            directory.mkdir(parents=True)
        with suppress(FileNotFoundError):
            handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(handle, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                if os.stat(directory).st_ino == os.fstat(handle).st_ino:  # noqa: PTH116
                    return handle
            os.close(handle)
