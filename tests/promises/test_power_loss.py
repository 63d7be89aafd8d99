"""Promises of published directories through power loss, from what strace saw them do."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import disk_model
import pytest
import tiny
from small import full_count
from tracing import Op, record, unavailable

from embkit import data

reason = unavailable()
pytestmark = [pytest.mark.promise, pytest.mark.skipif(reason is not None, reason=str(reason))]


@pytest.fixture(scope="module")
def clean(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("few")
    tiny.build(tiny.make_source(out / "source", rows=12), tokenizer, out)
    return out / "clean"


def tokenize(clean: Path, tokenizer: Path, out: Path, *, longest: int = 24) -> None:
    with tiny.small_shards(500):
        data.tokenize(
            clean, out=out / "store", tokenizer=tokenizer, max_length_query=12,
            max_length_passage=longest,
        )  # fmt: skip


@pytest.fixture(scope="module")
def recorded(
    clean: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[disk_model.Disk, list[Op], dict[str, bytes], dict[str, bytes]]]:
    """Two runs: into nothing, and in the place of another store. Start, operations, old, new."""
    found = {}
    for name in ("new", "replace"):
        root = tmp_path_factory.mktemp(name)
        out = root / "out"
        out.mkdir()
        if name == "replace":
            tokenize(clean, tokenizer, out, longest=16)
        start: disk_model.Disk = {".": None}
        for path in sorted(out.rglob("*")):
            start[path.relative_to(out).as_posix()] = path.read_bytes() if path.is_file() else None
        old = tiny.tree(out / "store") if name == "replace" else {}
        ops = record(partial(tokenize, clean, tokenizer, out), out, root / "trace")
        found[name] = (start, ops, old, tiny.tree(out / "store"))
    return found


@pytest.mark.parametrize("name", ["new", "replace"])
def test_sync_order(recorded: dict, name: str) -> None:
    """P2: each file is fsynced after its last write and before the rename that shows it, and its
    directory afterwards, before anything is deleted and before the end."""
    start, ops, _, new = recorded[name]
    needs = disk_model.durability(start, ops)
    shown = max(
        i for i, op in enumerate(ops) if op.kind in ("rename", "exchange") and op.to == "store"
    )
    for i, (op, needed) in enumerate(zip(ops, needs, strict=True)):
        if op.kind == "remove":
            continue  # may come back: then it is swept
        assert needed is not None, f"never durable: {op.kind} {op.path} {op.to}"
        if i < shown and op.kind != "sync":
            beside = "/" not in (op.to or op.path)  # the work's own directory, the old store
            assert needed < shown or beside, f"shown before it was durable: {op.kind} {op.path}"
    renamed = 0
    for i, op in enumerate(ops):
        if op.kind == "rename" and ".tmp" in op.path and op.to.endswith((".safetensors", ".json")):
            synced = [j for j, o in enumerate(ops) if o.kind == "sync" and o.path == op.path]
            written = [j for j, o in enumerate(ops) if o.kind == "write" and o.path == op.path]
            assert written and synced and max(written) < min(synced) < i, op.path
            renamed += 1
    assert renamed >= sum(n.endswith(".safetensors") for n in new) + 1
    first_delete = min((i for i, op in enumerate(ops) if i > shown and op.kind == "remove"),
                       default=len(ops))  # fmt: skip
    assert any(op.kind == "sync" and op.path == "." for op in ops[shown:first_delete])


@pytest.mark.parametrize("name", ["new", "replace"])
def test_crash_model(
    recorded: dict, clean: Path, tokenizer: Path, tmp_path: Path, name: str
) -> None:
    """P2: after power loss at any moment the old store or the new one is there, and the next run
    makes the new one of whatever else is left."""
    start, ops, old, new = recorded[name]
    total, seen, kinds = 0, {}, {"old": 0, "new": 0}
    for disk in disk_model.crashes(start, ops, limit=4096):
        total += 1
        now = disk_model.below(disk, "store")
        assert now in (old, new), f"torn: {sorted(now)}"
        kinds["new" if now == new else "old"] += 1
        if now != new:
            seen[hash(frozenset(disk.items()))] = disk
    assert min(kinds.values()) > 0
    # The last operation was seen through: nothing acknowledged may be lost.
    assert now == new
    chosen = list(seen.values())[:: max(1, len(seen) // full_count(400, 25))]
    for i, disk in enumerate(chosen):
        out = tmp_path / str(i)
        for path, content in disk.items():
            if content is None:
                (out / path).mkdir(parents=True, exist_ok=True)
        for path, content in disk.items():
            if content is not None:
                (out / path).write_bytes(content)
        if old:
            data.Store(out / "store", verify="open")
        tokenize(clean, tokenizer, out)
        assert tiny.tree(out / "store") == new, f"state {i}"
        shutil.rmtree(out)
    print(f"{name}: {len(ops)} operations, {total} states ({kinds}), {len(seen)} distinct without "
          f"the new store, {len(chosen)} of them continued")  # fmt: skip


def test_the_model_finds_a_missing_fsync(recorded: dict) -> None:
    """The test itself: without the fsync of one file, of one kind, or of a directory it objects."""
    start, ops, old, new = recorded["new"]
    last = max(i for i, op in enumerate(ops) if op.kind == "sync")
    assert ops[last].path == "."
    for missing in ("tokenizer.json", ".safetensors", "manifest.json"):
        broken = [op for op in ops if not (op.kind == "sync" and missing in op.path)]
        states = disk_model.crashes(start, broken, limit=4096)
        assert any(disk_model.below(d, "store") not in (old, new) for d in states), missing
    without = [op for i, op in enumerate(ops) if i != last]
    *_, first, end = disk_model.crashes(start, without, limit=4096)
    assert [disk_model.below(d, "store") == new for d in (first, end)] == [False, True]
