//! Texts as sets of hashed n-grams, and the exact Jaccard similarity of two such sets.
//!
//! A shingle is `n` successive units of the normalised text: words (default 3) or characters
//! (default 5). Each unit is hashed once to 64 bits and the shingle's hash is a polynomial of theirs,
//! mixed. A text with fewer units than `n` is one shingle of its whole normalised form, punctuation
//! included, so that "a?" and "a!" are different short texts; an empty text has none.

use crate::normalize::{Unit, continues_word, is_word_char, normalize_into, unit_of};
use crate::simd;
use embkit_core::{Error, Result};
use xxhash_rust::xxh3::xxh3_64;

/// Units per shingle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShingleParams {
    /// Words per shingle, at least 1.
    pub words: usize,
    /// Characters per shingle in texts of scripts without spaces, at least 1.
    pub chars: usize,
}

impl Default for ShingleParams {
    fn default() -> Self {
        Self { words: 3, chars: 5 }
    }
}

impl ShingleParams {
    /// Refuses a shingle of nothing.
    pub fn check(&self) -> Result<()> {
        if self.words == 0 || self.chars == 0 {
            return Err(Error::usage(
                format!("shingles of {} words or {} characters", self.words, self.chars),
                "Use at least 1 of each (defaults: 3 words, 5 characters)",
            ));
        }
        Ok(())
    }
}

/// Reusable buffers that turn texts into shingle sets.
pub struct Shingler {
    params: ShingleParams,
    norm: Vec<u8>,
    units: Vec<u64>,
}

impl Shingler {
    /// A shingler for one thread.
    pub fn new(params: ShingleParams) -> Self {
        Self { params, norm: Vec::new(), units: Vec::new() }
    }

    /// Fills `out` with the sorted, distinct shingles of `text`; returns the normalised bytes.
    pub fn shingles(&mut self, text: &str, out: &mut Vec<u64>) -> &[u8] {
        self.in_order(text, out);
        out.sort_unstable();
        out.dedup();
        &self.norm
    }

    /// As [`Shingler::shingles`], but in the order of the text and with repeats.
    pub(crate) fn in_order(&mut self, text: &str, out: &mut Vec<u64>) -> &[u8] {
        out.clear();
        normalize_into(text, &mut self.norm);
        if self.norm.is_empty() {
            return &self.norm;
        }
        let n = self.split();
        if self.units.len() < n {
            out.push(xxh3_64(&self.norm));
            return &self.norm;
        }
        let step = |hash: u64, unit: u64| hash.wrapping_mul(BASE).wrapping_add(unit);
        let hash = |gram: &[u64]| mix(gram.iter().fold(0, |hash, unit| step(hash, *unit)));
        if n == 3 {
            out.extend(self.units.windows(3).map(hash)); // the default, unrolled by the compiler
        } else {
            out.extend(self.units.windows(n).map(hash));
        }
        &self.norm
    }

    /// Hashes the units of `norm` into `units`; returns the n of this text's unit.
    fn split(&mut self) -> usize {
        self.units.clear();
        let Ok(norm) = std::str::from_utf8(&self.norm) else { return self.params.words };
        if unit_of(norm) == Unit::Char {
            let mut utf8 = [0u8; 4];
            for c in norm.chars().filter(|&c| is_word_char(c)) {
                let bytes = c.encode_utf8(&mut utf8).as_bytes();
                self.units.push(unit_hash(bytes, 0, bytes.len()));
            }
            return self.params.chars;
        }
        let units = &mut self.units;
        for_each_word(norm, |from, to| units.push(unit_hash(norm.as_bytes(), from, to)));
        self.params.words
    }
}

/// An odd number of random bits, the base of the polynomials.
const BASE: u64 = 0x9E6C_63D0_876A_46CD;

/// Spreads every bit over all: the polynomial leaves patterns in the low bits, which MinHash reads.
fn mix(hash: u64) -> u64 {
    let hash = (hash ^ hash >> 32).wrapping_mul(0xD6E8_FEB8_6659_FD93);
    hash ^ hash >> 32
}

