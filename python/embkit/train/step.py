"""One step: forward, loss, backward, update. What is around it (data, log, state) is the loop's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from embkit.losses import compute
from embkit.train.optim import Optimizer, learning_rate

if TYPE_CHECKING:
    from embkit.model import Encoder
    from embkit.recipe import Train
    from embkit.train.batches import Batch
    from embkit.train.profile import Clock


@dataclass(frozen=True, kw_only=True)
class Done:
    """What a step gives; the weights are updated when ``loss`` and ``norm`` are finite.

    Attributes:
        loss: of the global batch. per_dim: the same by MRL width, in the order of the widths.
        norm: of the gradients before clipping; NaN when ``loss`` was no finite number.
        rate: learning rate of the update.
        embeddings: raw [R, D], detached, one per distinct row of this process's part of the batch.
    """

    loss: float
    per_dim: list[float]
    norm: float
    rate: float
    embeddings: torch.Tensor


class Step:
    """Trains an encoder on one batch at a time.

    Args:
        encoder: in training mode. optimizer: of its parameters. config: settings of the run.
    """

    def __init__(self, encoder: Encoder, config: Train, optimizer: Optimizer) -> None:
        self.encoder, self.config, self.optimizer = encoder, config, optimizer

    def run(self, batch: Batch, clock: Clock) -> Done:
        """Forward, loss, backward, update; ``clock`` gets a lap for each."""
        self.encoder.begin_step(batch.filled.step)
        parts = [self.encoder(m.ids, m.mask, m.prompt_len) for m in batch.micro]
        e_RD = torch.cat(parts) if len(parts) > 1 else parts[0]
        clock.lap("forward")
        out = compute(
            e_RD, batch.query, batch.positive, batch.hard, batch.sides,
            dims=self.encoder.dims, config=self.config,
        )  # fmt: skip
        loss, norm = float(out.loss.detach()), math.nan
        rate = learning_rate(self.config, batch.filled.step)
        clock.lap("loss")
        if math.isfinite(loss):
            out.loss.backward()
            clock.lap("backward")
            norm = self.optimizer.step(rate)
        clock.lap("optimizer")
        return Done(
            loss=loss,
            per_dim=out.per_dim.detach().tolist(),
            norm=norm,
            rate=rate,
            embeddings=e_RD.detach(),
        )
