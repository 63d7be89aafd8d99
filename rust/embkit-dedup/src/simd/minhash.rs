//! Minima of linear hashes, the inner loop of MinHash.
//!
//! The loop is written once, in plain Rust; `unsafe` is only the call of a copy compiled for more
//! features than the baseline, after those features were detected. Integers: every copy returns
//! the same bits.

/// Lanes are padded to this many, a whole number of registers of any width.
pub(crate) const LANES: usize = 16;

/// `minimum[k] = min(minimum[k], low32(x) * multiply[k] + add[k])` over all `x` in `shingles`.
pub(crate) fn minhash(shingles: &[u64], multiply: &[u32], add: &[u32], minimum: &mut [u32]) {
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx512f") {
            // SAFETY: the features this copy was compiled for were just detected.
            return unsafe { minhash_avx512(shingles, multiply, add, minimum) };
        }
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: as above.
            return unsafe { minhash_avx2(shingles, multiply, add, minimum) };
        }
    }
    minhash_any(shingles, multiply, add, minimum);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn minhash_avx512(shingles: &[u64], multiply: &[u32], add: &[u32], minimum: &mut [u32]) {
    minhash_any(shingles, multiply, add, minimum);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn minhash_avx2(shingles: &[u64], multiply: &[u32], add: &[u32], minimum: &mut [u32]) {
    minhash_any(shingles, multiply, add, minimum);
}

#[inline(always)]
fn minhash_any(shingles: &[u64], multiply: &[u32], add: &[u32], minimum: &mut [u32]) {
    let (multiply, _) = multiply.as_chunks::<LANES>();
    let (add, _) = add.as_chunks::<LANES>();
    let (minimum, _) = minimum.as_chunks_mut::<LANES>();
    for ((a, b), m) in multiply.iter().zip(add).zip(minimum) {
        // One register of lanes stays put while the shingles pass by.
        let mut low = *m;
        for &x in shingles {
            let x = x as u32;
            for k in 0..LANES {
                low[k] = low[k].min(x.wrapping_mul(a[k]).wrapping_add(b[k]));
            }
        }
        *m = low;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_copy_matches_the_scalar_definition() {
        for (n, lanes) in [(0usize, 16usize), (1, 16), (2, 48), (127, 96), (1000, 32)] {
            let shingles: Vec<u64> =
                (0..n as u64).map(|i| (i + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15)).collect();
            let multiply: Vec<u32> =
                (0..lanes as u32).map(|k| k.wrapping_mul(2_654_435_769) | 1).collect();
            let add: Vec<u32> = (0..lanes as u32).map(|k| k.wrapping_mul(40_503)).collect();
            let want: Vec<u32> = (0..lanes)
                .map(|k| {
                    let hash = |&x: &u64| (x as u32).wrapping_mul(multiply[k]).wrapping_add(add[k]);
                    shingles.iter().map(hash).min().unwrap_or(u32::MAX)
                })
                .collect();
            for copy in [minhash, minhash_any] {
                let mut got = vec![u32::MAX; lanes];
                copy(&shingles, &multiply, &add, &mut got);
                assert_eq!(got, want);
            }
        }
    }
}
