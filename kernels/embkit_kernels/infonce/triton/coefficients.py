# mypy: allow-untyped-defs, allow-incomplete-defs
"""Backward: the coefficient matrices that plain GEMMs turn into gradients, for a chunk of columns.

With e = 2^(y - X) and the weight of a row, W^k_i = g^k_i slope^k_i / tau, so that G = W e:

    C^k_ij = a^k_i G^k_ij b^k_j          du_i = sum_j C^k_ij v_j - ..., over the prefix k
    Cbar^t = sum_{k>=t} C^k              what segment t gets: one GEMM a segment, whatever K
    rho^k_i = sum_j G^k_ij s^k_ij        pull of the normalisation of u_i, and of the temperature
    kappa^k_j = sum_i G^k_ij s^k_ij      pull of the normalisation of v_j

The main loop is the forward's. C^k goes to the workspace [K, rows, columns] as the boundaries come,
ascending; the sums Cbar run the other way, so the program reads its own tiles back from L2 at the
end. rho and kappa leave as partials, one a tile, and are added up in the order of the tiles.
"""

import triton
import triton.language as tl

from .tile import MASKED, logits, piece, place, row_terms


@triton.jit(do_not_specialize=["B", "N", "K", "tiles_m", "tiles_n"])
def coefficient_kernel(
    U, V, INVERSE_U, INVERSE_V, REFERENCE, TAU, ROW_KEY, COLUMN_KEY, ROW_START, COLUMN_START,
    ROW_QUERY, COLUMN_QUERY, WIDTHS, X, WEIGHT, SCALE, C, RHO, KAPPA,
    B, N, padded, width, stride_u, stride_v, stride_rows, stride_columns, first, K,
    tiles_m, tiles_n, margin, alpha,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SUB: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """C [K, stride_rows, stride_columns], RHO [K, tiles_n, stride_rows] and
    KAPPA [K, tiles_m, stride_columns] of the columns from `first` (a multiple of BLOCK_N) on.

    X [K, B] is nLSE - z_pos in units of log 2, WEIGHT [K, B] is W. SCALE: a power of two that C is
    multiplied by (fp16), or None. C, KAPPA: None where nobody wants them.
    """
    tile_m, tile_n = place(tiles_m, tiles_n, GROUP)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    live = rows < B
    depth = tl.arange(0, BLOCK_K)
    if not TMA:
        columns = first + tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        at_u = U + tl.minimum(rows, B - 1).to(tl.int64)[:, None] * stride_u + depth[None, :]
        at_v = V + tl.minimum(columns, N - 1).to(tl.int64)[None, :] * stride_v + depth[:, None]
    row_key, row_query = 0, 0
    if ROW_START is None:
        row_key = tl.load(ROW_KEY + rows, mask=live, other=0)
    if ROW_QUERY is not None:
        row_query = tl.load(ROW_QUERY + rows, mask=live, other=0)
    dots = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    W: tl.constexpr = BLOCK_N // SUB
    to_c = (tile_m * BLOCK_M).to(tl.int64) * stride_columns + tile_n * BLOCK_N
    in_c = tl.arange(0, BLOCK_M)[:, None] * stride_columns + tl.arange(0, W)[None, :]
    stride_c = (tl.zeros((), tl.int64) + stride_rows) * stride_columns
    k = 0
    boundary = tl.load(WIDTHS)
    for d in range(0, width, BLOCK_K):
        if TMA:
            u = U.load([tile_m * BLOCK_M, d])
            v = V.load([first + tile_n * BLOCK_N, d]).T
        else:
            u = tl.load(at_u + d)
            v = tl.load(at_v + d)
        dots = tl.dot(u, v, dots, input_precision=PRECISION)
        if d + BLOCK_K == boundary:
            a, reference, shift, scale, limit, lift = row_terms(
                INVERSE_U, REFERENCE, TAU, k * B + rows, live, margin, alpha
            )
            # Rows past the end have weight 0 and a = 0: they write zeros.
            weight = tl.load(WEIGHT + k * B + rows, mask=live, other=0.0)
            x = tl.load(X + k * B + rows, mask=live, other=0.0)
            factor = weight * a
            if SCALE is not None:
                factor = factor * tl.load(SCALE)
            rho = tl.zeros((BLOCK_M,), tl.float32)
            for part in tl.static_range(SUB):
                r = piece(dots, part, SUB)
                local = tile_n * BLOCK_N + part * W
                t, y, keep, b = logits(
                    r, first + local, INVERSE_V + k * padded, COLUMN_KEY, COLUMN_QUERY,
                    row_key, row_query, ROW_KEY, ROW_START, COLUMN_START, rows, B, N,
                    shift, scale, limit, lift, margin, alpha,
                )  # fmt: skip
                e = tl.exp2(tl.where(keep, y - x[:, None], MASKED))
                pull = e * weight[:, None] * tl.fma(t, a[:, None], reference[:, None])
                rho += tl.sum(pull, 1)
                if KAPPA is not None:
                    to = (k * tiles_m + tile_m) * stride_columns + local
                    tl.store(KAPPA + to + tl.arange(0, W), tl.sum(pull, 0))
                if C is not None:
                    c = e * factor[:, None] * b[None, :]
                    tl.store(C + to_c + part * W + in_c, c.to(C.dtype.element_ty))
            tl.store(RHO + (k * tiles_n + tile_n) * stride_rows + rows, rho)
            to_c += stride_c
            k += 1
            boundary = tl.load(WIDTHS + k)
    if C is not None:
        # Other threads of this program wrote some of what this one reads.
        tl.debug_barrier()
        for part in tl.static_range(SUB):
            at = C + to_c - stride_c + part * W + in_c
            bar = tl.load(at).to(tl.float32)
            for _ in range(1, K):
                at -= stride_c
                bar += tl.load(at).to(tl.float32)
                tl.store(at, bar.to(C.dtype.element_ty))
