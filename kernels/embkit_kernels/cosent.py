"""CoSENT: rank text pairs by their gold score, at several embedding widths.

    loss^k = log( 1 + sum over (i, j) with y_i > y_j of exp(scale (s^k_j - s^k_i)) )

i and j are text *pairs* with cosine s and gold label y; equal labels contribute nothing. With
P_ij the terms over (1 + their sum), ds_j += scale sum_i P_ij and ds_i -= scale sum_j P_ij.

Tiles of pairs of pairs are walked in a fixed order, so that memory is O(B) and every run gives the
same bits: the O(B log B) form needs a cumulative log-sum-exp, not deterministic on CUDA.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _dispatch
from ._common import (
    NAMESPACE,
    accumulate_dtype,
    full_precision,
    prefix_dots,
    prefix_inverse_norms,
    resolve_dims,
    weigh_dims,
)

TILE = 512
MASKED = -1e30


def cosent(
    x: Tensor | tuple[Tensor, Tensor],
    labels: Tensor,
    dims: Sequence[int] | None = None,
    *,
    scale: float = 20.0,
    dim_weights: Sequence[float] | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """CoSENT over the text pairs of a batch.

    Args:
        x: the two sides (a, b) of the pairs, raw embeddings [B, D] each, or ready scores: [B], or
            [K, B] for K widths (gathered over ranks, say).
        labels: gold scores [B], any real dtype; only their order counts. NaN takes part in nothing.
        dims: prefix widths of (a, b) in any order; None means (D,). Not with ready scores.
        scale: the factor on score differences, 1 / temperature.
        dim_weights: [K] in the order of `dims`; None means 1 each.

    Returns:
        The loss (), summed over widths with `dim_weights`, and each width's loss [K], detached.
        0 with zero gradient when no two labels differ. float32 (float64 for float64).

    Raises:
        ValueError: shapes that do not fit, or dims with ready scores.

    Example:
        >>> loss, per_dim = cosent(torch.tensor([0.9, 0.2]), torch.tensor([1.0, 0.0]))
        >>> round(loss.item(), 8)
        8.3e-07
    """
    if isinstance(x, Tensor):
        if dims is not None:
            raise ValueError("dims need the two sides (a, b), not ready scores")
        scores = x[None] if x.dim() == 1 else x
        order = list(range(scores.shape[0]))
    else:
        a, b = x
        if a.shape != b.shape or a.dim() != 2:
            raise ValueError(f"a is {tuple(a.shape)}, b is {tuple(b.shape)}; want equal [B, D]")
        ascending, order = resolve_dims(dims, a.shape[1])
        scores = prefix_cosine(a, b, ascending)
    if scores.dim() != 2 or labels.shape != scores.shape[1:]:
        raise ValueError(f"scores {tuple(scores.shape)} and labels {tuple(labels.shape)} differ")
    loss, _ = cosent_op(scores.to(accumulate_dtype(scores)), labels, float(scale))
    total, per_dim = weigh_dims(loss, order, dim_weights)
    return total, per_dim.detach()


def cosent_naive(
    x: Tensor | tuple[Tensor, Tensor],
    labels: Tensor,
    dims: Sequence[int] | None = None,
    *,
    scale: float = 20.0,
    dim_weights: Sequence[float] | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The specification of `cosent` in plain autograd, all pairs at once."""
    if isinstance(x, Tensor):
        rows = [x] if x.dim() == 1 else list(x)
    else:
        a, b = x
        rows = [
            torch.nn.functional.cosine_similarity(a[:, :d], b[:, :d], eps=1e-30)
            for d in (dims or [a.shape[1]])
        ]
    higher, lower = torch.nonzero(labels[:, None] > labels[None, :], as_tuple=True)
    loss = []
    for s in rows:
        terms = scale * (s[lower] - s[higher])
        loss.append(torch.logsumexp(torch.cat([terms.new_zeros(1), terms]), 0))
    per_dim = torch.stack(loss)
    weights = torch.ones_like(per_dim)
    if dim_weights is not None:
        weights = torch.as_tensor(dim_weights, dtype=per_dim.dtype)
    return (weights * per_dim).sum(), per_dim


