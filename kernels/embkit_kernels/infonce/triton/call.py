"""One InfoNCE call in Triton: its sides, its banks of candidates, its forward.

    prefix_kernel      inverse prefix norms of each side, cosines of matching rows
    forward_kernel     partial sums of exponentials of each bank of candidates
    combine_kernel     X = nLSE - z_pos
    coefficient_kernel coefficient matrices of a chunk of columns; GEMMs make gradients of them
    finish_kernel      positives, own hard negatives, pull of the normalisation, cast

The banks (passages, shared hard negatives, other queries, documents against documents) are the
reference's, see chunked.py; all their tiles are merged in one fixed order.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from ..._common import segments
from ..problem import NO_COLUMN, Problem, jagged_rows
from ..rows import Rows
from .keys import BankKeys, Keys
from .launch import Tiles, Tiling, cdiv, combine, prefix

MASKED = -1e30
LOG2E = 1.4426950408889634


class Side:
    """Vectors on one side of a bank, their inverse prefix norms, and sums for their gradient.

    Attributes:
        needed: whether anybody wants the gradient.
        whole: the accumulator holds all rows; otherwise those of one chunk, finished at once.
        pull: sum of G s of each row, [K, R].
    """

    def __init__(self, x: Tensor, tiling: Tiling, inverse: Tensor | None = None) -> None:
        """x [R, D], last stride 1."""
        self.x, self.dims = x, tiling.dims
        self.inverse = prefix(x, tiling.dims) if inverse is None else inverse
        self.tiles = tiling.tiles(x)
        self.needed, self.whole = False, True
        self.acc: Tensor | None = None
        self.written = 0
        self.pull = torch.zeros_like(self.inverse)

    def add(self, left: Tensor, right: Tensor, first: int = 0) -> None:
        """acc[first : first + n, segment t] += left[t] @ right[:, segment t], left [K, n, .]."""
        count = left.shape[1]
        if self.acc is None:
            shape = (self.x.shape[0] if self.whole else count, self.dims[-1])
            self.acc = torch.empty(shape, dtype=torch.float32, device=self.x.device)
        target = self.acc[first : first + count] if self.whole else self.acc[:count]
        fresh = first >= self.written
        for t, (lo, hi) in enumerate(segments(self.dims)):
            matmul_into(target[:, lo:hi], left[t], right[:, lo:hi], fresh)
        self.written = max(self.written, first + count)


def matmul_into(out: Tensor, left: Tensor, right: Tensor, fresh: bool) -> None:
    """out (+)= left @ right, summed in float32 whatever the factors are; fresh overwrites."""
    beta = 0 if fresh else 1
    if left.dtype == torch.float32:
        torch.addmm(out, left, right, beta=beta, out=out)
    elif out.is_cuda:
        torch.addmm(out, left, right, out_dtype=torch.float32, beta=beta, out=out)
    else:
        torch.addmm(out, left.float(), right.float(), beta=beta, out=out)


@dataclass(frozen=True)
class Bank:
    """Candidates: each row of `rows` stands against all of `columns`."""

    rows: Side
    columns: Side
    keys: BankKeys
    mask: Tensor | None = None
    alpha: float = 0.0

    def tiles(self, call: "Call") -> Tiles:
        """Arguments of the tile kernels; a column that is nobody's candidate has norm -1."""
        inverse, keys, tiling = self.columns.inverse, self.keys, call.tiling
        if self.mask is not None:
            inverse = inverse.masked_fill(~self.mask, -1.0)
        column, query = keys.column, keys.column_query
        keys = dataclasses.replace(
            keys,
            column=column if keys.column_start is not None else tiling.pad(column, NO_COLUMN),
            column_query=None if query is None else tiling.pad(query, NO_COLUMN),
        )
        return Tiles(
            tiling=tiling,
            u=self.rows.tiles,
            v=self.columns.tiles,
            inverse_u=self.rows.inverse,
            inverse_v=tiling.pad(inverse, -1.0),
            reference=call.reference,
            tau=call.tau,
            keys=keys,
            margin=call.problem.margin,
            alpha=self.alpha or None,
        )


