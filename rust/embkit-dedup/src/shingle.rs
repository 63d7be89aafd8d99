//! Texts as sets of hashed n-grams, and the exact Jaccard similarity of two such sets.
//!
//! A shingle is XXH3-64 (seed 0) of the UTF-8 of `n` successive units of the normalised text:
//! words joined by one space (default 3), or characters joined by nothing (default 5). A text with
//! fewer units than `n` is one shingle of its whole normalised form, punctuation included, so that
//! "a?" and "a!" are different short texts; an empty text has none.

use crate::normalize::{Unit, continues_word, is_word_char, normalize_into, unit_of};
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
    form: Vec<u8>,
    /// Start and end in `form` of each unit.
    spans: Vec<(usize, usize)>,
}

impl Shingler {
    /// A shingler for one thread.
    pub fn new(params: ShingleParams) -> Self {
        Self { params, norm: Vec::new(), form: Vec::new(), spans: Vec::new() }
    }

    /// Fills `out` with the sorted, distinct shingles of `text`; returns the normalised bytes.
    pub fn shingles(&mut self, text: &str, out: &mut Vec<u64>) -> &[u8] {
        out.clear();
        normalize_into(text, &mut self.norm);
        let n = self.split();
        if self.norm.is_empty() {
            return &self.norm;
        }
        if self.spans.len() < n {
            out.push(xxh3_64(&self.norm));
            return &self.norm;
        }
        out.reserve(self.spans.len());
        for window in self.spans.windows(n) {
            if let (Some(&(from, _)), Some(&(_, to))) = (window.first(), window.last()) {
                out.push(xxh3_64(&self.form[from..to]));
            }
        }
        out.sort_unstable();
        out.dedup();
        &self.norm
    }

    /// Writes the units of `norm` to `form` and `spans`; returns the n of this text's unit.
    fn split(&mut self) -> usize {
        self.form.clear();
        self.spans.clear();
        let Ok(norm) = std::str::from_utf8(&self.norm) else { return self.params.words };
        if unit_of(norm) == Unit::Char {
            let mut utf8 = [0u8; 4];
            for c in norm.chars().filter(|&c| is_word_char(c)) {
                let from = self.form.len();
                self.form.extend_from_slice(c.encode_utf8(&mut utf8).as_bytes());
                self.spans.push((from, self.form.len()));
            }
            return self.params.chars;
        }
        for_each_word(norm, |from, to| {
            if !self.form.is_empty() {
                self.form.push(b' ');
            }
            let start = self.form.len();
            self.form.extend_from_slice(&norm.as_bytes()[from..to]);
            self.spans.push((start, self.form.len()));
        });
        self.params.words
    }
}

/// 2 for ASCII that begins a word, 1 for what only continues one, else 0; see [`is_word_char`].
const ASCII: [u8; 256] = {
    let mut class = [0; 256];
    let mut byte = 0u8;
    while byte < 128 {
        class[byte as usize] = match byte {
            b'+' | b'#' => 1,
            b'_' => 2,
            _ => 2 * byte.is_ascii_alphanumeric() as u8,
        };
        byte += 1;
    }
    class
};

/// Calls `f(start, end)` with the byte span of each word of `text`.
#[inline]
pub(crate) fn for_each_word(text: &str, mut f: impl FnMut(usize, usize)) {
    if text.is_ascii() {
        let class = |at: usize| text.as_bytes().get(at).map_or(0, |byte| ASCII[*byte as usize]);
        let mut at = 0;
        while at < text.len() {
            if class(at) < 2 {
                at += 1;
                continue;
            }
            let start = at;
            while class(at) > 0 {
                at += 1;
            }
            f(start, at);
        }
        return;
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
    fn ascii_table_agrees_with_the_rule() {
        for byte in 0..128u8 {
            let c = byte as char;
            let want =
                2 * u8::from(is_word_char(c)) + u8::from(continues_word(c) && !is_word_char(c));
            assert_eq!(ASCII[byte as usize], want, "{c:?}");
        }
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
            let grams: BTreeSet<u64> = if words.len() < n {
                [norm.clone()].iter().filter(|t| !t.is_empty()).map(|t| xxh3_64(t.as_bytes())).collect()
            } else {
                words.windows(n).map(|w| xxh3_64(w.join(" ").as_bytes())).collect()
            };
            let got = shingles(&text, ShingleParams { words: n, chars: 5 });
            prop_assert_eq!(got, grams.into_iter().collect::<Vec<_>>());
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
