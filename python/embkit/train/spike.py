"""The rule that stops a run whose loss jumps.

A step is a spike when its loss is above the median of its task's last 64 losses (of the last 2000
steps) by more than ``spike`` spreads, once there are 32. The spread is 1.4826 times the median
absolute deviation (the standard deviation of a normal distribution), but at least a tenth of the
median and at least 0.1: a loss that has become small and steady may still wander. With the default
of 10 a spike is at least 1.0 above the median and at least twice as large.
"""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from typing import Any

_WINDOW, _LEAST = 64, 32
_STEPS = 2000  # what a resumed run reads again of its log


class Spikes:
    """Watches the losses of a run by task; a function of the losses, so a resumed run agrees.

    Args:
        spreads: how many above the median is a spike; None for never.
        lines: of the log so far.
    """

    def __init__(self, spreads: float | None, lines: Iterable[Mapping[str, Any]] = ()) -> None:
        self.spreads = spreads
        self._seen: dict[str, deque[tuple[int, float]]] = defaultdict(lambda: deque(maxlen=_WINDOW))
        self._step = 0
        for line in lines:
            self.add(line)

    def limit(self, task: str) -> float | None:
        """The loss above which the next step of a task is a spike; None while nothing is."""
        seen = [loss for step, loss in self._seen[task] if step > self._step - _STEPS]
        if self.spreads is None or len(seen) < _LEAST:
            return None
        median = statistics.median(seen)
        spread = 1.4826 * statistics.median(abs(x - median) for x in seen)
        return median + self.spreads * max(spread, 0.1 * abs(median), 0.1)

    def add(self, line: Mapping[str, Any]) -> None:
        """Take up a step's line of the log; new negatives begin a new history."""
        if "refresh" in line:
            self._seen.clear()
        self._step = int(line["step"])
        self._seen[line["task"]].append((self._step, float(line["loss"])))
