"""InfoNCE forward and closed-form backward in row chunks: the torch reference of the op.

Maths (all sums in float32, or float64 for float64 inputs). Raw rows u_i, v_j and widths
d_1 < ... < d_K cut [0, D) into segments; prefix k is the sum of segments 0..k, so that one pass
over the width gives the dot products R^k of every prefix. With inverse prefix norms a, b:

    s^k_ij = a^k_i b^k_j R^k_ij                                       the cosine
    y^k_ij = (s^k_ij - s^k_i,pos) / tau  [+ alpha s^k_ij]             masked: -1e30
    X^k_i  = log sum_j exp y^k_ij                                     = nLSE - z_pos
    loss^k_i = softplus(X^k_i)      or X^k_i without the positive in the denominator

The positive never enters the log-sum-exp and logits are differences of cosines *before* the
division by tau: an easy row keeps its tiny loss, where log-sum-exp minus logit would cancel.

Backward with upstream g^k_i, G^k_ij = g^k_i sigmoid(X^k_i) exp(y^k_ij - X^k_i) / tau and
C^k = a G^k b:

    du_i[seg t] = sum_j Cbar^t_ij v_j[seg t] - eta^t_i u_i[seg t],    Cbar^t = sum_{k>=t} C^k
    eta^t_i = sum_{k>=t} (a^k_i)^2 sum_j G^k_ij s^k_ij                and the same for v

since coordinate d of segment t belongs to the prefixes k >= t: one GEMM a segment, whatever K.
dtau = -(1/tau) sum G s.

Candidates come in banks (passages, hard negatives, queries, documents against documents), each a
pair of sides. A block [rows, columns] of one bank is the largest thing in memory, K + 3 of them.
Rows are walked in the same chunks forward and backward, so that margin masks agree to the bit.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .._common import (
    accumulate_dtype,
    add_rows_,
    prefix_dots,
    prefix_inverse_norms,
    segments,
    suffix_sum_,
)
from .problem import Masks, Problem

MASKED = -1e30
EMPTY = -1e29
"""A log-sum-exp below this had nothing but masked candidates."""

WORKSPACE = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Elements of a chunk's blocks together: about L2 on CPU, 256 MiB in float32 on CUDA."""

MIN_ROWS = 16


