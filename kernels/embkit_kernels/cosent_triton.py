# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels of CoSENT: all pairs of pairs in tiles, nothing of size B x B.

In powers of two, with c = scale / ln 2, a term of rows i and j with y_i > y_j is 2^(c (s_j - s_i)).

Forward: a program owns BLOCK_I rows of one width, walks all columns and keeps a running maximum m
and sum l of 2^(t - m) a row. The 1 in log(1 + sum) is a term with exponent 0, so m starts from 0:
masked terms (-1e30) then vanish without a second mask, and where every term is below 1 the sum
itself is stored, so that a tiny loss is log1p of it and loses no digits. Each program leaves one
(m, l); the B / BLOCK_I of them are merged in torch, in a fixed order.

Backward: a row x stands on one side of each comparison, so both sums of

    ds_x = scale g ( sum over y_z > y_x of P_zx  -  sum over y_z < y_x of P_xz ),
    log2 P_zx = c (s_x - s_z) - log2(1 + sum),     log2 P_xz = -c (s_x - s_z) - log2(1 + sum)

need one exponential an element and no sums over columns: every row is written once.
"""

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _triton

LOG2E = 1 / math.log(2)


@triton.jit(do_not_specialize=["size", "count"])
def forward_kernel(
    scores,
    labels,
    maxima,
    sums,
    c,
    size,
    count,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """(m, l) of BLOCK_I rows of width k against all rows, to [K, count]."""
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    k = tl.program_id(1).to(tl.int64)
    inside = i < size
    s_i = tl.load(scores + k * size + i, mask=inside, other=0.0)
    y_i = tl.load(labels + i, mask=inside, other=0)
    m = tl.zeros((BLOCK_I,), tl.float32)
    total = tl.zeros((BLOCK_I,), tl.float32)
    for start in range(0, size, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        s_j = tl.load(scores + k * size + j, mask=j < size, other=0.0)
        y_j = tl.load(labels + j, mask=j < size, other=0)
        counts = inside[:, None] & (j < size)[None, :] & (y_i[:, None] > y_j[None, :])
        t = tl.where(counts, c * (s_j[None, :] - s_i[:, None]), -1e30)
        above = tl.maximum(m, tl.max(t, 1))
        total = total * tl.exp2(m - above) + tl.sum(tl.exp2(t - above[:, None]), 1)
        m = above
    top = tl.max(m, 0)
    place = k * count + tl.program_id(0)
    tl.store(maxima + place, top)
    tl.store(sums + place, tl.sum(total * tl.exp2(m - top), 0))


@triton.jit(do_not_specialize=["size"])
def backward_kernel(
    scores,
    labels,
    loss,
    grad,
    out,
    c,
    size,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Gradient of BLOCK_I scores of width k; `loss` in powers of two, `grad` times the scale."""
    x = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    k = tl.program_id(1).to(tl.int64)
    inside = x < size
    s_x = tl.load(scores + k * size + x, mask=inside, other=0.0)
    y_x = tl.load(labels + x, mask=inside, other=0)
    total = tl.load(loss + k)
    pull = tl.zeros((BLOCK_I,), tl.float32)
    for start in range(0, size, BLOCK_J):
        z = start + tl.arange(0, BLOCK_J)
        s_z = tl.load(scores + k * size + z, mask=z < size, other=0.0)
        y_z = tl.load(labels + z, mask=z < size, other=0)
        exists = inside[:, None] & (z < size)[None, :]
        higher = exists & (y_z[None, :] > y_x[:, None])
        lower = exists & (y_z[None, :] < y_x[:, None])
        t = c * (s_x[:, None] - s_z[None, :])
        p = tl.exp2(tl.where(higher | lower, tl.where(higher, t, -t) - total, -1e30))
        pull += tl.sum(tl.where(lower, -p, p), 1)
    tl.store(out + k * size + x, tl.load(grad + k) * pull, mask=inside)


def forward(scores: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """See `cosent.cosent_op`."""
    widths, size = scores.shape
    if scores.numel() == 0:
        return scores.new_zeros(widths), scores.new_zeros(widths)
    tiles = _triton.config("cosent", "forward", scores.device)
    count = triton.cdiv(size, tiles["BLOCK_I"])
    maxima, sums = scores.new_empty(2, widths, count).unbind()
    forward_kernel[(count, widths)](
        scores.contiguous(), _comparable(labels), maxima, sums, scale * LOG2E, size, count, **tiles
    )
    # A few numbers a width from here on: float64 costs nothing.
    top = maxima.amax(1).double()
    total = (sums * (maxima - top[:, None]).exp2()).sum(1)
    # 1 + total, over 2^top; with top = 0 the log1p keeps a small loss.
    exact = torch.where(top > 0, (total + (-top).exp2()).log() + top / LOG2E, total.log1p())
    loss = exact.float()
    return loss, (exact - loss).float()


def backward(
    grad: Tensor, loss: Tensor, rest: Tensor, scores: Tensor, labels: Tensor, scale: float
) -> Tensor:
    """See `cosent.cosent_backward`."""
    widths, size = scores.shape
    out = torch.empty_like(scores, memory_format=torch.contiguous_format)
    if scores.numel() == 0:
        return out
    total = (loss.double() + rest) * LOG2E
    rounded = total.float()
    # What rounding takes from the exponent becomes a factor.
    factor = (grad * scale * (rounded - total).exp2()).float()
    tiles = _triton.config("cosent", "backward", scores.device)
    grid = (triton.cdiv(size, tiles["BLOCK_I"]), widths)
    backward_kernel[grid](
        scores.contiguous(), _comparable(labels), rounded, factor, out, scale * LOG2E, size, **tiles
    )
    return out


def _comparable(labels: Tensor) -> Tensor:
    """Labels in a type that kernels compare as torch does."""
    narrow = labels.dtype in (torch.bool, torch.float16, torch.bfloat16)
    return (labels.float() if narrow else labels).contiguous()


def specs() -> Iterator[_triton.Spec]:
    """Every shipped configuration, for labels in float32."""
    common = {"scores": "*fp32", "labels": "*fp32", "c": "fp32", "size": "i32"}
    own = {
        "forward": {"maxima": "*fp32", "sums": "*fp32", "count": "i32"},
        "backward": dict.fromkeys(("loss", "grad", "out"), "*fp32"),
    }
    for key, kernel in (("forward", forward_kernel), ("backward", backward_kernel)):
        signature = common | own[key]
        for name, arches, tiles in _triton.shipped("cosent", key):
            yield _triton.Spec(
                name=f"{key} {name}",
                kernel=kernel,
                signature=signature,
                constexprs={block: tiles[block] for block in ("BLOCK_I", "BLOCK_J")},
                # `sums` is the second half of an allocation.
                aligned=tuple(n for n, t in signature.items() if t == "*fp32" and n != "sums"),
                num_warps=tiles["num_warps"],
                num_stages=tiles["num_stages"],
                arch=arches,
            )