/// 64-bit hash of `text[from..to]`: short units (nearly all) cost one multiplication.
#[inline]
fn unit_hash(text: &[u8], from: usize, to: usize) -> u64 {
    let len = to - from;
    if len > 16 {
        return xxh3_64(&text[from..to]);
    }
    let whole = match text.get(from..from + 16) {
        // Read past the end of the unit and cut the surplus off.
        Some(bytes) => bytes.try_into().map_or(0, u128::from_le_bytes),
        None => {
            let mut bytes = [0; 16];
            bytes[..len].copy_from_slice(&text[from..to]);
            u128::from_le_bytes(bytes)
        }
    };
    let kept = whole & u128::MAX.checked_shr(8 * (16 - len as u32)).unwrap_or(0);
    let (low, high) =
        (kept as u64 ^ BASE, (kept >> 64) as u64 ^ 0xA076_1D64_78BD_642F ^ len as u64);
    let product = u128::from(low) * u128::from(high);
    // The operands come in again: a factor of zero must not swallow the other.
    (product as u64 ^ (product >> 64) as u64).wrapping_add(low).wrapping_add(high.rotate_left(32))
}

/// Calls `f(start, end)` with the byte span of each word of `text`.
#[inline]
pub(crate) fn for_each_word(text: &str, mut f: impl FnMut(usize, usize)) {
    if text.is_ascii() {
        return for_each_ascii_word(text.as_bytes(), f);
    }
    let mut start = None;
    for (at, c) in text.char_indices() {
        match start {
            None if is_word_char(c) => start = Some(at),
            Some(from) if !continues_word(c) => {
                f(from, at);
                start = None;
            }
            _ => {}
        }
    }
    if let Some(from) = start {
        f(from, text.len());
    }
}

/// The ASCII part of [`for_each_word`]: finds where runs of word bytes begin and end, 64 at a time.
#[inline]
fn for_each_ascii_word(text: &[u8], mut f: impl FnMut(usize, usize)) {
    let mut word = |mut from: usize, to: usize| {
        while from < to && matches!(text[from], b'+' | b'#') {
            from += 1; // these continue a word and begin none
        }
        if from < to {
            f(from, to);
        }
    };
    let mut masks = [0; simd::BLOCK / 64];
    let (mut open, mut before) = (None, 0);
    for (block, bytes) in text.chunks(simd::BLOCK).enumerate() {
        for (i, &mask) in simd::word_masks(bytes, &mut masks).iter().enumerate() {
            let mut edges = mask ^ (mask << 1 | before);
            before = mask >> 63;
            while edges != 0 {
                let at = block * simd::BLOCK + 64 * i + edges.trailing_zeros() as usize;
                edges &= edges - 1;
                match open.take() {
                    Some(from) => word(from, at),
                    None => open = Some(at),
                }
            }
        }
    }
    if let Some(from) = open {
        word(from, text.len());
    }
}

/// The sorted, distinct shingle hashes of one text.
pub fn shingles(text: &str, params: ShingleParams) -> Vec<u64> {
    let mut out = Vec::new();
    Shingler::new(params).shingles(text, &mut out);
    out
}

