"""What losses are fed beside a batch: a teacher's vectors and scores, a learned temperature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from embkit.data.teacher import Scores, Teacher

if TYPE_CHECKING:
    from embkit.losses import Outcome, Sides
    from embkit.recipe import Train
    from embkit.train.batches import Batch

_NAME = "log_temperature"


class Teachers:
    """A teacher's vectors and scores of the rows of a batch.

    Args:
        config: teacher, and the losses of the tasks. store: of the run. parts: names of the tasks
            of each part of a step.

    Attributes:
        width: of the vectors, None without any.

    Raises:
        UsageError, CorruptError: vectors of another store, or damaged.
    """

    def __init__(self, config: Train, store: Any, parts: Sequence[Sequence[str]] = ()) -> None:
        self._vectors = Teacher(config.teacher, store) if config.teacher else None
        self.width = None if self._vectors is None else self._vectors.width
        wanted = {
            name
            for i, names in enumerate(parts)
            for name in names
            if config.loss_of(name, i).distill_scores
        }
        self._scores = {
            name: Scores(store.examples(name), store.rows)
            for name in sorted(wanted)
            if store.task(name)["kind"] == "retrieval"
        }

    def vectors(self, batch: Batch, device: torch.device) -> torch.Tensor | None:
        """[R, width] of the rows that were embedded, where the batch's loss asks for them."""
        if self._vectors is None or not batch.loss.distill:
            return None
        found = torch.from_numpy(self._vectors.rows(batch.filled.rows))
        return found.to(device, non_blocking=True)

    def sides(self, batch: Batch) -> Sides:
        """With the teacher's scores, where the batch's loss asks for them."""
        scores = self._scores.get(batch.filled.task)
        if scores is None or not batch.loss.distill_scores:
            return batch.sides
        filled = batch.filled
        query, positive, hard = (filled.rows[filled[n]] for n in ("query", "positive", "hard"))
        return replace(
            batch.sides,
            score=torch.from_numpy(scores.of(query, positive)),
            hard_score=torch.from_numpy(scores.of(query[:, None], hard)),
        )


def learn_temperature(encoder: nn.Module, config: Train) -> None:
    """Give an encoder the parameter of a temperature that is trained, where a loss asks for one.

    Its logarithm is what is trained, [1], at the learning rate of the run: AdamW moves it by about
    that much a step, so a temperature changes slowly and stays above 0.
    """
    if config.learns_temperature:
        start = torch.tensor(
            [math.log(config.temperature)], device=next(encoder.parameters()).device
        )
        encoder.register_parameter(_NAME, nn.Parameter(start))


def forget_temperature(encoder: nn.Module) -> None:
    """Take the parameter away again: a model has no temperature."""
    encoder._parameters.pop(_NAME, None)


def temperature_of(encoder: nn.Module, batch: Batch | None = None) -> torch.Tensor | None:
    """The learned temperature (), None where there is none or the batch's loss has its own."""
    found = encoder._parameters.get(_NAME)
    if found is None or (batch is not None and not batch.loss.learn_temperature):
        return None
    return found.detach().exp().reshape(())


def add_temperature_gradient(encoder: nn.Module, out: Outcome, factor: float) -> None:
    """Accumulate the gradient of a batch's loss; of 0 where the loss has no use for it, so that
    every rank has one."""
    found = encoder._parameters.get(_NAME)
    if found is not None:
        slope = out.d_temperature
        gradient = torch.zeros_like(found)
        if slope is not None:
            gradient = (slope * factor * found.detach().exp()).to(found.dtype)
        torch.autograd.backward(found, gradient)
