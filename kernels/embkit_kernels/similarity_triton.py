# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels of mrl_similarity: one product for all widths, and a selection without sorting.

`norms_kernel` reads rows once and writes the inverse norm of every prefix. `product_kernel` walks D
once and stores a similarity tile at each width's end: the running product times both norms.

For the k best, the product goes to a block of the workspace and `select_kernel` reads it once. A
program owns one query at one width. It keeps a buffer of M > k keys (score and column in one
integer, no two equal: `similarity.pack`) and a bar, the k-th best key of the last clean-up. Keys
above the bar are appended, at places that a prefix sum gives; when the buffer is full it is cut
down to its k best and the bar rises. Every clean-up sees about M - k new keys, which on unordered
data takes e^(M / k - 1) times more columns each time: three clean-ups at k = 100, M = 512 and a
million columns. No key of the k best is ever below the bar: the result does not depend on blocks.
Buffer, fill and bar stay on the device between blocks; one `topk` over the buffers ends it.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _triton
from ._common import MIN_NORM
from .similarity import unpack

SMALLEST = tl.constexpr(MIN_NORM**2)
NOTHING = -(1 << 63)
NO_KEY = tl.constexpr(NOTHING)


@triton.jit(do_not_specialize=["rows", "widths"])
def norms_kernel(
    x,
    stride_x,
    dims,
    out,
    rows,
    widths,
    EVEN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Inverse norm of each prefix of BLOCK_R rows, to [K, rows]; 0 for a zero prefix."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = r < rows
    out += r
    square = tl.zeros((BLOCK_R,), tl.float32)
    low = 0
    for k in range(widths):
        high = tl.load(dims + k)
        for d in range(low, high, BLOCK_K):
            column = d + tl.arange(0, BLOCK_K)
            wanted = inside[:, None] if EVEN else inside[:, None] & (column < high)[None, :]
            place = x + r[:, None] * stride_x + column[None, :]
            part = tl.load(place, mask=wanted, other=0.0).to(tl.float32)
            square += tl.sum(part * part, 1)
        inverse = tl.where(square > SMALLEST, 1 / tl.sqrt(tl.maximum(square, SMALLEST)), 0.0)
        tl.store(out, inverse, mask=inside)
        out += rows
        low = high


@triton.jit(do_not_specialize=["rows", "columns", "widths", "grid_m", "grid_n"])
def product_kernel(
    q,
    p,
    a,
    b,
    dims,
    out,
    stride_q,
    stride_p,
    stride_b,
    stride_k,
    stride_row,
    rows,
    columns,
    widths,
    grid_m,
    grid_n,
    EVEN: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Cosines of BLOCK_M rows and BLOCK_N columns at every width.

    EVEN: BLOCK_K divides all widths. WHOLE: `out` has room for whole tiles.
    """
    # Tiles in groups of GROUP rows, so that programs that run together share rows and columns.
    number = tl.program_id(0)
    group = number // (GROUP * grid_n)
    height = tl.minimum(grid_m - group * GROUP, GROUP)
    row = (group * GROUP + number % (GROUP * grid_n) % height).to(tl.int64) * BLOCK_M
    column = (number % (GROUP * grid_n) // height).to(tl.int64) * BLOCK_N
    # Scalar 64-bit bases and 32-bit offsets: 64-bit vectors would take all registers.
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    high_m, high_n = (rows - row).to(tl.int32), (columns - column).to(tl.int32)
    # Rows past the end repeat the last one: no mask in the loop, and they are not stored.
    q_row = q + row * stride_q + tl.minimum(m, high_m - 1)[:, None] * stride_q
    p_row = p + column * stride_p + tl.minimum(n, high_n - 1)[None, :] * stride_p
    a += row
    b += column
    out += row * stride_row + column
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    low = 0
    for k in range(widths):
        high = tl.load(dims + k)
        for d in range(low, high, BLOCK_K):
            place = d + tl.arange(0, BLOCK_K)
            if EVEN:
                x = tl.load(q_row + place[None, :])
                y = tl.load(p_row + place[:, None])
            else:
                x = tl.load(q_row + place[None, :], mask=(place < high)[None, :], other=0.0)
                y = tl.load(p_row + place[:, None], mask=(place < high)[:, None], other=0.0)
            product = tl.dot(x, y, product, input_precision=PRECISION)
        low = high
        tile = product * tl.load(a + m, mask=m < high_m, other=0.0)[:, None]
        tile *= tl.load(b + n, mask=n < high_n, other=0.0)[None, :]
        tile_out = out + (m[:, None] * stride_row + n[None, :])
        if WHOLE:
            tl.store(tile_out, tile)
        else:
            tl.store(tile_out, tile, mask=(m < high_m)[:, None] & (n < high_n)[None, :])
        a += rows
        b += stride_b
        out += stride_k


@triton.jit(do_not_specialize=["first", "columns", "k"])
def select_kernel(
    scores,
    stride_k,
    stride_row,
    buffer,
    fill,
    bar,
    first,
    columns,
    k,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Take in the similarities of one query at one width to columns first, first + 1, ...

    Rows of `scores` have room for whole blocks.
    """
    width, query = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    scores += width * stride_k + query * stride_row
    row = width * tl.num_programs(0) + query
    buffer += row * M
    full = tl.load(fill + row)
    least = tl.load(bar + row)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        score = tl.load(scores + column)
        bits = (score + 0.0).to(tl.int32, bitcast=True)
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        key = (bits.to(tl.int64) << 32) | (0xFFFFFFFF - (first + column).to(tl.int64))
        hit = (column < columns) & (key > least)
        count = tl.sum(hit.to(tl.int32), 0)
        if count > 0:
            if full + count > M:
                tl.debug_barrier()  # other threads have appended what is read here
                slot = tl.arange(0, M)
                kept = tl.load(buffer + slot, mask=slot < full, other=NO_KEY)
                best = tl.sort(kept, descending=True)  # (tl.topk: not in the interpreter)
                least = tl.max(tl.where(slot == k - 1, best, NO_KEY), 0)
                tl.debug_barrier()  # all have read before any writes
                tl.store(buffer + slot, tl.where(slot < k, best, NO_KEY))
                full = full * 0 + k
                hit = hit & (key > least)
                count = tl.sum(hit.to(tl.int32), 0)
            at = full + tl.cumsum(hit.to(tl.int32), 0) - 1
            tl.store(buffer + at, key, mask=hit)
            full += count
    tl.store(fill + row, full)
    tl.store(bar + row, least)


def scores(q: Tensor, p: Tensor, dims: Sequence[int]) -> Tensor:
    """See `similarity.similarity_scores`."""
    q, p = _operands(q, p)
    out = q.new_empty(len(dims), q.shape[0], p.shape[0], dtype=torch.float32)
    if out.numel():
        a, b = _inverse_norms(q, dims), _inverse_norms(p, dims)
        _product(q, p, a, b, dims, out, whole=False)
    return out


def topk(q: Tensor, p: Tensor, dims: Sequence[int], k: int, columns: int) -> tuple[Tensor, Tensor]:
    """The k best of some queries, through blocks of that many columns."""
    q, p = _operands(q, p)
    a, b = _inverse_norms(q, dims), _inverse_norms(p, dims)
    tiles = _triton.config("similarity", "select", q.device)
    room = triton.next_power_of_2(k + tiles["BLOCK"])
    shape = (len(dims), q.shape[0])
    buffer = torch.full((*shape, room), NOTHING, dtype=torch.int64, device=q.device)
    bar = torch.full(shape, NOTHING, dtype=torch.int64, device=q.device)
    fill = torch.zeros(shape, dtype=torch.int32, device=q.device)
    product = _tiles(q, dims)
    height = _up(q.shape[0], product["BLOCK_M"])
    width = _up(min(columns, p.shape[0]), max(product["BLOCK_N"], tiles["BLOCK"]))
    # Zeros, because columns beyond the product's last tile are read before they are left out.
    workspace = q.new_zeros(len(dims), height, width, dtype=torch.float32)
    for first in range(0, p.shape[0], columns):
        block = p[first : first + columns]
        _product(q, block, a, b[:, first:], dims, workspace, whole=True)
        select_kernel[(q.shape[0], len(dims))](
            workspace, workspace.stride(0), width, buffer, fill, bar, first, block.shape[0], k,
            room, **tiles,
        )  # fmt: skip
    return unpack(buffer.topk(k, dim=-1).values)


def _operands(q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, p.dtype)
    q, p = (x.to(dtype) if x.stride(1) == 1 else x.to(dtype).contiguous() for x in (q, p))
    return q, p


@functools.cache
def _table(dims: tuple[int, ...], device: torch.device) -> Tensor:
    """Widths on the device, copied there once: a copy from the host waits for the stream."""
    return torch.tensor(dims, dtype=torch.int32, device=device)


def _inverse_norms(x: Tensor, dims: Sequence[int]) -> Tensor:
    out = x.new_empty(len(dims), x.shape[0], dtype=torch.float32)
    if out.numel():
        tiles = _triton.config("similarity", "norms", x.device)
        grid = (triton.cdiv(x.shape[0], tiles["BLOCK_R"]),)
        norms_kernel[grid](
            x, x.stride(0), _table(tuple(dims), x.device), out, x.shape[0], len(dims),
            _even(tiles, dims), **tiles,
        )  # fmt: skip
    return out


def _product(
    q: Tensor, p: Tensor, a: Tensor, b: Tensor, dims: Sequence[int], out: Tensor, *, whole: bool
) -> None:
    """Fill the first rows and columns of `out` with cosines; whole: it has room for tiles."""
    tiles = _tiles(q, dims)
    grid = triton.cdiv(q.shape[0], tiles["BLOCK_M"]), triton.cdiv(p.shape[0], tiles["BLOCK_N"])
    product_kernel[(grid[0] * grid[1],)](
        q, p, a, b, _table(tuple(dims), q.device), out, q.stride(0), p.stride(0), b.stride(0),
        out.stride(0), out.stride(1), q.shape[0], p.shape[0], len(dims), *grid,
        _even(tiles, dims), whole, "ieee", 8, **tiles,
    )  # fmt: skip


def _even(tiles: _triton.Config, dims: Sequence[int]) -> bool:
    """Whether BLOCK_K divides all widths, halved if that helps: then nothing is masked."""
    for block in (tiles["BLOCK_K"], tiles["BLOCK_K"] // 2, tiles["BLOCK_K"] // 4):
        if block >= 16 and all(d % block == 0 for d in dims):
            tiles["BLOCK_K"] = block
            return True
    return False


def _up(size: int, block: int) -> int:
    return triton.cdiv(size, block) * block


def _tiles(q: Tensor, dims: Sequence[int]) -> _triton.Config:
    kind = "product_fp32" if q.dtype == torch.float32 else "product"
    tiles = _triton.config("similarity", kind, q.device)
    if q.dtype != torch.float32 and not _even(tiles, dims):
        return _triton.config("similarity", "product_odd", q.device)
    return tiles


def specs() -> Iterator[_triton.Spec]:
    """Every shipped configuration: products in bf16 and fp32, widths even and odd; k = 100."""
    fp32, i32, i64 = "*fp32", "i32", "*i64"
    kinds = (("product", "*bf16"), ("product_odd", "*bf16"), ("product_fp32", fp32))
    for (key, x), whole in itertools.product(kinds, (True, False)):
        even = key != "product_odd"
        for name, arches, tiles in _triton.shipped("similarity", key):
            blocks = {b: tiles[b] for b in ("BLOCK_M", "BLOCK_N", "BLOCK_K")}
            sizes = (
                "stride_q", "stride_p", "stride_b", "stride_k", "stride_row", "rows", "columns",
                "widths", "grid_m", "grid_n",
            )  # fmt: skip
            strides: tuple[str, ...] = ("stride_q", "stride_p") if even else ()
            strides += ("stride_k", "stride_row") if whole else ()
            yield _triton.Spec(
                name=f"{key}{' whole' * whole} {name}",
                kernel=product_kernel,
                signature={
                    "q": x, "p": x, "a": fp32, "b": fp32, "dims": "*i32", "out": fp32,
                    **dict.fromkeys(sizes, i32),
                },
                constexprs=blocks
                | {"EVEN": even, "WHOLE": whole, "PRECISION": "ieee", "GROUP": 8},
                aligned=("q", "p", "a", "b", "dims", "out", *strides),
                num_warps=tiles["num_warps"],
                num_stages=tiles["num_stages"],
                arch=arches,
                tensor_cores=x != fp32,
                pipelined=even,
            )  # fmt: skip
    for x in ("*bf16", fp32):
        for name, arches, tiles in _triton.shipped("similarity", "norms"):
            yield _triton.Spec(
                name=f"norms {x[1:]} {name}",
                kernel=norms_kernel,
                signature={
                    "x": x, "stride_x": i32, "dims": "*i32", "out": fp32, "rows": i32,
                    "widths": i32,
                },
                constexprs={"EVEN": True, **{b: tiles[b] for b in ("BLOCK_R", "BLOCK_K")}},
                aligned=("x", "stride_x", "dims", "out"),
                num_warps=tiles["num_warps"],
                num_stages=tiles["num_stages"],
                arch=arches,
            )  # fmt: skip
    for name, arches, tiles in _triton.shipped("similarity", "select"):
        room: Any = triton.next_power_of_2(100 + tiles["BLOCK"])
        yield _triton.Spec(
            name=f"select k=100 {name}",
            kernel=select_kernel,
            signature={
                "scores": fp32, "stride_k": i32, "stride_row": i32, "buffer": i64, "fill": "*i32",
                "bar": i64, "first": i32, "columns": i32, "k": i32,
            },
            constexprs={"M": room, "BLOCK": tiles["BLOCK"]},
            aligned=("scores", "stride_k", "stride_row", "buffer", "fill", "bar"),
            num_warps=tiles["num_warps"],
            num_stages=tiles["num_stages"],
            arch=arches,
        )  # fmt: skip
