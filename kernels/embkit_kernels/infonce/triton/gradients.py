"""Backward of one InfoNCE call in Triton: chunks of coefficients, GEMMs, finish.

Largest in memory: the workspace of coefficients (`WORKSPACE` bytes), the queries' float32
accumulator and that of one chunk of passages. Columns are chunked, not rows, because N >= B: the
accumulator that is read and written for each chunk is the smaller one, and a chunk of passages is
finished when its GEMMs are. (With doc_doc two banks meet in the passages: they get an accumulator
of their own size.)
"""

import math

import torch
from torch import Tensor

from ..._common import add_rows_
from ..problem import Problem
from .call import LOG2E, Bank, Call
from .launch import Pairs, finish

WORKSPACE = 256 << 20
"""Bytes of coefficients of a chunk of columns. Each chunk costs a pass over the rows' accumulator:
few large chunks are better than what fits in L2."""

HALF_EXPONENT = 13
"""Base-2 logarithm of the bound of coefficients in float16, whose exponents end at 15 and -24."""

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]


def backward(
    grad: Tensor,
    x: Tensor,
    q: Tensor,
    p: Tensor,
    hard: Tensor | None,
    tau: Tensor,
    problem: Problem,
    needs: tuple[bool, bool, bool],
) -> Gradients:
    """Gradients of q, p, hard (None where `needs` is False) and tau; see chunked.backward."""
    return Backward(Call(q, p, hard, tau, problem), grad, x, needs).run(hard)


