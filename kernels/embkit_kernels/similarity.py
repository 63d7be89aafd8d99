"""Cosine similarities of every MRL width in one pass over D: all of them, or the k best a query.

    s^k_ij = a^k_i b^k_j R^k_ij,      R^k_ij = sum over d < d_k of q_i[d] p_j[d]

a and b are inverse prefix norms, so that raw vectors go in, and R^k is a running sum: the widths
together cost one product over the largest. Upstream gradients G give, with C^k = a G^k b,

    dq_i[seg t] = sum over j of Cbar^t_ij p_j[seg t] - eta^t_i q_i[seg t],  Cbar^t = sum_{k>=t} C^k,
    eta^t_i = sum_{k>=t} (a^k_i)^2 sum over j of G^k_ij s^k_ij                   and the same for p

For the k best, blocks of columns are merged into the best so far, so that memory is bounded; ties
go to the lower index, whatever the blocks.
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
    prefix_inverse_norms,
    resolve_dims,
    segments,
    suffix_sum_,
)

WORKSPACE = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Elements of a block of similarities of all widths (16 and 256 MiB in float32)."""

ROWS = 2048
"""Queries searched at a time: enough for full GEMM speed; more would mean narrower blocks."""

LOWEST = (1 << 32) - 1


def mrl_similarity(
    q: Tensor, p: Tensor, dims: Sequence[int] | None = None, *, k: int | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Cosines of queries and passages at several widths, or the k best passages of each query.

    Args:
        q: raw embeddings [B, D], any float dtype.
        p: raw embeddings [N, D].
        dims: prefix widths in any order; None means (D,).
        k: passages per query; None returns all similarities.

    Returns:
        Without k: similarities [K, B, N] in the order of `dims`, differentiable in q and p.
        With k: similarities [K, B, k], best first, and passage indices int64 [K, B, k]; of equal
        similarities the lower index comes first. No gradient, and memory beyond the result is
        bounded by `WORKSPACE`. float32 (float64 for float64); a zero prefix has cosine 0.

    Raises:
        ValueError: shapes or dims that do not fit, or k outside 1..N.

    Example:
        >>> q, p = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 0.0], [2.0, 2.0], [0.0, 3.0]])
        >>> scores, index = mrl_similarity(q, p, (2, 1), k=2)
        >>> index.tolist()  # at width 2 and at width 1
        [[[1, 0]], [[0, 1]]]
    """
    if q.dim() != 2 or p.dim() != 2 or q.shape[1] != p.shape[1]:
        raise ValueError(f"q is {tuple(q.shape)}, p is {tuple(p.shape)}; want [B, D] and [N, D]")
    ascending, order = resolve_dims(dims, q.shape[1])
    sorted_already = order == sorted(order)
    if k is None:
        scores: Tensor = similarity_scores(q, p, list(ascending))
        return scores if sorted_already else scores[order]
    if not 1 <= k <= p.shape[0]:
        raise ValueError(f"k = {k} is not between 1 and the {p.shape[0]} passages")
    scores, index = similarity_topk(q.detach(), p.detach(), list(ascending), k)
    return (scores, index) if sorted_already else (scores[order], index[order])


def mrl_similarity_naive(
    q: Tensor, p: Tensor, dims: Sequence[int] | None = None, *, k: int | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """The specification of `mrl_similarity`: each width alone, all pairs, in plain autograd."""
    acc = accumulate_dtype(q, p)
    q, p = q.to(acc), p.to(acc)
    unit = torch.nn.functional.normalize
    scores = torch.stack([unit(q[:, :d]) @ unit(p[:, :d]).t() for d in dims or [q.shape[1]]])
    if k is None:
        return scores
    best, index = scores.sort(dim=-1, descending=True, stable=True)
    return best[..., :k], index[..., :k]


def _provider(q: Tensor, p: Tensor) -> _dispatch.Provider:
    return _dispatch.provider("similarity", q.device, torch.promote_types(q.dtype, p.dtype))


def _cosines(
    q: Tensor, p: Tensor, a: Tensor, b: Tensor, dims: Sequence[int], out: Tensor
) -> Tensor:
    """Cosines [K, B, N] of rows in the accumulation type and their inverse prefix norms."""
    product = torch.zeros_like(out[0])
    for t, (lo, hi) in enumerate(segments(dims)):
        product.addmm_(q[:, lo:hi], p[:, lo:hi].t())
        torch.mul(product, a[t, :, None], out=out[t]).mul_(b[t, None, :])
    return out


@torch.library.custom_op(
    f"{NAMESPACE}::similarity_scores",
    mutates_args=(),
    schema="(Tensor q, Tensor p, int[] dims) -> Tensor",
)
def similarity_scores(q: Tensor, p: Tensor, dims: Sequence[int]) -> Tensor:
    """Cosines [K, B, N] at ascending widths."""
    acc = accumulate_dtype(q, p)
    with full_precision(q.device):
        if _provider(q, p) == "triton":
            from . import similarity_triton

            with torch.cuda.device_of(q):
                return similarity_triton.scores(q, p, dims)
        out = q.new_empty(len(dims), q.shape[0], p.shape[0], dtype=acc)
        q, p = q.to(acc), p.to(acc)
        a, b = prefix_inverse_norms(q, dims), prefix_inverse_norms(p, dims)
        return _cosines(q, p, a, b, dims, out)


@similarity_scores.register_fake
def _(q: Tensor, p: Tensor, dims: Sequence[int]) -> Tensor:
    return q.new_empty(len(dims), q.shape[0], p.shape[0], dtype=accumulate_dtype(q, p))


@torch.library.custom_op(
    f"{NAMESPACE}::similarity_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad, Tensor scores, Tensor q, Tensor p, int[] dims, bool need_q, bool need_p)"
        " -> (Tensor, Tensor)"
    ),
)
def similarity_backward(
    grad: Tensor,
    scores: Tensor,
    q: Tensor,
    p: Tensor,
    dims: Sequence[int],
    need_q: bool,
    need_p: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of q and p (empty if not needed) from grad and scores [K, B, N].

    Plain GEMMs on every device: the upstream gradient is a [K, B, N] matrix already.
    """
    acc = accumulate_dtype(q, p)
    with full_precision(q.device):
        wide = q.to(acc), p.to(acc)
        inverse = [prefix_inverse_norms(x, dims) for x in wide]
        weights = suffix_sum_(grad * inverse[0][:, :, None] * inverse[1][:, None, :])
        pull = grad * scores
        out = []
        for side, need in enumerate((need_q, need_p)):
            if not need:
                out.append(q.new_empty(0))
                continue
            own, other = wide[side], wide[1 - side]
            eta = suffix_sum_(inverse[side].square() * pull.sum(2 - side))
            dx = torch.zeros_like(own)
            for t, (lo, hi) in enumerate(segments(dims)):
                c = weights[t] if side == 0 else weights[t].t()
                dx[:, lo:hi] = c @ other[:, lo:hi] - eta[t, :, None] * own[:, lo:hi]
            out.append(dx.to((q, p)[side].dtype))
        return out[0], out[1]


