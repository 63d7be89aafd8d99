//! AArch64 NEON: 6 queries x 16 rows, 24 accumulators of 4 lanes.

use super::{MAX_MR, MAX_TILE};
use std::arch::aarch64::{vdupq_n_f32, vfmaq_n_f32, vld1q_f32, vst1q_f32};

const MR: usize = 6;
const NR: usize = 16;

#[target_feature(enable = "neon")]
pub(super) fn tile(
    queries: &[f32],
    panel: &[f32],
    least: &[f32; MAX_MR],
    scores: &mut [f32; MAX_TILE],
    above: &mut [u32; MAX_MR],
) {
    let (queries, _) = queries.as_chunks::<MR>();
    let (panel, _) = panel.as_chunks::<NR>();
    let mut sum = [[vdupq_n_f32(0.0); NR / 4]; MR];
    for (q, p) in queries.iter().zip(panel) {
        let (quads, _) = p.as_chunks::<4>();
        for (j, quad) in quads.iter().enumerate() {
            // SAFETY: `quad` has the 4 elements that are loaded.
            let b = unsafe { vld1q_f32(quad.as_ptr()) };
            for i in 0..MR {
                sum[i][j] = vfmaq_n_f32(sum[i][j], b, q[i]);
            }
        }
    }
    let (rows, _) = scores.as_chunks_mut::<NR>();
    for (((sum, row), least), above) in sum.iter().zip(rows).zip(least).zip(above) {
        let (quads, _) = row.as_chunks_mut::<4>();
        for (quad, sum) in quads.iter_mut().zip(sum) {
            // SAFETY: `quad` has the 4 elements that are stored.
            unsafe { vst1q_f32(quad.as_mut_ptr(), *sum) };
        }
        *above = row.iter().enumerate().fold(0, |bits, (j, s)| bits | u32::from(s > least) << j);
    }
}
