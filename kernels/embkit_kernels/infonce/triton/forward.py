# mypy: allow-untyped-defs, allow-incomplete-defs
"""Forward: sums of exponentials of every prefix width, in one pass over the embeddings.

    R^k = R^(k-1) + u[segment k] . v[segment k]        one accumulator, read at each boundary
    m^k_i, l^k_i = max_j y^k_ij, sum_j 2^(y^k_ij - m^k_i)    over the columns of a tile

A program owns one tile and walks the embeddings once. The loop is flat, with the epilogue under an
`if` at the boundaries, so that loads of the next segment are in flight during the exponentials.
Partials (m, l) [K, tiles, rows] are merged by `combine_kernel` in the order of the tiles: no
atomics, the same bits at each run. They cost 8 bytes for each BLOCK_N candidates.
"""

import triton
import triton.language as tl

from .tile import EMPTY, LN2, MASKED, logits, piece, place, row_terms


@triton.jit(do_not_specialize=["B", "N", "tiles_m", "tiles_n"])
def forward_kernel(
    U, V, INVERSE_U, INVERSE_V, REFERENCE, TAU, ROW_KEY, COLUMN_KEY, ROW_START, COLUMN_START,
    ROW_QUERY, COLUMN_QUERY, WIDTHS, MAXIMA, SUMS,
    B, N, padded, width, stride_u, stride_v, stride_rows, stride_partials,
    tiles_m, tiles_n, margin, alpha,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SUB: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """MAXIMA, SUMS [K, tiles, stride_rows] of one bank of candidates.

    U [B, width] and V [N, width] are pointers (or descriptors of blocks, with TMA), WIDTHS the
    boundaries, multiples of BLOCK_K. INVERSE_V [K, padded] is -1 where a column is nobody's
    candidate; it and the columns' keys are padded to whole tiles.
    """
    tile_m, tile_n = place(tiles_m, tiles_n, GROUP)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    live = rows < B
    depth = tl.arange(0, BLOCK_K)
    if not TMA:
        # Rows past the end repeat the last one: unmasked loads, and their results go nowhere.
        columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        at_u = U + tl.minimum(rows, B - 1).to(tl.int64)[:, None] * stride_u + depth[None, :]
        at_v = V + tl.minimum(columns, N - 1).to(tl.int64)[None, :] * stride_v + depth[:, None]
    row_key, row_query = 0, 0
    if ROW_START is None:
        row_key = tl.load(ROW_KEY + rows, mask=live, other=0)
    if ROW_QUERY is not None:
        row_query = tl.load(ROW_QUERY + rows, mask=live, other=0)
    dots = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    to = tile_n.to(tl.int64) * stride_rows + rows
    k = 0
    boundary = tl.load(WIDTHS)
    for d in range(0, width, BLOCK_K):
        if TMA:
            u = U.load([tile_m * BLOCK_M, d])
            v = V.load([tile_n * BLOCK_N, d]).T
        else:
            u = tl.load(at_u + d)
            v = tl.load(at_v + d)
        dots = tl.dot(u, v, dots, input_precision=PRECISION)
        if d + BLOCK_K == boundary:
            _, _, shift, scale, limit, lift = row_terms(
                INVERSE_U, REFERENCE, TAU, k * B + rows, live, margin, alpha
            )
            top = tl.full((BLOCK_M,), MASKED, tl.float32)
            total = tl.zeros((BLOCK_M,), tl.float32)
            for part in tl.static_range(SUB):
                r = piece(dots, part, SUB)
                at = tile_n * BLOCK_N + part * (BLOCK_N // SUB)
                _, y, keep, _ = logits(
                    r, at, INVERSE_V + k * padded, COLUMN_KEY, COLUMN_QUERY, row_key, row_query,
                    ROW_KEY, ROW_START, COLUMN_START, rows, B, N, shift, scale, limit, lift,
                    margin, alpha,
                )  # fmt: skip
                y = tl.where(keep, y, MASKED)
                before, top = top, tl.maximum(top, tl.max(y, 1))
                total = total * tl.exp2(before - top) + tl.sum(tl.exp2(y - top[:, None]), 1)
            tl.store(MAXIMA + to, top)
            tl.store(SUMS + to, total)
            to += stride_partials
            k += 1
            boundary = tl.load(WIDTHS + k)


@triton.jit(do_not_specialize=["B", "tiles"])
def combine_kernel(MAXIMA, SUMS, X, B, stride_rows, tiles, BLOCK: tl.constexpr):
    """X [K, B] = log of the sum over tiles of l 2^m, -inf where every candidate was masked."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = rows < B
    k = tl.program_id(1).to(tl.int64)
    top = tl.full((BLOCK,), MASKED, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for tile in range(tiles):
        at = (k * tiles + tile) * stride_rows + rows
        other = tl.load(MAXIMA + at, mask=live, other=MASKED)
        before, top = top, tl.maximum(top, other)
        share = tl.load(SUMS + at, mask=live, other=0.0) * tl.exp2(other - top)
        total = total * tl.exp2(before - top) + share
    empty = top < EMPTY
    x = (top + tl.log2(tl.where(empty, 1.0, total))) * LN2
    tl.store(X + k * B + rows, tl.where(empty, float("-inf"), x), mask=live)
