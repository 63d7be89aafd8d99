//! Every distinct text once.
//!
//! Two texts are one when their NFC forms are equal; the form that came first is the one stored.
//! The table is keyed by the full 128-bit hash of the NFC form, so two texts are merged only when
//! all 128 bits agree, while the `text_id` column holds the low 64 of them. It costs about 32 bytes
//! a text; the texts themselves go to shards ([`super::shards`]).

use std::borrow::Cow;

use embkit_core::{Result, hash128};
use hashbrown::HashTable;
use unicode_normalization::{IsNormalized, UnicodeNormalization, is_nfc_quick};

use super::shards::Shards;

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

/// Distinct texts in order of first appearance.
pub(crate) struct Texts {
    keys: Vec<u128>,
    /// Rows by key; the keys are hashes already, so their low bits serve as the table's.
    rows: HashTable<u64>,
    pub(crate) shards: Shards,
}

impl Texts {
    pub(crate) fn new(shards: Shards) -> Self {
        Self { keys: Vec::new(), rows: HashTable::new(), shards }
    }

    /// The row of a text with this [`identity`], which is added when it is new.
    /// Errors: `Io` when a shard is full and cannot be written.
    pub(crate) fn intern(&mut self, key: u128, text: &str) -> Result<u64> {
        let known = |row: &u64| self.keys.get(*row as usize).copied().unwrap_or(0);
        if let Some(row) = self.rows.find(key as u64, |row| known(row) == key) {
            return Ok(*row);
        }
        let row = self.keys.len() as u64;
        self.rows.insert_unique(key as u64, row, |row| known(row) as u64);
        self.keys.push(key);
        self.shards.push(text.as_bytes(), key as u64)?;
        Ok(row)
    }

    /// Number of distinct texts.
    pub(crate) fn len(&self) -> usize {
        self.keys.len()
    }

    /// Forgets every text from row `len` on (a file that turned out to be broken).
    pub(crate) fn truncate(&mut self, len: usize) -> Result<()> {
        for (row, key) in self.keys.iter().enumerate().skip(len) {
            if let Ok(entry) = self.rows.find_entry(*key as u64, |r| *r == row as u64) {
                entry.remove();
            }
        }
        self.keys.truncate(len);
        self.shards.truncate(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn intern(texts: &mut Texts, text: &str) -> u64 {
        texts.intern(identity(text), text).unwrap()
    }

    #[test]
    fn equal_nfc_forms_are_one_text_and_the_first_form_stays() {
        let mut texts = Texts::new(Shards::in_memory());
        assert_eq!(intern(&mut texts, "caf\u{e9}"), 0);
        assert_eq!(intern(&mut texts, "cafe"), 1);
        assert_eq!(intern(&mut texts, "cafe\u{301}"), 0);
        assert_eq!(intern(&mut texts, "\u{1112}\u{1161}\u{11ab}"), 2); // conjoining jamo
        assert_eq!(intern(&mut texts, "\u{d55c}"), 2);
        assert_eq!(intern(&mut texts, "\u{212b}"), 3); // angstrom sign, a singleton
        assert_eq!(intern(&mut texts, "\u{c5}"), 3);
        assert_eq!(intern(&mut texts, "caf\u{e9} "), 4); // no other folding
        let held = texts.shards.finish().unwrap();
        assert_eq!(&held.text[..held.offsets[1] as usize], "caf\u{e9}".as_bytes());
        assert_eq!(held.text_id[3], identity("\u{c5}") as u64);
        assert_eq!(held.offsets.len(), 6);
    }

    #[test]
    fn truncate_forgets_wholly() {
        let mut texts = Texts::new(Shards::in_memory());
        for text in ["a", "bb", "ccc"] {
            intern(&mut texts, text);
        }
        texts.truncate(1).unwrap();
        assert_eq!(intern(&mut texts, "ccc"), 1);
        assert_eq!(intern(&mut texts, "bb"), 2);
        assert_eq!(intern(&mut texts, "a"), 0);
        assert_eq!(texts.shards.finish().unwrap().text, b"acccbb");
    }
}
