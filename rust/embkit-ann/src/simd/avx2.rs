//! AVX2 with FMA: 6 queries x 16 rows at a time, 12 accumulators of 8 lanes.

use super::{Bars, Hits, NR};
use std::arch::x86_64::{
    _CMP_GT_OQ, _mm256_cmp_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_movemask_ps,
    _mm256_set1_ps, _mm256_setzero_ps, _mm256_storeu_ps,
};

pub(super) const MR: usize = 6;

#[target_feature(enable = "avx2,fma")]
pub(super) fn tile(queries: &[f32], panel: &[f32], bars: &Bars, hits: &mut Hits) {
    let (queries, _) = queries.as_chunks::<MR>();
    let (panel, _) = panel.as_chunks::<NR>();
    hits.above = [0; _];
    for half in 0..2 {
        let mut sum = [[_mm256_setzero_ps(); 2]; MR];
        for (q, p) in queries.iter().zip(panel) {
            let p = &p[half * 16..][..16];
            // SAFETY: `p` has 16 elements; the loads cover 0..8 and 8..16.
            let (low, high) =
                unsafe { (_mm256_loadu_ps(p.as_ptr()), _mm256_loadu_ps(p.as_ptr().add(8))) };
            for i in 0..MR {
                let a = _mm256_set1_ps(q[i]);
                sum[i][0] = _mm256_fmadd_ps(a, low, sum[i][0]);
                sum[i][1] = _mm256_fmadd_ps(a, high, sum[i][1]);
            }
        }
        for i in 0..MR {
            let bar = _mm256_set1_ps(bars[i]);
            let low = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(sum[i][0], bar)) as u32;
            let high = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(sum[i][1], bar)) as u32;
            let above = low | high << 8;
            hits.above[i] |= above << (half * 16);
            if above != 0 {
                let row = &mut hits.scores[i][half * 16..][..16];
                // SAFETY: `row` has 16 elements; the stores cover 0..8 and 8..16.
                unsafe {
                    _mm256_storeu_ps(row.as_mut_ptr(), sum[i][0]);
                    _mm256_storeu_ps(row.as_mut_ptr().add(8), sum[i][1]);
                }
            }
        }
    }
}
