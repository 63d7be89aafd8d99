//! MinHash signatures folded into band keys: texts that agree in one band are worth comparing.
//!
//! Hash `k` of shingle `x` is `low32(x) * a_k + b_k` modulo 2^32 with odd `a_k`, a permutation of
//! the 32-bit values; the signature is its minimum over the text's shingles. Two texts of Jaccard
//! similarity `s` agree in one hash with probability `s`, in a band of `r` hashes with `s^r`, in at
//! least one of `b` bands with `1 - (1 - s^r)^b`. [`Bands::for_threshold`] inverts that.

use crate::simd;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Chance that a pair exactly at the threshold meets in no band; pairs above it miss less often.
const MISS: f64 = 0.006;
/// Hashes per text we are willing to pay for selectivity.
const BUDGET: usize = 112;
/// Bands at most: below a threshold of about 0.004 the promise of [`MISS`] ends here.
const MAX_BANDS: usize = 1024;
const MAX_ROWS: usize = 16;

/// How a signature is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bands {
    /// Number of bands; each gives a text one key.
    pub bands: usize,
    /// Hashes per band.
    pub rows: usize,
}

impl Bands {
    /// The most selective bands (most rows) within the budget of hashes whose recall at
    /// `threshold` (in `(0, 1]`) is at least 0.994.
    pub fn for_threshold(threshold: f64) -> Self {
        let needed = |rows: usize| {
            let agree = threshold.powi(rows as i32);
            // ln_1p: exact for the tiny chances of low thresholds. At 1 this is ln(0): one band.
            (MISS.ln() / (-agree).ln_1p()).ceil().max(1.0) as usize
        };
        (1..=MAX_ROWS)
            .rev()
            .map(|rows| Bands { bands: needed(rows), rows })
            .find(|b| b.bands.saturating_mul(b.rows) <= BUDGET)
            .unwrap_or(Bands { bands: needed(1).min(MAX_BANDS), rows: 1 })
    }

    /// Chance that two texts of similarity `s` share a key.
    pub fn recall(&self, s: f64) -> f64 {
        1.0 - (1.0 - s.powi(self.rows as i32)).powi(self.bands as i32)
    }
}

/// Turns shingle sets into band keys; one per thread.
pub(crate) struct Signer {
    bands: Bands,
    multiply: Vec<u32>,
    add: Vec<u32>,
    minimum: Vec<u32>,
}

impl Signer {
    /// A signer whose hash functions depend on `seed` only.
    pub fn new(bands: Bands, seed: u64) -> Self {
        // Whole SIMD registers; the surplus hashes are computed and not read.
        let lanes = (bands.bands * bands.rows).next_multiple_of(simd::LANES);
        let draw =
            |k: usize, what: u8| xxh3_64_with_seed(&[&[what], &k.to_le_bytes()[..]].concat(), seed);
        Self {
            bands,
            multiply: (0..lanes).map(|k| draw(k, 0) as u32 | 1).collect(),
            add: (0..lanes).map(|k| draw(k, 1) as u32).collect(),
            minimum: vec![u32::MAX; lanes],
        }
    }

    /// Appends one key per band for the set `shingles` (repeats do not matter).
    ///
    /// 32 bits: among n texts a band makes n^2 / 2^33 pairs meet by accident, and they are verified.
    pub fn keys(&mut self, shingles: &[u64], out: &mut Vec<u32>) {
        self.minimum.fill(u32::MAX);
        simd::minhash(shingles, &self.multiply, &self.add, &mut self.minimum);
        for band in self.minimum.chunks_exact(self.bands.rows).take(self.bands.bands) {
            let hash = band.iter().fold(0u64, |hash, &m| {
                (hash ^ hash >> 29 ^ u64::from(m)).wrapping_mul(0x9E6C_63D0_876A_46CD)
            });
            out.push(((hash ^ hash >> 29).wrapping_mul(0xD6E8_FEB8_6659_FD93) >> 32) as u32);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use xxhash_rust::xxh3::xxh3_64;

    #[test]
    fn bands_keep_their_recall_at_every_threshold() {
        for percent in 1..=100 {
            let threshold = f64::from(percent) / 100.0;
            let bands = Bands::for_threshold(threshold);
            assert!(bands.recall(threshold) >= 0.98, "{threshold} {bands:?}");
            assert!(bands.bands <= MAX_BANDS && bands.rows <= MAX_ROWS);
        }
        assert_eq!(Bands::for_threshold(0.8), Bands { bands: 17, rows: 6 });
        assert_eq!(Bands::for_threshold(1.0), Bands { bands: 1, rows: MAX_ROWS });
    }

    #[test]
    fn agreement_estimates_jaccard() {
        // 400 pairs of 60 shingles that share 40 (Jaccard 0.5), 96 hashes: the mean over 38,400
        // agreements has a standard deviation of 0.0026 (correlations of the linear hashes aside).
        let bands = Bands { bands: 96, rows: 1 };
        let mut signer = Signer::new(bands, 7);
        let (mut same, mut all) = (0usize, 0usize);
        for pair in 0..400u64 {
            let set = |from: u64| -> Vec<u64> {
                (from..from + 60).map(|i| xxh3_64(&(pair * 1000 + i).to_le_bytes())).collect()
            };
            let (mut a, mut b) = (Vec::new(), Vec::new());
            signer.keys(&set(0), &mut a);
            signer.keys(&set(20), &mut b);
            same += a.iter().zip(&b).filter(|(x, y)| x == y).count();
            all += a.len();
        }
        let rate = same as f64 / all as f64;
        assert!((rate - 0.5).abs() < 0.02, "{rate}");
    }
}
