//! AVX2 with FMA: 6 queries x 16 rows, 12 accumulators of 8 lanes.

use super::{MAX_MR, MAX_TILE};
use std::arch::x86_64::{
    _CMP_GT_OQ, _mm256_cmp_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_movemask_ps,
    _mm256_set1_ps, _mm256_setzero_ps, _mm256_storeu_ps,
};

const MR: usize = 6;
const NR: usize = 16;

#[target_feature(enable = "avx2,fma")]
pub(super) fn tile(
    queries: &[f32],
    panel: &[f32],
    least: &[f32; MAX_MR],
    scores: &mut [f32; MAX_TILE],
    above: &mut [u32; MAX_MR],
) {
    let (queries, _) = queries.as_chunks::<MR>();
    let (panel, _) = panel.as_chunks::<NR>();
    let mut sum = [[_mm256_setzero_ps(); 2]; MR];
    for (q, p) in queries.iter().zip(panel) {
        // SAFETY: `p` has 16 elements; the loads cover 0..8 and 8..16.
        let (low, high) =
            unsafe { (_mm256_loadu_ps(p.as_ptr()), _mm256_loadu_ps(p.as_ptr().add(8))) };
        for i in 0..MR {
            let a = _mm256_set1_ps(q[i]);
            sum[i][0] = _mm256_fmadd_ps(a, low, sum[i][0]);
            sum[i][1] = _mm256_fmadd_ps(a, high, sum[i][1]);
        }
    }
    let (rows, _) = scores.as_chunks_mut::<NR>();
    for (((sum, row), least), above) in sum.iter().zip(rows).zip(least).zip(above) {
        let least = _mm256_set1_ps(*least);
        let low = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(sum[0], least)) as u32;
        let high = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(sum[1], least)) as u32;
        *above = low | high << 8;
        if *above != 0 {
            // SAFETY: `row` has 16 elements; the stores cover 0..8 and 8..16.
            unsafe {
                _mm256_storeu_ps(row.as_mut_ptr(), sum[0]);
                _mm256_storeu_ps(row.as_mut_ptr().add(8), sum[1]);
            }
        }
    }
}
