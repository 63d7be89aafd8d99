"""Per-row arithmetic of InfoNCE, the same for every implementation: positives, losses, slopes.

Everything here is [K, B] or [K, nnz]: nothing that grows with the number of candidates. With
X = nLSE - z_pos of each row's reference positive:

    loss  = softplus(X)           or X without the positive in the denominator, 0 if X = -inf
    slope = dloss / dX = sigmoid(X)   or 1

With several positives the lowest is the reference, and each has its own X, moved by the difference
of the cosines.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._common import add_rows_
from .problem import Problem, jagged_rows

EMPTY = -1e29
"""A log-sum-exp below this had nothing but masked candidates."""


class Rows:
    """Positives of each row, the temperature, and what turns log-sum-exps into losses.

    Attributes:
        s_pos: cosine of each positive, [K, nnz] (nnz = B unless positives are jagged).
        reference: the lowest of each row's, [K, B]; it also sets the margin.
        row: row of each positive, [nnz]; None when every row has one.
        share: 1 / (positives of that row), [nnz], or None.
    """

    def __init__(self, s_pos: Tensor, tau: Tensor, problem: Problem, batch: int) -> None:
        """s_pos [K, nnz] and tau in the accumulation type."""
        self.problem, self.batch, self.tau = problem, batch, tau
        self.row: Tensor | None = None
        self.share: Tensor | None = None
        self.s_pos = self.reference = s_pos
        if problem.positive_offsets is not None:
            offsets = problem.positive_offsets.to(torch.int64)
            self.row, count = jagged_rows(offsets, s_pos.shape[1])
            self.share = count.index_select(0, self.row).to(s_pos.dtype).reciprocal()
            low = s_pos.new_full((s_pos.shape[0], batch), torch.inf)
            low = low.scatter_reduce(1, self.row.expand_as(s_pos), s_pos, "amin")
            self.reference = torch.where(low.isinf(), 0, low)

    def of_row(self, x: Tensor, dim: int) -> Tensor:
        """Spread a per-row tensor over the positives (a copy only when they are jagged)."""
        return x if self.row is None else x.index_select(dim, self.row)

    def per_row(self, x: Tensor) -> Tensor:
        """Mean over the positives of each row: [K, nnz] -> [K, B]."""
        if self.row is None or self.share is None:
            return x
        out = x.new_zeros(self.batch, x.shape[0])
        return add_rows_(out, self.row, (x * self.share).t().contiguous()).t().contiguous()

    def excess(self, x: Tensor) -> Tensor:
        """nLSE - z_pos for each positive: X moved from the reference to that positive."""
        if self.row is None:
            return x
        return self.of_row(x, 1) - (self.s_pos - self.of_row(self.reference, 1)) / self.tau

    def losses(self, x: Tensor) -> Tensor:
        """Per-row losses [K, B] from X."""
        excess = self.excess(x)
        if self.problem.include_positive:
            return self.per_row(F.softplus(excess, threshold=40))
        return self.per_row(torch.where(excess.isneginf(), 0, excess))

    def slope(self, excess: Tensor) -> Tensor:
        """dloss / d(nLSE - z_pos)."""
        if self.problem.include_positive:
            return torch.sigmoid(excess)
        return (~excess.isneginf()).to(excess.dtype)
