"""The loss of a batch: its kind decides the kernel, its recipe the candidates and what is added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from embkit import kernels
from embkit.errors import UsageError
from embkit.losses import added
from embkit.losses.contrastive import contrastive
from embkit.losses.sides import Outcome, Rows, Share, Sides
from embkit.recipe import Loss, Train


def compute(
    embeddings: torch.Tensor,
    query: torch.Tensor,
    positive: torch.Tensor,
    hard: torch.Tensor,
    sides: Sides,
    *,
    dims: Sequence[int],
    config: Train,
    loss: Loss | None = None,
    share: Share | None = None,
    step: int = 0,
    teacher: torch.Tensor | None = None,
    temperature: torch.Tensor | None = None,
    projection: torch.Tensor | None = None,
) -> Outcome:
    """The loss of one batch of one task.

    Args:
        embeddings: raw [R, D], one per distinct row of the batch.
        query, positive: int64 [B], hard: int64 [B, H]: positions of each side in ``embeddings``.
        sides: kind of the task, keys, masks, scores and weights.
        dims: MRL widths; their losses are added.
        config: temperature of InfoNCE, scale of CoSENT, number of steps.
        loss: of the task; None takes that of ``config``.
        share: the ranks that have the batch between them; all arguments are of this rank's rows
            then, and what is returned is its part of a sum over ranks.
        step: from 0, for widths that join one after another.
        teacher: [R, W], what the rows' first W numbers are drawn to where ``loss.distill`` is set,
            and what decides of negatives where ``loss.guide`` is.
        temperature: (), a learned one, in the place of the configuration's.
        projection: [D, W], takes embeddings into the space of a teacher that is wider than they.

    Raises:
        UsageError: a guided loss without a teacher's vectors, or a teacher that is too wide without
            a projection.
    """
    device = embeddings.device
    loss = config.loss if loss is None else loss
    weights = dim_weights(loss, dims, step, config.steps)

    def side(index: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        # index_select, not indexing: its backward adds repeated rows in a fixed order.
        flat = x.index_select(0, index.reshape(-1).to(device))
        return flat.reshape(*index.shape, x.shape[1])

    own = hard if hard.shape[1] > 0 else None
    of_teacher: list[torch.Tensor | None] = [None] * 3
    if teacher is not None:
        places = (query, positive, own)
        of_teacher = [None if i is None else side(i, teacher) for i in places]
    rows = Rows(
        q=side(query, embeddings),
        p=side(positive, embeddings),
        hard=None if own is None else side(own, embeddings),
        sides=sides.to(device),
    )
    if loss.guided and sides.kind != "sts":
        if of_teacher[0] is None or of_teacher[1] is None:
            raise UsageError(
                "The loss is guided by a teacher, and there are no vectors of one.",
                where="loss.guide",
                fix="give teacher=, the vectors of the rows that were embedded",
            )
        rows = replace(rows, guide=(of_teacher[0], of_teacher[1], of_teacher[2]))
    tau: float | torch.Tensor = config.temperature if loss.temperature is None else loss.temperature
    tau = temperature if temperature is not None else tau
    if sides.kind == "sts":
        scale = config.cosent_scale if loss.cosent_scale is None else loss.cosent_scale
        out = _cosent(rows, dims, scale, weights, share)
    else:
        out = contrastive(rows, dims, loss, temperature=tau, dim_weights=weights, share=share)
        if loss.spread_out:
            more = added.spread_out(rows, dims, weights, share)
            out = replace(out, loss=out.loss + loss.spread_out * more)
        if loss.distill_scores and own is not None:
            more = added.divergence(
                rows, dims, loss, temperature=tau, dim_weights=weights, share=share
            )
            out = replace(out, loss=out.loss + loss.distill_scores * more)
    if loss.distill and teacher is not None:
        more = added.distances(rows, of_teacher, loss, share, projection)
        out = replace(out, loss=out.loss + loss.distill * more)
    return out


def value_and_grad(
    embeddings: torch.Tensor,
    *args: Any,
    temperature: torch.Tensor | None = None,
    projection: torch.Tensor | None = None,
    **options: Any,
) -> tuple[Outcome, torch.Tensor]:
    """The loss of a batch, detached, and its gradient by embedding [R, D], float32 for half types.

    Args:
        embeddings: as for :func:`compute`, with or without a graph, which is not used.
        temperature, projection: as for :func:`compute`; their gradients are in the outcome.
        *args, **options: as for :func:`compute`.
    """
    # Half types hold an embedding; the sum of its gradients from all its places needs more.
    half = embeddings.dtype in (torch.bfloat16, torch.float16)
    leaf = (embeddings.float() if half else embeddings).detach().requires_grad_()
    learned = {"temperature": temperature, "projection": projection}
    own = {k: x.detach().clone().requires_grad_() for k, x in learned.items() if x is not None}
    with torch.enable_grad():
        out = compute(leaf, *args, **{**options, **own})
        wanted = [leaf, *own.values()]
        gradient, *rest = torch.autograd.grad(out.loss, wanted, allow_unused=bool(own))
    # A kind of task may have no use for one: CoSENT has no temperature.
    slopes = {
        f"d_{name}": torch.zeros_like(x) if slope is None else slope
        for (name, x), slope in zip(own.items(), rest, strict=True)
    }
    return Outcome(loss=out.loss.detach(), per_dim=out.per_dim.detach(), **slopes), gradient


def dim_weights(loss: Loss, dims: Sequence[int], step: int, steps: int) -> list[float] | None:
    """Factor of the loss at each width, in the order of the widths; None for 1 each.

    >>> dim_weights(Loss(dims_schedule="progressive"), (256, 128, 64), step=400, steps=1000)
    [0.0, 1.0, 1.0]
    """
    if not loss.dim_weights and loss.dims_schedule == "joint":
        return None
    weights = [loss.dim_weights.get(str(d), 1.0) for d in dims]
    if loss.dims_schedule == "progressive":
        joined = sorted(dims)[: min(step * len(dims) // steps + 1, len(dims))]
        weights = [w if d in joined else 0.0 for d, w in zip(dims, weights, strict=True)]
    return weights


def _cosent(
    rows: Rows,
    dims: Sequence[int],
    scale: float,
    weights: Sequence[float] | None,
    share: Share | None,
) -> Outcome:
    labels = rows.sides.score
    if share is None:
        loss, per_dim = kernels.cosent(
            (rows.q, rows.p), labels, dims, scale=scale, dim_weights=weights
        )
        return Outcome(loss=loss, per_dim=per_dim)
    # A cosine needs its own pair only: K numbers a pair go around, not embeddings. Every rank then
    # has the whole loss and the gradient of its own cosines; empty places have no label.
    ascending = sorted(dims)
    cosine_BK = kernels.prefix_cosine(rows.q, rows.p, ascending).t()
    all_NK, all_labels, there = share.gather_own(cosine_BK, labels)
    all_labels = torch.where(there, all_labels, torch.nan)
    by_width = None if weights is None else dict(zip(dims, weights, strict=True))
    loss, per_dim = kernels.cosent(
        all_NK.t(), all_labels, scale=scale,
        dim_weights=None if by_width is None else [by_width[d] for d in ascending],
    )  # fmt: skip
    order = torch.tensor([ascending.index(d) for d in dims], device=per_dim.device)
    # The value is counted once over ranks; the gradient is this rank's own already.
    return Outcome(
        loss=loss - loss.detach() * (1 - 1 / share.world),
        per_dim=per_dim.index_select(0, order) / share.world,
    )
