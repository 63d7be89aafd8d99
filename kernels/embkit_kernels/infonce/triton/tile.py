# mypy: allow-untyped-defs, allow-incomplete-defs
"""What the two kernels over tiles share: their grid, their exponents, their masks.

Forward and backward see one arithmetic: the dot products R^k of a tile are the same instructions
in the same order, and `logits` is called by both, so that a margin masks the same elements bit for
bit.
For row i and column j, with inverse prefix norms a, b and the cosine of the reference positive:

    t = R b - ref / a        one fused multiply-add, so that the difference of two cosines is taken
    y = t a log2(e) / tau    before the division by tau; y is in units of log 2
    s = a t + ref            the cosine itself

Layout. In the wgmma layout a thread holds BLOCK_N / 4 columns of two rows: each vector over columns
(b, keys) costs that many registers. Tiles are therefore walked in SUB slices of columns.
"""

import triton
import triton.language as tl

MASKED = tl.constexpr(-1e30)
"""Exponent of a masked candidate: finite, so that a fully masked tile merges without NaN."""

EMPTY = tl.constexpr(-1e29)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def place(tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of this program's tile: GROUP rows of tiles go together, to meet in L2."""
    pid = tl.program_id(0)
    width = GROUP * tiles_n
    first = (pid // width) * GROUP
    size = min(tiles_m - first, GROUP)
    return first + (pid % width) % size, (pid % width) // size


@triton.jit
def halves(x):
    """Left and right half of a tile's columns, without a move between threads."""
    return x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def piece(dots, part: tl.constexpr, SUB: tl.constexpr):
    """Slice `part` of SUB (1, 2 or 4) of a tile's columns."""
    r = dots
    if SUB > 1:
        left, right = halves(dots)
        r = left if part < SUB // 2 else right
    if SUB == 4:
        left, right = halves(r)
        r = left if part % 2 == 0 else right
    return r


@triton.jit
def row_terms(INVERSE_U, REFERENCE, TAU, at, live, margin, alpha):
    """Vectors over rows at one width: a, ref, -ref / a, a log2(e) / tau, limit of t, alpha ref."""
    a = tl.load(INVERSE_U + at, mask=live, other=0.0)
    reference = tl.load(REFERENCE + at, mask=live, other=0.0)
    tau = tl.load(TAU)
    real = a > 0
    safe = tl.where(real, a, 1.0)
    shift = tl.where(real, -reference / safe, 0.0)
    scale = a * (LOG2E / tau)
    # y > margin / tau, asked of t. A zero vector has y = 0.
    limit = float("inf")
    if margin is not None:
        zero_row = tl.where(margin < 0, float("-inf"), float("inf"))
        limit = tl.where(real, margin / safe, zero_row)
    lift = 0.0
    if alpha is not None:
        scale = scale * (1.0 + alpha * tau)
        lift = reference * (alpha * LOG2E)
    return a, reference, shift, scale, limit, lift


@triton.jit
def logits(
    r, first, INVERSE_V, COLUMN_KEY, COLUMN_QUERY, row_key, row_query, ROW_KEY, ROW_START,
    COLUMN_START, rows, B, N, shift, scale, limit, lift, margin, alpha,
):  # fmt: skip
    """The slice of a tile from column `first`: t, exponent y, which candidates are kept, b.

    Vectors over columns are padded to whole tiles: no mask, and one address with constant offsets.
    (Addresses do not depend on the width, so a compiler keeps them through the main loop.)
    """
    column = tl.arange(0, r.shape[1])
    b = tl.load(INVERSE_V + first + column)
    t = tl.fma(r, b[None, :], shift[:, None])
    keep = (b >= 0)[None, :]
    if ROW_START is None:
        key = tl.load(COLUMN_KEY + first + column)
        keep = keep & (row_key[:, None] != key[None, :])
    else:
        keep = keep & differ(
            rows, B, first + column, N, ROW_KEY, ROW_START, COLUMN_KEY, COLUMN_START
        )
    if COLUMN_QUERY is not None:
        query = tl.load(COLUMN_QUERY + first + column)
        keep = keep & (row_query[:, None] != query[None, :])
    if margin is not None:
        keep = keep & (t <= limit[:, None])
    y = t * scale[:, None]
    if alpha is not None:
        y = y + lift[:, None]
    return t, y, keep, b


@triton.jit
def differ(rows, B, columns, N, ROW_KEY, ROW_START, COLUMN_KEY, COLUMN_START):
    """True where no key of the row is a key of the column, for rows that have several.

    Loops inside the epilogue keep the compiler from pipelining the tile: right, and slower.
    """
    start = tl.load(ROW_START + rows, mask=rows < B, other=0)
    end = tl.load(ROW_START + rows + 1, mask=rows < B, other=0)
    keep = (rows >= 0)[:, None] & (columns >= 0)[None, :]
    if COLUMN_START is None:
        key = tl.load(COLUMN_KEY + columns, mask=columns < N, other=0)
        for m in range(tl.max(end - start)):
            own = tl.load(ROW_KEY + start + m, mask=start + m < end, other=-1)
            keep = keep & (own[:, None] != key[None, :])
    else:
        first = tl.load(COLUMN_START + columns, mask=columns < N, other=0)
        last = tl.load(COLUMN_START + columns + 1, mask=columns < N, other=0)
        for m in range(tl.max(end - start)):
            own = tl.load(ROW_KEY + start + m, mask=start + m < end, other=-1)
            for n in range(tl.max(last - first)):
                key = tl.load(COLUMN_KEY + first + n, mask=first + n < last, other=-2)
                keep = keep & (own[:, None] != key[None, :])
    return keep