@similarity_backward.register_fake
def _(
    grad: Tensor,
    scores: Tensor,
    q: Tensor,
    p: Tensor,
    dims: Sequence[int],
    need_q: bool,
    need_p: bool,
) -> tuple[Tensor, Tensor]:
    dq, dp = (
        x.new_empty(x.shape) if need else q.new_empty(0) for x, need in ((q, need_q), (p, need_p))
    )
    return dq, dp


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, p, ctx.dims = inputs
    ctx.save_for_backward(output, q, p)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    needs = ctx.needs_input_grad[:2]
    dq, dp = similarity_backward(grad, *ctx.saved_tensors, ctx.dims, *needs)
    return dq if needs[0] else None, dp if needs[1] else None, None


similarity_scores.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op(
    f"{NAMESPACE}::similarity_topk",
    mutates_args=(),
    schema="(Tensor q, Tensor p, int[] dims, int k) -> (Tensor, Tensor)",
)
def similarity_topk(q: Tensor, p: Tensor, dims: Sequence[int], k: int) -> tuple[Tensor, Tensor]:
    """The k best cosines [K, B, k] at ascending widths, and their columns."""
    triton = _provider(q, p) == "triton"
    scores = q.new_empty(len(dims), q.shape[0], k, dtype=accumulate_dtype(q, p))
    index = torch.empty(scores.shape, dtype=torch.int64, device=q.device)
    with full_precision(q.device):
        for start in range(0, q.shape[0], ROWS):
            rows = slice(start, start + ROWS)
            if triton:
                from . import similarity_triton

                with torch.cuda.device_of(q):
                    found = similarity_triton.topk(q[rows], p, dims, k, block_columns(q, dims))
            else:
                found = _topk(q[rows], p, dims, k)
            scores[:, rows], index[:, rows] = found
    return scores, index


