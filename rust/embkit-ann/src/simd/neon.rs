//! AArch64 NEON: 6 queries x 16 rows at a time, 24 accumulators of 4 lanes.

use super::{Bars, Hits, NR, above};
use std::arch::aarch64::{vdupq_n_f32, vfmaq_n_f32, vld1q_f32, vst1q_f32};

pub(super) const MR: usize = 6;

#[target_feature(enable = "neon")]
pub(super) fn tile(queries: &[f32], panel: &[f32], bars: &Bars, hits: &mut Hits) {
    let (queries, _) = queries.as_chunks::<MR>();
    let (panel, _) = panel.as_chunks::<NR>();
    for half in 0..2 {
        let mut sum = [[vdupq_n_f32(0.0); 4]; MR];
        for (q, p) in queries.iter().zip(panel) {
            let (quads, _) = p[half * 16..][..16].as_chunks::<4>();
            for (j, quad) in quads.iter().enumerate() {
                // SAFETY: `quad` has the 4 elements that are loaded.
                let b = unsafe { vld1q_f32(quad.as_ptr()) };
                for i in 0..MR {
                    sum[i][j] = vfmaq_n_f32(sum[i][j], b, q[i]);
                }
            }
        }
        for (sum, row) in sum.iter().zip(&mut hits.scores) {
            let (quads, _) = row[half * 16..][..16].as_chunks_mut::<4>();
            for (quad, sum) in quads.iter_mut().zip(sum) {
                // SAFETY: `quad` has the 4 elements that are stored.
                unsafe { vst1q_f32(quad.as_mut_ptr(), *sum) };
            }
        }
    }
    above(bars, hits, MR);
}
