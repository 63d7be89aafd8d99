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
pair of sides. Blocks [K, rows, columns] of the banks are the largest things in memory. Rows are
walked in the same chunks everywhere, so that margin masks agree to the bit.

A chunk of rows has all its columns, so its softmax is complete: `fused` takes the gradient of a
weighted loss in the same pass (three GEMMs a segment), `forward` and `backward` recompute (four).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
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
from .rows import EMPTY, Rows

MASKED = -1e30
WORKSPACE = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Elements of a chunk's blocks together, 16 and 256 MiB in float32. On CPU the GEMMs want many rows
more than the blocks want to fit L2: at B = N = 2048 a quarter of this is a third slower."""

MIN_ROWS = 16


def chunk_rows(columns: int, widths: int, device: torch.device) -> int:
    """Rows in a chunk, from the workspace budget (a function of the shape alone)."""
    budget = WORKSPACE.get(device.type, WORKSPACE["cuda"])
    return max(MIN_ROWS, budget // (max(1, columns) * (2 * widths + 2)))


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


@dataclass(frozen=True)
class Block:
    """What a chunk's gradient needs of one bank: e = exp(y - base), e y, [K, rows, columns]."""

    bank: Bank
    rows: slice
    e: Tensor
    ey: Tensor
    mass: Tensor
    """Row sums of e, [K, rows]."""
    base: Tensor


