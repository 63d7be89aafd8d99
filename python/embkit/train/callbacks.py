"""What looks on while a run trains: a small protocol, and the run's own onlookers.

    class Stop(Callback):
        def on_evaluate(self, step, scores):
            print(step, scores["mean"])

    finetune(encoder, store, out="run", callbacks=[Stop()])

Callbacks see everything and change nothing: what they do with torch's random numbers is undone, so
that the model is the same with and without them. One that raises ends the run; the same call goes
on from the last checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class About:
    """What a callback is told before the first step.

    Attributes:
        name: of the stage. out: the run directory to be published.
        digest: of everything that decides the run; the same when it is resumed.
        settings: that decide it. start: steps done before. steps: in all.
    """

    name: str
    out: Path
    digest: str
    settings: Mapping[str, Any]
    start: int
    steps: int


class Callback:
    """Does nothing; override what is wanted. Only rank 0 calls."""

    def on_start(self, about: About) -> None:
        """Before the first step, also of a run that is resumed."""

    def on_step(self, step: int, line: Mapping[str, Any], speed: Mapping[str, float]) -> None:
        """After a step.

        Args:
            step: counted from 1.
            line: what log.jsonl has of the step.
            speed: of the last step: ``seconds``, ``tokens_per_s``, ``wait`` (share of the time
                spent waiting for data), and ``mfu`` once the peak is known.
        """

    def on_evaluate(self, step: int, scores: Mapping[str, Any]) -> None:
        """After an evaluation: ``{"mean": {"256": ...}, "types": ..., "tasks": ...}``, percent."""

    def on_checkpoint(self, step: int, path: Path) -> None:
        """A checkpoint is saved, or being saved where that happens behind the training."""

    def on_end(self, done: bool) -> None:
        """After the last step, or when the run stops before it (``done`` is False)."""


class Callbacks(Callback):
    """Several callbacks as one, in their order, with the random numbers left alone."""

    def __init__(self, all_: Sequence[Callback]) -> None:
        self.all = list(all_)

    def on_start(self, about: About) -> None:
        with random_state_kept():
            for one in self.all:
                one.on_start(about)

    def on_step(self, step: int, line: Mapping[str, Any], speed: Mapping[str, float]) -> None:
        with random_state_kept():
            for one in self.all:
                one.on_step(step, line, speed)

    def on_evaluate(self, step: int, scores: Mapping[str, Any]) -> None:
        with random_state_kept():
            for one in self.all:
                one.on_evaluate(step, scores)

    def on_checkpoint(self, step: int, path: Path) -> None:
        with random_state_kept():
            for one in self.all:
                one.on_checkpoint(step, path)

    def on_end(self, done: bool) -> None:
        with random_state_kept():
            for one in self.all:
                one.on_end(done)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Put torch's generators back as they were."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield
