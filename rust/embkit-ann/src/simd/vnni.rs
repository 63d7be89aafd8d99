//! AVX-512 VNNI: 12 queries x 32 rows, 24 accumulators of 16 lanes, 4 products a lane and step.

use super::{Bars, Hits, MAX_MR, NR};
use std::arch::x86_64::{
    __m512i, _CMP_GT_OQ, _mm512_cmp_ps_mask, _mm512_cvtepi32_ps, _mm512_dpbusd_epi32,
    _mm512_loadu_ps, _mm512_loadu_si512, _mm512_mul_ps, _mm512_set1_epi32, _mm512_set1_ps,
    _mm512_storeu_ps,
};

pub(super) const MR: usize = 12;

#[target_feature(enable = "avx512f,avx512vnni")]
pub(super) fn tile(
    queries: &[[i8; 4]],
    start: &[i32; MAX_MR],
    panel: &[[u8; 4]],
    scale: &[f32; NR],
    bars: &Bars,
    hits: &mut Hits,
) {
    let (panel, _) = panel.as_chunks::<NR>();
    let depth = panel.len();
    assert!(queries.len() == MR * depth);
    let mut sum = [[_mm512_set1_epi32(0); 2]; MR];
    for i in 0..MR {
        sum[i] = [_mm512_set1_epi32(start[i]); 2];
    }
    for (k, p) in panel.iter().enumerate() {
        // SAFETY: `p` has 32 groups of 4 bytes; the loads cover 0..16 and 16..32.
        let (low, high) = unsafe {
            (_mm512_loadu_si512(p.as_ptr().cast()), _mm512_loadu_si512(p.as_ptr().add(16).cast()))
        };
        for (i, sum) in sum.iter_mut().enumerate() {
            // SAFETY: `i * depth + k` is less than `MR * depth`, the length of `queries`.
            let q = unsafe { *queries.get_unchecked(i * depth + k) };
            let a = _mm512_set1_epi32(i32::from_le_bytes(q.map(|v| v as u8)));
            sum[0] = _mm512_dpbusd_epi32(sum[0], low, a);
            sum[1] = _mm512_dpbusd_epi32(sum[1], high, a);
        }
    }
    for i in 0..MR {
        compare(sum[i], scale, bars[i], &mut hits.above[i], &mut hits.scores[i]);
    }
}

/// Scales a query's sums with 32 rows and compares them with its bar.
#[target_feature(enable = "avx512f")]
pub(super) fn compare(
    sums: [__m512i; 2],
    scale: &[f32; NR],
    bar: f32,
    above: &mut u32,
    scores: &mut [f32; NR],
) {
    // SAFETY: `scale` has 32 elements; the loads cover 0..16 and 16..32.
    let scale =
        unsafe { [_mm512_loadu_ps(scale.as_ptr()), _mm512_loadu_ps(scale.as_ptr().add(16))] };
    let bar = _mm512_set1_ps(bar);
    let low = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[0]), scale[0]);
    let high = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[1]), scale[1]);
    *above = u32::from(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(low, bar))
        | u32::from(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(high, bar)) << 16;
    if *above != 0 {
        // SAFETY: `scores` has 32 elements; the stores cover 0..16 and 16..32.
        unsafe {
            _mm512_storeu_ps(scores.as_mut_ptr(), low);
            _mm512_storeu_ps(scores.as_mut_ptr().add(16), high);
        }
    }
}
