"""InfoNCE over ranks whose columns go around: nobody ever holds those of all.

    there  a block of columns passes every rank, which adds it to the log-sum-exp of its own rows
    back   it returns the way it came, and brings the sum of its gradients home

A block of another rank is a bank of negatives that stands against every row, masked by the keys of
both sides. X of a row is the log-sum-exp of its X over the blocks, so a block's part of the
gradient is that of its own X, weighed by exp(X_block - X).

A rank holds two blocks at a time and, on the way back, as many gradients. What travels is one
piece of memory, so that a hop is one message: W - 1 there, W - 2 back, W - 1 of gradients.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .._common import accumulate_dtype, resolve_dims, weigh_dims
from .op import _fields, infonce_backward, infonce_forward
from .problem import Problem

_KEYS = 3  # of a column: its own, its query's, and whether it is there


class Ring(Protocol):
    """Ranks in a circle.

    Attributes:
        world: how many. rows: places of a block, at least the rows of each rank.
    """

    world: int
    rows: int

    def pass_on(self, tensor: Tensor, *, back: bool = False) -> Callable[[], Tensor]:
        """Send a contiguous tensor to the rank before, or back to the one after, and receive the
        like from the other neighbour; a function that waits for both and gives what came."""


def infonce_ring(
    q: Tensor,
    p: Tensor,
    dims: Sequence[int],
    *,
    ring: Ring,
    query_ids: Tensor,
    passage_ids: Tensor,
    row_weights: Tensor,
    hard: Tensor | None = None,
    hard_ids: Tensor | None = None,
    hard_mask: Tensor | None = None,
    temperature: float | Tensor = 0.05,
    dim_weights: Sequence[float] | Tensor | None = None,
    include_positive: bool = True,
    same_tower: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """This rank's part of `infonce(..., reduction="sum")` over the rows and passages of all ranks.

    Every rank calls it, and its backward, with equal `dims` and options.

    Args:
        q: own queries [B, D]. p: own passages [B, D], row i's positive is i.
        dims: prefix widths in any order.
        ring: the ranks.
        query_ids, passage_ids: identity of each, int32 [B], the same numbers on all ranks.
        row_weights: [B], of own rows in the sum over ranks.
        hard, hard_ids, hard_mask: own hard negatives [B, H, D] of each row, as for `infonce`.
        temperature: as for `infonce`; a tensor's gradient is this rank's part of a sum.
        dim_weights: as for `infonce`.
        include_positive, same_tower: as for `infonce`; with `same_tower` queries go around too.
        **options: `hardness_alpha` and margins of `infonce`.

    Returns:
        The own rows' sum over widths, and the sum at each width [K] in the order of `dims`,
        detached. Their sums over ranks are those of one process to rounding.

    Raises:
        TypeError: an option that needs more than this ring: `doc_doc`, `symmetric`, jagged
            positives, other reductions.
    """
    if "doc_doc" in options:
        raise TypeError("infonce_ring has no doc_doc")
    ascending, order = resolve_dims(dims, q.shape[1])
    tau = torch.as_tensor(temperature, dtype=accumulate_dtype(q, p, hard), device=q.device)
    own = Problem(
        dims=ascending, positive_index=torch.arange(len(q), device=q.device),
        query_ids=query_ids, passage_ids=passage_ids, passage_query_ids=query_ids,
        hard_ids=hard_ids, hard_mask=None if hard_mask is None else hard_mask.bool(),
        include_positive=False, same_tower=same_tower, **options,
    )  # fmt: skip
    x_KB: Tensor = _Ring.apply(q, p, hard, tau.reshape(()), own, ring)
    if include_positive:
        rows_KB = F.softplus(x_KB, threshold=40)
    else:
        rows_KB = torch.where(x_KB.isneginf(), 0, x_KB)
    loss, per_dim = weigh_dims((rows_KB * row_weights).sum(1), order, dim_weights)
    return loss, per_dim.detach()


class _Ring(torch.autograd.Function):
    """X = nLSE - z_pos over the columns of all ranks, [K, B]."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, p: Tensor, hard: Tensor | None, tau: Tensor, own: Problem, ring: Ring
    ) -> Tensor:
        block = _Block.of(q, p, own, ring.rows)
        coming = ring.pass_on(block.data) if ring.world > 1 else None
        parts = [infonce_forward(q, p, hard, tau, *_fields(own))[1]]
        while coming is not None:
            block = dataclasses.replace(block, data=coming())
            coming = ring.pass_on(block.data) if len(parts) < ring.world - 1 else None
            parts.append(infonce_forward(q, p, *block.bank(tau, own))[1])
        x = torch.logsumexp(torch.stack(parts), 0)
        ctx.save_for_backward(q, p, hard, tau, x)
        ctx.own, ctx.ring, ctx.parts, ctx.last = own, ring, parts, block
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, p, hard, tau, x = ctx.saved_tensors
        own, ring, block, parts = ctx.own, ctx.ring, ctx.last, ctx.parts
        count = len(q)

        def part(number: int, *bank: Any, need_bank: bool) -> tuple[Tensor, ...]:
            x_KB = parts[number]
            weight = torch.where(x_KB.isneginf(), 0, torch.exp(x_KB - x)) * grad
            # exp gives NaN where there is no candidate at all, and where() passes over it.
            found: tuple[Tensor, ...] = infonce_backward(
                weight, x_KB, q, p, *bank[:2], True, True, need_bank, *bank[2:]
            )
            return found

        dq, dp, dtau = torch.zeros_like(q), torch.zeros_like(p), torch.zeros_like(tau)
        home: Callable[[], Tensor] | None = None
        for number in range(ring.world - 1, 0, -1):
            ahead = ring.pass_on(block.data, back=True) if number > 1 else None
            more_q, more_p, added, more_tau = part(number, *block.bank(tau, own), need_bank=True)
            dq += more_q
            dp += more_p
            dtau += more_tau
            if home is not None:
                added = added.add_(home())
            home = ring.pass_on(added, back=True)
            if ahead is not None:
                block = dataclasses.replace(block, data=ahead())
        more_q, more_p, dhard, more_tau = part(
            0, hard, tau, *_fields(own), need_bank=hard is not None
        )
        dq += more_q
        dp += more_p
        dtau += more_tau
        if home is not None:
            sides = home().view(-1, ring.rows, q.shape[1])
            dp += sides[0, :count]
            if own.same_tower:
                dq += sides[1, :count]
        return dq, dp, None if hard is None else dhard, dtau, None, None


