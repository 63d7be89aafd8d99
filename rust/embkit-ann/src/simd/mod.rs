//! One tile of scores: `mr` queries against `nr` corpus rows, compared before they leave registers.
//!
//! Queries and rows come packed "k-major": element `k` of all the tile's vectors lies together.
//! Every score is one chain of fused multiply-adds over `k` in ascending order (multiply, then add
//! in the portable form), so it depends on the two vectors alone: not on the place in the tile, the
//! block sizes or the threads. The FMA forms agree with each other bit for bit.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;

/// Largest `mr` and `mr * nr` of any form.
pub(crate) const MAX_MR: usize = 12;
pub(crate) const MAX_TILE: usize = 12 * 32;

/// An instruction set that the tile is written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Isa {
    /// AVX-512F, tiles of 12 x 32.
    Avx512,
    /// AVX2 and FMA, tiles of 6 x 16.
    Avx2,
    /// AArch64 NEON, tiles of 6 x 16.
    Neon,
    /// Plain Rust, tiles of 4 x 8.
    Portable,
}

impl Isa {
    /// What this machine can run, fastest first.
    pub fn available() -> Vec<Isa> {
        let mut all = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if std::arch::is_x86_feature_detected!("avx512f") {
                all.push(Isa::Avx512);
            }
            if std::arch::is_x86_feature_detected!("avx2")
                && std::arch::is_x86_feature_detected!("fma")
            {
                all.push(Isa::Avx2);
            }
        }
        #[cfg(target_arch = "aarch64")]
        all.push(Isa::Neon); // part of every AArch64 target Rust has a standard library for
        all.push(Isa::Portable);
        all
    }

    /// The fastest that this machine can run.
    pub fn best() -> Isa {
        Isa::available().first().copied().unwrap_or(Isa::Portable)
    }

    /// Queries per tile.
    pub(crate) fn mr(self) -> usize {
        match self {
            Isa::Avx512 => 12,
            Isa::Avx2 | Isa::Neon => 6,
            Isa::Portable => 4,
        }
    }

    /// Corpus rows per tile, at most 32.
    pub(crate) fn nr(self) -> usize {
        match self {
            Isa::Avx512 => 32,
            Isa::Avx2 | Isa::Neon => 16,
            Isa::Portable => 8,
        }
    }
}

/// Scores one tile. Bit `j` of `above[i]` says that the score of query `i` and row `j` exceeds
/// `least[i]`; `scores[i * nr + j]` is written for every query with any such bit.
///
/// `queries` holds `d` groups of `mr` values, `panel` `d` groups of `nr`.
///
/// # Panics
/// When `isa` is not in [`Isa::available`].
pub(crate) fn tile(
    isa: Isa,
    queries: &[f32],
    panel: &[f32],
    least: &[f32; MAX_MR],
    scores: &mut [f32; MAX_TILE],
    above: &mut [u32; MAX_MR],
) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => {
            // The macro caches: this is one load and a branch that is always predicted.
            assert!(std::arch::is_x86_feature_detected!("avx512f"));
            // SAFETY: AVX-512F was just detected.
            unsafe { avx512::tile(queries, panel, least, scores, above) }
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => {
            assert!(std::arch::is_x86_feature_detected!("avx2"));
            assert!(std::arch::is_x86_feature_detected!("fma"));
            // SAFETY: AVX2 and FMA were just detected.
            unsafe { avx2::tile(queries, panel, least, scores, above) }
        }
        #[cfg(target_arch = "aarch64")]
        // SAFETY: NEON is part of the AArch64 baseline.
        Isa::Neon => unsafe { neon::tile(queries, panel, least, scores, above) },
        Isa::Portable => portable::tile(queries, panel, least, scores, above),
        #[allow(unreachable_patterns)]
        _ => panic!("{isa:?} does not exist on this architecture"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_matches_the_scalar_chain() {
        for isa in Isa::available() {
            let (mr, nr) = (isa.mr(), isa.nr());
            for d in [1usize, 2, 3, 17, 129, 384] {
                let value = |i: usize| ((i * 7919 + 13) % 1000) as f32 / 250.0 - 2.0;
                let queries: Vec<f32> = (0..d * mr).map(value).collect();
                let panel: Vec<f32> = (0..d * nr).map(|i| value(i + 5)).collect();
                let mut want = vec![0f32; mr * nr];
                for i in 0..mr {
                    for j in 0..nr {
                        want[i * nr + j] = (0..d).fold(0f32, |sum, k| {
                            let (q, p) = (queries[k * mr + i], panel[k * nr + j]);
                            if isa == Isa::Portable { sum + q * p } else { q.mul_add(p, sum) }
                        });
                    }
                }
                // Query 0 keeps all, 1 none, the rest what exceeds their own third score.
                let mut least = [f32::NEG_INFINITY; MAX_MR];
                for i in 1..mr {
                    least[i] = if i == 1 { f32::INFINITY } else { want[i * nr + 2] };
                }
                let (mut scores, mut above) = ([7f32; MAX_TILE], [9u32; MAX_MR]);
                tile(isa, &queries, &panel, &least, &mut scores, &mut above);
                for i in 0..mr {
                    let row = &want[i * nr..][..nr];
                    let bits = (0..nr).fold(0u32, |b, j| b | u32::from(row[j] > least[i]) << j);
                    assert_eq!(above[i], bits, "{isa:?} d={d} query {i}");
                    if bits != 0 {
                        assert_eq!(&scores[i * nr..][..nr], row, "{isa:?} d={d} query {i}");
                    }
                }
            }
        }
    }
}
