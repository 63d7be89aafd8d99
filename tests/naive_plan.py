"""The reference of the Rust plan: which examples are the batch of a step, in numpy.

Tasks: steps come in blocks of K. Inside a block each task has the number of steps that its weight
gives by largest remainder, in an order that a keyed permutation deals; so the number of a task's
batches before any step is a sum in closed form, and nothing has to be replayed on resume. Rows: a
task's epoch is a keyed permutation of its examples, cut into whole batches (the rest of an epoch is
dropped, another rest each epoch); the task's batch number alone gives epoch and place.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from naive_draws import key_of, permute

from embkit.errors import UsageError

BLOCK = 32  # steps; more when a task's weight asks for less than one in a block
_MAX_BLOCK = 4096


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the plan knows of a task.

    Attributes:
        name: unique; draws depend on it, not on the order of the tasks.
        examples: number of usable examples.
        weight: share of the steps, any scale.
        batch_size: examples of one of its batches; 0 for the plan's.
    """

    name: str
    examples: int
    weight: float
    batch_size: int = 0


@dataclass(frozen=True, kw_only=True)
class Part:
    """The batch of one step.

    Attributes:
        step: counted from 0.
        task: index of the task.
        ordinal: number of this task's batches before.
        epoch: passes over the task's examples that are complete.
        examples: u64 [batch_size], numbers of the task's usable examples.
        weight: of this part in the step's loss.
    """

    step: int
    task: int
    ordinal: int
    epoch: int
    examples: np.ndarray
    weight: float = 1.0


class Plan:
    """The plan of a run.

    Args:
        seed: of the order.
        tasks: at least one; those of weight 0 never come.
        batch_size: examples of a step.

    Raises:
        UsageError: no task, a negative weight, or a task smaller than a batch.

    >>> plan = Plan(seed=0, tasks=[Task(name="a", examples=10, weight=1.0)], batch_size=4)
    >>> plan.batches_per_epoch(0), plan.task_of(7)
    (2, (0, 7))
    """

    def __init__(self, *, seed: int, tasks: Sequence[Task], batch_size: int) -> None:
        self.seed, self.tasks, self.batch_size = seed, tuple(tasks), batch_size
        total = sum(t.weight for t in self.tasks)
        if total <= 0 or any(t.weight < 0 for t in self.tasks):
            raise UsageError(
                "The task weights leave nothing to train on.",
                where={t.name: t.weight for t in self.tasks},
                fix="give each task a weight of 0 or more, and at least one above 0",
            )
        for t in self.tasks:
            if t.weight > 0 and t.examples < (t.batch_size or batch_size):
                raise UsageError(
                    f"Task {t.name!r} has {t.examples} usable examples, fewer than a batch of "
                    f"{t.batch_size or batch_size}.",
                    where=f"task {t.name}",
                    fix=f"set batch_size to {t.examples} or less, or give the task weight 0",
                )
        self.counts = block_counts([t.weight / total for t in self.tasks])
        self.block = int(self.counts.sum())
        self._ends = np.cumsum(self.counts)

    def batches_per_epoch(self, task: int) -> int:
        """Whole batches in one pass over a task."""
        return self.tasks[task].examples // self.size(task)

    def size(self, task: int) -> int:
        """Examples of a batch of a task."""
        return self.tasks[task].batch_size or self.batch_size

    def task_of(self, step: int) -> tuple[int, int]:
        """The task of a step, and how many batches of that task come before it."""
        block, place = divmod(step, self.block)
        order = self._order(block)
        task = int(order[place])
        before = int((order[:place] == task).sum())
        return task, block * int(self.counts[task]) + before

    def count_before(self, step: int) -> list[int]:
        """Batches of each task in the steps before ``step``: the cursors of a checkpoint."""
        block, place = divmod(step, self.block)
        inside = np.bincount(self._order(block)[:place], minlength=len(self.tasks))
        return [int(v) for v in block * self.counts + inside]

    def __call__(self, step: int) -> Part:
        """The batch of a step; costs the same for any step."""
        task, ordinal = self.task_of(step)
        t = self.tasks[task]
        epoch, place = divmod(ordinal, self.batches_per_epoch(task))
        key = key_of(self.seed, "rows", t.name, epoch)
        examples = permute(t.examples, key, place * self.size(task), self.size(task))
        return Part(step=step, task=task, ordinal=ordinal, epoch=epoch, examples=examples)

    @functools.lru_cache(maxsize=4)  # noqa: B019 - a plan lives as long as its run
    def _order(self, block: int) -> np.ndarray:
        """Task of each step of a block."""
        slot = permute(self.block, key_of(self.seed, "block", block), 0, self.block)
        return np.searchsorted(self._ends, slot.astype(np.int64), side="right")


def block_counts(shares: Sequence[float]) -> np.ndarray:
    """Steps of each task in a block, int64, by largest remainder (ties: the earlier task).

    The block is the smallest multiple of 32 steps in which each task of positive share comes.

    Raises:
        UsageError: a share so small that it would not come once in 4,096 steps.
    """
    share = np.asarray(shares, np.float64)
    block = BLOCK
    while block <= _MAX_BLOCK:
        quota = share * block
        counts = np.floor(quota + 1e-9).astype(np.int64)
        rest = np.where(share > 0, counts - quota, np.inf)
        counts[np.argsort(rest, kind="stable")[: block - int(counts.sum())]] += 1
        if (counts[share > 0] > 0).all():
            return counts
        block += BLOCK
    raise UsageError(
        f"A task's weight is so small that it would not come once in {_MAX_BLOCK} steps.",
        where=f"shares {[round(float(s), 6) for s in share]}",
        fix="raise its weight, or set it to 0",
    )