class State(Rows):
    """Sides, banks, positives and per-row vectors of one call."""

    def __init__(self, q: Tensor, p: Tensor, hard: Tensor | None, tau: Tensor, problem: Problem):
        acc = accumulate_dtype(q, p, hard)
        self.dims = problem.dims
        masks = Masks(problem, q.shape[0])
        self.q, self.p = Side(q.to(acc), self.dims), Side(p.to(acc), self.dims)
        self.hard = None if hard is None else Side(hard.to(acc), self.dims)
        # The positives as a side of their own: their gradient joins the passages' at the end.
        self.positive = Side(self.p.x.index_select(0, problem.positive_index), self.dims)
        own, inverse = self.q.x, self.q.inverse
        if masks.row is not None:
            own, inverse = own.index_select(0, masks.row), inverse.index_select(1, masks.row)
        s_pos = prefix_dots(own, self.positive.x, self.dims) * inverse * self.positive.inverse
        super().__init__(s_pos, tau.to(acc), problem, q.shape[0])

        self.banks: list[Bank] = []
        if problem.in_batch:
            self.banks.append(Bank(self.q, self.p, masks.passages))
        if self.hard is not None:
            keep = masks.private_hard if self.hard.x.dim() == 3 else masks.shared_hard
            self.banks.append(Bank(self.q, self.hard, keep, problem.hardness_alpha))
        if problem.same_tower:
            self.banks.append(Bank(self.q, self.q, masks.queries))
        if problem.doc_doc:
            self.banks.append(Bank(self.positive, self.p, masks.documents))
        columns = sum(bank.width for bank in self.banks)
        self.chunk = chunk_rows(columns, len(self.dims), q.device)

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
                unit = reference.abs() if self.problem.margin_relative else 1
                false_negative = y > self.problem.margin * unit / self.tau
                mask = false_negative if drop is None else false_negative.logical_or_(drop)
            if bank.alpha:
                y = y.mul_(1 + bank.alpha * self.tau).add_(bank.alpha * reference)
            if mask is not None:
                y.masked_fill_(mask, MASKED)
            if own is not None:
                y.scatter_(1, own, MASKED)
            yield k, y

    def block(self, bank: Bank, rows: slice, shift: Tensor | None = None) -> "Block":
        """Exponentials of a chunk, relative to `shift` [K, rows] or to each row's maximum."""
        shape = (len(self.dims), rows.stop - rows.start, bank.width)
        e, ey = self.q.x.new_empty(shape), self.q.x.new_empty(shape)
        base = self.q.x.new_empty(shape[:2]) if shift is None else shift
        for k, y in self.logits(bank, rows):
            if shift is None:
                top = y.amax(-1)
                base[k] = torch.where(top < EMPTY, 0, top)
            torch.sub(y, base[k, :, None], out=e[k]).exp_()
            torch.mul(y, e[k], out=ey[k])
        return Block(bank, rows, e, ey, e.sum(-1), base)

    def want_grads(self, needs: tuple[bool, bool, bool]) -> None:
        """Make room for the gradients of q, p, hard."""
        for side, need in ((self.q, 0), (self.p, 1), (self.positive, 1), (self.hard, 2)):
            if side is not None and needs[need]:
                side.want_grad()

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Finished gradients of q, p, hard in the accumulation type, None where not wanted."""
        dq, dhard = (
            None if s is None or s.grad is None else s.finish() for s in (self.q, self.hard)
        )
        if self.p.grad is None:
            return dq, None, dhard
        own = self.positive.finish()
        return dq, add_rows_(self.p.finish(), self.problem.positive_index, own), dhard


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
    return state.losses(x), x


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
    """Gradients of q, p, hard (None where `needs` is False) and the temperature.

    Args:
        grad: upstream gradient of the per-row losses, [K, B].
        x: second output of `forward`.
        q, p, hard, tau, problem: as in `forward`.
        needs: whether q, p, hard need a gradient.
    """
    state = State(q, p, hard, tau, problem)
    state.want_grads(needs)
    grad = grad.to(x.dtype)
    slope = state.slope(state.excess(x))
    pull = _positives_backward(state, state.of_row(grad, 1) * slope)
    weight_kb = grad * state.per_row(slope) / state.tau  # sum_j G_ij
    x = torch.where(x.isneginf(), 0, x)
    for rows in state.chunks():
        for bank in state.banks:
            block = state.block(bank, rows, x[:, rows])
            pull = pull + _block_backward(state, block, weight_kb[:, rows])
    return *state.gradients(), -pull / state.tau


def fused(
    weights: Tensor,
    q: Tensor,
    p: Tensor,
    hard: Tensor | None,
    tau: Tensor,
    problem: Problem,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Gradients]:
    """Per-row losses [K, B], and the gradients of sum(weights * losses), in one pass.

    Args:
        weights: [K, B].
        q, p, hard, tau, problem, needs: as in `backward`, and its gradients.
    """
    if problem.positive_offsets is not None:
        # Slopes of a chunk's rows would need its jagged positives apart: recompute instead.
        loss, x = forward(q, p, hard, tau, problem)
        return loss, backward(weights, x, q, p, hard, tau, problem, needs)
    state = State(q, p, hard, tau, problem)
    state.want_grads(needs)
    weights = weights.to(state.q.x.dtype)
    x = torch.empty_like(state.reference)
    pull = x.new_zeros(())
    for rows in state.chunks():
        blocks = [state.block(bank, rows) for bank in state.banks]
        # Masked exponentials are exactly 0: no mass means no candidate, log gives -inf.
        top = torch.logsumexp(torch.stack([b.base + b.mass.log() for b in blocks]), 0)
        x[:, rows] = top
        weight = weights[:, rows] * state.slope(top) / state.tau
        top = torch.where(top.isneginf(), 0, top)
        for block in blocks:
            # Nothing left in this block, and the others far below its base of 0: not inf * 0.
            share = torch.where(block.mass > 0, block.base - top, MASKED).exp_().mul_(weight)
            pull = pull + _block_backward(state, block, share)
    pull = pull + _positives_backward(state, weights * state.slope(x))
    return state.losses(x), (*state.gradients(), -pull / state.tau)


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


def _block_backward(state: State, block: Block, weight: Tensor) -> Tensor:
    """Add a block's share of the gradients, G = weight * e; returns sum G s.

    Consumes the block. With s = tau y + reference (a little more with alpha), the row and column
    sums of G s come from e and e y.
    """
    bank, rows, c, ey = block.bank, block.rows, block.e, block.ey
    u, v = bank.rows, bank.columns
    scale = state.tau / (1 + bank.alpha * state.tau)
    offset = weight * state.reference[:, rows] * (1 - bank.alpha * scale)
    scale = weight * scale
    pulled = scale * ey.sum(-1) + offset * block.mass
    if u.pull is not None:
        u.pull[:, rows] += pulled
    if v.pull is not None:
        if bank.private:
            v.pull[:, rows] += ey.mul_(scale[..., None]).addcmul_(offset[..., None], c)
        else:
            for k in range(len(state.dims)):
                v.pull[k].addmv_(ey[k].t(), scale[k]).addmv_(c[k].t(), offset[k])
    c.mul_((weight * u.inverse[:, rows])[..., None])
    c.mul_(v.inverse[:, rows] if bank.private else v.inverse[:, None])
    suffix_sum_(c)
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
    return pulled.sum()
