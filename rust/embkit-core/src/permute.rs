//! Order as a function: a keyed bijection on `[0, n)` with O(1) access and no table.
//!
//! A Feistel network over `b = ceil(log2 n)` bits, walked until the value falls inside `[0, n)`
//! (fewer than two steps on average, because `2^b < 2n`). The halves may differ by one bit and swap
//! widths each round; an even number of rounds brings them back. `docs/formats.md` has the same
//! thing in numpy, and the test there compares the two.

const ROUNDS: usize = 8;
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// The finaliser of SplitMix64.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// A keyed permutation of `[0, n)`.
#[derive(Clone, Debug)]
pub struct Feistel {
    n: u64,
    left: u32,
    right: u32,
    keys: [u64; ROUNDS],
}

impl Feistel {
    /// The permutation of `[0, n)` that belongs to `key`.
    pub fn new(n: u64, key: u64) -> Feistel {
        let bits = 64 - n.saturating_sub(1).leading_zeros();
        let mut keys = [0; ROUNDS];
        for (i, k) in (1u64..).zip(keys.iter_mut()) {
            *k = mix(key.wrapping_add(GOLDEN.wrapping_mul(i)));
        }
        Feistel { n, left: bits / 2, right: bits - bits / 2, keys }
    }

    /// Number of positions.
    pub fn n(&self) -> u64 {
        self.n
    }

    /// Where position `i` goes.
    ///
    /// # Panics
    /// When `i >= n`: there is no such position, and walking from outside could come back never.
    pub fn get(&self, i: u64) -> u64 {
        assert!(i < self.n, "position {i} of a permutation of {}", self.n);
        let mut x = i;
        loop {
            x = self.once(x);
            if x < self.n {
                return x;
            }
        }
    }

    /// Where positions `start .. start + count` go.
    ///
    /// # Panics
    /// When a position is not below `n`.
    pub fn range(&self, start: u64, count: u64) -> Vec<u64> {
        let end = start.checked_add(count).filter(|end| *end <= self.n);
        assert!(end.is_some(), "positions {start} + {count} of a permutation of {}", self.n);
        let mut out: Vec<u64> = (start..start + count).map(|i| self.once(i)).collect();
        // In most cases few are outside: the first round is one straight loop over all.
        for x in &mut out {
            while *x >= self.n {
                *x = self.once(*x);
            }
        }
        out
    }

    fn once(&self, x: u64) -> u64 {
        let (mut wl, mut wr) = (self.left, self.right);
        let mut l = x >> wr; // wr <= 32
        let mut r = x & ((1 << wr) - 1);
        for k in self.keys {
            let f = mix(r ^ k) & ((1 << wl) - 1);
            (l, r) = (r, l ^ f);
            (wl, wr) = (wr, wl);
        }
        (l << wr) | r
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_small_n_is_a_bijection() {
        for n in (0..600).chain([1023, 1024, 1025, 65_537]) {
            for key in [0, 1, u64::MAX] {
                let p = Feistel::new(n, key);
                let mut seen = vec![false; n as usize];
                for i in 0..n {
                    let j = p.get(i) as usize;
                    assert!(!seen[j], "n {n} key {key}: {j} twice");
                    seen[j] = true;
                }
            }
        }
    }

    #[test]
    fn huge_n_stays_inside_and_distinct() {
        for n in [u64::MAX, 1 << 63, (1 << 63) + 1, (1 << 33) - 7] {
            let p = Feistel::new(n, 7);
            let mut seen = std::collections::HashSet::new();
            for i in (0..1000).map(|i| n / 1000 * i).chain(n - 10..n) {
                let j = p.get(i);
                assert!(j < n && seen.insert(j));
            }
        }
    }

    #[test]
    fn first_values_are_frozen() {
        let got: Vec<u64> = (0..10).map(|i| Feistel::new(10, 42).get(i)).collect();
        assert_eq!(got, GOLDEN_10_42, "the order of every training run would change");
    }
    // From an independent implementation in plain Python integers.
    const GOLDEN_10_42: [u64; 10] = [2, 9, 1, 5, 3, 7, 0, 4, 8, 6];

    /// Every position goes everywhere about equally often, for a size whose halves differ.
    #[test]
    fn positions_are_uniform_over_keys() {
        const N: usize = 23;
        const KEYS: u64 = 23_000;
        let mut counts = vec![0u64; N * N];
        for key in 0..KEYS {
            let p = Feistel::new(N as u64, key);
            for i in 0..N {
                counts[i * N + p.get(i as u64) as usize] += 1;
            }
        }
        let mean = KEYS as f64 / N as f64;
        let chi2: f64 = counts.iter().map(|&c| (c as f64 - mean).powi(2) / mean).sum();
        // 22 * 22 = 484 degrees of freedom: sd 31; six of them leaves no room for chance.
        assert!((chi2 - 484.0).abs() < 190.0, "chi2 {chi2}");
    }

    #[test]
    #[should_panic(expected = "position 5 of a permutation of 5")]
    fn outside_panics() {
        Feistel::new(5, 0).get(5);
    }
}
