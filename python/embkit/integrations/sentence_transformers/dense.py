"""MultipleNegativesRankingLoss of one width on a CPU: value and gradients in closed form.

`embkit.kernels.infonce` shares work between widths and recomputes what it can. One width has
nothing to share, and a small batch is over before the kernel has looked at its arguments: here the
unit vectors are made once for all directions, and one pass over chunks of rows takes the loss and
its gradients from the same products (three GEMMs a direction).

With z the scaled cosines, y a candidate's z (and penalty) less the positive's, c as in ranking.py:

    X = log sum e^y,  loss = log(c + e^X),  dloss/dz = e^(y - loss) at candidates
    dloss/dz_pos = -sigmoid(X - log c)      which is no candidate, so easy rows keep their loss

Rows: B queries of this rank, W of all ranks, N = W (1 + negatives) documents, M = W + N vectors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from embkit.kernels._common import MIN_NORM, accumulate_dtype, full_precision

_CHUNK = 1 << 20  # numbers of a chunk's logits, 4 MiB in float32
_LEAST_ROWS = 16
_PENALISED = {
    "hard_negatives": "negatives", "in_batch_negatives": "others", "all_negatives": "all"
}  # fmt: skip


@dataclass(frozen=True)
class _Block:
    """Rows first, first + 1, ... of the vectors against columns lo to hi of them.

    Attributes:
        own: places among the columns, of row 0, that belong to the row and are no candidates; the
            next row's are one further.
        hardness: how much the penalty of each candidate adds to its logit, as a share of it.
        penalised: "all" candidates, those of the row's own "negatives", or all "others".
    """

    first: int
    lo: int
    hi: int
    own: tuple[int, ...]
    hardness: float = 0.0
    penalised: str = "all"
    negatives: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Group:
    """Blocks under one softmax; the first one's first own column is the positive."""

    blocks: tuple[_Block, ...]
    count: int  # c

    @property
    def width(self) -> int:
        """Columns of all blocks."""
        return sum(block.hi - block.lo for block in self.blocks)


@dataclass(frozen=True)
class Plan:
    """What stands against what, of `rows` queries, and 1 / temperature."""

    groups: tuple[_Group, ...]
    rows: int
    scale: float


def plan_of(
    settings: Any, *, rows: int, world: int, columns: int, first: int, queries: int
) -> Plan:
    """The plan of one batch, whose vectors are queries and then columns of documents.

    Args:
        settings: as of `ranking_loss`.
        rows: B. world: W, rows of a column of documents. columns: positives and negatives.
        first: of this rank's documents in a column.
        queries: B or W, as many as there are vectors of queries.
    """
    hardness, penalised = 0.0, "all"
    if settings.hardness_mode is not None and settings.hardness_strength > 0:
        hardness = settings.hardness_strength / settings.scale
        penalised = _PENALISED[settings.hardness_mode]
    joint = settings.partition_mode == "joint"
    return _plan(
        settings.directions, joint, hardness, penalised, settings.scale, rows, world, columns,
        first, queries,
    )  # fmt: skip


@functools.lru_cache(maxsize=64)
def _plan(
    directions: tuple[str, ...],
    joint: bool,
    hardness: float,
    penalised: str,
    scale: float,
    rows: int,
    world: int,
    columns: int,
    first: int,
    queries: int,
) -> Plan:
    """Kept, because the steps of a training are alike and small ones are short."""
    place = first if queries == world else 0
    end = queries + columns * world
    mine = tuple(first + k * world for k in range(columns))
    blocks = {
        "query_to_doc": _Block(place, queries, end, mine[:1], hardness, penalised, mine[1:]),
        "query_to_query": _Block(place, 0, queries, (place,)),
        "doc_to_query": _Block(queries + first, 0, queries, (place,)),
        "doc_to_doc": _Block(queries + first, queries, end, mine),
    }
    chosen = [block for name, block in blocks.items() if name in directions]
    groups = [_Group((block,), 1) for block in chosen]
    if joint:
        groups = [_Group(tuple(chosen), 2 if "doc_to_query" in directions else 1)]
    return Plan(tuple(groups), rows, float(scale))


def dense_loss(plan: Plan, vectors: Sequence[Tensor]) -> Tensor:
    """The mean loss of the queries.

    Args:
        plan: of :func:`plan_of`.
        vectors: queries, positives, then columns of negatives, [B or W, D] each.

    Returns:
        float32 (float64 for float64 inputs), differentiable once.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in vectors):
        loss: Tensor = _Loss.apply(plan, *vectors)
        return loss
    return _loss_and_gradient(plan, vectors, wanted=False)[0]


class _Loss(torch.autograd.Function):
    """The gradients are those of the forward pass, scaled."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *vectors: Tensor) -> Tensor:
        """The loss of vectors; see :func:`dense_loss`."""
        loss, grad_MD = _loss_and_gradient(plan, vectors, wanted=True)
        ctx.sizes = [x.shape[0] for x in vectors]
        ctx.dtypes = [x.dtype for x in vectors]
        ctx.save_for_backward(grad_MD)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        """Gradients of the vectors."""
        (grad_MD,) = ctx.saved_tensors
        parts = (grad_MD * upstream).split(ctx.sizes)
        return None, *(g.to(t) for g, t in zip(parts, ctx.dtypes, strict=True))


