"""Spread-out (global orthogonal) regulariser: second moment of in-batch cosines.

    loss^k = 1 / (B (B - 1)) sum over i != j of (x^k_i . x^k_j)^2,    x^k the unit prefixes

The Frobenius norms of X X^T [B, B] and X^T X [d, d] are equal, so the smaller of the two is built:
memory is min(B, d)^2 a width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._common import (
    accumulate_dtype,
    prefix_inverse_norms,
    resolve_dims,
    weigh_dims,
)


def spread_out(
    x: Tensor,
    dims: Sequence[int] | None = None,
    *,
    dim_weights: Sequence[float] | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Second moment of the cosines of one side's embeddings (EmbeddingGemma adds both sides).

    Args:
        x: raw embeddings [B, D].
        dims: prefix widths in any order; None means (D,).
        dim_weights: [K] in the order of `dims`; None means 1 each.

    Returns:
        The loss (), summed over widths with `dim_weights`, and each width's loss [K], detached;
        0 when B < 2.

    Raises:
        ValueError: x is not [B, D], or dims do not fit.

    Example:
        >>> spread_out(torch.eye(3))[0].item()
        0.0
    """
    if x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, want [B, D]")
    batch = x.shape[0]
    ascending, order = resolve_dims(dims, x.shape[1])
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(accumulate_dtype(x))
        inverse = prefix_inverse_norms(x, ascending)
        losses = []
        for k, d in enumerate(ascending):
            unit = x[:, :d] * inverse[k, :, None]
            if batch <= d:
                gram = unit @ unit.t()
                total = (gram - torch.diag(gram.diagonal())).square().sum()
            else:
                gram = unit.t() @ unit
                # A zero row has length 0, not 1: subtract what is there.
                total = gram.square().sum() - unit.square().sum(1).square().sum()
            losses.append(total / max(1, batch * (batch - 1)))
    total, per_dim = weigh_dims(torch.stack(losses), order, dim_weights)
    return total, per_dim.detach()


def spread_out_naive(x: Tensor, dims: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """The specification of `spread_out`: every pair, in plain autograd."""
    losses = []
    for d in dims or [x.shape[1]]:
        unit = torch.nn.functional.normalize(x[:, :d], dim=1)
        pairs = [(unit[i] @ unit[j]) ** 2 for i in range(len(x)) for j in range(len(x)) if i != j]
        losses.append(sum(pairs, x.sum() * 0) / max(1, len(pairs)))
    per_dim = torch.stack(losses)
    return per_dim.sum(), per_dim
