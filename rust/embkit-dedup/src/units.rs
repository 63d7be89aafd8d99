//! A text as a sequence of hashed units that remember where in the original they came from.
//!
//! Contamination reports spans of the text as the user wrote it, so normalisation happens piece by
//! piece: whitespace-separated pieces for words (NFKC neither joins nor reorders across whitespace),
//! a character with its marks for characters. The hashes equal those of the normalised whole.

use crate::normalize::{Unit, is_word_char, normalize_into, unit_of};
use crate::shingle::for_each_word;
use unicode_normalization::char::is_combining_mark;
use xxhash_rust::xxh3::xxh3_64;

/// One word or character: its hash and its bytes in the original text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub hash: u64,
    pub start: usize,
    pub end: usize,
}

/// Reusable buffers; one per thread.
#[derive(Default)]
pub(crate) struct Cutter {
    norm: Vec<u8>,
}

impl Cutter {
    /// Fills `out` with the units of `text` and says what they are.
    pub fn cut(&mut self, text: &str, out: &mut Vec<Piece>) -> Unit {
        out.clear();
        if text.is_ascii() {
            self.words(text, 0, out);
            return Unit::Word;
        }
        normalize_into(text, &mut self.norm);
        let unit = std::str::from_utf8(&self.norm).map_or(Unit::Word, unit_of);
        match unit {
            Unit::Word => {
                for piece in text.split_whitespace() {
                    let start = piece.as_ptr() as usize - text.as_ptr() as usize;
                    self.words(piece, start, out);
                }
            }
            Unit::Char => {
                let mut start = 0;
                for (at, c) in text.char_indices().skip(1) {
                    // Marks, and the half-width Kana voicing marks that NFKC merges, follow a base.
                    if !(is_combining_mark(c) || matches!(c, '\u{FF9E}' | '\u{FF9F}')) {
                        self.chars(text, start, at, out);
                        start = at;
                    }
                }
                self.chars(text, start, text.len(), out);
            }
        }
        unit
    }

    fn words(&mut self, piece: &str, start: usize, out: &mut Vec<Piece>) {
        if piece.is_ascii() {
            for_each_word(piece, |from, to| {
                let mut lower = [0u8; 64];
                let word = &piece.as_bytes()[from..to];
                let hash = match lower.get_mut(..word.len()) {
                    Some(lower) => {
                        lower.copy_from_slice(word);
                        lower.make_ascii_lowercase();
                        xxh3_64(lower)
                    }
                    None => xxh3_64(&word.to_ascii_lowercase()),
                };
                out.push(Piece { hash, start: start + from, end: start + to });
            });
            return;
        }
        // Positions in the normalised form say nothing about the original: each word gets the span
        // of its whole piece.
        normalize_into(piece, &mut self.norm);
        if let Ok(norm) = std::str::from_utf8(&self.norm) {
            let end = start + piece.len();
            for_each_word(norm, |from, to| {
                out.push(Piece { hash: xxh3_64(&norm.as_bytes()[from..to]), start, end });
            });
        }
    }

    fn chars(&mut self, text: &str, start: usize, end: usize, out: &mut Vec<Piece>) {
        normalize_into(&text[start..end], &mut self.norm);
        let mut utf8 = [0u8; 4];
        if let Ok(norm) = std::str::from_utf8(&self.norm) {
            for c in norm.chars().filter(|&c| is_word_char(c)) {
                let hash = xxh3_64(c.encode_utf8(&mut utf8).as_bytes());
                out.push(Piece { hash, start, end });
            }
        }
    }
}

/// Rolling polynomial hash of every window of `n` units; empty when there are fewer.
pub(crate) fn windows(units: &[Piece], n: usize, out: &mut Vec<u64>) {
    const BASE: u64 = 0x9E37_79B9_7F4A_7C15; // odd, so that no unit is ever shifted out
    out.clear();
    if n == 0 || units.len() < n {
        return;
    }
    let top = (0..n).fold(1u64, |power, _| power.wrapping_mul(BASE));
    let mut hash = 0u64;
    for (i, unit) in units.iter().enumerate() {
        hash = hash.wrapping_mul(BASE).wrapping_add(unit.hash);
        if i >= n {
            hash = hash.wrapping_sub(units[i - n].hash.wrapping_mul(top));
        }
        if i + 1 >= n {
            // Tables take bits from both ends; multiplication alone mixes only upwards.
            out.push(hash ^ (hash >> 32));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn cut(text: &str) -> (Unit, Vec<Piece>) {
        let mut out = Vec::new();
        let unit = Cutter::default().cut(text, &mut out);
        (unit, out)
    }

    #[test]
    fn spans_point_into_the_original() {
        let text = "  The QUICK, “naïve” fox!";
        let (_, units) = cut(text);
        let spans: Vec<&str> = units.iter().map(|u| &text[u.start..u.end]).collect();
        assert_eq!(spans, ["The", "QUICK", "“naïve”", "fox"]);
        let text = "ｶﾞス 設備。";
        let (unit, units) = cut(text);
        let spans: Vec<&str> = units.iter().map(|u| &text[u.start..u.end]).collect();
        assert_eq!((unit, spans), (Unit::Char, vec!["ｶﾞ", "ス", "設", "備"]));
    }

    proptest! {
        #[test]
        fn hashes_equal_those_of_the_normalised_text(
            text in "[a-cA-C é漢字かﾞﾟがｶ,.+#ﬁÅ\u{301}\u{327}\u{3000}\n]{0,24}|\\PC{0,24}"
        ) {
            let (unit, units) = cut(&text);
            let norm = crate::normalize(&text);
            let (_, again) = cut(&norm);
            let hashes = |u: &[Piece]| u.iter().map(|p| p.hash).collect::<Vec<_>>();
            prop_assert_eq!(unit, unit_of(&norm));
            prop_assert_eq!(hashes(&units), hashes(&again));
            for u in &units {
                prop_assert!(text.get(u.start..u.end).is_some());
            }
        }

        #[test]
        fn rolling_equals_direct(keys in prop::collection::vec(0u64..4, 0..40), n in 1usize..9) {
            let units: Vec<Piece> = keys.iter().map(|&hash| Piece { hash, start: 0, end: 0 }).collect();
            let mut got = Vec::new();
            windows(&units, n, &mut got);
            let want: Vec<u64> = units.windows(n).map(|w| {
                let mut one = Vec::new();
                windows(w, n, &mut one);
                one[0]
            }).collect();
            prop_assert_eq!(got, want);
        }
    }
}