/// Jaccard similarity of two sorted, distinct lists: shared / all; 0 when both are empty.
///
/// ```
/// assert_eq!(embkit_dedup::jaccard(&[1, 2, 3], &[2, 3, 4]), 0.5);
/// ```
pub fn jaccard(a: &[u64], b: &[u64]) -> f64 {
    let (mut i, mut j, mut shared) = (0, 0, 0usize);
    while let (Some(x), Some(y)) = (a.get(i), b.get(j)) {
        // Branch-free steps: which side is smaller is a coin toss.
        shared += usize::from(x == y);
        i += usize::from(x <= y);
        j += usize::from(y <= x);
    }
    let all = a.len() + b.len() - shared;
    if all == 0 { 0.0 } else { shared as f64 / all as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn short_texts_are_one_shingle_of_the_whole() {
        let p = ShingleParams::default();
        assert_eq!(shingles("", p), Vec::<u64>::new());
        assert_eq!(shingles("two words", p).len(), 1);
        assert_ne!(shingles("two words?", p), shingles("two words!", p));
        assert_eq!(shingles("???", p).len(), 1);
        assert_eq!(shingles("Now, three words", p), shingles("now three WORDS!", p));
        assert_ne!(shingles("the c library", p), shingles("the c++ library", p));
    }

    #[test]
    fn scripts_without_spaces_use_characters() {
        let p = ShingleParams::default();
        assert_eq!(shingles("軟體開發套件", p).len(), 2);
        assert_eq!(shingles("軟體 開發，套件。", p), shingles("軟體開發套件", p));
    }

    #[test]
    fn units_hash_by_their_bytes_alone() {
        let text: Vec<u8> = (0..60).map(|i| b'a' + i % 26).collect();
        let mut seen = BTreeSet::new();
        for len in 1..40 {
            let alone = unit_hash(&text[..len], 0, len);
            let mut shifted = vec![b'?'; 5];
            shifted.extend_from_slice(&text[..len]);
            shifted.extend_from_slice(b"?????????????????");
            assert_eq!(unit_hash(&shifted, 5, 5 + len), alone);
            assert!(seen.insert(alone));
        }
        // Every word of up to three bytes of a small alphabet, and 100,000 numbers.
        let mut words: BTreeSet<String> = (0..100_000).map(|i| i.to_string()).collect();
        for (a, b, c) in (0..27 * 27 * 27u32).map(|i| (i % 27, i / 27 % 27, i / 729)) {
            let letter = |i: u32| char::from_u32(96 + i).filter(|c| *c != '`');
            words.insert([a, b, c].into_iter().filter_map(letter).collect());
        }
        words.remove("");
        let hashes: BTreeSet<u64> =
            words.iter().map(|w| mix(unit_hash(w.as_bytes(), 0, w.len()))).collect();
        assert_eq!(hashes.len(), words.len());
    }

    proptest! {
        #[test]
        fn shingles_match_a_set_of_strings(text in "([a-c]{1,2}[ ,.+#]{1,2}){0,12}", n in 1usize..5) {
            let norm = crate::normalize(&text);
            let words: Vec<&str> = norm
                .split([' ', ',', '.'])
                .map(|w| w.trim_start_matches(['+', '#']))
                .filter(|w| !w.is_empty())
                .collect();
            let grams: BTreeSet<String> = if words.len() < n {
                [norm.clone()].into_iter().filter(|t| !t.is_empty()).collect()
            } else {
                words.windows(n).map(|w| w.join(" ")).collect()
            };
            // A shingle hashes the same wherever it stands, and different ones differ.
            let alone: BTreeSet<u64> = grams
                .iter()
                .flat_map(|gram| shingles(gram, ShingleParams { words: n.min(words.len().max(1)), chars: 5 }))
                .collect();
            let got = shingles(&text, ShingleParams { words: n, chars: 5 });
            prop_assert_eq!(got.len(), grams.len());
            if words.len() >= n {
                prop_assert_eq!(got, alone.into_iter().collect::<Vec<_>>());
            }
        }

        #[test]
        fn ascii_words_follow_the_rule(text in "[ -~]{0,20}|([a-cZ09_]|[+#]|[ .\\[@`{/:]){0,300}") {
            let (mut want, mut start) = (Vec::new(), None);
            for (at, c) in text.char_indices().chain([(text.len(), ' ')]) {
                match start {
                    None if is_word_char(c) => start = Some(at),
                    Some(from) if !continues_word(c) => {
                        want.push((from, at));
                        start = None;
                    }
                    _ => {}
                }
            }
            let mut got = Vec::new();
            for_each_word(&text, |from, to| got.push((from, to)));
            prop_assert_eq!(got, want);
        }

        #[test]
        fn jaccard_matches_sets(a in prop::collection::btree_set(0u64..30, 0..20),
                                b in prop::collection::btree_set(0u64..30, 0..20)) {
            let want = if a.is_empty() && b.is_empty() { 0.0 } else {
                a.intersection(&b).count() as f64 / a.union(&b).count() as f64 };
            let (a, b): (Vec<u64>, Vec<u64>) = (a.into_iter().collect(), b.into_iter().collect());
            prop_assert_eq!(jaccard(&a, &b), want);
            prop_assert_eq!(jaccard(&b, &a), want);
        }
    }
}