@dataclasses.dataclass(frozen=True)
class _Block:
    """Columns of a rank in one piece of memory: keys [3, rows], then vectors [S, rows, D].

    Attributes:
        data: uint8. sides: S, 1 for passages, 2 with queries. rows: places, some of them empty.
        width: D. dtype: of the vectors.
    """

    data: Tensor
    sides: int
    rows: int
    width: int
    dtype: torch.dtype

    @classmethod
    def of(cls, q: Tensor, p: Tensor, own: Problem, rows: int) -> "_Block":
        """This rank's columns, the same number of places on every rank."""
        sides = [p, q] if own.same_tower else [p]
        dtype = torch.promote_types(q.dtype, p.dtype)
        block = cls(
            torch.zeros(
                rows * (8 * _KEYS + len(sides) * q.shape[1] * dtype.itemsize),
                dtype=torch.uint8, device=q.device,
            ),
            len(sides), rows, q.shape[1], dtype,
        )  # fmt: skip
        for place, side in zip(block.vectors, sides, strict=True):
            place[: len(side)] = side
        assert own.passage_ids is not None and own.query_ids is not None
        block.keys[0, : len(p)] = own.passage_ids
        block.keys[1, : len(p)] = own.query_ids
        block.keys[2, : len(p)] = 1
        return block

    @property
    def vectors(self) -> Tensor:
        """[S, rows, D], a view."""
        vectors = self.data[8 * _KEYS * self.rows :].view(self.dtype)
        return vectors.view(self.sides, self.rows, self.width)

    @property
    def keys(self) -> Tensor:
        """int64 [3, rows], a view."""
        return self.data[: 8 * _KEYS * self.rows].view(torch.int64).view(_KEYS, self.rows)

    def bank(self, tau: Tensor, own: Problem) -> list[Any]:
        """Arguments of the ops from ``hard`` on: every column is a negative of every row."""
        passage, query, there = self.keys.to(torch.int32).repeat(1, self.sides)
        problem = dataclasses.replace(
            own, in_batch=False, same_tower=False, hardness_alpha=0.0, passage_query_ids=None,
            hard_ids=passage, hard_query_ids=query, hard_mask=there.bool(),
        )  # fmt: skip
        return [self.vectors.flatten(0, 1), tau, *_fields(problem)]
