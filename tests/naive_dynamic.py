"""Conan's dynamic hard negatives, replayed from scores: one example at a time, no arrays.

The reference of ``embkit.train.dynamic``: given what a run scored at each step, it says where every
slice had to begin and what every check had to count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass
class Example:
    """One example: its slice, from which step on batches have it, and its scores."""

    slice: int = 0
    since: int = 0
    first: float | None = None
    now: float = 0.0


class Replay:
    """The rule over one task.

    Args:
        lengths: of each example's list. n: negatives a step.
        rule: conan-v1 or conan-v2. first, every, lag: see docs/training.md.
    """

    def __init__(
        self, lengths: Sequence[int], n: int, rule: str, *, first: int, every: int, lag: int
    ) -> None:
        self.lengths, self.n, self.rule = lengths, n, rule
        self.first, self.every, self.lag = first, every, lag
        self.examples = [Example() for _ in lengths]
        self.visited: set[int] = set()

    def places(self, step: int, example: int) -> range:
        """Places in its list that an example trains on at a step."""
        state = self.examples[example]
        slice_ = state.slice if step >= state.since else state.slice - 1
        start = self.first + slice_ * self.n
        if start + self.n > self.lengths[example]:  # only the first slice of a short list
            start = max(0, self.lengths[example] - self.n)
        return range(start, min(start + self.n, self.lengths[example]))

    def step(self, step: int, scores: Mapping[int, float | None]) -> dict[str, float]:
        """Take the scores of a step's examples; what its check counts, if there is one."""
        for example, score in scores.items():
            state = self.examples[example]
            if score is None or step < state.since:
                continue
            if state.first is None:
                state.first = score
            state.now = score
            self.visited.add(example)
        return self.check(step) if (step + 1) % self.every == 0 else {}

    def check(self, step: int) -> dict[str, float]:
        """Move the examples on whose negatives are no longer hard."""
        visited, self.visited = sorted(self.visited), set()
        if not visited:
            return {}
        replaced = exhausted = 0
        first, now = [], []
        for example in visited:
            state = self.examples[example]
            assert state.first is not None
            first.append(state.first)
            now.append(state.now)
            if not self.no_longer_hard(state.first, state.now):
                continue
            if self.first + (state.slice + 2) * self.n > self.lengths[example]:
                exhausted += 1
                continue
            replaced += 1
            self.examples[example] = Example(slice=state.slice + 1, since=step + self.lag)
        return {
            "checked": len(visited),
            "replaced": replaced,
            "exhausted": exhausted,
            "now": sum(now) / len(now),
            "first": sum(first) / len(first),
        }

    def no_longer_hard(self, first: float, now: float) -> bool:
        """The papers' words, with their numbers."""
        if self.rule == "conan-v1":
            return 1.15 * now < first and abs(now) < 0.8
        return first < 0.4 or (1.2 * now < first and now < 0.7)
