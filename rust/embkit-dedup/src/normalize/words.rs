//! Where the words of normalised text are: bits first, then runs of bits.

use super::ascii::{BLOCK, bits};
use super::table::table;
use embkit_core::{Job, Result};

/// One bit per byte of a text: may begin a word, may continue one. All bytes of a character have
/// the same bits.
#[derive(Default)]
pub(crate) struct Marks {
    begin: Vec<u64>,
    go_on: Vec<u64>,
}

impl Marks {
    /// Reads one text, which must be normalised if it is not ASCII; ASCII is made lower case in
    /// place. Looks at `job` every quarter of a MiB.
    pub fn read(&mut self, text: &mut [u8], job: &Job) -> Result<()> {
        const STEP: usize = 1 << 18;
        self.begin.clear();
        self.go_on.clear();
        let mut ascii = true;
        for part in text.chunks_mut(STEP) {
            job.check()?;
            ascii &= self.add(part);
        }
        if !ascii {
            let mut at = 0;
            while at < text.len() {
                job.check()?;
                at = self.add_others(text, at, at + STEP);
            }
        }
        Ok(())
    }

    /// Adds the ASCII of the next part of a text; says whether that is all there is.
    fn add(&mut self, text: &mut [u8]) -> bool {
        let first = self.begin.len();
        let blocks = text.len().div_ceil(BLOCK);
        self.begin.resize(first + blocks, 0);
        self.go_on.resize(first + blocks, 0);
        let mut ascii = true;
        let (whole, rest) = text.as_chunks_mut::<BLOCK>();
        for (k, block) in whole.iter_mut().enumerate() {
            let (begin, go_on, plain) = classify(block);
            self.begin[first + k] = begin;
            self.go_on[first + k] = go_on;
            ascii &= plain;
        }
        if !rest.is_empty() {
            let mut block = [0u8; BLOCK];
            block[..rest.len()].copy_from_slice(rest);
            let (begin, go_on, plain) = classify(&mut block);
            rest.copy_from_slice(&block[..rest.len()]);
            self.begin[first + whole.len()] = begin;
            self.go_on[first + whole.len()] = go_on;
            ascii &= plain;
        }
        ascii
    }

    /// Adds the other characters that begin in `[at, to)`; returns where to go on.
    fn add_others(&mut self, text: &[u8], mut at: usize, to: usize) -> usize {
        let table = table();
        let to = to.min(text.len());
        while at < to {
            at += super::ascii::run(&text[at..to]);
            while let Some((c, len)) = decode(text, at).filter(|&(_, len)| at < to && len > 1) {
                if table.is_word(c) {
                    for byte in at..(at + len).min(text.len()) {
                        self.begin[byte / 64] |= 1 << (byte % 64);
                        self.go_on[byte / 64] |= 1 << (byte % 64);
                    }
                }
                at += len;
            }
        }
        at
    }

    /// The first word at or after byte `from`: its begin and end.
    #[inline(always)]
    pub fn next(&self, from: usize) -> Option<(usize, usize)> {
        let start = first_set(&self.begin, from, 0)?;
        let end = first_set(&self.go_on, start, !0).unwrap_or(64 * self.go_on.len());
        Some((start, end))
    }

    /// The first byte at or after `from` that belongs to a word character.
    #[inline(always)]
    pub fn next_char(&self, from: usize) -> Option<usize> {
        first_set(&self.begin, from, 0)
    }
}

/// The first bit at or after `from` that differs from those of `flip`.
#[inline(always)]
fn first_set(words: &[u64], from: usize, flip: u64) -> Option<usize> {
    let mut k = from / 64;
    let mut word = (words.get(k)? ^ flip) & (!0 << (from % 64));
    while word == 0 {
        k += 1;
        word = words.get(k)? ^ flip;
    }
    Some(64 * k + word.trailing_zeros() as usize)
}

/// Bits of ASCII that begins and that continues words, and whether all is ASCII.
#[inline(always)]
fn classify(block: &mut [u8; BLOCK]) -> (u64, u64, bool) {
    let (mut begin, mut go_on, mut any) = ([0u8; BLOCK], [0u8; BLOCK], 0u8);
    for i in 0..BLOCK {
        let byte = block[i];
        any |= byte;
        let letter = (byte | 0x20).wrapping_sub(b'a') < 26; // false beyond ASCII
        let word = letter | (byte.wrapping_sub(b'0') < 10) | (byte == b'_');
        begin[i] = u8::from(word);
        go_on[i] = u8::from(word | (byte == b'+') | (byte == b'#'));
        block[i] = byte | (u8::from(letter) << 5);
    }
    (bits(&begin), bits(&go_on), any < 0x80)
}

/// The character of valid UTF-8 that begins at `at`, and its bytes.
#[inline(always)]
pub(crate) fn decode(text: &[u8], at: usize) -> Option<(char, usize)> {
    let first = *text.get(at)?;
    if first < 0x80 {
        return Some((char::from(first), 1));
    }
    let tail = |k: usize| u32::from(text.get(at + k).copied().unwrap_or(0) & 0x3F);
    let (code, len) = match first {
        0..0xE0 => (u32::from(first & 0x1F) << 6 | tail(1), 2),
        0xE0..0xF0 => (u32::from(first & 0x0F) << 12 | tail(1) << 6 | tail(2), 3),
        _ => (u32::from(first & 7) << 18 | tail(1) << 12 | tail(2) << 6 | tail(3), 4),
    };
    Some((char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER), len))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shingle::for_each_word;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn words_are_those_of_the_rule(text in "([a-zA-C]{1,9}[ ,.+#_\\-é漢字\u{301}😀@`\\[{/:]{0,3}){0,40}|\\PC{0,90}") {
            let mut want = Vec::new();
            for_each_word(&text, |from, to| want.push((from, to)));
            let mut bytes = text.clone().into_bytes();
            let mut marks = Marks::default();
            marks.read(&mut bytes, &Job::new()).unwrap();
            let (mut got, mut at) = (Vec::new(), 0);
            while let Some((from, to)) = marks.next(at) {
                got.push((from, to));
                at = to;
            }
            prop_assert_eq!(got, want);
            prop_assert_eq!(bytes, text.to_ascii_lowercase().into_bytes());
            for (at, c) in text.char_indices() {
                prop_assert_eq!(decode(text.as_bytes(), at), Some((c, c.len_utf8())));
            }
        }
    }
}
