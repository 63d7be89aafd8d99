"""MultipleNegativesRankingLoss and its cached form on `embkit.kernels.infonce`.

The original fills one matrix of similarities for each direction, width and call; the kernel keeps
none. Each direction is a log-sum-exp over its candidates less the positive's logit, X; then

    joint           log(c + sum over directions of e^X),  c = 1, or 2 with doc_to_query, which has
                    the positive pair once more
    per_direction   mean over directions of log(1 + e^X)

Rows: B queries of this rank, W of all ranks, N = W (1 + negatives) documents, K widths. One width
on a CPU takes the shorter way of dense.py, unless EMBKIT_KERNELS names an implementation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.sentence_transformer import losses as st
from sentence_transformers.util import all_gather_with_grad, cos_sim, get_rank
from torch import Tensor

from embkit.integrations.sentence_transformers.dense import dense_loss, plan_of
from embkit.integrations.sentence_transformers.widths import Fused, Widths
from embkit.kernels import _dispatch, infonce
from embkit.kernels._common import accumulate_dtype, resolve_dims
from embkit.kernels.infonce.op import infonce_rows
from embkit.kernels.infonce.problem import Problem


class MultipleNegativesRankingLoss(Fused, st.MultipleNegativesRankingLoss):
    """sentence-transformers' loss, its arguments and value, without a matrix of similarities.

    Every direction, partition and hardness mode, with and without gathering. A `similarity_fct`
    other than `cos_sim` runs the original's code.
    """

    @property
    def fused(self) -> bool:
        """Whether the kernel has this similarity."""
        return self.similarity_fct is cos_sim

    def loss_at(
        self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor, widths: Widths
    ) -> Tensor:
        """The loss of all widths, from one embedding of the texts."""
        return ranking_loss(self, embed_columns(self.model, sentence_features), widths)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """The loss of embeddings [B, D] of queries, positives and columns of negatives."""
        if not self.fused:
            return super().compute_loss_from_embeddings(embeddings, labels)
        return ranking_loss(self, embeddings, Widths())


class CachedMultipleNegativesRankingLoss(Fused, st.CachedMultipleNegativesRankingLoss):
    """The loss of cached gradients (GradCache), with the original's arguments and value.

    Texts go through the model in mini-batches, twice, by the original's code. The loss over all of
    them is one call of the kernel, whose memory does not grow with their square.
    """

    @property
    def fused(self) -> bool:
        """Whether the kernel has this similarity."""
        return self.similarity_fct is cos_sim

    def calculate_loss(
        self,
        reps: list[list[Tensor]],
        labels: Tensor | None = None,
        *,
        with_backward: bool = False,
    ) -> Tensor:
        """The loss of mini-batches of embeddings; `with_backward` leaves their gradients."""
        if not self.fused:
            return super().calculate_loss(reps, labels, with_backward=with_backward)
        embeddings = [torch.cat(column) for column in reps]
        loss = ranking_loss(self, embeddings, self.widths.drawn())
        if not with_backward:
            return loss
        loss.backward()
        return loss.detach()


def ranking_loss(settings: Any, embeddings: Sequence[Tensor], widths: Widths) -> Tensor:
    """The loss of embeddings under the settings of one of the two classes.

    Args:
        settings: has `scale`, `directions`, `partition_mode`, `hardness_mode`,
            `hardness_strength`, `gather_across_devices`.
        embeddings: queries, positives, then columns of negatives, [B, D] each.

    Raises:
        ValueError: fewer than two columns, columns of other lengths, or a width that they do not
            have.
    """
    if len(embeddings) < 2:
        raise ValueError(f"Expected at least 2 embeddings, got {len(embeddings)}")
    if len({column.shape[0] for column in embeddings}) > 1:
        lengths = ", ".join(str(column.shape[0]) for column in embeddings)
        raise ValueError(f"Columns of one batch have as many rows each, not {lengths}")
    one = widths.dims is None or len(widths.dims) == 1
    if one and embeddings[0].device.type == "cpu" and _dispatch.requested() == "auto":
        return _dense(settings, embeddings, widths)
    batch = _Batch(settings, embeddings)
    joint = settings.partition_mode == "joint"
    directions: tuple[str, ...] = settings.directions
    if batch.plain and (directions == ("query_to_doc",) or not joint):
        return batch.mean(directions, widths)
    dims, _ = resolve_dims(widths.dims, embeddings[0].shape[1])
    parts = [batch.excess(direction, dims) for direction in directions]
    if joint:
        count = 2 if "doc_to_query" in directions else 1
        rows_KB = batch.log_of_sum(count, [x for part in parts for x in part], len(dims))
    else:
        rows_KB = torch.stack([batch.log_of_sum(1, part, len(dims)) for part in parts]).mean(0)
    loss = widths.weigh(rows_KB.mean(1), dims)
    if batch.alone:  # a pair without candidates: every column has a gradient all the same, of 0
        loss = loss + 0 * torch.stack([column.sum() for column in embeddings]).sum()
    return loss


def _dense(settings: Any, embeddings: Sequence[Tensor], widths: Widths) -> Tensor:
    """The loss of one width by dense.py."""
    dims, _ = resolve_dims(widths.dims, embeddings[0].shape[1])
    if widths.dims is not None:
        embeddings = [column[:, : dims[0]] for column in embeddings]
    queries, columns, first = embeddings[0], list(embeddings[1:]), 0
    rows = queries.shape[0]
    if settings.gather_across_devices:
        if settings.directions != ("query_to_doc",):
            queries = all_gather_with_grad(queries)
        columns = [all_gather_with_grad(column) for column in columns]
        first = get_rank() * rows
    plan = plan_of(
        settings, rows=rows, world=columns[0].shape[0], columns=len(columns), first=first,
        queries=queries.shape[0],
    )  # fmt: skip
    loss = dense_loss(plan, [queries, *columns])
    return loss if widths.weights is None else loss * widths.weights[0]


class _Batch:
    """Queries and documents of one call, gathered where a direction needs it."""

    def __init__(self, settings: Any, embeddings: Sequence[Tensor]) -> None:
        queries, columns = embeddings[0], list(embeddings[1:])
        self.hardness = settings.hardness_mode if settings.hardness_strength > 0 else None
        if self.hardness == "hard_negatives" and len(columns) == 1:
            self.hardness = None  # there are none
        self.alpha = float(settings.hardness_strength)
        self.tau = 1 / settings.scale
        self.queries, self.positives, self.all_queries = queries, columns[0], queries
        self.negatives = torch.stack(columns[1:], 1) if len(columns) > 1 else None  # [B, H, D]
        self.dtype = accumulate_dtype(*embeddings)
        first = 0
        if settings.gather_across_devices:
            if settings.directions != ("query_to_doc",):
                self.all_queries = all_gather_with_grad(queries)
            columns = [all_gather_with_grad(column) for column in columns]
            first = get_rank() * len(queries)
        self.documents = torch.cat(columns) if len(columns) > 1 else columns[0]
        self.place = torch.arange(first, first + len(queries), device=queries.device)  # [B]
        self.everyone = torch.arange(len(columns[0]), device=queries.device)  # [W]
        self.owner = self.everyone.repeat(len(columns))  # whose document it is, [N]

    @property
    def alone(self) -> bool:
        """Whether no other row is there, on any rank."""
        return len(self.everyone) == 1

    @property
    def plain(self) -> bool:
        """Whether the documents of a query are one call of the kernel."""
        return self.hardness in (None, "hard_negatives")

    def _weighed(self) -> dict[str, Any]:
        """Own negatives leave the documents and come back as ones of the row, with weights."""
        if self.hardness is None:
            return {}
        return {
            "query_ids": self.place, "passage_query_ids": self.owner, "hardness_alpha": self.alpha
        }  # fmt: skip

    def mean(self, directions: tuple[str, ...], widths: Widths) -> Tensor:
        """Mean of the losses of queries over documents and, if asked for, the other way round."""
        losses = []
        for direction in directions:
            if direction == "query_to_doc":
                rows, columns, more = self.queries, self.documents, self._weighed()
                more |= {"hard": self.negatives} if more else {}
            else:
                rows, columns, more = self.positives, self.all_queries, {}
            loss, _ = infonce(
                rows, columns, widths.dims, positive_index=self.place, temperature=self.tau,
                dim_weights=widths.weights, **more,
            )  # fmt: skip
            losses.append(loss)
        return sum(losses[1:], losses[0]) / len(losses)

    def excess(self, direction: str, dims: tuple[int, ...]) -> list[Tensor]:
        """X [K, B] of a direction's candidates, in up to two parts; none without candidates.

        But for queries over plain documents, what every row is compared with stands beside its
        positive as hard negatives do, and the positives are no candidates.
        """
        q, p, d = self.queries, self.positives, self.documents
        mine: dict[str, Any] = {"query_ids": self.place}
        if direction != "query_to_doc" and self.alone:
            return []
        if direction == "doc_to_query":
            return [self._x(dims, p, self.all_queries, None, {"positive_index": self.place})]
        if direction == "query_to_query":
            others = mine | {"hard_query_ids": self.everyone}
            return [self._x(dims, q, p, self.all_queries, others)]
        others = mine | {"hard_query_ids": self.owner}
        if direction == "doc_to_doc":
            return [self._x(dims, p, q, d, others)]
        if self.alone and self.negatives is None:
            return []
        if self.plain:
            more = self._weighed()
            more |= {"positive_index": self.place, "in_batch": True}
            return [self._x(dims, q, d, self.negatives if self.hardness else None, more)]
        weighed: dict[str, Any] = {"hardness_alpha": self.alpha}
        if self.hardness == "all_negatives":
            places = torch.arange(len(self.owner), device=q.device)
            weighed |= {"passage_ids": self.place, "hard_ids": places}
            return [self._x(dims, q, p, d, weighed)]
        parts = [] if self.alone else [self._x(dims, q, p, d, weighed | others)]
        if self.negatives is not None:
            parts.append(self._x(dims, q, p, self.negatives, {}))
        return parts

    def _x(
        self,
        dims: tuple[int, ...],
        rows: Tensor,
        passages: Tensor,
        hard: Tensor | None,
        fields: dict[str, Any],
    ) -> Tensor:
        """X [K, B]; `fields` of the kernel's problem, row i's positive being passage i if not."""
        fields.setdefault("positive_index", torch.arange(len(rows), device=rows.device))
        fields.setdefault("in_batch", hard is None)
        problem = Problem(dims=dims, include_positive=False, **fields)
        tau = torch.tensor(self.tau, dtype=self.dtype, device=rows.device)
        return infonce_rows(rows, passages, hard, tau, problem)

    def log_of_sum(self, count: int, parts: list[Tensor], widths: int) -> Tensor:
        """log(count + sum of e^X) of parts [K, B]."""
        shape = (widths, len(self.queries))
        own = self.queries.new_full(shape, math.log(count), dtype=self.dtype)
        return torch.logsumexp(torch.stack([own, *parts]), 0)
