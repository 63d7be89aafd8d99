"""What changes the hard negatives of a run: slices that move on, tables that are mined again.

Both decide what is in a batch, and batches are assembled ahead, so both are functions of the step
that a batch is for: a slice from ``dynamic.lag`` steps after its check on, a table from
``refresh_lag`` steps after its weights on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from embkit.train.dynamic import Slices, mean_scores
from embkit.train.refresh import Miner, Refresh, changed, told

if TYPE_CHECKING:
    from embkit.data.batches import Batches
    from embkit.data.tables import Array
    from embkit.model import Encoder
    from embkit.recipe import Train
    from embkit.train.batches import Batch
    from embkit.train.profile import Profile


class Negatives:
    """The hard negatives of a run. Does nothing where the settings leave both switched off.

    Args:
        batches: of the run; its table is changed at a swap. given: directory of the negatives that
            the run was given. miner: of the refresh. folder: for its weights and tables. threads:
            torch's. profile: takes the seconds of swaps.

    Attributes:
        idle: called again and again while a table is awaited; may raise.
    """

    def __init__(
        self,
        config: Train,
        batches: Batches,
        *,
        given: Path | None,
        miner: Miner | None,
        folder: Path,
        threads: int,
        profile: Profile,
    ) -> None:
        self.config, self.batches, self.given, self.profile = config, batches, given, profile
        self.refresh: Refresh | None = None
        if miner is not None:
            self.refresh = Refresh(miner, config, folder, threads=threads)
        self.dynamic = config.dynamic.on
        self.idle: Callable[[], None] = lambda: None
        self._slices: dict[int, Slices] = {}  # by number of the table
        self._swaps: dict[int, dict[str, Any]] = {}  # by step, for the log

    @property
    def on(self) -> bool:
        """Whether anything changes."""
        return self.dynamic or self.refresh is not None

    def threads(self, wanted: int) -> int:
        """Threads that assemble batches: none so far ahead that it needs what is not yet known."""
        lags = [self.config.dynamic.lag] if self.dynamic else []
        lags += [self.config.refresh_lag] if self.refresh is not None else []
        return min([wanted, *(lag - 2 for lag in lags)])

    def before(self, step: int) -> Array | None:
        """Settle what a step's batch needs: swap its table in, and say where its slices begin."""
        number = self._number(step)
        if number != self._number(max(step - 1, 0)):
            self._swap(step, number)
        return self._of(number).starts(step) if self.dynamic else None

    def after(self, batch: Batch, embeddings: torch.Tensor) -> dict[str, Any]:
        """Take the scores of a trained step; returns what there is to log."""
        step, out = batch.filled.step, {}
        if self.dynamic:
            examples = batch.filled.examples
            scores = np.full(len(examples), np.nan, np.float32)
            if batch.hard.shape[1]:
                scores = mean_scores(embeddings, batch)
            number = self._number(step)
            for past in [k for k in self._slices if k < number]:
                del self._slices[past]
            counts = self._of(number).observe(step, examples, scores)
            out = {"negatives": counts} if counts else {}
        if step in self._swaps:
            out["refresh"] = self._swaps.pop(step)
        return out

    def updated(self, done: int, encoder: Encoder) -> None:
        """The weights after ``done`` steps are there: a refresh may begin with them."""
        if self.refresh is not None:
            self.refresh.after_step(done, encoder)

    def tensors(self, done: int) -> dict[str, Any]:
        """What a checkpoint after ``done`` steps holds, arrays by name."""
        return dict(self._of(self._number(done)).tensors()) if self.dynamic else {}

    def state(self, done: int) -> dict[str, Any]:
        """What its state.json says."""
        return {} if self.refresh is None else {"refresh": self.refresh.state(done)}

    def restore(
        self, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any], done: int
    ) -> None:
        """Go on after ``done`` steps.

        Raises:
            CorruptError: what the checkpoint names is missing, damaged, or of another run.
        """
        if done == self.config.steps:
            return
        number = self._number(done)
        if self.refresh is not None:
            self.refresh.resume(state["refresh"], done)
            if number and done == self.refresh.since(number):
                return  # the swap comes with the first batch, and starts anew
            if number:
                self.batches.use(self.refresh.table(number))
        if self.dynamic:
            self._of(number).restore(tensors, done=done)

    def prune(self, oldest: int) -> None:
        """Remove what is older than the oldest checkpoint."""
        if self.refresh is not None:
            self.refresh.prune(oldest)

    def close(self) -> None:
        """End a miner that still runs."""
        if self.refresh is not None:
            self.refresh.close()

    def _number(self, step: int) -> int:
        return 0 if self.refresh is None else self.refresh.number(step)

    def _of(self, number: int) -> Slices:
        """The slices over a table, anew when it is met for the first time."""
        if number not in self._slices:
            self._slices[number] = Slices(
                self.config.dynamic,
                self.batches,
                n=self.config.hard_negatives,
                since=0 if self.refresh is None else self.refresh.since(number),
            )
        return self._slices[number]

    def _swap(self, step: int, number: int) -> None:
        assert self.refresh is not None
        began = time.perf_counter()
        waited = self.refresh.wait(number, self.idle)
        table = self.refresh.table(number)
        before = self.refresh.table(number - 1) if number > 1 else self.given
        shares = changed(self.batches.store, before, table)
        self.batches.use(table)
        self._swaps[step] = {"weights": number * self.config.refresh_every, "changed": shares}
        told(number, waited, shares)
        self.profile.refresh += time.perf_counter() - began
