"""What each stage of a run has asked of its language model, over all attempts, in a file.

The stages' own reports hold only what the answers decide, so that a run that was killed ends with
the same bytes. What it took to get them, retries and a second start included, stands here.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from embkit import _rust
from embkit.synth.llm import Usage

Counts = dict[str, Any]  # as Usage.counts() gives them


class Spent:
    """Counts by stage, kept after every call of the model.

    Args:
        path: JSON file. A file that is damaged counts nothing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Counts]:
        """What was spent so far, by stage."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            return {str(stage): dict(counts) for stage, counts in found.items()}
        except (FileNotFoundError, ValueError, TypeError, AttributeError):
            return {}

    @contextmanager
    def counting(self, stage: str, usage: Usage) -> Iterator[None]:
        """Add what ``usage`` gains inside, also when that ends in an error."""
        before = usage.counts()
        try:
            yield
        finally:
            gained = _combined(usage.counts(), before, -1)
            if any(gained.values()):
                found = self.read()
                self._write(found | {stage: _combined(found.get(stage, {}), gained, 1)})

    def forget(self, stages: Container[str]) -> None:
        """Stages that are done anew begin at nothing."""
        found = self.read()
        left = {stage: counts for stage, counts in found.items() if stage not in stages}
        if left != found:
            self._write(left)

    def _write(self, counts: dict[str, Counts]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(counts, indent=1, sort_keys=True) + "\n"
        _rust.publish_file(str(self.path), text.encode())


def _combined(a: Counts, b: Counts, sign: int) -> Counts:
    """a + sign * b: numbers by name, and of tables (retries, rejected) entry by entry."""
    out: Counts = {}
    for name in {**a, **b}:
        x, y = a.get(name, 0), b.get(name, 0)
        if isinstance(x, dict) or isinstance(y, dict):
            both = _combined(x or {}, y or {}, sign)
            out[name] = {key: n for key, n in both.items() if n}
        else:
            out[name] = x + sign * y
    return out
