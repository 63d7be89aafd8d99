# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels of mean_pool: one read of the kept states, one write of their gradient.

Everything works on rows [T, H] and ascending spans [start_b, end_b) of them; padded states are
rows too, and a mask adds a flag a row. The forward is two launches (three with a mask, whose first
and last real token `bounds_kernel` finds):

1. `sum_kernel` cuts the span of b into chunks of CHUNK rows. A program has to find its chunk
   without a list made on the host. Chunk s of b gets the number

       floor(start_b / CHUNK) + b + s

   which is unique because a span of n rows moves the first term by at least floor(n / CHUNK) and b
   by one, together at least the ceil(n / CHUNK) chunks it has. So floor(T / CHUNK) + B programs
   are enough, and each finds its b by bisection. A chunk that is all of its span stores the mean;
   others store their sum in a table of partials, at floor(2 start_b / CHUNK) + s: only spans longer
   than CHUNK get there, 2 n / CHUNK places are enough for them, and the table's size is that of
   the states over CHUNK, whatever B.
2. `finish_kernel`, one program a row of the result, adds the partials in the order of the chunks,
   divides, normalises if asked, and writes zeros where nothing was kept.

The backward writes once: `share_kernel` makes what each kept token of b gets, in the states' dtype,
and `spread_kernel` copies it to the tokens and zeros to the rest.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _triton
from ._common import MIN_NORM

SMALLEST = tl.constexpr(MIN_NORM**2)


@triton.jit
def bounds_kernel(keep, start, end, count, length, BLOCK: tl.constexpr):
    """Per row b of keep [B, length]: the span from its first to its last kept token, and how many.

    The span is in rows of the flattened states; it is empty if nothing is kept.
    """
    b = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    first = tl.full((BLOCK,), length, tl.int32)
    last = tl.zeros((BLOCK,), tl.int32)
    kept = tl.zeros((BLOCK,), tl.int32)
    for t in range(0, length, BLOCK):
        place = t + offsets
        flag = tl.load(keep + b * length + place, mask=place < length, other=0) != 0
        first = tl.minimum(first, tl.where(flag, place, length))
        last = tl.maximum(last, tl.where(flag, place + 1, 0))
        kept += flag.to(tl.int32)
    total = tl.sum(kept, 0)
    tl.store(start + b, b * length + tl.where(total > 0, tl.min(first, 0), 0))
    tl.store(end + b, b * length + tl.max(last, 0))
    tl.store(count + b, total.to(tl.int64))


