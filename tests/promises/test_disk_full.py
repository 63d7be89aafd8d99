"""Promises when the disk is full or refuses, and about modes, links and names."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from small import full_count
from tiny import build, small_shards, tree
from tracing import in_child, traced, unavailable

from embkit import _rust, container, data
from embkit.errors import CorruptError
from embkit.stage import check_files, stage

pytestmark = pytest.mark.promise


@pytest.fixture
def make(built: Path, tokenizer: Path) -> Callable[[Path], object]:
    """Tokenize the same records again into ``out/store``, in small shards."""

    def tokenize(out: Path) -> None:
        with small_shards(600):
            data.tokenize(
                built / "clean", out=out / "store", tokenizer=tokenizer, max_length_query=12,
                max_length_passage=24, prompts={"query": "query: "},
            )  # fmt: skip

    return tokenize


def intact(out: Path, old: dict[str, bytes]) -> None:
    """What a failed run may leave: the old store as it was, and whole files to go on from."""
    now = tree(out / "store") if (out / "store").exists() else {}
    assert now == old
    for path in out.rglob("*"):
        assert not path.name.endswith(".tmp"), path
        assert path.parent != out or path.name == "store" or path.name.startswith(".partial-")
        if path.suffix == ".safetensors":
            _rust.open_tensors(path, "open")


# ---------------------------------------------------------------- P17


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty tmpfs; needs to be root."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_disk_full(small_disk: Path, make: Callable[[Path], object], built: Path) -> None:
    """P17: ENOSPC at many places: an OSError that says so, the old store intact, no temporary
    files; once there is room the same call goes on and gives the same bytes."""
    want = tree(built / "store")
    for replace in (False, True):
        old: dict[str, bytes] = {}
        if replace:
            subprocess.run(["mount", "-o", "remount,size=16m", small_disk], check=True)
            shutil.copytree(built / "clean", small_disk / "x")
            data.tokenize(built / "clean", out=small_disk / "store", vocab_size=200)
            shutil.rmtree(small_disk / "x")
            old = tree(small_disk / "store")
        used = shutil.disk_usage(small_disk).used
        failed = 0
        for room in range(4096, 4 << 20, full_count(8192, 40960)):
            size = f"remount,size={used + room}"
            subprocess.run(["mount", "-o", size, small_disk], check=True)
            code, text = in_child(partial(make, small_disk))
            if code == 0:
                break
            assert code == errno.ENOSPC, text
            intact(small_disk, old)
            failed += 1
        assert tree(small_disk / "store") == want
        assert [p.name for p in small_disk.iterdir()] == ["store"]
        print(f"replace {replace}: {failed} times no space, then {room // 1024} KiB were enough")
        assert failed >= 4
        shutil.rmtree(small_disk / "store")


def test_file_size_limit(make: Callable[[Path], object], built: Path, tmp_path: Path) -> None:
    """P17 without root: writes fail at every size of a file that there is."""
    want = tree(built / "store")
    failed = 0
    for limit in range(0, 65536, full_count(256, 2500)):

        def limited(limit: int = limit) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            make(tmp_path)

        code, text = in_child(limited)
        if code == 0:
            break
        assert code == errno.EFBIG, text
        intact(tmp_path, {})
        failed += 1
    assert failed >= 4
    assert tree(tmp_path / "store") == want


@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
def test_nth_call_fails(make: Callable[[Path], object], built: Path, tmp_path: Path) -> None:
    """P17: the n-th write, fsync or rename of the whole stage fails, in Rust or in Python. (Rust
    alone, every n: rust/embkit-store/tests/faults.rs.)"""
    want = tree(built / "store")
    calls = {"write": "ENOSPC", "fsync": "EIO", "rename,renameat2": "ENOSPC", "mkdir": "EDQUOT"}
    log = tmp_path / "log"
    failed: Counter[str] = Counter()
    for call, name in calls.items():
        n = 1
        while True:
            out = tmp_path / f"{call[:6]}-{n}"
            out.mkdir()
            # strace counts the calls of each thread by itself.
            code, text = traced(
                partial(make, out), log, "-e", f"trace={call}",
                "-e", f"inject={call}:error={name}:when={n}",
            )  # fmt: skip
            if "INJECTED" not in log.read_text():
                assert code == 0, text
                break
            assert code == getattr(errno, name), f"{call} {n}: {text}"
            failed[call] += 1
            there = tree(out / "store") if (out / "store").exists() else {}
            assert there in ({}, want), f"{call} {n}"
            for path in out.rglob("*.safetensors"):
                _rust.open_tensors(path, "open")
            assert not list(out.rglob("*.tmp")), f"{call} {n}"
            make(out)
            assert tree(out / "store") == want, f"{call} {n}"
            n += 1 if os.environ.get("EMBKIT_TEST_FULL") else 1 + 2 * n
    print(f"failed in turn: {dict(failed)}")
    assert set(failed) == set(calls)


# ---------------------------------------------------------------- P18


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(source: Path, tokenizer: Path, tmp_path: Path, umask: int) -> None:
    """P18: every file and directory of records, clean and store."""
    before = os.umask(umask)
    try:
        build(source, tokenizer, tmp_path / "out")
    finally:
        os.umask(before)
    for path in (tmp_path / "out").rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o777 if path.is_dir() else 0o666) & ~umask, (path, oct(mode))


NAMES = (
    "../outside.txt", "tokenizer/../../outside.txt", "/etc/hostname", "./outside.txt", ".", "..",
    "", "tokenizer//tokenizer.json", "tokenizer/", "tokenizer\\tokenizer.json", "a\0b", "link",
    "folder/tokenizer.json",
)  # fmt: skip


def test_names_in_manifests_stay_inside(built: Path, tmp_path: Path) -> None:
    """P18: path traversal, absolute names and symbolic links are refused before they are opened."""
    store = tmp_path / "store"
    shutil.copytree(built / "store", store)
    (tmp_path / "outside.txt").write_text("x")
    (store / "link").symlink_to(tmp_path / "outside.txt")
    (store / "folder").symlink_to(store / "tokenizer")
    good = container.read_manifest(store)
    for name in NAMES:
        bad = {**good, "files": {**good["files"], name: {"length": 1, "blake3": "0" * 64}}}
        container.write_manifest(store, bad)
        with pytest.raises(CorruptError, match="outside its directory"):
            data.Store(store)
    container.write_manifest(store, good)
    data.Store(store)


@pytest.mark.parametrize("name", ["texts-00000-of-{n:05}.safetensors", "tokenizer"])
def test_a_link_in_the_place_of_a_file_is_refused(built: Path, tmp_path: Path, name: str) -> None:
    """P18: also when it leads to the very bytes that the manifest names."""
    store = tmp_path / "store"
    shutil.copytree(built / "store", store)
    victim = store / name.format(n=container.read_manifest(store)["counts"]["shards"])
    victim.rename(tmp_path / "elsewhere")
    victim.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptError, match="outside its directory"):
        data.Store(store)
    with pytest.raises(CorruptError, match="outside its directory"):
        check_files(store, json.loads(_rust.read_manifest(store / "manifest.json")))


def test_links_are_not_published(tmp_path: Path) -> None:
    """P18: what a link leads to is not part of the output."""
    (tmp_path / "secret").write_text("x")
    with (
        pytest.raises(ValueError, match="neither a file nor a directory"),
        stage(tmp_path / "out", name="test", params={}) as work,
    ):
        (work.dir / "link").symlink_to(tmp_path / "secret")
        work.publish()
    assert not (tmp_path / "out").exists()
