# mypy: allow-untyped-defs, allow-incomplete-defs
"""After the GEMMs: positives, own hard negatives and the pull of the normalisation, in one write.

    out_r[d] = acc_r[d] + sum_e c_e(d) y_e[d] + sum_h c_rh(d) hard_rh[d] - eta_r(d) x_r[d]
    c(d) = sum of c^k over the widths d_k > d        eta_r(d) the same of (inverse^k_r)^2 pull^k_r

e runs over the pairs that row r takes part in, in a fixed order: its positives if it is a query,
the queries it is a positive of if it is a passage. Bytes bound: each row is read and written once.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["K"])
def finish_kernel(
    OUT, X, ACC, UNSCALE, WIDTHS, INVERSE, PULL,
    START, ENTRY, SOURCE, Y, PAIR_C, PAIR_PULL, HARD, HARD_C,
    K, width, stride_x, stride_k, stride_y, stride_e, stride_hard, stride_hard_c, each,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """OUT [R, width] from X, ACC (None: 0) and INVERSE, PULL [K, .] with stride_k between widths.

    Pairs (Y None: none): row r has START[r]:START[r + 1] (START None: r alone), which ENTRY (None:
    itself) maps to entries e of PAIR_C, PAIR_PULL [K, stride_e] and SOURCE (None: e // each) to
    rows of Y. HARD (None: none) [R, each, .] with HARD_C [K, R, each]. UNSCALE multiplies ACC.
    """
    row = tl.program_id(0)
    row_64 = row.to(tl.int64)
    depth = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = depth < width
    covered = tl.load(WIDTHS + K - 1)
    used = inside & (depth < covered)
    grad = tl.zeros((BLOCK,), tl.float32)
    if ACC is not None:
        grad = tl.load(ACC + row_64 * covered + depth, mask=used, other=0.0)
        if UNSCALE is not None:
            grad = grad * tl.load(UNSCALE)
    start, end = row, row + 1
    if START is not None:
        start = tl.load(START + row).to(tl.int32)
        end = tl.load(START + row + 1).to(tl.int32)
    eta = tl.zeros((BLOCK,), tl.float32)
    for k in range(K):
        inverse = tl.load(INVERSE + k * stride_k + row)
        pull = tl.load(PULL + k * stride_k + row)
        if PAIR_PULL is not None:
            for i in range(start, end):
                e = i
                if ENTRY is not None:
                    e = tl.load(ENTRY + i).to(tl.int32)
                pull += tl.load(PAIR_PULL + k * stride_e + e)
        eta += tl.where(depth < tl.load(WIDTHS + k), inverse * inverse * pull, 0.0)
    x = tl.load(X + row_64 * stride_x + depth, mask=used, other=0.0).to(tl.float32)
    grad -= eta * x
    if Y is not None:
        for i in range(start, end):
            e = i
            if ENTRY is not None:
                e = tl.load(ENTRY + i).to(tl.int32)
            source = e // each
            if SOURCE is not None:
                source = tl.load(SOURCE + e)
            c = tl.zeros((BLOCK,), tl.float32)
            for k in range(K):
                c_k = tl.load(PAIR_C + k * stride_e + e)
                c += tl.where(depth < tl.load(WIDTHS + k), c_k, 0.0)
            at = Y + source.to(tl.int64) * stride_y + depth
            grad += c * tl.load(at, mask=used, other=0.0).to(tl.float32)
    if HARD is not None:
        for h in range(each):
            e = row * each + h
            c = tl.zeros((BLOCK,), tl.float32)
            for k in range(K):
                c_k = tl.load(HARD_C + k * stride_hard_c + e)
                c += tl.where(depth < tl.load(WIDTHS + k), c_k, 0.0)
            at = HARD + e.to(tl.int64) * stride_hard + depth
            grad += c * tl.load(at, mask=used, other=0.0).to(tl.float32)
    tl.store(OUT + row_64 * width + depth, grad.to(OUT.dtype.element_ty), mask=inside)