@triton.jit(do_not_specialize=["batch", "steps", "tokens"])
def sum_kernel(
    x,
    stride_x,
    keep,
    start,
    end,
    count,
    out,
    partial,
    batch,
    steps,
    tokens,
    width,
    MASKED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Sum of one chunk of rows over BLOCK_H columns, to `out` (as a mean) or to `partial`."""
    number = tl.program_id(0).to(tl.int64)
    b = number * 0
    stop = b + batch
    for _ in range(steps):  # invariant: first chunk of b <= number < first chunk of stop
        middle = (b + stop) // 2
        here = tl.load(start + middle) // CHUNK + middle <= number
        b = tl.where(here, middle, b)
        stop = tl.where(here, stop, middle)
    begin = tl.load(start + b)
    finish = tl.minimum(tl.load(end + b), tokens)
    s = number - (begin // CHUNK + b)
    first = begin + s * CHUNK
    if (s >= 0) & (first < finish):
        column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        inside = column < width
        offsets = tl.arange(0, BLOCK_T)
        sums = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
        last = tl.minimum(first + CHUNK, finish)
        for t in range(first, last, BLOCK_T):
            token = t + offsets
            real = token < last
            if MASKED:
                real &= tl.load(keep + token, mask=real, other=0) != 0
            sums += tl.load(
                x + token[:, None] * stride_x + column[None, :],
                mask=real[:, None] & inside[None, :],
                other=0.0,
            ).to(tl.float32)
        total = tl.sum(sums, 0)
        if finish - begin <= CHUNK:
            kept = tl.load(count + b) if MASKED else finish - begin
            tl.store(out + b * width + column, total / kept.to(tl.float32), mask=inside)
        else:
            place = 2 * begin // CHUNK + s
            tl.store(partial + place * width + column, total, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def finish_kernel(
    start,
    end,
    count,
    out,
    partial,
    inverse,
    tokens,
    width,
    MASKED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the partials of one row in order, divide, normalise; zeros where nothing was kept."""
    b = tl.program_id(0).to(tl.int64)
    begin = tl.load(start + b)
    finish = tl.minimum(tl.load(end + b), tokens)
    chunks = (tl.maximum(finish - begin, 0) + CHUNK - 1) // CHUNK
    if (chunks != 1) | NORMALIZE:
        column = tl.arange(0, BLOCK)
        inside = column < width
        y = tl.zeros((BLOCK,), tl.float32)
        if chunks == 1:
            y += tl.load(out + b * width + column, mask=inside, other=0.0)
        elif chunks > 1:
            place = 2 * begin // CHUNK
            for s in range(chunks):
                y += tl.load(partial + (place + s) * width + column, mask=inside, other=0.0)
            kept = tl.load(count + b) if MASKED else finish - begin
            y /= kept.to(tl.float32)
        if NORMALIZE:
            square = tl.sum(y * y, 0)
            scale = tl.where(square > SMALLEST, 1 / tl.sqrt(tl.maximum(square, SMALLEST)), 0.0)
            y *= scale
            tl.store(inverse + b, scale)
        tl.store(out + b * width + column, y, mask=inside)


@triton.jit
def share_kernel(
    grad,
    pooled,
    inverse,
    start,
    end,
    count,
    share,
    width,
    MASKED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of each kept token of one sequence, in the dtype of the states."""
    b = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    g = tl.load(grad + b * width + column, mask=inside, other=0.0)
    if NORMALIZE:
        y = tl.load(pooled + b * width + column, mask=inside, other=0.0)
        g = (g - tl.sum(g * y, 0) * y) * tl.load(inverse + b)
    kept = tl.load(count + b) if MASKED else tl.load(end + b) - tl.load(start + b)
    g /= tl.maximum(kept, 1).to(tl.float32)
    tl.store(share + b * width + column, g.to(share.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["batch", "steps", "tokens", "length"])
def spread_kernel(
    share,
    keep,
    start,
    end,
    dx,
    batch,
    steps,
    tokens,
    length,
    width,
    MASKED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Write BLOCK_T rows of the gradient: the share of each kept token's sequence, or zeros."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    exists = token < tokens
    if MASKED:
        b = token // length
        real = exists & (tl.load(keep + token, mask=exists, other=0) != 0)
    else:
        b = token * 0  # bisect for the first span that ends after the token
        stop = b + batch
        for _ in range(steps):
            middle = (b + stop) // 2
            before = tl.load(end + middle, mask=b < stop, other=0) <= token
            b = tl.where(before & (b < stop), middle + 1, b)
            stop = tl.where(before, stop, middle)
        real = exists & (b < batch)
        real &= tl.load(start + b, mask=real, other=0) <= token
    for h in range(0, width, BLOCK_H):
        column = h + tl.arange(0, BLOCK_H)
        inside = (column < width)[None, :]
        value = tl.load(
            share + b[:, None] * width + column[None, :], mask=real[:, None] & inside, other=0.0
        )
        place = dx + token[:, None] * width + column[None, :]
        tl.store(place, value, mask=exists[:, None] & inside)


def packed(states: Tensor, start: Tensor, end: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """See `mean_pool.mean_pool_packed`."""
    return _forward(states, start, end, None, None, normalize)


def padded(states: Tensor, keep: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """See `mean_pool.mean_pool_padded`."""
    batch, length, width = states.shape
    flags = keep.contiguous().view(torch.uint8)
    start, end, count = torch.empty((3, batch), dtype=torch.int64, device=keep.device).unbind()
    if batch:
        bounds = _triton.config("mean_pool", "bounds", keep.device)
        bounds_kernel[(batch,)](flags, start, end, count, length, **bounds)
    rows = states.reshape(batch * length, width)
    return _forward(rows, start, end, flags, count, normalize)


def _forward(
    rows: Tensor,
    start: Tensor,
    end: Tensor,
    keep: Tensor | None,
    count: Tensor | None,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    tokens, width = rows.shape
    batch = start.shape[0]
    out = rows.new_empty(batch, width, dtype=torch.float32)
    inverse = out.new_empty(batch if normalize else 0)
    if batch == 0 or width == 0:
        return out, inverse.zero_()
    tiles = _triton.config("mean_pool", "sum", rows.device)
    chunk = tiles["CHUNK"]
    partial = out.new_empty(2 * tokens // chunk + 1, width)
    block = min(tiles.pop("BLOCK_H"), _block(width))
    grid = (tokens // chunk + batch, triton.cdiv(width, block))
    where, sizes = (start, end, count, out, partial), (batch, batch.bit_length(), tokens, width)
    masked = keep is not None
    sum_kernel[grid](rows, rows.stride(0), keep, *where, *sizes, masked, BLOCK_H=block, **tiles)
    row = _triton.config("mean_pool", "row", rows.device)
    finish_kernel[(batch,)](
        *where, inverse, tokens, width, masked, normalize, chunk, _block(width), **row
    )
    return out, inverse


def packed_backward(
    grad: Tensor,
    pooled: Tensor | None,
    inverse: Tensor | None,
    start: Tensor,
    end: Tensor,
    tokens: int,
    dtype: torch.dtype,
) -> Tensor:
    """See `mean_pool.mean_pool_packed_backward`."""
    dx = grad.new_empty(tokens, grad.shape[1], dtype=dtype)
    return _backward(grad, pooled, inverse, start, end, None, None, dx)


def padded_backward(
    grad: Tensor, pooled: Tensor | None, inverse: Tensor | None, keep: Tensor, dtype: torch.dtype
) -> Tensor:
    """See `mean_pool.mean_pool_padded_backward`."""
    dx = grad.new_empty(*keep.shape, grad.shape[1], dtype=dtype)
    count = keep.sum(1)
    return _backward(grad, pooled, inverse, count, count, keep.contiguous(), count, dx)


def _backward(
    grad: Tensor,
    pooled: Tensor | None,
    inverse: Tensor | None,
    start: Tensor,
    end: Tensor,
    keep: Tensor | None,
    count: Tensor | None,
    dx: Tensor,
) -> Tensor:
    batch, width = grad.shape
    tokens = dx.numel() // max(1, width)
    if dx.numel() == 0:
        return dx
    masked = keep is not None
    share = torch.empty_like(grad, dtype=dx.dtype, memory_format=torch.contiguous_format)
    row = _triton.config("mean_pool", "row", grad.device)
    if batch:
        share_kernel[(batch,)](
            grad.contiguous(), pooled, inverse, start, end, count, share, width,
            masked, pooled is not None, _block(width), **row,
        )  # fmt: skip
    tiles = _triton.config("mean_pool", "spread", grad.device)
    block = min(tiles.pop("BLOCK_H"), _block(width))
    flags = keep.view(torch.uint8) if keep is not None else None
    length = keep.shape[1] if keep is not None else 1
    spread_kernel[(triton.cdiv(tokens, tiles["BLOCK_T"]),)](
        share, flags, start, end, dx, batch, batch.bit_length(), tokens, length, width, masked,
        BLOCK_H=block, **tiles,
    )  # fmt: skip
    return dx


def _block(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def specs() -> Iterator[_triton.Spec]:
    """Every shipped configuration; the hidden size is no part of the code, but of a row's block."""
    long = {name: "*i64" for name in ("start", "end", "count")}
    for x, masked in (("*bf16", False), ("*bf16", True), ("*fp32", False)):
        flags: dict[str, Any] = {"keep": "*u8"} if masked else {}
        left_out: dict[str, Any] = {} if masked else {"keep": None, "count": None}
        spans = long if masked else {k: v for k, v in long.items() if k != "count"}
        label = f"{x[1:]}{' mask' * masked}"
        for name, arches, tiles in _triton.shipped("mean_pool", "sum"):
            constexprs = {"MASKED": masked, **left_out}
            constexprs |= {k: tiles[k] for k in ("CHUNK", "BLOCK_T", "BLOCK_H")}
            yield _triton.Spec(
                name=f"sum {label} {name}",
                kernel=sum_kernel,
                signature={
                    "x": x, "stride_x": "i32", **flags, **spans, "out": "*fp32",
                    "partial": "*fp32", "batch": "i32", "steps": "i32", "tokens": "i32",
                    "width": "i32",
                },
                constexprs=constexprs,
                aligned=("x", "stride_x", "keep", *spans, "out", "partial", "width"),
                num_warps=tiles["num_warps"],
                num_stages=tiles["num_stages"],
                arch=arches,
            )  # fmt: skip
        for name, arches, tiles in _triton.shipped("mean_pool", "spread"):
            constexprs = {"MASKED": masked, "BLOCK_T": tiles["BLOCK_T"]}
            constexprs |= {"BLOCK_H": tiles["BLOCK_H"]}
            constexprs |= {} if masked else {"keep": None}
            yield _triton.Spec(
                name=f"spread {label} {name}",
                kernel=spread_kernel,
                signature={
                    "share": x, **flags, "start": "*i64", "end": "*i64", "dx": x,
                    "batch": "i32", "steps": "i32", "tokens": "i32", "length": "i32",
                    "width": "i32",
                },
                constexprs=constexprs,
                aligned=("share", "keep", "start", "end", "dx", "width"),
                num_warps=tiles["num_warps"],
                num_stages=tiles["num_stages"],
                arch=arches,
            )  # fmt: skip
    yield from _row_specs(long)


def _row_specs(long: dict[str, str]) -> Iterator[_triton.Spec]:
    width, fp32 = 3072, "*fp32"
    chunk = _triton.config("mean_pool", "sum")["CHUNK"]
    for name, arches, row in _triton.shipped("mean_pool", "row"):
        launch = {"num_warps": row["num_warps"], "num_stages": row["num_stages"], "arch": arches}
        flags = {"MASKED": True, "NORMALIZE": True, "BLOCK": _block(width)}
        yield _triton.Spec(
            name=f"finish H={width} {name}",
            kernel=finish_kernel,
            signature={
                **long, "out": fp32, "partial": fp32, "inverse": fp32, "tokens": "i32",
                "width": "i32",
            },
            constexprs={**flags, "CHUNK": chunk},
            aligned=(*long, "out", "partial", "inverse", "width"),
            **launch,
        )  # fmt: skip
        yield _triton.Spec(
            name=f"share bf16 H={width} {name}",
            kernel=share_kernel,
            signature={
                "grad": fp32, "pooled": fp32, "inverse": fp32, **long, "share": "*bf16",
                "width": "i32",
            },
            constexprs=flags,
            aligned=("grad", "pooled", "inverse", *long, "share", "width"),
            **launch,
        )  # fmt: skip
    for name, arches, tiles in _triton.shipped("mean_pool", "bounds"):
        yield _triton.Spec(
            name=f"bounds {name}",
            kernel=bounds_kernel,
            signature={"keep": "*u8", **long, "length": "i32"},
            constexprs={"BLOCK": tiles["BLOCK"]},
            aligned=("keep", *long),
            num_warps=tiles["num_warps"],
            num_stages=tiles["num_stages"],
            arch=arches,
        )