class Call(Rows):
    """Sides, banks and per-row vectors of one call."""

    def __init__(self, q: Tensor, p: Tensor, hard: Tensor | None, tau: Tensor, problem: Problem):
        dtype = torch.promote_types(q.dtype, p.dtype)
        if hard is not None:
            dtype = torch.promote_types(dtype, hard.dtype)
        index, batch = problem.positive_index, q.shape[0]
        self.dims, self.dtype = problem.dims, dtype
        self.tiling = Tiling(problem.dims, dtype, q.device)
        self.q, self.p = (Side(packed(x, dtype), self.tiling) for x in (q, p))
        row = None
        if problem.positive_offsets is not None:
            row, _ = jagged_rows(problem.positive_offsets.to(torch.int64), index.shape[0])
        self.keys = Keys(problem, batch, p.shape[0], row)
        dots = prefix(self.p.x, self.dims, self.q.x, v_row=index, u_row=row)
        own = self.q.inverse if row is None else self.q.inverse.index_select(1, row)
        self.positive_inverse = self.p.inverse.index_select(1, index)
        super().__init__(dots * own * self.positive_inverse, tau.float(), problem, batch)

        self.banks: list[Bank] = []
        self.hard: Side | None = None
        self.private: Private | None = None
        self.documents: Side | None = None
        passages, mask = self.keys.passages, problem.passage_mask
        if problem.in_batch:
            self.banks.append(Bank(self.q, self.p, passages, mask))
        if hard is not None and hard.numel():
            self.hard = Side(packed(hard.reshape(-1, hard.shape[-1]), dtype), self.tiling)
            if hard.dim() == 3:
                self.private = Private(self, self.hard, hard.shape[1])
            else:
                keys, alpha = self.keys.shared_hard(hard.shape[0]), problem.hardness_alpha
                self.banks.append(Bank(self.q, self.hard, keys, problem.hard_mask, alpha))
        if problem.same_tower:
            self.banks.append(Bank(self.q, self.q, self.keys.queries))
        if problem.doc_doc:
            own_rows = self.p.x.index_select(0, index)
            self.documents = Side(own_rows, self.tiling, self.positive_inverse)
            self.banks.append(Bank(self.documents, self.p, passages, mask))


def packed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in that dtype, with rows whose elements are neighbours."""
    x = x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


class Private:
    """Each row's own hard negatives: B H cosines, read once by prefix_kernel; the rest is small."""

    def __init__(self, call: Call, side: Side, each: int) -> None:
        self.call, self.side, self.each = call, side, each
        problem = call.problem
        dots = prefix(side.x, call.dims, call.q.x, each=each)
        shape = (len(call.dims), call.batch, each)
        self.s = dots.view(shape) * call.q.inverse[..., None] * side.inverse.view(shape)
        excess = self.s - call.reference[..., None]
        drop = call.keys.drops_private_hard()
        if problem.hard_mask is not None:
            padding = ~problem.hard_mask
            drop = padding if drop is None else drop | padding
        if problem.margin is not None:
            false_negative = excess > problem.margin
            drop = false_negative if drop is None else drop | false_negative
        y = excess / call.tau
        if problem.hardness_alpha:
            y = y + problem.hardness_alpha * self.s
        self.y = y if drop is None else y.masked_fill(drop, MASKED)

    def partial(self) -> tuple[Tensor, Tensor]:
        """Maximum and sum of powers of two above it [K, B], as a tile of the forward has them."""
        y = self.y * LOG2E
        top = y.amax(-1)
        return top, torch.exp2(y - top[..., None]).sum(-1)

    def pairs(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients a G b and pulls G s, [K, B H]."""
        g = torch.exp(self.y - x[..., None]) * weight[..., None]
        c = g * self.call.q.inverse[..., None] * self.side.inverse.view(g.shape)
        return c.flatten(1), (g * self.s).flatten(1)


def forward(
    q: Tensor, p: Tensor, hard: Tensor | None, tau: Tensor, problem: Problem
) -> tuple[Tensor, Tensor]:
    """Per-row losses [K, B] and X [K, B]; see chunked.forward."""
    call = Call(q, p, hard, tau, problem)
    counts = [cdiv(bank.columns.x.shape[0], call.tiling.block_n) for bank in call.banks]
    rows = cdiv(call.batch, call.tiling.block_m) * call.tiling.block_m
    shape = (len(call.dims), sum(counts) + (call.private is not None), rows)
    maxima, sums = call.reference.new_empty(shape), call.reference.new_empty(shape)
    first = 0
    for bank, count in zip(call.banks, counts, strict=True):
        bank.tiles(call).forward(maxima, sums, first)
        first += count
    if call.private is not None:
        maxima[:, first, : call.batch], sums[:, first, : call.batch] = call.private.partial()
    x = combine(maxima, sums, call.batch)
    return call.losses(x), x
