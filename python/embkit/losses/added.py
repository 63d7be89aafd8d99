"""What a recipe adds to a contrastive loss: spread-out embeddings, and distances from a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from embkit import kernels
from embkit.errors import UsageError
from embkit.losses.sides import Rows, Share, shares
from embkit.recipe import Loss


def spread_out(
    rows: Rows, dims: Sequence[int], dim_weights: Sequence[float] | None, share: Share | None
) -> torch.Tensor:
    """Mean squared cosine of different queries, and of different positives, of the global batch."""
    return sum(
        (_spread(x, dims, dim_weights, share) for x in (rows.q, rows.p)), rows.q.new_zeros(())
    )


def _spread(
    x: torch.Tensor, dims: Sequence[int], dim_weights: Sequence[float] | None, share: Share | None
) -> torch.Tensor:
    if share is None:
        return kernels.spread_out(x, dims, dim_weights=dim_weights)[0]
    # Every rank has the whole sum and the gradient of its own rows. Empty places hold zeros, which
    # add nothing; the kernel has divided by the pairs of all places.
    everyone, there = share.gather_own(x)
    value, _ = kernels.spread_out(everyone, dims, dim_weights=dim_weights)
    places, count = len(there), share.batch_size
    value = value * (places * (places - 1) / max(1, count * (count - 1)))
    return _once(value, share)


def distances(
    rows: Rows,
    teacher: Sequence[torch.Tensor | None],
    loss: Loss,
    share: Share | None,
    projection: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean distance of queries, positives and hard negatives from a teacher's vectors, added.

    Args:
        teacher: [b, W] of queries and of positives, [b, H, W] of hard negatives or None; compared
            with the first W numbers of the embeddings.
        projection: [D, W], takes the embeddings into a wider teacher's space.

    Raises:
        UsageError: a wider teacher without it.
    """
    distance: Any = loss.distance  # one of the two that the recipe allows
    weight = rows.sides.weight
    masked = weight[:, None] * rows.sides.hard_mask
    each = [(rows.q, weight), (rows.p, weight), (rows.hard, masked)]
    found = [(x, w, t) for (x, w), t in zip(each, teacher, strict=True) if x is not None]
    owned = torch.stack([w.sum() for _, w, _ in found])
    parts = shares(owned, share.sum(owned.clone())) if share is not None else torch.ones_like(owned)
    total = rows.q.new_zeros((), dtype=torch.float32)
    for (x, w, t), part in zip(found, parts, strict=True):
        assert t is not None
        width = t.shape[-1]
        own = x[..., :width] if projection is None else _through(x, projection)
        if own.shape[-1] != width:
            raise UsageError(
                f"The teacher's vectors have {width} numbers, the embeddings {x.shape[-1]}.",
                where="teacher",
                fix="give the projection from the one to the other",
            )
        value, _ = kernels.embedding_distill(
            own.reshape(-1, width), t.reshape(-1, width), distance=distance,
            row_weights=w.reshape(-1),
        )  # fmt: skip
        total = total + part * value
    return total


def _through(x: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    kind = torch.promote_types(x.dtype, projection.dtype)
    return x.to(kind) @ projection.to(kind)


def divergence(
    rows: Rows,
    dims: Sequence[int],
    loss: Loss,
    *,
    temperature: float | torch.Tensor,
    dim_weights: Sequence[float] | None,
    share: Share | None,
) -> torch.Tensor:
    """Divergence of the softmax over positive and own hard negatives from the teacher's.

    KL(teacher || student) at each width, weighed and added; a mean over the rows in which the
    teacher has scored the positive and a hard negative.
    """
    sides, of_hard = rows.sides, rows.sides.hard_score
    assert rows.hard is not None and of_hard is not None
    scores = torch.cat([sides.score[:, None], of_hard.masked_fill(~sides.hard_mask, torch.nan)], 1)
    apart, used = kernels.score_distill(
        rows.q, rows.p, rows.hard, scores, dims, temperature=temperature,
        teacher_temperature=loss.teacher_temperature,
    )  # fmt: skip
    weight = sides.weight * used
    total = weight.sum() if share is None else share.sum(weight.sum())
    per_dim = (apart * shares(weight, total)).sum(1)
    if dim_weights is not None:
        per_dim = per_dim * per_dim.new_tensor(dim_weights)
    return per_dim.sum()


def _once(value: torch.Tensor, share: Share) -> torch.Tensor:
    """A value that every rank has whole, counted once over ranks; the gradient stays."""
    return value - value.detach() * (1 - 1 / share.world)
