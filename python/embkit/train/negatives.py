"""What changes the hard negatives of a run: slices that move on, tables that are mined again.

Both decide what is in a batch, and batches are assembled ahead, so both are functions of the step
that a batch is for: a slice from ``dynamic.lag`` steps after its check on, a table from
``refresh_lag`` steps after its weights on. With several ranks all of them hold the same slices,
because a step gives each the scores of the whole global batch, and swap tables at the same step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from embkit.errors import UsageError
from embkit.train.dynamic import Slices
from embkit.train.parallel import Ranks
from embkit.train.refresh import Miner, Refresh, changed, told

if TYPE_CHECKING:
    from embkit.data.batches import Batches
    from embkit.data.tables import Array
    from embkit.model import Encoder
    from embkit.recipe import Train
    from embkit.train.profile import Profile

_PREFIX = "dynamic."  # of the state of slices among a checkpoint's tensors


class _Source:
    """The batches of one part of a step, and the slices of its examples.

    Attributes:
        table: number of the table that the batches take their negatives from.
    """

    def __init__(self, batches: Batches, hard_negatives: int, label: str) -> None:
        self.batches, self.n, self.label, self.table = batches, hard_negatives, label, 0
        self.slices: dict[int, Slices] = {}  # by number of the table

    def has_slices(self) -> bool:
        """Whether any of its examples has hard negatives."""
        kinds = {self.batches.store.task(name)["kind"] for name in self.batches.examples}
        return self.n > 0 and "retrieval" in kinds


class Negatives:
    """The hard negatives of a run. Does nothing where the settings leave both switched off.

    Args:
        parts: the batches of each part of a step; their tables are changed at a swap. ranks: of
            the run. given: directory of the negatives that the run was given. miner: of the
            refresh. folder: for its weights and tables. threads: torch's. profile: takes the
            seconds of swaps.

    Attributes:
        idle: called again and again while a table is awaited, on every rank; may raise.

    Raises:
        UsageError: dynamic, and no part has hard negatives.
    """

    def __init__(
        self,
        config: Train,
        parts: Sequence[Batches],
        *,
        ranks: Ranks,
        given: Path | None,
        miner: Miner | None,
        folder: Path,
        threads: int,
        profile: Profile,
    ) -> None:
        self.config, self.ranks, self.given, self.profile = config, ranks, given, profile
        self.refresh: Refresh | None = None
        if miner is not None:
            self.refresh = Refresh(miner, config, folder, threads=threads, ranks=ranks)
        self.dynamic = config.dynamic.on
        self.idle: Callable[[], None] = lambda: None
        counts = [part.hard_negatives for part in config.parts] or [config.hard_negatives]
        self._sources = [
            _Source(batches, n, f"{place}/" if config.parts else "")
            for place, (batches, n) in enumerate(zip(parts, counts, strict=True))
        ]
        self._sliced = [s for s in self._sources if self.dynamic and s.has_slices()]
        if self.dynamic and not self._sliced:
            raise UsageError(
                "dynamic replaces hard negatives, and no task of the mixture is retrieval.",
                fix='set dynamic.rule = "off"',
            )
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

    def before(self, place: int, step: int) -> Array | None:
        """Settle what a batch needs: swap its table in, and say where its slices begin.

        Args:
            place: of its part. step: of the batch; every rank comes to its swaps at the same point.
        """
        source, number = self._sources[place], self._number(step)
        if number != source.table:
            self._await(step, number)
            self._use(source, number)
        return self._slices(source, number).starts(step) if source in self._sliced else None

    def after(self, step: int, scores: Sequence[Array]) -> dict[str, Any]:
        """Take the scores of a trained step (of each part, [B]); returns what there is to log."""
        number = self._number(step)
        counts: dict[str, Any] = {}
        for source in self._sliced:
            slices = self._slices(source, number)
            source.slices = {k: v for k, v in source.slices.items() if k >= number}
            _, examples = slices.loader.examples(step)
            scored = scores[self._sources.index(source)][: len(examples)]
            found = slices.observe(step, examples, scored)
            counts |= {source.label + name: count for name, count in found.items()}
        out: dict[str, Any] = {"negatives": counts} if counts else {}
        if step in self._swaps:
            out["refresh"] = self._swaps.pop(step)
        return out

    def updated(self, done: int, encoder: Callable[[], Encoder | None]) -> None:
        """The weights after ``done`` steps are there: a refresh may begin with them.

        Args:
            encoder: gives them in one piece on the first rank; called on all ranks or on none.
        """
        if self.refresh is not None:
            self.refresh.after_step(done, encoder)

    def tensors(self, done: int) -> dict[str, torch.Tensor]:
        """What a checkpoint after ``done`` steps holds, by name; the same on every rank."""
        number = self._number(done)
        return {
            _PREFIX + source.label + name: torch.from_numpy(column)
            for source in self._sliced
            for name, column in self._slices(source, number).columns().items()
        }

    def state(self, done: int) -> dict[str, Any]:
        """What its state.json says; the first rank writes it."""
        if self.refresh is None or not self.ranks.first:
            return {}
        return {"refresh": self.refresh.state(done)}

    def restore(
        self, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any], done: int
    ) -> None:
        """Go on after ``done`` steps.

        Args:
            tensors: of a checkpoint, among them what :meth:`tensors` gave. state: its state.json.

        Raises:
            CorruptError: what the checkpoint names is missing, damaged, or of another run.
        """
        if done == self.config.steps:
            return
        number = self._number(done)
        if self.refresh is not None:
            refresh = self.refresh
            self.ranks.once(lambda: refresh.resume(state["refresh"], done))
            if number and done == refresh.since(number):
                return  # the swap comes with the first batch, and starts anew
            for source in self._sources:
                self._use(source, number)
        for source in self._sliced:
            slices, prefix = self._slices(source, number), _PREFIX + source.label
            own = {
                name.removeprefix(prefix): tensors[name]
                for name in tensors
                if name.startswith(prefix)
            }
            slices.restore(own, done=done)

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

    def _slices(self, source: _Source, number: int) -> Slices:
        """The slices over a table, anew when it is met for the first time."""
        if number not in source.slices:
            if source.table != number:  # of a part that other ranks work on: nobody swapped it here
                self._use(source, number)
            source.slices[number] = Slices(
                self.config.dynamic,
                source.batches,
                n=source.n,
                since=0 if self.refresh is None else self.refresh.since(number),
            )
        return source.slices[number]

    def _use(self, source: _Source, number: int) -> None:
        if number != source.table:
            assert self.refresh is not None
            source.batches.use(self.refresh.table(number))
            source.table = number

    def _await(self, step: int, number: int) -> None:
        """Until a table is there; every part of a step comes here, the first one waits."""
        if step in self._swaps:
            return
        assert self.refresh is not None
        began = time.perf_counter()
        waited = self.refresh.wait(number, self.idle)
        table, store = self.refresh.table(number), self._sources[0].batches.store
        before = self.refresh.table(number - 1) if number > 1 else self.given
        shares = self.ranks.once(lambda: changed(store, before, table))
        self._swaps[step] = {"weights": number * self.config.refresh_every, "changed": shares}
        if self.ranks.first:
            told(number, waited, shares)
        self.profile.refresh += time.perf_counter() - began