def chunk_rows(columns: int, widths: int, device: torch.device) -> int:
    """Rows in a chunk, from the workspace budget (a function of the shape alone)."""
    budget = WORKSPACE.get(device.type, WORKSPACE["cuda"])
    return max(MIN_ROWS, budget // (max(1, columns) * (widths + 3)))


class Side:
    """Vectors on one side of a bank, with their inverse prefix norms and gradient sums."""

    def __init__(self, x: Tensor, dims: tuple[int, ...]) -> None:
        """x: [..., D] in the accumulation type."""
        self.x, self.dims = x, dims
        self.inverse = prefix_inverse_norms(x, dims)
        self.grad: Tensor | None = None
        self.pull: Tensor | None = None

    def want_grad(self) -> None:
        """Make room for the gradient [..., D] and `pull` = sum_j G s, [K, ...]."""
        self.grad, self.pull = torch.zeros_like(self.x), torch.zeros_like(self.inverse)

    def finish(self) -> Tensor:
        """Gradient after the pull of the normalisation, - eta u."""
        assert self.grad is not None and self.pull is not None
        eta = suffix_sum_(self.inverse.square() * self.pull)
        for (lo, hi), weight in zip(segments(self.dims), eta, strict=True):
            self.grad[..., lo:hi].addcmul_(weight.unsqueeze(-1), self.x[..., lo:hi], value=-1)
        return self.grad


@dataclass(frozen=True)
class Bank:
    """Candidates: row i of `rows` stands against all of `columns` [N, D], or its own [B, H, D]."""

    rows: Side
    columns: Side
    masks: Callable[[slice], tuple[Tensor | None, Tensor | None]]
    alpha: float = 0.0

    @property
    def private(self) -> bool:
        """Whether each row has candidates of its own."""
        return self.columns.x.dim() == 3

    @property
    def width(self) -> int:
        """Candidates of a row."""
        return self.columns.x.shape[-2]

    def column_inverse(self, k: int, rows: slice) -> Tensor:
        """Inverse norms that broadcast over a block [rows, columns]."""
        return self.columns.inverse[k, rows] if self.private else self.columns.inverse[k]


class State:
    """Sides, banks, positives and per-row vectors of one call."""

    def __init__(self, q: Tensor, p: Tensor, hard: Tensor | None, tau: Tensor, problem: Problem):
        acc = accumulate_dtype(q, p, hard)
        self.problem, self.dims = problem, problem.dims
        self.batch = q.shape[0]
        self.tau = tau.to(acc)
        masks = Masks(problem, self.batch)
        self.row = masks.row
        self.share = None if masks.count is None else masks.count.to(acc).reciprocal()
        self.q, self.p = Side(q.to(acc), self.dims), Side(p.to(acc), self.dims)
        self.hard = None if hard is None else Side(hard.to(acc), self.dims)
        # The positives as a side of their own: their gradient joins the passages' at the end.
        self.positive = Side(self.p.x.index_select(0, problem.positive_index), self.dims)
        self.s_pos = (
            prefix_dots(self.of_row(self.q.x, 0), self.positive.x, self.dims)
            * self.of_row(self.q.inverse, 1)
            * self.positive.inverse
        )
        self.reference = self.s_pos
        if self.row is not None:
            # With several positives the lowest is the reference: it also sets the margin.
            low = self.s_pos.new_full((len(self.dims), self.batch), torch.inf)
            low = low.scatter_reduce(1, self.row.expand_as(self.s_pos), self.s_pos, "amin")
            self.reference = torch.where(low.isinf(), 0, low)

        self.banks: list[Bank] = []
        if problem.in_batch:
            self.banks.append(Bank(self.q, self.p, masks.passages))
        if self.hard is not None:
            keep = masks.private_hard if self.hard.x.dim() == 3 else masks.shared_hard
            self.banks.append(Bank(self.q, self.hard, keep, problem.hardness_alpha))
        if problem.same_tower:
            self.banks.append(Bank(self.q, self.q, masks.queries))
        if problem.doc_doc:
            self.banks.append(Bank(self.positive, self.p, masks.passages))
        widest = max(bank.width for bank in self.banks)
        self.chunk = chunk_rows(widest, len(self.dims), q.device)

    def of_row(self, x: Tensor, dim: int) -> Tensor:
        """Spread a per-row tensor over the positives (a copy only when they are jagged)."""
        return x if self.row is None else x.index_select(dim, self.row)

    def per_row(self, x: Tensor) -> Tensor:
        """Mean over the positives of each row: [K, nnz] -> [K, B]."""
        if self.row is None or self.share is None:
            return x
        out = x.new_zeros(self.batch, x.shape[0])
        return add_rows_(out, self.row, (x * self.share).t().contiguous()).t().contiguous()

    def chunks(self) -> Iterator[slice]:
        """Row slices, the same forward and backward."""
        for start in range(0, self.batch, self.chunk):
            yield slice(start, min(start + self.chunk, self.batch))

    def logits(self, bank: Bank, rows: slice) -> Iterator[tuple[int, Tensor]]:
        """Yield (k, masked y^k [rows, columns]) for each width, ascending.

        y is scratch of the caller's; the running dot product stays here.
        """
        drop, own = bank.masks(rows)
        u, v = bank.rows.x[rows], bank.columns.x[rows] if bank.private else bank.columns.x
        dot: Tensor | None = None
        for k, (lo, hi) in enumerate(segments(self.dims)):
            if bank.private:
                part = torch.bmm(v[:, :, lo:hi], u[:, lo:hi, None]).squeeze(-1)
                dot = part if dot is None else dot.add_(part)
            elif dot is None:
                dot = u[:, lo:hi] @ v[:, lo:hi].t()
            else:
                dot.addmm_(u[:, lo:hi], v[:, lo:hi].t())
            a = bank.rows.inverse[k, rows, None]
            reference = self.reference[k, rows, None]
            # (a R b - ref) / tau as (R b - ref / a) (a / tau): two passes. a = 0 has ref = 0.
            shift = torch.where(a > 0, -reference / a, 0)
            y = torch.addcmul(shift, dot, bank.column_inverse(k, rows)).mul_(a / self.tau)
            mask = drop
            if self.problem.margin is not None:
                false_negative = y > self.problem.margin / self.tau
                mask = false_negative if drop is None else false_negative.logical_or_(drop)
            if bank.alpha:
                y = y.mul_(1 + bank.alpha * self.tau).add_(bank.alpha * reference)
            if mask is not None:
                y.masked_fill_(mask, MASKED)
            if own is not None:
                y.scatter_(1, own, MASKED)
            yield k, y

    def cosine(self, bank: Bank, y: Tensor, k: int, rows: slice) -> Tensor:
        """s^k from y^k; whatever at masked places, where its factor is 0."""
        reference = self.reference[k, rows, None]
        if bank.alpha:
            scale = self.tau / (1 + bank.alpha * self.tau)
            return torch.addcmul(reference * (1 - bank.alpha * scale), y, scale)
        return torch.addcmul(reference, y, self.tau)

    def excess(self, x: Tensor) -> Tensor:
        """nLSE - z_pos for each positive: X moved from the reference to that positive."""
        if self.row is None:
            return x
        return self.of_row(x, 1) - (self.s_pos - self.of_row(self.reference, 1)) / self.tau


def forward(
    q: Tensor, p: Tensor, hard: Tensor | None, tau: Tensor, problem: Problem
) -> tuple[Tensor, Tensor]:
    """Per-row losses [K, B] and X [K, B] (-inf where no candidate remains)."""
    state = State(q, p, hard, tau, problem)
    x = state.q.x.new_full((len(problem.dims), state.batch), -torch.inf)
    for rows in state.chunks():
        for bank in state.banks:
            for k, y in state.logits(bank, rows):
                x[k, rows] = torch.logaddexp(x[k, rows], torch.logsumexp(y, -1))
    x = torch.where(x < EMPTY, -torch.inf, x)
    excess = state.excess(x)
    if problem.include_positive:
        loss = F.softplus(excess, threshold=40)
    else:
        loss = torch.where(excess.isneginf(), 0, excess)
    return state.per_row(loss), x


def backward(
    grad: Tensor,
    x: Tensor,
    q: Tensor,
    p: Tensor,
    hard: Tensor | None,
    tau: Tensor,
    problem: Problem,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """Gradients of q, p, hard (None where `needs` is False) and the temperature.

    Args:
        grad: upstream gradient of the per-row losses, [K, B].
        x: second output of `forward`.
        q, p, hard, tau, problem: as in `forward`.
        needs: whether q, p, hard need a gradient.
    """
    state = State(q, p, hard, tau, problem)
    for side, need in ((state.q, needs[0]), (state.p, needs[1]), (state.positive, needs[1])):
        if need:
            side.want_grad()
    if state.hard is not None and needs[2]:
        state.hard.want_grad()

    grad = grad.to(x.dtype)
    excess = state.excess(x)
    slope = torch.sigmoid(excess) if problem.include_positive else (~excess.isneginf()).to(x.dtype)
    pull = _positives_backward(state, state.of_row(grad, 1) * slope)
    weight_kb = grad * state.per_row(slope) / state.tau  # sum_j G_ij
    x = torch.where(x.isneginf(), 0, x)
    for rows in state.chunks():
        for bank in state.banks:
            pull = pull + _bank_backward(state, bank, rows, x, weight_kb)

    dtau = (-pull / state.tau).to(tau.dtype)
    dq = state.q.finish().to(q.dtype) if needs[0] else None
    dhard = None
    if state.hard is not None and hard is not None and needs[2]:
        dhard = state.hard.finish().to(hard.dtype)
    dp = None
    if needs[1]:
        own = state.positive.finish()
        dp = add_rows_(state.p.finish(), problem.positive_index, own).to(p.dtype)
    return dq, dp, dhard, dtau


def _positives_backward(state: State, weight: Tensor) -> Tensor:
    """The pull of every positive on its query, dloss/dz_pos = -weight; returns sum G s."""
    if state.share is not None:
        weight = weight * state.share
    g = -weight / state.tau
    gs = g * state.s_pos
    c = suffix_sum_(g * state.of_row(state.q.inverse, 1) * state.positive.inverse)
    for t, (lo, hi) in enumerate(segments(state.dims)):
        if state.q.grad is not None:
            push = c[t, :, None] * state.positive.x[:, lo:hi]
            if state.row is None:
                state.q.grad[:, lo:hi] += push
            else:
                add_rows_(state.q.grad[:, lo:hi], state.row, push)
        if state.positive.grad is not None:
            own = state.of_row(state.q.x[:, lo:hi], 0)
            state.positive.grad[:, lo:hi] += c[t, :, None] * own
    if state.q.pull is not None:
        if state.row is None:
            state.q.pull += gs
        else:
            state.q.pull += add_rows_(
                gs.new_zeros(state.batch, gs.shape[0]), state.row, gs.t().contiguous()
            ).t()
    if state.positive.pull is not None:
        state.positive.pull += gs
    return gs.sum()


def _bank_backward(state: State, bank: Bank, rows: slice, x: Tensor, weight_kb: Tensor) -> Tensor:
    """Add a bank's share of the gradients for a chunk of rows; returns sum G s."""
    size = rows.stop - rows.start
    c = x.new_empty(len(state.dims), size, bank.width)
    total = x.new_zeros(())
    for k, y in state.logits(bank, rows):
        weight = weight_kb[k, rows]
        s = state.cosine(bank, y, k, rows)
        prob = torch.sub(y, x[k, rows, None], out=c[k]).exp_()
        ps = s.mul_(prob)
        pulled = weight * ps.sum(-1)
        total = total + pulled.sum()
        if bank.rows.pull is not None:
            bank.rows.pull[k, rows] += pulled
        if bank.columns.pull is not None:
            if bank.private:
                bank.columns.pull[k, rows] += ps.mul_(weight[:, None])
            else:
                bank.columns.pull[k] += weight @ ps
        a = bank.rows.inverse[k, rows]
        prob.mul_((weight * a)[:, None]).mul_(bank.column_inverse(k, rows))
    suffix_sum_(c)
    u, v = bank.rows, bank.columns
    for t, (lo, hi) in enumerate(segments(state.dims)):
        if bank.private:
            if u.grad is not None:
                push = torch.bmm(c[t, :, None, :], v.x[rows, :, lo:hi]).squeeze(1)
                u.grad[rows, lo:hi] += push
            if v.grad is not None:
                v.grad[rows, :, lo:hi] += c[t, :, :, None] * u.x[rows, None, lo:hi]
        else:
            if u.grad is not None:
                u.grad[rows, lo:hi].addmm_(c[t], v.x[:, lo:hi])
            if v.grad is not None:
                v.grad[:, lo:hi].addmm_(c[t].t(), u.x[rows, lo:hi])
    return total
