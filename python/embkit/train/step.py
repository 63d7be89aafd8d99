"""One step: forward, loss, backward, update. What is around it (data, log, state) is the loop's.

A step has one batch, or several parts whose weighted losses are added. The encoder runs in
micro-batches (GradCache where their graphs do not fit), the loss is taken once over the whole
batch, over all ranks that share it, and one update follows the sum of all gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch

from embkit.losses import value_and_grad
from embkit.train.dynamic import mean_scores
from embkit.train.gradcache import Chunks, graph_bytes, kept_graphs, seed_of
from embkit.train.optim import Optimizer, learning_rate
from embkit.train.parallel import Ranks
from embkit.train.sharding import Replicas, Shards
from embkit.train.statistics import Statistics
from embkit.train.teachers import (
    Teachers,
    add_learned_gradients,
    projection_of,
    temperature_of,
)
from embkit.train.word_rows import rows_added, takes_rows

if TYPE_CHECKING:
    from embkit.data.tables import Array
    from embkit.model import Encoder
    from embkit.recipe import Train
    from embkit.train.batches import Batch, MicroBatch
    from embkit.train.profile import Clock

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
_COUNTS = ("tokens", "padded", "rows")


@dataclass(frozen=True, kw_only=True)
class Done:
    """What a step gives; the weights are updated when ``loss`` and ``norm`` are finite.

    Attributes:
        loss: of the step over all ranks, parts weighted. per_dim: the same by MRL width, in the
            order of the widths.
        norm: of the gradients before clipping; NaN when ``loss`` was no finite number.
        rate: learning rate of the update.
        scores: of each part float32 [B], mean cosines of its global batch's queries with their hard
            negatives, NaN without any; no parts where the step was not told to take them.
        tokens, padded, rows: of the step over all ranks.
        skipped: fp16 overflowed: no update, and the next step has half the scale.
        statistics: of the similarities, as :mod:`embkit.train.statistics` sums them, in some steps.
        more: for the log: ``parts``, their losses before they are weighted, when there are several;
            ``loss_scale`` of fp16; a learned ``temperature`` after the update.
    """

    loss: float
    per_dim: list[float]
    norm: float
    rate: float
    scores: list[Array]
    tokens: int
    padded: int
    rows: int
    skipped: bool = False
    statistics: torch.Tensor | None = None
    more: dict[str, Any] = field(default_factory=dict)


class Step:
    """Trains an encoder on one step's batches at a time.

    Args:
        encoder: in training mode. config: settings of the run. optimizer: of its parameters.
        ranks: of the run. weights: where they are on those, from :func:`embkit.train.sharding.
            spread`; copies by default.
        parts: of a step, on all ranks together.
        scored: rows of each part's global batch, when the scores of hard negatives are to be taken.
        teachers: of losses that distil.
    """

    def __init__(
        self,
        encoder: Encoder,
        config: Train,
        optimizer: Optimizer,
        *,
        ranks: Ranks | None = None,
        weights: Replicas | Shards | None = None,
        parts: int = 1,
        scored: Sequence[int] = (),
        teachers: Teachers | None = None,
    ) -> None:
        self.encoder, self.config, self.optimizer, self.parts = encoder, config, optimizer, parts
        self.ranks = ranks or Ranks()
        self._teachers = teachers or Teachers(config, None)
        ends = [0, *accumulate(scored)]
        self._scored = [slice(a, b) for a, b in pairwise(ends)]
        self._score_count = ends[-1]
        self.weights = weights or Replicas(optimizer.parameters, self.ranks)
        self._statistics = Statistics(config, encoder.dims, parts, self.ranks)
        self._model: Any = encoder
        if config.compile:
            # Its own random numbers would differ between the passes with and without a graph.
            self._model = torch.compile(encoder, dynamic=True, options={"fallback_random": True})
        words = encoder.backbone.get_input_embeddings()
        whole = not (config.compile or self.weights.sharded)
        self._words = words if whole and takes_rows(words) else None
        self._token_bytes = graph_bytes(encoder.backbone.config)

    def run(self, batch: Batch, clock: Clock) -> Done:
        """Forward, loss, backward, update; ``clock`` gets laps of each.

        Raises:
            EmbkitError: another rank did not answer.
        """
        self.encoder.begin_step(batch.step)
        local = (batch, *batch.others)
        widths = len(self.encoder.dims)
        # Of each part its loss and those of its widths; counts; a place for the score of each row,
        # which one rank fills. All are summed over ranks at once.
        sizes = [self.parts * (1 + widths), len(_COUNTS), self._score_count]
        report = torch.zeros(sum(sizes), dtype=torch.float64)
        losses, counts, scores = report.split(sizes)
        values = []
        for part in local:
            e_RD, *found = self._part(part, clock, last=part is local[-1])
            score = mean_scores(e_RD, part) if self._scored else None
            values.append((part, found, score))
            clock.lap("negatives")
        self.weights.finish()
        clock.lap("backward")
        # Values are read once all work is queued: a GPU is not waited for before.
        for part, (loss, per_dim), score in values:
            at = part.place * (1 + widths)
            losses[at] = loss.double()
            losses[at + 1 : at + 1 + widths] = per_dim.double()
            own = (part.filled.tokens, part.filled.padded, len(part.filled.rows))
            counts += torch.tensor(own, dtype=torch.float64)
            if score is not None:
                places = torch.from_numpy(part.filled["position"])
                scores[self._scored[part.place]][places] = score.double().cpu()
        report = self.ranks.sum(report.to(self.ranks.device())).cpu()
        losses, counts, scores = report.split(sizes)
        numbers, (tokens, padded, rows) = losses.tolist(), counts.tolist()
        each = [numbers[i : i + 1 + widths] for i in range(0, len(numbers), 1 + widths)]
        by_place = self._weights(local)
        totals = [
            sum(w * one[i] for w, one in zip(by_place, each, strict=True))
            for i in range(1 + widths)
        ]
        rate = learning_rate(self.config, batch.step)
        norm, skipped, scale = math.nan, False, self.optimizer.scale
        if math.isfinite(totals[0]):
            norm = self.optimizer.step(rate)
            skipped = self.optimizer.scaled and not math.isfinite(norm)
        else:
            self.optimizer.clear()
        more: dict[str, Any] = {}
        if self.parts > 1:
            more["parts"] = [{"loss": one[0], "loss_per_dim": one[1:]} for one in each]
        if self.optimizer.scaled:
            more["loss_scale"] = scale
        learned = temperature_of(self.encoder)
        if learned is not None:
            more["temperature"] = float(learned)
        clock.lap("optimizer")
        return Done(
            loss=totals[0],
            per_dim=totals[1:],
            norm=norm,
            rate=rate,
            scores=[scores[at].float().numpy() for at in self._scored],
            tokens=int(tokens),
            padded=int(padded),
            rows=int(rows),
            skipped=skipped,
            statistics=self._statistics.take(),
            more=more,
        )

    def _part(self, batch: Batch, clock: Clock, *, last: bool) -> tuple[torch.Tensor, ...]:
        """Forward, loss and backward of one batch: embeddings, its loss, that of each width."""
        sharded, filled = self.weights.sharded, batch.filled
        rank = 0 if batch.share is None else batch.share.ranks.rank
        if sharded:
            # Ranks meet in every forward and backward, and must forget the same graphs.
            empty, keep = filled.micro_count - len(batch.micro), 1
        else:
            sizes = [m.ids.numel() for m in batch.micro]
            budget = self.config.graph_memory * 2**30
            empty, keep = 0, kept_graphs(sizes, self._token_bytes, budget)
        chunks = Chunks(
            self._forward,
            batch.micro,
            seed=seed_of(self.config.seed, filled.step, batch.place, rank),
            keep=keep,
            around=self._precision,
            empty=empty,
        )
        e_RD = chunks.forward()
        clock.lap("forward")
        out, gradient = value_and_grad(
            e_RD, batch.query, batch.positive, batch.hard, self._teachers.sides(batch),
            dims=self.encoder.dims, config=self.config, share=batch.share, step=batch.step,
            loss=batch.loss, teacher=self._teachers.vectors(batch, e_RD.device),
            temperature=temperature_of(self.encoder, batch),
            projection=projection_of(self.encoder, batch),
        )  # fmt: skip
        factor = batch.weight * self.optimizer.scale
        if factor != 1:
            gradient.mul_(factor)
        clock.lap("loss")
        self._statistics.add(batch, e_RD)
        clock.lap("other")
        chunks.backward(gradient, before_last=self.weights.arm if last else None)
        add_learned_gradients(self.encoder, out, factor)
        clock.lap("backward")
        return e_RD, out.loss, out.per_dim

    def _forward(self, micro: MicroBatch) -> torch.Tensor:
        with nullcontext() if self._words is None else rows_added(self._words):
            return micro.embed(self._model)

    def _precision(self) -> AbstractContextManager[Any]:
        kind = _HALF.get(self.config.precision)
        if kind is None or self.weights.sharded:  # FSDP2 casts by itself
            return nullcontext()
        return torch.autocast(self.encoder.device.type, dtype=kind)

    def _weights(self, local: tuple[Batch, ...]) -> list[float]:
        """Of every part, those of other ranks too."""
        if self.config.parts:
            return [part.weight for part in self.config.parts]
        return [local[0].weight] * self.parts