@similarity_topk.register_fake
def _(q: Tensor, p: Tensor, dims: Sequence[int], k: int) -> tuple[Tensor, Tensor]:
    scores = q.new_empty(len(dims), q.shape[0], k, dtype=accumulate_dtype(q, p))
    return scores, scores.new_empty(scores.shape, dtype=torch.int64)


def block_columns(q: Tensor, dims: Sequence[int]) -> int:
    """Columns of a block, from the workspace budget: a multiple of 256, or 16 if it is small."""
    budget = WORKSPACE.get(q.device.type, WORKSPACE["cuda"])
    columns = budget // (len(dims) * max(1, min(ROWS, q.shape[0])))
    return max(16, columns // 256 * 256)


def _topk(q: Tensor, p: Tensor, dims: Sequence[int], k: int) -> tuple[Tensor, Tensor]:
    acc = accumulate_dtype(q, p)
    step = block_columns(q, dims)
    q = q.to(acc)
    a = prefix_inverse_norms(q, dims)
    best = index = q.new_empty(len(dims), q.shape[0], 0)
    index = index.to(torch.int64)
    for first in range(0, p.shape[0], step):
        block = p[first : first + step].to(acc)
        b = prefix_inverse_norms(block, dims)
        scores = q.new_empty(len(dims), q.shape[0], block.shape[0])
        _cosines(q, block, a, b, dims, scores)
        column = torch.arange(first, first + block.shape[0], device=q.device)
        best, index = merge(best, index, scores, column, k)
    return best, index


def merge(
    best: Tensor, index: Tensor, scores: Tensor, column: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """The k best of those so far and of a block of later columns, ties by lower index."""
    scores = torch.cat([best, scores], -1)
    index = torch.cat([index, column.expand(*scores.shape[:-1], -1)], -1)
    k = min(k, scores.shape[-1])
    if scores.dtype == torch.float64:  # equal scores are in the order of their columns already
        scores, order = scores.sort(dim=-1, descending=True, stable=True)
        return scores[..., :k], index.gather(-1, order[..., :k])
    return unpack(pack(scores, index).topk(k, dim=-1).values)


def pack(scores: Tensor, index: Tensor) -> Tensor:
    """float32 scores and columns below 2^32 as int64 keys: no two are equal, larger is better.

    `topk` alone may return any of several equal scores.
    """
    bits = (scores + 0.0).view(torch.int32)  # + 0.0: -0.0 and 0.0 are equal
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # ordered as integers
    return (bits.to(torch.int64) << 32) | (LOWEST - index)


def unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The scores and columns of `pack`."""
    bits = (keys >> 32).to(torch.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return bits.view(torch.float32), LOWEST - (keys & LOWEST)
