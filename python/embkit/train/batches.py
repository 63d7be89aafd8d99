"""Batches: the plan's examples as padded token micro-batches, assembled ahead in threads.

A batch is a pure function of (run, step): threads only decide when it is computed, never what is
in it. Each distinct row of a batch is encoded once, however many examples name it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from embkit.losses import Sides, TaskData
from embkit.model.encoder import gather, micro_batches
from embkit.train.plan import Part, Plan


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Rows that go through the encoder together: ids, mask int64 [b, L], prompt_len int64 [b]."""

    ids: torch.Tensor
    mask: torch.Tensor
    prompt_len: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One step's input.

    Attributes:
        part: the plan's word on this step. task: name. sides: rows and keys.
        rows: u64 [R], the distinct rows in the order of the micro-batches.
        micro: the encoder's input; their embeddings, one after another, are [R, D].
        query, positive: int64 [B], positions of each side in those embeddings.
        hard: int64 [B, H].
        tokens: real tokens. padded: the same with padding.
    """

    part: Part
    task: str
    sides: Sides
    rows: np.ndarray
    micro: list[MicroBatch]
    query: torch.Tensor
    positive: torch.Tensor
    hard: torch.Tensor
    tokens: int
    padded: int = field(default=0)


class Batches:
    """Assembles the batches of a run.

    Args:
        plan: the plan over ``tasks``.
        tasks: their data, in the plan's order.
        store: the token store.
        seed: of draws of positives and hard negatives.
        hard: hard negatives per retrieval row.
        token_budget: tokens of a micro-batch, padding included.
        pad_id: id that fills rows up.
    """

    def __init__(
        self,
        plan: Plan,
        tasks: list[TaskData],
        store: Any,
        *,
        seed: int,
        hard: int,
        token_budget: int,
        pad_id: int,
    ) -> None:
        self.plan, self.tasks, self.store = plan, tasks, store
        self.seed, self.hard, self.token_budget, self.pad_id = seed, hard, token_budget, pad_id

    def __call__(self, step: int) -> Batch:
        """The batch of a step, counted from 0."""
        part = self.plan(step)
        task = self.tasks[part.task]
        sides = task.sides(
            part.examples, seed=self.seed, epoch=part.epoch, hard=self.hard, store=self.store
        )
        named = np.concatenate([sides.query, sides.positive, sides.hard.reshape(-1)])
        rows, index = np.unique(named, return_inverse=True)
        lengths = np.asarray(self.store.lengths(rows), np.int64)
        cuts = list(micro_batches(lengths, self.token_budget))
        order = np.concatenate(cuts)
        place = np.empty(len(rows), np.int64)
        place[order] = np.arange(len(rows))
        at = torch.from_numpy(place[index.reshape(-1)])
        b = len(sides.query)
        micro = [self._micro(rows[cut]) for cut in cuts]
        return Batch(
            part=part,
            task=task.name,
            sides=sides,
            rows=rows[order],
            micro=micro,
            query=at[:b],
            positive=at[b : 2 * b],
            hard=at[2 * b :].reshape(sides.hard.shape),
            tokens=int(lengths.sum()),
            padded=sum(m.ids.numel() for m in micro),
        )

    def _micro(self, rows: np.ndarray) -> MicroBatch:
        ids, mask = gather(self.store, rows, self.pad_id)
        prompt_len = np.asarray(self.store.prompt_len(rows), np.int64)
        return MicroBatch(
            ids=torch.from_numpy(ids),
            mask=torch.from_numpy(mask),
            prompt_len=torch.from_numpy(prompt_len),
        )


def prefetch(batches: Batches, start: int, stop: int, *, threads: int) -> Iterator[Batch]:
    """The batches of steps ``start`` to ``stop`` in order, assembled ahead by ``threads`` threads.

    Args:
        batches: what assembles them.
        start, stop: steps, counted from 0.
        threads: at least 1; at most ``threads + 1`` batches wait.
    """
    waiting: deque[Future[Batch]] = deque()
    pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="embkit-data")
    try:
        ahead = iter(range(start, stop))
        for step in ahead:
            waiting.append(pool.submit(batches, step))
            if len(waiting) > threads:
                break
        while waiting:
            batch = waiting.popleft().result()
            for step in ahead:
                waiting.append(pool.submit(batches, step))
                break
            yield batch
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
