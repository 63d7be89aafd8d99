"""Batch samplers for `SentenceTransformerTrainer` that are dealt in Rust."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import accumulate, islice
from typing import Any

import numpy as np
import torch
from sentence_transformers.base import sampler as st
from sentence_transformers.util import get_world_size

from embkit import _rust
from embkit.data.tables import Array
from embkit.integrations.sentence_transformers.arrow import row_keys

logger = logging.getLogger(__name__)

_MORE_PASSES = 2  # as many as the original's, over a dataset that fills too few batches
_NOT_TEXT = "dataset_name"  # the trainer's own column
_LEAST_SHARE = 1 / 4000  # of the steps; the plan refuses less than one in 4,096


class NoDuplicatesBatchSampler(st.NoDuplicatesBatchSampler):
    """Batches in which no value comes twice, in any column: those of sentence-transformers'
    sampler, row for row, for the same generator and seed.

    A value is compared by 64 bits of a hash, made once; 8 bytes of memory for each. An epoch is
    dealt at once, so rows that conflict are not looked at again for each batch.

    Args:
        dataset, batch_size, drop_last, valid_label_columns, generator, seed: as the original's.
        precompute_hashes, precompute_num_proc, precompute_batch_size: of the original, not needed.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        drop_last: bool,
        valid_label_columns: list[str] | None = None,
        generator: torch.Generator | None = None,
        seed: int = 0,
        precompute_hashes: bool = False,
        precompute_num_proc: int | None = None,
        precompute_batch_size: int = 1000,
    ) -> None:
        super().__init__(
            dataset, batch_size=batch_size, drop_last=drop_last,
            valid_label_columns=valid_label_columns, generator=generator, seed=seed,
        )  # fmt: skip
        self._keys: Array | None = None

    def __iter__(self) -> Iterator[list[int]]:
        """The batches of an epoch; rows that are left over only once `len` batches are there.

        With `drop_last`, a dataset of many equal values fills too few: then it is shuffled again,
        up to twice, until there are `len`.
        """
        if self.generator is not None and self.seed is not None:
            self.generator.manual_seed(self.seed + self.epoch)
        if len(self.dataset) == 0:
            return
        wanted, given = len(self), 0
        for again in range(1 + _MORE_PASSES):
            for batch in self._deal():
                yield batch
                given += 1
                if again and given == wanted:
                    return
            if given == 0 or given >= wanted:
                break
        if given < wanted:
            logger.warning(
                "%d of %d batches: the dataset has too few distinct values for batches of %d. "
                "Lower the batch size.", given, wanted, self.batch_size,
            )  # fmt: skip

    def _deal(self) -> Iterator[list[int]]:
        n = len(self.dataset)
        small = n <= np.iinfo(np.int32).max  # the generator's numbers differ by type
        order = torch.randperm(
            n, generator=self.generator, dtype=torch.int32 if small else torch.int64
        )
        if self._keys is None:
            columns = [c for c in self.dataset.column_names if c != _NOT_TEXT]
            self._keys = row_keys(self.dataset, columns)
            if not columns:
                self._keys = np.arange(n, dtype=np.uint64)[:, None]
        keys = self._keys
        rows, ends = _rust.first_fit(
            keys.reshape(-1), keys.shape[1], order.numpy().astype(np.uint64), self.batch_size
        )
        start = 0
        for end in ends.tolist():
            if end - start == self.batch_size or not self.drop_last:
                yield rows[start:end].tolist()
            start = end


class SingleTaskBatchSampler(st.MultiDatasetDefaultBatchSampler):
    """Batches of several datasets such that every step of all ranks has one dataset's.

    The trainer gives successive batches to successive ranks, so with sentence-transformers'
    samplers the ranks of a step have different datasets, and with `gather_across_devices` those are
    negatives of one another. Here each dataset comes `world_size` batches at a time.

    Each dataset has its share in every block of 32 steps (embkit's plan: docs/batches.md), not only
    on average, and all of its batches come; with several ranks, whose steps need as many full
    batches, all but the short ones and fewer than `world_size` others. The order is a function of
    the seed and the epoch.

    Args:
        dataset, batch_samplers, generator, seed: as the trainer passes them; the generator is the
            batch samplers' only.
        world_size: ranks that share a step; None takes those of `torch.distributed`.
    """

    def __init__(
        self,
        dataset: Any,
        batch_samplers: list[Any],
        generator: torch.Generator | None = None,
        seed: int | None = 0,
        world_size: int | None = None,
    ) -> None:
        super().__init__(dataset, batch_samplers, generator=generator, seed=seed)
        self.world_size = world_size or get_world_size()

    def __iter__(self) -> Iterator[list[int]]:
        """Batches of rows of the concatenated dataset."""
        sizes = [len(part) for part in self.dataset.datasets]
        first = [0, *accumulate(sizes)]
        groups = self._groups()
        if not any(groups):
            return
        least = sum(groups) * _LEAST_SHARE
        tasks = [(str(i), n, max(n, least)) for i, n in enumerate(groups) if n]
        plan = _rust.Plan((self.seed or 0) + self.epoch, tasks, 1, exhausted="drop", epochs=1)
        places = [i for i, n in enumerate(groups) if n]
        sources = [self._batches(sampler) for sampler in self.batch_samplers]
        for task in plan.tasks_of(0, plan.steps or 0).tolist():
            place = places[task]
            batches, shift = list(islice(sources[place], self.world_size)), first[place]
            if len(batches) < self.world_size:  # a sampler may have promised more than it gives
                continue
            if shift:
                batches = [[row + shift for row in batch] for batch in batches]
            yield from batches

    def __len__(self) -> int:
        """Batches of all ranks together."""
        return sum(self._groups()) * self.world_size

    def _groups(self) -> list[int]:
        if self.world_size == 1:
            return [len(sampler) for sampler in self.batch_samplers]
        both = zip(self.dataset.datasets, self.batch_samplers, strict=True)
        return [len(part) // sampler.batch_size // self.world_size for part, sampler in both]

    def _batches(self, sampler: Any) -> Iterator[list[int]]:
        """Those that make steps: accelerate loses a step that ends with a short batch."""
        if self.world_size == 1:
            return iter(sampler)
        return (batch for batch in sampler if len(batch) >= sampler.batch_size)
