"""Work with a language model in shards that survive a kill: each is a file, whole or absent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from embkit import _rust
from embkit.progress import bar, say
from embkit.synth.llm import LLM

Row = dict[str, Any]


def run_shards(
    directory: Path,
    total: int,
    size: int,
    work: Callable[[int, int], list[Row]],
    *,
    llm: LLM,
    label: str,
    unit: str,
) -> list[Row]:
    """Make the rows of items 0 to ``total``, shard by shard, and return all of them.

    Shards of an earlier run are taken as they are when they verify. The bar shows what the model
    was asked, in this run.

    Args:
        directory: a stage's partial directory; ``shards/`` in it is removed when all is done.
        total: number of items.
        size: items of a shard.
        work: makes the rows (JSON types) of items ``start`` to ``stop``.
        llm: whose usage is shown.
    """
    folder = directory / "shards"
    folder.mkdir(exist_ok=True)
    _rust.sweep_tmp(str(folder))
    starts = list(range(0, total, size))
    rows: list[Row] = []
    missing: list[tuple[Path, int, int, int]] = []
    parts: dict[int, list[Row]] = {}
    before = 0
    for i, start in enumerate(starts):
        path, stop = folder / f"shard-{i:05d}-of-{len(starts):05d}.jsonl", min(start + size, total)
        found = _read(path)
        if found is None:
            missing.append((path, i, start, stop))
        else:
            parts[i] = found
            before += stop - start
    with bar(label, total=total, unit=unit) as progress:
        progress.start(before)
        for path, i, start, stop in missing:
            parts[i] = work(start, stop)
            _write(path, parts[i])
            usage = llm.usage
            notes: dict[str, object] = {"requests": usage.requests, "tokens": usage.tokens}
            notes |= {"rejected": sum(usage.rejected.values())} if usage.rejected else {}
            notes |= {"retries": sum(usage.retries.values())} if usage.retries else {}
            progress.advance(stop - start, **notes)
    if missing:
        say(f"{llm.name}: {llm.usage}")
    for i in range(len(starts)):
        rows += parts[i]
    return rows


def forget(directory: Path, which: Callable[[Row], bool]) -> None:
    """Remove the shards that have such a row: they are made again in the next run."""
    for path in sorted((directory / "shards").glob("shard-*.jsonl")):
        if any(map(which, _read(path) or ())):
            path.unlink()


def finish(directory: Path) -> None:
    """Remove the shards: what they hold is in the tables now."""
    shutil.rmtree(directory / "shards", ignore_errors=True)


def _write(path: Path, rows: list[Row]) -> None:
    body = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    head = json.dumps({"rows": len(rows), "blake3": _rust.blake3(body)}) + "\n"
    _rust.publish_file(str(path), head.encode() + body)


def _read(path: Path) -> list[Row] | None:
    """The rows of a shard; None when it is not there or damaged."""
    if not path.is_file():
        return None
    head, _, body = path.read_bytes().partition(b"\n")
    try:
        if json.loads(head)["blake3"] != _rust.blake3(body):
            return None
    except (ValueError, KeyError, TypeError):
        return None
    return [json.loads(line) for line in body.decode().splitlines()]
