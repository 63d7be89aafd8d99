"""Evaluation during training: the model that trains is scored as it is, without a copy.

Dropout is off inside and the random numbers are put back, so that a run has the same bits with and
without it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embkit.errors import UsageError
from embkit.train.callbacks import random_state_kept

if TYPE_CHECKING:
    from embkit.model import Encoder
    from embkit.recipe import Watch


class Evaluation:
    """Scores an encoder every so many steps on the sets of a folder, and knows the best step.

    Args:
        watch: ``evaluate_every``, ``evaluate_on`` and ``best``.

    Attributes:
        best: ``{"step", "score"}`` of the best mean at full width so far, or None.

    Raises:
        UsageError: no folder, or one without sets: before the first step.
    """

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.best: dict[str, Any] | None = None
        self.sets: Any = []
        if not watch.evaluate_every:
            return
        if watch.evaluate_on is None:
            raise UsageError(
                f"evaluate_every = {watch.evaluate_every}, and nothing to evaluate on.",
                where="watch.evaluate_on",
                fix="name a folder of evaluation sets, such as data/dev",
            )
        from embkit.evaluate import load_split

        self.sets = load_split(Path(watch.evaluate_on))

    def due(self, done: int, steps: int) -> bool:
        """Whether the weights after ``done`` steps are scored: every so often, and at the end."""
        every = self.watch.evaluate_every
        return bool(every) and (done % every == 0 or done == steps)

    def score(self, encoder: Encoder) -> dict[str, Any]:
        """Scores of every set and width, as :func:`embkit.evaluate.evaluate` gives them."""
        from embkit.evaluate.run import score_sets

        with random_state_kept():
            return score_sets(encoder, self.sets)

    def note(self, scores: Mapping[str, Any], done: int) -> None:
        """Remember the best mean at full width."""
        mean = float(scores["mean"][max(scores["mean"], key=int)])
        if self.watch.best != "off" and (self.best is None or mean > self.best["score"]):
            self.best = {"step": done, "score": mean}

    def best_at(self, done: int) -> bool:
        """Whether the best weights so far are those after ``done`` steps: they are to be kept."""
        return self.best is not None and self.best["step"] == done

    def state(self) -> dict[str, Any]:
        """What a checkpoint says."""
        return {"best": self.best} if self.best is not None else {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what a checkpoint said."""
        self.best = state.get("best")


def with_folder(watch: Watch, folder: Path) -> Watch:
    """The settings with a folder to evaluate on where they need one and name none."""
    if watch.evaluate_every and watch.evaluate_on is None:
        return dataclasses.replace(watch, evaluate_on=str(folder))
    return watch
