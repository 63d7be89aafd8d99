"""Periodic refresh: hard negatives mined again with the weights of a step, beside the training.

After step kN the weights are published as a model directory; a miner reads it and publishes a table
of negatives; the first batch that has them is that of step kN + L. Which table a step has is
a function of the schedule alone: training waits for a table that is late.

With several ranks the first one publishes, mines and looks on; the others hear from it, a few times
a second while they wait, so that a late miner is no rank that does not answer.

The miner is a process of its own, started from a command. A thread would share the generators of
random numbers, the number of torch threads and the GIL with the training, and its timing would
show in the model's bits; a process also keeps its memory and its crashes to itself. A miner that
outlives a killed run ends its work, and the run that resumes finds it done.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from embkit import container
from embkit.data.batches import mined_files
from embkit.data.tables import Array, owners
from embkit.errors import CorruptError, EmbkitError, UsageError
from embkit.progress import say
from embkit.stage import check_files, digest_of, stage
from embkit.train.parallel import Ranks

if TYPE_CHECKING:
    from embkit.data.loader import Store
    from embkit.model import Encoder
    from embkit.recipe import Train

_ROUND = 0.2  # seconds that the first rank looks at a miner before all ranks hear of it
_GRACE = 1.0  # seconds between a SIGTERM to the miner and one to the run, by the same sender
# What a launcher of ranks tells its processes; a miner is none of them.
_LAUNCHER = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE",
    "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
_CHUNK = 65536  # examples that are compared at a time


@dataclass(frozen=True, kw_only=True)
class Miner:
    """How a refresh mines.

    Attributes:
        command: from a model directory and the directory to publish to the words of a command, such
            as ``embkit mine MODEL STORE --out OUT``. It publishes what :func:`embkit.mine.mine`
            publishes, and the same for the same model.
        params: what decides the negatives beside the model and the store, JSON types; part of the
            run's digest.
    """

    command: Callable[[Path, Path], Sequence[str]]
    params: Mapping[str, Any] = field(default_factory=dict)


class Refresh:
    """The tables of a run by number: 0 is what it was given, k is mined after step kN.

    Args:
        miner: the command. config: refresh_every N, refresh_lag L, steps, rank_timeout. folder: for
            models and tables, which all ranks see. threads: of the miner, so that it gives the same
            bits when the run resumes. ranks: of the run; the first has the miner.
    """

    def __init__(
        self, miner: Miner, config: Train, folder: Path, *, threads: int, ranks: Ranks | None = None
    ) -> None:
        self.miner, self.folder, self.threads = miner, folder, threads
        self.ranks, self.timeout = ranks or Ranks(), config.rank_timeout
        self.every, self.lag, self.steps = config.refresh_every, config.refresh_lag, config.steps
        if self.ranks.first:
            self.folder.mkdir(exist_ok=True)
        self._process: tuple[int, subprocess.Popen[bytes]] | None = None
        self._spared = False

    def number(self, step: int) -> int:
        """The table that a step (from 0) trains on."""
        return max(0, (min(step, self.steps - 1) - self.lag) // self.every)

    def since(self, number: int) -> int:
        """The first step that trains on a table."""
        return number * self.every + self.lag if number else 0

    def pending(self, done: int) -> int:
        """The table whose weights were taken within ``done`` steps and that is in no step yet."""
        newest = done // self.every
        due = newest > self.number(done) and self.since(newest) < self.steps
        return newest if due else 0

    def table(self, number: int) -> Path:
        """Directory of the negatives of a table."""
        return self.folder / f"negatives-{number * self.every:06d}"

    def model(self, number: int) -> Path:
        """Directory of the weights that a table is mined with."""
        return self.folder / f"weights-{number * self.every:06d}"

    def after_step(self, done: int, encoder: Callable[[], Encoder | None]) -> None:
        """When weights are due after ``done`` steps, publish them and start the miner.

        Args:
            encoder: gives the weights in one piece on the first rank; called where they are due.
        """
        number = self.pending(done)
        if number and done == number * self.every:
            weights = encoder()
            self.ranks.once(lambda: self._publish(number, weights))

    def _publish(self, number: int, encoder: Encoder | None) -> None:
        assert encoder is not None
        params = {"model": encoder.digest()}
        with stage(self.model(number), name="weights", params=params) as work:
            if not work.done:
                encoder.export(work.dir / "model")
                work.publish()
        self.start(number)

    def start(self, number: int) -> None:
        """Start the miner of a table whose weights are published.

        Raises:
            CorruptError: the weights are missing or damaged.
        """
        check_files(self.model(number))
        words = list(self.miner.command(self.model(number) / "model", self.table(number)))
        environment = {
            **{k: v for k, v in os.environ.items() if k not in _LAUNCHER and "ELASTIC" not in k},
            "OMP_NUM_THREADS": str(self.threads),
            "EMBKIT_PROGRESS": "off",
        }
        with self._log(number).open("wb") as output:
            # In a session of its own: a signal to the group of this process is for the run, which
            # ends the miner itself.
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment,
                start_new_session=True,
            )  # fmt: skip
        self._process = (number, process)

    def wait(self, number: int, idle: Callable[[], None]) -> float:
        """Wait until a table is published, on every rank; returns the seconds.

        Args:
            idle: called again and again, on every rank; may raise to stop waiting.

        Raises:
            EmbkitError: the miner failed, or this rank does not see what the first one sees.
        """
        began = time.perf_counter()
        while (digest := self.ranks.once(lambda: self._ended(number))) is None:
            idle()
        until = time.monotonic() + self.timeout
        while not self._sees(number, digest):
            if time.monotonic() > until:
                raise EmbkitError(
                    "The refreshed negatives are not those that the first rank sees.",
                    where=self.table(number),
                    fix="give all ranks one file system for the run's directory",
                )
            time.sleep(_ROUND)
        return time.perf_counter() - began

    def _ended(self, number: int) -> str | None:
        """The digest of a table when its miner has ended, after a look of some time at it."""
        if self._process is not None and self._process[0] == number:
            process = self._process[1]
            with suppress(subprocess.TimeoutExpired):
                process.wait(_ROUND)
            if process.returncode is None:
                return None
            if process.returncode == -signal.SIGTERM and not self._spared:
                # Who ends everything at once means the run too: hear that first.
                self._spared = True
                time.sleep(_GRACE)
                return None
            self._check_end(number, process.returncode)
            self._process = None
        check_files(self.table(number))  # also where a run resumes after its miner has ended
        return digest_of(self.table(number))

    def _check_end(self, number: int, code: int) -> None:
        log = self._log(number)
        if code != 0 or not (self.table(number) / "manifest.json").is_file():
            last = log.read_text("utf-8", errors="replace").strip().splitlines()[-3:]
            raise EmbkitError(
                f"The miner of the refresh after step {number * self.every} ended with "
                f"{code} and published nothing: {' / '.join(last)}",
                where=log,
                fix="correct what it says, then run the same command again to go on",
            )
        log.unlink(missing_ok=True)

    def _sees(self, number: int, digest: str) -> bool:
        """Whether the table is here as the first rank has it; a shared file system may lag."""
        table = self.table(number)
        return (table / "manifest.json").is_file() and digest_of(table) == digest

    def state(self, done: int) -> dict[str, Any]:
        """What a checkpoint says after ``done`` steps: the table in use, and the one to come."""
        number, coming = self.number(done), self.pending(done)
        return {
            "table": self.table(number).name if number else None,
            "table_digest": digest_of(self.table(number)) if number else None,
            "weights": self.model(coming).name if coming else None,
            "weights_digest": digest_of(self.model(coming)) if coming else None,
        }

    def resume(self, state: Mapping[str, Any], done: int) -> None:
        """Check what a checkpoint names and start the miner again where one is due.

        Raises:
            CorruptError: a table or weights are missing, damaged, or are not those of the run.
        """
        if done >= self.steps:
            return  # the folder may be gone: the run is about to be published
        for what in ("table", "weights"):
            name, digest = state.get(what), state.get(f"{what}_digest")
            path = self.folder / str(name)
            if name is None:
                continue
            if not path.is_dir() or digest_of(path) != digest:
                raise CorruptError(
                    f"The refresh's {what} that the checkpoint names are missing or changed.",
                    where=path,
                    fix="remove the newest checkpoint, or run the stage again with --fresh",
                )
            check_files(path)
        coming = self.pending(done)
        if coming and not (self.table(coming) / "manifest.json").is_file():
            self.start(coming)

    def prune(self, oldest: int) -> None:
        """Remove what no run needs that resumes after ``oldest`` steps or later."""
        used = self.number(max(oldest - 1, 0))  # what changed is counted against this one
        keep = {self.model(k).name for k in range(used + 1, self.steps // self.every + 1)}
        keep |= {self.table(k).name for k in range(used, self.steps // self.every + 1)}
        for path in self.folder.glob("*-*"):
            if path.is_dir() and path.name not in keep and not path.name.startswith("."):
                shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        """End a miner that still runs; its finished blocks stay for the next one."""
        if self._process is not None:
            process = self._process[1]
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            self._process = None

    def _log(self, number: int) -> Path:
        return self.folder / f"miner-{number * self.every:06d}.log"


def changed(store: Store, before: Path | None, after: Path) -> dict[str, float]:
    """Share of each task's negatives in ``after`` that ``before`` does not list for the example.

    Args:
        before: a directory of negatives; None, or a task that it lacks, is the examples' own.
    """
    old, out = mined_files(before, store), {}
    for name, path in mined_files(after, store).items():
        table = store.examples(name)
        one = _lists(old[name]) if name in old else (table.negative_offsets, table.negative)
        two = _lists(path)
        if len(one[0]) != len(two[0]):
            raise UsageError(
                f"The refreshed negatives of task {name!r} are for {len(two[0]) - 1} examples, the "
                f"store has {len(table)}.",
                where=after,
                fix="let the miner's command read the store that is trained on",
            )
        kept = 0
        for start in range(0, len(table), _CHUNK):
            pairs = [_pairs(*lists, start, store.rows) for lists in (one, two)]
            kept += int(np.isin(pairs[1], pairs[0]).sum())
        out[name] = 1 - kept / len(two[1]) if len(two[1]) else 0.0
    return out


def _lists(path: Path) -> tuple[Array, Array]:
    columns = container.load(path, kind="embkit.negatives")
    return columns["offsets"], columns["row"]


def _pairs(offsets: Array, rows: Array, start: int, count: int) -> Array:
    """One number for each (example, row) of the lists from ``start`` on."""
    part = offsets[start : start + _CHUNK + 1]
    owner = owners(part - part[0]).astype(np.uint64)
    return owner * np.uint64(count) + rows[int(part[0]) : int(part[-1])]


def told(number: int, seconds: float, shares: Mapping[str, float]) -> None:
    """One line for a person."""
    text = ", ".join(f"{share:.0%} new in {name}" for name, share in shares.items())
    say(f"refresh {number}: waited {seconds:.1f} s; {text}")