def prefix_cosine(a: Tensor, b: Tensor, dims: Sequence[int]) -> Tensor:
    """Cosines of matching rows at each of ascending widths: [B, D] x2 -> [K, B], differentiable.

    A zero prefix has cosine 0 and no gradient. O(B D) memory.
    """
    acc = accumulate_dtype(a, b)
    a, b = a.to(acc), b.to(acc)
    dots = prefix_dots(a, b, dims)
    return dots * prefix_inverse_norms(a, dims) * prefix_inverse_norms(b, dims)


def _tiles(size: int) -> list[tuple[slice, slice]]:
    cuts = [slice(i, min(i + TILE, size)) for i in range(0, size, TILE)]
    return [(rows, columns) for rows in cuts for columns in cuts]


def _terms(scores: Tensor, labels: Tensor, scale: float, rows: slice, columns: slice) -> Tensor:
    """scale (s_j - s_i) for i in rows, j in columns, masked where not y_i > y_j: [K, r, c]."""
    t = (scores[:, None, columns] - scores[:, rows, None]).mul_(scale)
    return t.masked_fill_(~(labels[rows, None] > labels[None, columns]), MASKED)


@torch.library.custom_op(
    f"{NAMESPACE}::cosent_forward",
    mutates_args=(),
    schema="(Tensor scores, Tensor labels, float scale) -> (Tensor, Tensor)",
)
def cosent_op(scores: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Losses [K] of scores [K, B], and what rounding took from them.

    The backward subtracts the loss inside an exponential: at a loss of 100 half a unit in its last
    place would be an error of 4e-6 in every gradient.
    """
    if _dispatch.provider("cosent", scores.device, scores.dtype) == "triton":
        from . import cosent_triton

        with torch.cuda.device_of(scores):
            return cosent_triton.forward(scores, labels, scale)
    # The 1 inside the log is a term with exponent 0: the running sum starts from it.
    loss = scores.new_zeros(scores.shape[0])
    with full_precision(scores.device):
        for rows, columns in _tiles(scores.shape[1]):
            t = _terms(scores, labels, scale, rows, columns)
            loss = torch.logaddexp(loss, torch.logsumexp(t.flatten(1), 1))
    return loss, torch.zeros_like(loss)


@cosent_op.register_fake
def _(scores: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return scores.new_empty(scores.shape[0]), scores.new_empty(scores.shape[0])


@torch.library.custom_op(
    f"{NAMESPACE}::cosent_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad, Tensor loss, Tensor rest, Tensor scores, Tensor labels, float scale)"
        " -> Tensor"
    ),
)
def cosent_backward(
    grad: Tensor, loss: Tensor, rest: Tensor, scores: Tensor, labels: Tensor, scale: float
) -> Tensor:
    """Gradient [K, B] of the scores, from upstream [K] and both outputs [K] of the forward."""
    if _dispatch.provider("cosent", scores.device, scores.dtype) == "triton":
        from . import cosent_triton

        with torch.cuda.device_of(grad):
            return cosent_triton.backward(grad, loss, rest, scores, labels, scale)
    out = torch.zeros_like(scores)
    with full_precision(scores.device):
        for rows, columns in _tiles(scores.shape[1]):
            t = _terms(scores, labels, scale, rows, columns)
            p = t.sub_(loss[:, None, None]).exp_()
            out[:, columns] += p.sum(1)
            out[:, rows] -= p.sum(2)
    return out.mul_(scale * grad[:, None])


@cosent_backward.register_fake
def _(
    grad: Tensor, loss: Tensor, rest: Tensor, scores: Tensor, labels: Tensor, scale: float
) -> Tensor:
    return scores.new_empty(scores.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    scores, labels, ctx.scale = inputs
    ctx.save_for_backward(*output, scores, labels)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, None, None]:
    if grad is None:
        return None, None, None
    return cosent_backward(grad, *ctx.saved_tensors, ctx.scale), None, None


cosent_op.register_autograd(_backward, setup_context=_setup)