def _loss_and_gradient(
    plan: Plan, vectors: Sequence[Tensor], *, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """The loss, and its gradient [M, D] if it is wanted."""
    with _exact():
        unit_MD = torch.cat(list(vectors)).to(accumulate_dtype(*vectors))
        norm_M1 = torch.linalg.vector_norm(unit_MD, dim=1, keepdim=True)
        unit_MD.div_(norm_M1.clamp_min(MIN_NORM))
        grad_MD = torch.zeros_like(unit_MD) if wanted else None
        sums = []
        weight = 1 / (plan.rows * len(plan.groups))
        for group in plan.groups:
            step = max(_LEAST_ROWS, _CHUNK // max(group.width, 1))
            for start in range(0, plan.rows, step):
                rows = range(start, min(start + step, plan.rows))
                logits = unit_MD.new_empty(len(rows), group.width)
                sums.append(_softmax(group, unit_MD, logits, rows, plan.scale, wanted))
                if grad_MD is not None:
                    _push(group, unit_MD, logits, rows, plan.scale * weight, grad_MD)
        if grad_MD is not None:
            # Only what is tangent to the sphere moves a unit vector; nothing moves a zero vector.
            radial_M1 = torch.linalg.vecdot(grad_MD, unit_MD).unsqueeze(1)
            inverse_M1 = norm_M1.reciprocal().masked_fill_(norm_M1 <= MIN_NORM, 0)
            grad_MD.addcmul_(unit_MD, radial_M1, value=-1).mul_(inverse_M1)
        return (sums[0] if len(sums) == 1 else torch.stack(sums).sum()) * weight, grad_MD


def _exact() -> AbstractContextManager[None]:
    """Float32 products where autocast or a lower precision is on: entering costs as much as a small
    product."""
    if torch.is_autocast_enabled("cpu") or torch.get_float32_matmul_precision() != "highest":
        return full_precision(torch.device("cpu"))
    return nullcontext()


def _parts(group: _Group, logits: Tensor) -> list[tuple[_Block, Tensor]]:
    """Each block with its columns of the logits."""
    if len(group.blocks) == 1:
        return [(group.blocks[0], logits)]
    widths = [block.hi - block.lo for block in group.blocks]
    return list(zip(group.blocks, logits.split(widths, 1), strict=True))


def _softmax(
    group: _Group, unit_MD: Tensor, logits: Tensor, rows: range, scale: float, wanted: bool
) -> Tensor:
    """The sum of the losses of rows; their gradient by z, if wanted, stays in `logits`."""
    positive: Tensor | None = None
    parts = _parts(group, logits)
    for block, part in parts:
        mine = unit_MD[block.first + rows.start : block.first + rows.stop]
        part.addmm_(mine, unit_MD[block.lo : block.hi].t(), beta=0, alpha=scale)
        if positive is None:
            positive = part.diagonal(block.own[0] + rows.start).clone()
        if block.hardness:
            _penalise(block, part, rows.start)
    assert positive is not None
    logits.sub_(positive[:, None])
    for block, part in parts:
        for place in block.own:
            part.diagonal(place + rows.start).fill_(-math.inf)
    excess = torch.logsumexp(logits, 1)
    if group.count > 1:
        excess.sub_(math.log(group.count))
    losses = F.softplus(excess, threshold=40)
    if group.count > 1:
        losses.add_(math.log(group.count))
    if wanted:
        logits.sub_(losses[:, None]).exp_()
        block, part = parts[0]
        part.diagonal(block.own[0] + rows.start).copy_(excess.sigmoid_().neg_())
    return losses.sum()


def _penalise(block: _Block, part: Tensor, start: int) -> None:
    """Add the penalties, which have no gradient, to the logits of a block."""
    factor = 1 + block.hardness
    theirs = [part.diagonal(place + start) for place in block.negatives]
    if block.penalised == "negatives":
        for diagonal in theirs:
            diagonal.mul_(factor)
        return
    before = [diagonal.clone() for diagonal in theirs]
    part.mul_(factor)
    if block.penalised == "others":
        for diagonal, value in zip(theirs, before, strict=True):
            diagonal.copy_(value)


def _push(
    group: _Group, unit_MD: Tensor, slopes: Tensor, rows: range, factor: float, grad_MD: Tensor
) -> None:
    """Add what the slopes of the logits are to the unit vectors."""
    for block, part in _parts(group, slopes):
        mine = slice(block.first + rows.start, block.first + rows.stop)
        grad_MD[mine].addmm_(part, unit_MD[block.lo : block.hi], alpha=factor)
        grad_MD[block.lo : block.hi].addmm_(part.t(), unit_MD[mine], alpha=factor)
