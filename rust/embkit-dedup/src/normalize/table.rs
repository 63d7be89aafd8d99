//! What normalisation does to single characters, looked up once per process.
//!
//! Most characters of most texts are *plain*: NFKC and lower case make one character of them that
//! never combines with the one before. 192 KiB of table for the first 65,536 characters, made on
//! first use in a few milliseconds, tell them from those that need the real algorithm.

use super::{is_unspaced, is_word_char};
use std::iter::once;
use std::sync::OnceLock;
use unicode_normalization::char::canonical_combining_class;
use unicode_normalization::{IsNormalized, UnicodeNormalization, is_nfkc_quick};

/// What becomes of a character.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// This character, whatever stands before it; white space becomes ' '.
    Plain(char),
    /// Itself when the class of the character before is not higher: a mark of this class.
    Mark(u8),
    /// Only the whole algorithm knows.
    Hard,
}

const PLAIN: u8 = 1;
const MARK: u8 = 2;
const WORD: u8 = 4;
const UNSPACED: u8 = 8;

pub(crate) struct Table {
    becomes: Vec<u16>,
    flags: Vec<u8>,
}

/// The table; all characters are asked of the slow functions once.
pub(crate) fn table() -> &'static Table {
    static TABLE: OnceLock<Table> = OnceLock::new();
    TABLE.get_or_init(|| {
        let mut table = Table { becomes: vec![0; 0x1_0000], flags: vec![0; 0x1_0000] };
        for code in 0..=0xFFFFu32 {
            let Some(c) = char::from_u32(code) else { continue };
            let (becomes, mut flags) = match fate(c) {
                Fate::Plain(to) if (to as u32) < 0x1_0000 => (to as u16, PLAIN),
                Fate::Mark(class) => (u16::from(class), MARK),
                _ => (0, 0),
            };
            flags |= WORD * u8::from(is_word_char(c)) + UNSPACED * u8::from(is_unspaced(c));
            table.becomes[code as usize] = becomes;
            table.flags[code as usize] = flags;
        }
        table
    })
}

impl Table {
    #[inline(always)]
    pub fn fate(&self, c: char) -> Fate {
        let at = c as usize;
        let (Some(&flags), Some(&becomes)) = (self.flags.get(at), self.becomes.get(at)) else {
            return fate(c);
        };
        if flags & PLAIN != 0 {
            // Never a surrogate: it was a character.
            Fate::Plain(char::from_u32(u32::from(becomes)).unwrap_or(c))
        } else if flags & MARK != 0 {
            Fate::Mark(becomes as u8)
        } else {
            Fate::Hard
        }
    }

    #[inline(always)]
    pub fn is_word(&self, c: char) -> bool {
        match self.flags.get(c as usize) {
            Some(flags) => flags & WORD != 0,
            None => is_word_char(c),
        }
    }

    #[inline(always)]
    pub fn is_unspaced(&self, c: char) -> bool {
        match self.flags.get(c as usize) {
            Some(flags) => flags & UNSPACED != 0,
            None => is_unspaced(c),
        }
    }
}

/// Begins a piece that nothing before it can change.
fn is_starter(c: char) -> bool {
    canonical_combining_class(c) == 0 && is_nfkc_quick(once(c)) == IsNormalized::Yes
}

fn fate(c: char) -> Fate {
    let mut nfkc = once(c).nfkc();
    let (Some(d), None) = (nfkc.next(), nfkc.next()) else { return Fate::Hard };
    let mut lower = super::lower(d);
    let (Some(e), None) = (lower.next(), lower.next()) else { return Fate::Hard };
    let class = canonical_combining_class(c);
    if class != 0 && c == d && d == e && is_nfkc_quick(once(c)) == IsNormalized::Yes {
        Fate::Mark(class)
    } else if is_starter(d) && is_starter(e) {
        Fate::Plain(if e.is_whitespace() { ' ' } else { e })
    } else {
        Fate::Hard
    }
}
