# mypy: allow-untyped-defs, allow-incomplete-defs
"""Before the tiles: inverse prefix norms and dot products of matching rows, read once.

    INVERSE^k_r = 1 / |v_r[:d_k]|, 0 for a zero prefix          DOTS^k_r = u_r . v_r over [0, d_k)

Squares and products are summed in float32 from the raw rows: a row normalised in bf16 carries up to
2^-9 of error in its norm, 0.1 to 0.2 in a logit.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["R", "K"])
def prefix_kernel(
    V, U, V_ROW, U_ROW, WIDTHS, INVERSE, DOTS, R, K, stride_v, stride_u, each, tiny,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """INVERSE [K, R] of rows V_ROW[r] of V, and DOTS [K, R] with rows U_ROW[r] of U.

    V_ROW None is r itself, U_ROW None is r // each. INVERSE or U and DOTS may be None. EVEN: every
    width is a multiple of 16, so that loads are vectors. tiny: a squared norm not above it is zero.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < R
    v_row, u_row = rows, rows // each
    if V_ROW is not None:
        v_row = tl.load(V_ROW + rows, mask=live, other=0)
    if U_ROW is not None:
        u_row = tl.load(U_ROW + rows, mask=live, other=0)
    at_v = V + v_row.to(tl.int64)[:, None] * stride_v
    if U is not None:
        at_u = U + u_row.to(tl.int64)[:, None] * stride_u
    square = tl.zeros((ROWS,), tl.float32)
    dots = tl.zeros((ROWS,), tl.float32)
    low = tl.load(WIDTHS) * 0
    for k in range(K):
        high = tl.load(WIDTHS + k)
        if EVEN:
            low, high = tl.multiple_of(low, 16), tl.multiple_of(high, 16)
        for d in range(low, high, BLOCK):
            depth = d + tl.arange(0, BLOCK)
            mask = live[:, None] & (depth < high)[None, :]
            v = tl.load(at_v + depth[None, :], mask=mask, other=0.0).to(tl.float32)
            if INVERSE is not None:
                square += tl.sum(v * v, 1)
            if U is not None:
                u = tl.load(at_u + depth[None, :], mask=mask, other=0.0).to(tl.float32)
                dots += tl.sum(u * v, 1)
        if INVERSE is not None:
            real = square > tiny
            inverse = 1.0 / tl.sqrt_rn(tl.where(real, square, 1.0))
            tl.store(INVERSE + k * R + rows, tl.where(real, inverse, 0.0), mask=live)
        if U is not None:
            tl.store(DOTS + k * R + rows, dots, mask=live)
        low = high
