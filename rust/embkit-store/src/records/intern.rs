//! Every distinct text once.
//!
//! Two texts are one when their NFC forms are equal; the form that came first is the one stored.
//! The table is keyed by the full 128-bit hash of the NFC form, so two texts are merged only when
//! all 128 bits agree, while the `text_id` column holds the low 64 of them.

use std::borrow::Cow;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use embkit_core::hash128;
use unicode_normalization::{IsNormalized, UnicodeNormalization, is_nfc_quick};

/// The identity of a text: the 128-bit hash of its NFC form.
pub fn identity(text: &str) -> u128 {
    hash128(nfc(text).as_bytes())
}

/// The NFC form of a text; nearly every text is already in it and is not copied.
pub fn nfc(text: &str) -> Cow<'_, str> {
    if text.is_ascii() || is_nfc_quick(text.chars()) == IsNormalized::Yes {
        Cow::Borrowed(text)
    } else {
        Cow::Owned(text.nfc().collect())
    }
}

/// The keys are hashes already: a second hash over them would only cost time.
#[derive(Default)]
struct LowBits(u64);

impl Hasher for LowBits {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("keys are u128")
    }

    fn write_u128(&mut self, key: u128) {
        self.0 = key as u64;
    }
}

/// Distinct texts in order of first appearance.
#[derive(Default)]
pub(crate) struct Texts {
    pub(crate) bytes: Vec<u8>,
    /// End of each text in `bytes`.
    ends: Vec<u64>,
    keys: Vec<u128>,
    rows: HashMap<u128, u64, BuildHasherDefault<LowBits>>,
}

impl Texts {
    /// The row of a text, which is added when it is new.
    pub(crate) fn intern(&mut self, text: &str) -> u64 {
        let key = identity(text);
        let next = self.keys.len() as u64;
        let row = *self.rows.entry(key).or_insert(next);
        if row == next {
            self.bytes.extend_from_slice(text.as_bytes());
            self.ends.push(self.bytes.len() as u64);
            self.keys.push(key);
        }
        row
    }

    /// Number of distinct texts.
    pub(crate) fn len(&self) -> usize {
        self.keys.len()
    }

    /// Forgets every text from row `len` on (a file that turned out to be broken).
    pub(crate) fn truncate(&mut self, len: usize) {
        for key in self.keys.drain(len.min(self.keys.len())..) {
            self.rows.remove(&key);
        }
        self.ends.truncate(len);
        self.bytes.truncate(self.ends.last().map_or(0, |end| *end as usize));
    }

    /// The text table: bytes, offsets (one more than texts), text ids.
    pub(crate) fn finish(self) -> (Vec<u8>, Vec<u64>, Vec<u64>) {
        let mut offsets = self.ends;
        offsets.insert(0, 0);
        (self.bytes, offsets, self.keys.into_iter().map(|key| key as u64).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_nfc_forms_are_one_text_and_the_first_form_stays() {
        let mut texts = Texts::default();
        assert_eq!(texts.intern("caf\u{e9}"), 0);
        assert_eq!(texts.intern("cafe"), 1);
        assert_eq!(texts.intern("cafe\u{301}"), 0);
        assert_eq!(texts.intern("\u{1112}\u{1161}\u{11ab}"), 2); // conjoining jamo
        assert_eq!(texts.intern("\u{d55c}"), 2);
        assert_eq!(texts.intern("\u{212b}"), 3); // angstrom sign, a singleton
        assert_eq!(texts.intern("\u{c5}"), 3);
        assert_eq!(texts.intern("caf\u{e9} "), 4); // no other folding
        let (bytes, offsets, ids) = texts.finish();
        assert_eq!(&bytes[..offsets[1] as usize], "caf\u{e9}".as_bytes());
        assert_eq!(ids[3], identity("\u{c5}") as u64);
        assert_eq!(offsets.len(), 6);
    }

    #[test]
    fn truncate_forgets_wholly() {
        let mut texts = Texts::default();
        for text in ["a", "bb", "ccc"] {
            texts.intern(text);
        }
        texts.truncate(1);
        assert_eq!(texts.intern("ccc"), 1);
        assert_eq!(texts.intern("bb"), 2);
        assert_eq!(texts.intern("a"), 0);
        assert_eq!(texts.finish().0, b"acccbb");
    }
}
