"""log.jsonl, one line a step, and the batch that is saved when a step fails.

The log is appended while the run goes and fsynced before each checkpoint; a resumed run first cuts
it back to the checkpoint, so that it never shows a step twice and equals an uninterrupted run's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from embkit import container
from embkit.errors import CorruptError

if TYPE_CHECKING:
    from embkit.train.batches import Batch


_TAIL = 1 << 20  # bytes


class Log:
    """Appends JSON lines to a file; open between :meth:`start` and :meth:`close`.

    Args:
        writes: False for a rank that only reads what the first one has written.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self._handle: IO[str] | None = None

    def start(self, steps: int, size: int = 0) -> list[dict[str, Any]]:
        """Cut the file back to the first ``steps`` steps and open it behind them.

        Costs the same at any step: only the end of what stays is read.

        Args:
            size: bytes of those steps' lines, which :meth:`sync` gave.

        Returns:
            The last lines that stay, some thousands.

        Raises:
            CorruptError: the file does not end with that step's line there.
        """
        kept = _tail(self.path, size)
        if (kept[-1].get("step") if kept else 0) != steps:
            raise CorruptError(
                f"log.jsonl does not hold the {steps} steps that the checkpoint has done.",
                where=self.path,
                fix="run the stage again with --fresh",
            )
        if self.writes:
            self._handle = self.path.open("a", encoding="utf-8")
            self._handle.truncate(size)
            self.sync()
        return kept

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append one line and hand it to the operating system."""
        if self.writes:
            assert self._handle is not None
            self._handle.write(_line(entry))
            self._handle.flush()

    def sync(self) -> int:
        """Make the lines so far survive a power loss; returns the bytes of the file."""
        if self._handle is None:
            return 0
        os.fsync(self._handle.fileno())
        return os.fstat(self._handle.fileno()).st_size

    def close(self) -> None:
        """Sync and close."""
        if self._handle is not None:
            self.sync()
            self._handle.close()
            self._handle = None


def read_log(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; a line that a kill has torn ends it."""
    entries: list[dict[str, Any]] = []
    for line in path.read_text("utf-8", errors="replace").splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if not line.endswith("\n") or not isinstance(entry, dict):
            break
        entries.append(entry)
    return entries


def _tail(path: Path, size: int) -> list[dict[str, Any]]:
    """The last whole lines within the first ``size`` bytes; none when something is wrong there."""
    if size == 0 or not path.is_file() or path.stat().st_size < size:
        return []
    start = max(size - _TAIL, 0)
    with path.open("rb") as handle:
        handle.seek(start)
        data = handle.read(size - start)
    lines = data.splitlines(keepends=True)
    try:
        found = [json.loads(line) for line in lines[1 if start else 0 :]]
    except ValueError:
        return []
    return found if data.endswith(b"\n") and isinstance(found[-1], dict) else []


def save_failed_batch(folder: Path, batch: Batch, *, rank: int = 0) -> list[Path]:
    """Write a rank's batch for inspection: rows, keys, tokens; a file for each part of the step."""
    return [_save_failed(folder, part, rank) for part in (batch, *batch.others)]


def _save_failed(folder: Path, batch: Batch, rank: int) -> Path:
    filled = batch.filled
    end = (f"-part-{batch.place}" if batch.place else "") + (f"-rank-{rank}" if rank else "")
    path = folder / f"failed-step-{batch.step + 1:06d}{end}.safetensors"
    flat = [m.flat() for m in batch.micro]
    lengths = np.concatenate([n.cpu().numpy() for _, n in flat])
    names = (
        "query", "positive", "hard", "query_key", "positive_key", "hard_key", "score", "weight",
    )  # fmt: skip
    container.save(
        path,
        {
            "rows": filled.rows,
            "tokens": np.concatenate([ids.cpu().numpy() for ids, _ in flat]),
            "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.uint64),
            "examples": filled.examples,
            "hard_mask": filled["hard_mask"].astype(np.uint8),
            **{name: filled[name] for name in names},
        },
        kind="embkit.batch",
        metadata={"task": filled.task, "step": str(batch.step + 1)},
    )
    return path


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, separators=(",", ":")) + "\n"
