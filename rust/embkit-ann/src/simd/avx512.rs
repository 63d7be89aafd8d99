//! AVX-512F: 12 queries x 32 rows, 24 accumulators of 16 lanes.

use super::{Bars, Hits, NR};
use std::arch::x86_64::{
    _CMP_GT_OQ, _mm512_cmp_ps_mask, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_set1_ps,
    _mm512_setzero_ps, _mm512_storeu_ps,
};

pub(super) const MR: usize = 12;

#[target_feature(enable = "avx512f")]
pub(super) fn tile(queries: &[f32], panel: &[f32], bars: &Bars, hits: &mut Hits) {
    let (queries, _) = queries.as_chunks::<MR>();
    let (panel, _) = panel.as_chunks::<NR>();
    let mut sum = [[_mm512_setzero_ps(); 2]; MR];
    for (q, p) in queries.iter().zip(panel) {
        // SAFETY: `p` has 32 elements; the loads cover 0..16 and 16..32.
        let (low, high) =
            unsafe { (_mm512_loadu_ps(p.as_ptr()), _mm512_loadu_ps(p.as_ptr().add(16))) };
        for i in 0..MR {
            let a = _mm512_set1_ps(q[i]);
            sum[i][0] = _mm512_fmadd_ps(a, low, sum[i][0]);
            sum[i][1] = _mm512_fmadd_ps(a, high, sum[i][1]);
        }
    }
    for i in 0..MR {
        let bar = _mm512_set1_ps(bars[i]);
        let low = u32::from(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(sum[i][0], bar));
        let high = u32::from(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(sum[i][1], bar));
        hits.above[i] = low | high << 16;
        if hits.above[i] != 0 {
            let row = &mut hits.scores[i];
            // SAFETY: `row` has 32 elements; the stores cover 0..16 and 16..32.
            unsafe {
                _mm512_storeu_ps(row.as_mut_ptr(), sum[i][0]);
                _mm512_storeu_ps(row.as_mut_ptr().add(16), sum[i][1]);
            }
        }
    }
}
