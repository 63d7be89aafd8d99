"""Dynamic hard negatives: who trains on which slice of its mined list, and when it moves on.

Conan-embedding's rules (arXiv 2408.15710 and 2509.12892), see :class:`embkit.recipe.Dynamic` and
docs/training.md. The state is a few numbers per example, a function of the run's settings and
steps, and part of every checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from embkit.errors import CorruptError, UsageError
from embkit.recipe import Dynamic

if TYPE_CHECKING:
    import torch

    from embkit.data.batches import Batches
    from embkit.data.tables import Array
    from embkit.train.batches import Batch

_COLUMNS = {
    "slice": np.int32,  # which slice of the list
    "since": np.int32,  # the step from which batches have it; those before have the slice before
    "visits": np.int32,  # steps that trained on it
    "first": np.float32,  # mean cosine at the first of them
    "now": np.float32,  # and at the last
}


@dataclass
class _Task:
    """State of one task's usable examples: columns [m], and who was visited since the check."""

    number: int
    columns: dict[str, Array]
    visited: list[Array]


class Slices:
    """The slices that the examples of a run train on, over one table of ranked negatives.

    Example e trains on ``list[first + s * n : first + (s + 1) * n]`` with its slice number s, from
    0, and n hard negatives a step. A list too short for that gives its last n. 20 bytes an example.

    Every rank of a run holds the same state: it follows from the scores of the global batch, so
    with several ranks :meth:`observe` takes scores that were gathered from all of them (4 bytes an
    example of the batch).

    Args:
        rule: its settings. batches: gives the plan and the lists as they are now. n: hard
            negatives per example. since: the first step that trains on this table.

    Raises:
        UsageError: no list of a task is long enough for a slice.
    """

    def __init__(self, rule: Dynamic, batches: Batches, *, n: int, since: int = 0) -> None:
        self.rule, self.n, self.since = rule.resolved(), n, since
        self.names, self.loader = batches.names, batches.loader
        self.tasks: dict[int, _Task] = {}
        for number, (name, count) in enumerate(batches.examples.items()):
            if batches.store.task(name)["kind"] == "retrieval":
                columns = {key: np.zeros(count, dtype) for key, dtype in _COLUMNS.items()}
                self.tasks[number] = _Task(number, columns, [])
                self._check_lists(number, count)

    def _check_lists(self, number: int, count: int) -> None:
        longest = int(self.loader.listed(number, np.arange(count, dtype=np.uint64)).max())
        if longest < self.rule.first + self.n:
            raise UsageError(
                f"The longest list of negatives of task {self.names[number]!r} has {longest}, the "
                f"first slice ends at {self.rule.first + self.n}.",
                where="dynamic",
                fix="mine more per query (mine.k = 100), or set dynamic.first = 0 when mining "
                "has already skipped the nearest",
            )

    def starts(self, step: int) -> Array | None:
        """Where the slices of a step's examples begin in their lists, u64 [B].

        None for a task without hard negatives. Needs what was observed up to step
        ``step - rule.lag``, and gives the same whatever was observed after it.
        """
        number, examples = self.loader.examples(step)
        if number not in self.tasks:
            return None
        state = self.tasks[number].columns
        at = state["slice"][examples] - (step < state["since"][examples])
        return (self.rule.first + at.astype(np.int64) * self.n).astype(np.uint64)

    def observe(self, step: int, examples: Array, scores: Array) -> dict[str, Any]:
        """Take the scores of a trained step; after the rule's number of steps, check.

        Args:
            step: counted from 0; of every step, in order. examples: u64 [B] of the global batch.
            scores: float32 [B], mean cosine of each query with its hard negatives, NaN without any.

        Returns:
            What the check found by task: examples checked, replaced, and out of negatives, means of
            the last and first scores. Empty without a check.
        """
        number, _, _, _ = self.loader.plan.part(step)
        task = self.tasks.get(number)
        if task is not None:
            state = task.columns
            # A slice that is on its way out says nothing of the one that takes its place.
            live = np.isfinite(scores) & (step >= state["since"][examples])
            e, score = examples[live], scores[live]
            state["first"][e] = np.where(state["visits"][e] == 0, score, state["first"][e])
            state["now"][e] = score
            state["visits"][e] += 1
            task.visited.append(e)
        assert self.rule.every is not None
        if (step + 1) % self.rule.every:
            return {}
        checked = ((self.names[t.number], self._check(t, step)) for t in self.tasks.values())
        return {name: found for name, found in checked if found}

    def _check(self, task: _Task, step: int) -> dict[str, Any]:
        """Only examples visited since the last check: for the others it would say the same."""
        if not task.visited:
            return {}
        state = task.columns
        e = np.unique(np.concatenate(task.visited))
        task.visited.clear()
        if not len(e):
            return {}
        first, now = (state[key][e].astype(np.float64) for key in ("first", "now"))
        wanted = e[no_longer_hard(self.rule, first, now)]
        slices = (self.loader.listed(task.number, wanted).astype(np.int64) - self.rule.first) // (
            self.n
        )
        more = state["slice"][wanted] + 1 < slices
        replaced = wanted[more]
        state["slice"][replaced] += 1
        state["since"][replaced] = step + self.rule.lag
        state["visits"][replaced] = 0
        return {
            "checked": len(e),
            "replaced": len(replaced),
            "exhausted": len(wanted) - len(replaced),
            "now": float(now.mean()),
            "first": float(first.mean()),
        }

    def columns(self) -> dict[str, Array]:
        """The state by name, for a checkpoint."""
        return {
            f"{self.names[t.number]}.{key}": column
            for t in self.tasks.values()
            for key, column in t.columns.items()
        }

    def restore(self, tensors: Mapping[str, torch.Tensor], *, done: int) -> None:
        """Put back what :meth:`columns` gave after ``done`` steps.

        Raises:
            CorruptError: the state is of other tasks or examples.
        """
        want = self.columns()
        if {k: tuple(v.shape) for k, v in tensors.items()} != {k: v.shape for k, v in want.items()}:
            raise CorruptError(
                "The state of the hard negatives in the checkpoint is of other data.",
                fix="run the stage again with --fresh",
            )
        for key, column in want.items():
            column[:] = tensors[key].numpy()
        # Who was visited since the last check follows from the plan: the rest of the state says
        # whether they count.
        assert self.rule.every is not None
        for step in range(max(self.since, done - done % self.rule.every), done):
            number, examples = self.loader.examples(step)
            if number in self.tasks:
                visits = self.tasks[number].columns["visits"]
                self.tasks[number].visited.append(examples[visits[examples] > 0])


def no_longer_hard(rule: Dynamic, first: Array, now: Array) -> Array:
    """Conan's rule for mean cosines float64 [n] at the first and the last visit, bool [n]."""
    size = np.abs(now) if rule.rule == "conan-v1" else now
    fallen = (rule.ratio * now < first) & (size < rule.ceiling)
    return np.asarray(fallen | (first < rule.floor))


def mean_scores(embeddings: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean cosine of each query with its hard negatives at full width, float32 [b].

    Stays on the device of the embeddings, so that nothing waits for it.

    Args:
        embeddings: [R, D] of the step, as the loss takes them.
        batch: names the rows. Where an example has no hard negative, the mean is NaN.
    """
    import torch

    with torch.no_grad():
        e_RD = embeddings.detach().float()
        q_BD = e_RD[batch.query.to(e_RD.device)]
        h_BHD = e_RD[batch.hard.to(e_RD.device)]
        mask = batch.sides.hard_mask.to(e_RD.device)
        cosine = torch.nn.functional.cosine_similarity(q_BD[:, None], h_BHD, dim=2)
        mean: torch.Tensor = torch.where(mask, cosine, 0.0).sum(1) / mask.sum(1)
    return mean
