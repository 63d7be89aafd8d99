"""The disk after power loss, SQLite's way: every prefix of the operations, and of what was not yet
durable every subset.

The model: a write reaches the disk whole, by half, or not at all until its file is fsynced; a
change of names is atomic and may be lost until the directory that holds the name is fsynced; what
was fsynced stays. A change that builds on a lost one is lost too: journals keep their order.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

from tracing import Op

Disk = dict[str, bytes | None]  # by path; None is a directory
LOST, HALF, WHOLE = 0, 1, 2


def apply(disk: Disk, op: Op, fate: int = WHOLE) -> None:
    """Change the disk by one operation as far as it got."""
    if fate == LOST:
        return
    if op.kind in ("create", "mkdir"):
        if _parent(op.path) in disk:
            disk[op.path] = None if op.kind == "mkdir" else b""
    elif op.kind == "write":
        before = disk.get(op.path)
        if before is not None:
            disk[op.path] = before + (op.data if fate == WHOLE else op.data[: len(op.data) // 2])
    elif op.kind == "remove":
        _take(disk, op.path)
    elif op.kind == "rename" and op.path in disk:
        moved = _take(disk, op.path)
        _take(disk, op.to)
        disk.update({op.to + name: content for name, content in moved.items()})
    elif op.kind == "exchange" and op.path in disk:
        one, two = _take(disk, op.path), _take(disk, op.to)
        disk.update({op.to + name: content for name, content in one.items()})
        disk.update({op.path + name: content for name, content in two.items()})


def crashes(start: Disk, ops: Sequence[Op], *, limit: int, seed: int = 0) -> Iterator[Disk]:
    """States the disk may be in, at most ``limit``: all of a prefix where they are few enough,
    otherwise everything lost, everything there, each one lost, and a sample of the rest."""
    per_prefix = limit // (len(ops) + 1)
    assert per_prefix >= 4, f"{len(ops)} operations are too many for {limit} states"
    rng = random.Random(seed)
    needs = durability(start, ops)
    base = dict(start)  # what is durable whatever happens, applied as far as it is a prefix
    done = 0
    for cut in range(len(ops) + 1):
        undone = [i for i in range(done, cut) if _open(needs[i], cut)]
        first = undone[0] if undone else cut
        while done < first:
            apply(base, ops[done])
            done += 1
        kinds = [3 if ops[i].kind == "write" else 2 for i in undone]
        for fates in _choices(kinds, per_prefix, rng):
            disk, chosen = dict(base), dict(zip(undone, fates, strict=True))
            for i in range(done, cut):
                apply(disk, ops[i], chosen.get(i, WHOLE))
            yield disk


def durability(start: Disk, ops: Sequence[Op]) -> list[int | None]:
    """For each operation the place of the sync that makes it durable; -1: needs none."""
    disk: dict[str, int] = {path: i for i, path in enumerate([".", *start])}  # path to inode
    fresh = itertools.count(len(disk))
    waiting: dict[int, list[int]] = {}  # inode to operations
    needs: list[int | None] = []
    for i, op in enumerate(ops):
        needs.append(-1 if op.kind == "sync" else None)
        if op.kind == "sync":
            for earlier in waiting.pop(disk[op.path], []):
                needs[earlier] = i
            continue
        inode = disk[op.path] if op.kind == "write" else disk[_parent(op.to or op.path)]
        waiting.setdefault(inode, []).append(i)
        if op.kind in ("create", "mkdir"):
            disk[op.path] = next(fresh)
        elif op.kind != "write":
            one, two = _take(disk, op.path), _take(disk, op.to) if op.to else {}
            disk.update({op.to + name: n for name, n in one.items() if op.to})
            if op.kind == "exchange":
                disk.update({op.path + name: n for name, n in two.items()})
    return needs


def below(disk: Disk, path: str) -> dict[str, bytes]:
    """The files under a path, by their names relative to it."""
    found = {p[len(path) + 1 :]: c for p, c in disk.items() if p.startswith(f"{path}/")}
    return {name: content for name, content in found.items() if content is not None}


def _open(needed: int | None, cut: int) -> bool:
    return needed is None or needed >= cut


def _choices(kinds: list[int], limit: int, rng: random.Random) -> Iterator[tuple[int, ...]]:
    values = [(LOST, WHOLE) if k == 2 else (LOST, HALF, WHOLE) for k in kinds]
    if math.prod(kinds) <= limit:
        yield from itertools.product(*values)
        return
    whole = (WHOLE,) * len(kinds)
    chosen = {whole, (LOST,) * len(kinds)}
    singles = [(*whole[:i], fate, *whole[i + 1 :]) for i, v in enumerate(values) for fate in v[:-1]]
    chosen.update(rng.sample(singles, min(len(singles), limit - 2)))
    while len(chosen) < limit:
        chosen.add(tuple(rng.choice(v) for v in values))
    yield from sorted(chosen)


def _take(disk: dict, path: str) -> dict:
    """Remove a path and what is below it; by the rest of the path."""
    names = [p for p in disk if p == path or p.startswith(f"{path}/")]
    return {name[len(path) :]: disk.pop(name) for name in names}


def _parent(path: str) -> str:
    return PurePosixPath(path).parent.as_posix()
