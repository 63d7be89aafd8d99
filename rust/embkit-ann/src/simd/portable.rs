//! Plain Rust: 4 queries x 32 rows, in shapes that compilers vectorise.

use super::{Bars, Hits, MAX_MR, NR, above};

pub(super) const MR: usize = 4;

pub(super) fn tile(queries: &[f32], panel: &[f32], bars: &Bars, hits: &mut Hits) {
    let (queries, _) = queries.as_chunks::<MR>();
    let (panel, _) = panel.as_chunks::<NR>();
    for i in 0..MR {
        let mut sum = [0f32; NR];
        for (q, p) in queries.iter().zip(panel) {
            // Not `mul_add`: without an FMA instruction that is a library call per element.
            (0..NR).for_each(|j| sum[j] += q[i] * p[j]);
        }
        hits.scores[i] = sum;
    }
    above(bars, hits, MR);
}

pub(super) fn int8_tile(
    queries: &[[i8; 4]],
    start: &[i32; MAX_MR],
    panel: &[[u8; 4]],
    scale: &[f32; NR],
    bars: &Bars,
    hits: &mut Hits,
) {
    let (panel, _) = panel.as_chunks::<NR>();
    for (i, query) in queries.chunks_exact(panel.len()).enumerate() {
        let mut sum = [start[i]; NR];
        for (q, p) in query.iter().zip(panel) {
            for (sum, p) in sum.iter_mut().zip(p) {
                *sum += q.iter().zip(p).map(|(q, p)| i32::from(*q) * i32::from(*p)).sum::<i32>();
            }
        }
        (0..NR).for_each(|j| hits.scores[i][j] = sum[j] as f32 * scale[j]);
    }
    above(bars, hits, MR);
}
