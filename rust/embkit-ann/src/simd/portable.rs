//! Plain Rust: 4 queries x 8 rows, in a shape that compilers vectorise.

use super::{MAX_MR, MAX_TILE};

const MR: usize = 4;
const NR: usize = 8;

pub(super) fn tile(
    queries: &[f32],
    panel: &[f32],
    least: &[f32; MAX_MR],
    scores: &mut [f32; MAX_TILE],
    above: &mut [u32; MAX_MR],
) {
    let (queries, _) = queries.as_chunks::<MR>();
    let (panel, _) = panel.as_chunks::<NR>();
    let mut sum = [[0f32; NR]; MR];
    for (q, p) in queries.iter().zip(panel) {
        for i in 0..MR {
            for j in 0..NR {
                // Not `mul_add`: without an FMA instruction that is a library call per element.
                sum[i][j] += q[i] * p[j];
            }
        }
    }
    let (rows, _) = scores.as_chunks_mut::<NR>();
    for (((sum, row), least), above) in sum.iter().zip(rows).zip(least).zip(above) {
        *row = *sum;
        *above = row.iter().enumerate().fold(0, |bits, (j, s)| bits | u32::from(s > least) << j);
    }
}