class Backward:
    """The gradients of one call as they come to be."""

    def __init__(self, call: Call, grad: Tensor, x: Tensor, needs: tuple[bool, bool, bool]) -> None:
        """grad [K, B] upstream of the per-row losses, x [K, B] from the forward."""
        self.call, problem = call, call.problem
        self.needs = needs
        for side, need in ((call.q, 0), (call.p, 1), (call.documents, 1), (call.hard, 2)):
            if side is not None:
                side.needed = needs[need]
        call.p.whole = call.documents is not None
        if call.hard is not None:
            call.hard.whole = False
        grad = grad.to(x.dtype)
        slope = call.slope(call.excess(x))
        self.weight = (grad * call.per_row(slope) / call.tau).contiguous()  # sum_j G_ij
        self.x = torch.where(x.isneginf(), 0, x)
        self.scale = self.half_scale() if call.dtype == torch.float16 else None
        self.unscale = None if self.scale is None else self.scale.reciprocal()

        # Positives: pairs of a query and a passage, dloss / ds = -(their share of the weight).
        g = call.of_row(grad, 1) * slope / -call.tau
        g = g if call.share is None else g * call.share
        self.pair_pull = (g * call.s_pos).contiguous()
        self.pair_c = (g * call.of_row(call.q.inverse, 1) * call.positive_inverse).contiguous()
        self.total = self.pair_pull.sum()  # of all G s, which is -tau dloss / dtau

        index = problem.positive_index
        if needs[1]:
            self.dp = torch.empty_like(call.p.x, memory_format=torch.contiguous_format)
            self.order = index.argsort(stable=True)
            ends = torch.arange(call.p.x.shape[0] + 1, device=index.device)
            self.start = torch.searchsorted(index[self.order], ends, out_int32=True)
        if needs[2] and call.hard is not None:
            self.dhard = torch.empty_like(call.hard.x, memory_format=torch.contiguous_format)

    def half_scale(self) -> Tensor:
        """A power of two that puts the largest coefficient below 2^HALF_EXPONENT: float16 has no
        room for coefficients of 1e-8, whatever the norms and weights are."""
        call = self.call
        sides = [s for bank in call.banks for s in (bank.rows, bank.columns)]
        largest = torch.stack([side.inverse.max() for side in sides or [call.q]]).max()
        bound = len(call.dims) * self.weight.abs().max() * largest.square()
        exponent = HALF_EXPONENT - torch.log2(bound.clamp(1e-30, 1e30)).ceil()
        return torch.exp2(exponent)

    def run(self, hard: Tensor | None) -> Gradients:
        """All gradients, in the dtype the kernels worked in."""
        call = self.call
        for bank in call.banks:
            self.bank(bank)
        own: tuple[Tensor, Tensor] | None = None
        dq, dp, dhard = None, None, None
        if call.private is not None:
            side, each = call.private.side, call.private.each
            c, pull = call.private.pairs(self.x, self.weight)
            self.total = self.total + pull.sum()
            call.q.pull += pull.view(*call.q.pull.shape, each).sum(-1)
            own = (side.x, c)
            if side.needed:
                pairs = Pairs(y=call.q.x, c=c, each=each)
                finish(side.x, call.dims, side.inverse, pull, pairs=pairs, out=self.dhard)
        if call.hard is not None and self.needs[2] and hard is not None:
            dhard = self.dhard.view(hard.shape)
        elif hard is not None and self.needs[2]:
            dhard = torch.zeros_like(hard)
        if self.needs[0]:
            dq = self.finish_queries(own)
        if self.needs[1]:
            if call.documents is not None:
                self.join_documents()
            if call.p.whole or not call.p.written:
                self.finish_passages(slice(0, call.p.x.shape[0]))
            dp = self.dp
        return dq, dp, dhard, -self.total / call.tau

    def bank(self, bank: Bank) -> None:
        """Add one bank's gradients and pulls, a chunk of columns at a time."""
        call, rows, columns = self.call, bank.rows, bank.columns
        tiles, count = bank.tiles(call), columns.x.shape[0]
        block_m, block_n = call.tiling.block_m, call.tiling.block_n
        one = len(call.dims) * math.ceil(call.batch / block_m) * block_m  # elements of a column
        fits = WORKSPACE // columns.x.element_size() // one // block_n * block_n
        step = min(max(fits, block_n), math.ceil(count / block_n) * block_n)
        workspace = None
        if rows.needed or columns.needed:
            workspace = torch.empty(one * step, dtype=call.dtype, device=columns.x.device)
        x = self.x * LOG2E
        for start in range(0, count, step):
            chunk = slice(start, min(start + step, count))
            c, rho, kappa = tiles.coefficients(
                x, self.weight, self.scale, workspace, chunk, columns.needed
            )
            rows.pull += rho
            self.total = self.total + rho.sum()
            if c is not None and rows.needed:
                rows.add(c, columns.x[chunk])
            if c is not None and kappa is not None:
                columns.pull[:, chunk] += kappa
                columns.add(c.transpose(1, 2), rows.x, start)
                if columns is call.p and not columns.whole:
                    self.finish_passages(chunk)
                elif columns is call.hard:
                    self.finish_hard(chunk)

    def join_documents(self) -> None:
        """Positives as rows of doc_doc are passages: their sums join the passages'."""
        call, index = self.call, self.call.problem.positive_index
        p, documents = call.p, call.documents
        assert documents is not None and documents.acc is not None and p.acc is not None
        add_rows_(p.acc, index, documents.acc)
        pull = p.pull.t().contiguous()
        p.pull = add_rows_(pull, index, documents.pull.t().contiguous()).t().contiguous()

    def finish_queries(self, own: tuple[Tensor, Tensor] | None) -> Tensor:
        """dq [B, D]."""
        call, problem = self.call, self.call.problem
        pairs = Pairs(
            y=call.p.x, c=self.pair_c, pull=self.pair_pull,
            start=problem.positive_offsets, source=problem.positive_index,
        )  # fmt: skip
        q = call.q
        return finish(
            q.x, call.dims, q.inverse, q.pull,
            acc=q.acc, unscale=self.unscale, pairs=pairs, hard=own,
        )  # fmt: skip

    def finish_passages(self, chunk: slice) -> None:
        """dp [chunk, D]: each passage has the queries that it is a positive of."""
        call, p = self.call, self.call.p
        pairs = Pairs(
            y=call.q.x, c=self.pair_c, pull=self.pair_pull,
            start=self.start[chunk.start :], entry=self.order, source=call.row,
        )  # fmt: skip
        finish(
            p.x[chunk], call.dims, p.inverse[:, chunk], p.pull[:, chunk],
            acc=p.acc, unscale=self.unscale, pairs=pairs, out=self.dp[chunk],
        )  # fmt: skip

    def finish_hard(self, chunk: slice) -> None:
        """d_hard [chunk, D] of shared hard negatives."""
        call, hard = self.call, self.call.hard
        assert hard is not None
        finish(
            hard.x[chunk], call.dims, hard.inverse[:, chunk], hard.pull[:, chunk],
            acc=hard.acc, unscale=self.unscale, out=self.dhard[chunk],
        )  # fmt: skip
