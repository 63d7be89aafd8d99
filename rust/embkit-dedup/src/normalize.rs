//! One spelling per text: NFKC, lower case, single spaces, and the words of the result.
//!
//! * NFKC, then lower case without context (final sigma becomes sigma), then NFKC of that;
//!   whitespace runs become one space, none at the ends. Punctuation stays.
//! * A *word* is a run of alphanumeric characters, combining marks and `_`; `+` and `#` continue a
//!   word but do not begin one, so that `c`, `c++` and `c#` stay three words.
//! * Scripts that put no spaces between words (Han, Kana, Thai, Lao, Khmer, Myanmar, Tibetan) have
//!   characters as units instead. The choice is made per text: characters when the text has at
//!   least as many characters of such scripts as words of all others.
//!
//! [`crate::naive::normalize`] is that definition in three lines. Here ASCII goes through in blocks
//! and plain characters through a table; only marks that may combine, and what stands before them,
//! take the long way.

mod ascii;
pub(crate) mod table;
pub(crate) mod words;

use embkit_core::{Error, Job, Result};
use table::Fate;
use unicode_normalization::UnicodeNormalization;
use unicode_normalization::char::is_combining_mark;

/// What a text's units are: words, or single characters where a script has no spaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Words between spaces and punctuation.
    Word,
    /// Single word characters; spaces and punctuation are skipped.
    Char,
}

/// Returns `text` in NFKC, lower case, with every whitespace run as one space and none at the ends.
///
/// ```
/// assert_eq!(embkit_dedup::normalize("  Ｆｕｌｌ\u{3000}WIDTH\n"), "full width");
/// ```
pub fn normalize(text: &str) -> String {
    let mut out = Vec::new();
    normalize_into(text, &mut out);
    String::from_utf8_lossy(&out).into_owned()
}

/// As [`normalize`], into a caller's buffer (cleared first), which always ends as valid UTF-8.
pub fn normalize_into(text: &str, out: &mut Vec<u8>) {
    out.clear();
    out.reserve(text.len());
    append(text, out);
    trim_end(out);
}

/// As [`normalize_into`] for bytes that may not be UTF-8 and may be many: looks at `job` every
/// quarter of a MiB. `row` is for the error of text that is not UTF-8.
pub(crate) fn normalize_bytes(
    bytes: &[u8],
    row: usize,
    job: &Job,
    out: &mut Vec<u8>,
) -> Result<()> {
    const STEP: usize = 1 << 18;
    out.clear();
    out.reserve(bytes.len());
    let mut rest = bytes;
    while !rest.is_empty() {
        job.check()?;
        let mut piece = rest;
        if rest.len() > STEP {
            // Cut before an ASCII character, or before any when none is near: nothing combines
            // with the former, and of the latter only those are taken that stand for themselves.
            piece = cut_before_plain(rest, STEP);
        }
        let text = std::str::from_utf8(piece).map_err(|e| {
            Error::usage(format!("text row {row} is not UTF-8 ({e})"), "Pass validated records")
        })?;
        append(text, out);
        rest = &rest[piece.len()..];
    }
    trim_end(out);
    Ok(())
}

/// The longest prefix of at most `step` bytes after which a plain character begins; all when there
/// is none.
fn cut_before_plain(bytes: &[u8], step: usize) -> &[u8] {
    let plain = |&at: &usize| {
        let c = bytes.get(at..(at + 4).min(bytes.len())).and_then(first_char);
        c.is_some_and(|c| matches!(table::table().fate(c), table::Fate::Plain(_)))
    };
    let before = (1..step + 1).rev().find(plain);
    &bytes[..before.or_else(|| (step + 1..bytes.len()).find(plain)).unwrap_or(bytes.len())]
}

fn first_char(bytes: &[u8]) -> Option<char> {
    let chunk = bytes.utf8_chunks().next()?;
    chunk.valid().chars().next()
}

fn trim_end(out: &mut Vec<u8>) {
    if out.last() == Some(&b' ') {
        out.pop();
    }
}

/// Appends the normal form of `text`, except that one space may stand at the end.
fn append(text: &str, out: &mut Vec<u8>) {
    // Below this an ASCII run is not worth a block of its own.
    const SHORT: usize = 16;
    let bytes = text.as_bytes();
    let mut class = 0;
    // The last character from which the real algorithm can start: its place in the text, and what
    // had been written before it. Later marks may combine with it.
    let mut start = (0, out.len());
    let mut at = ascii::run(bytes);
    if at > 0 {
        ascii::append(&bytes[..at - 1], out);
        start = (at - 1, out.len());
        push(out, char::from(bytes[at - 1].to_ascii_lowercase()));
    }
    if at == bytes.len() {
        return;
    }
    let table = table::table();
    while let Some((c, len)) = words::decode(bytes, at) {
        if len == 1 {
            let mut last = at;
            let ahead = bytes.get(at..at + SHORT);
            if ahead.is_some_and(|ahead| ahead.iter().fold(0, |any, &byte| any | byte) < 0x80) {
                last = at + ascii::run(&bytes[at..]) - 1;
            }
            if last > at {
                ascii::append(&bytes[at..last], out);
            }
            start = (last, out.len());
            push(out, char::from(bytes[last].to_ascii_lowercase()));
            (at, class) = (last + 1, 0);
            continue;
        }
        match table.fate(c) {
            Fate::Plain(to) => {
                start = (at, out.len());
                class = 0;
                push(out, to);
            }
            Fate::Mark(mark) if mark >= class => {
                class = mark;
                push(out, c);
            }
            _ => {
                let next = text[at..]
                    .char_indices()
                    .find(|&(_, c)| c.is_ascii() || matches!(table.fate(c), Fate::Plain(_)));
                let end = next.map_or(text.len(), |(more, _)| at + more);
                out.truncate(start.1);
                append_slowly(&text[start.0..end], out);
                // What follows is plain and starts anew.
                (at, start, class) = (end, (end, out.len()), 0);
                continue;
            }
        }
        at += len;
    }
}

/// The definition itself: NFKC, lower case, and NFKC again, because lower case can make letters
/// that combine (H with line below) or marks out of order (I with dot).
fn append_slowly(text: &str, out: &mut Vec<u8>) {
    text.nfkc().flat_map(lower).nfkc().for_each(|c| {
        push(out, if c.is_whitespace() { ' ' } else { c });
    });
}

/// Lower case without context: a sigma at the end of a word is a sigma.
fn lower(c: char) -> impl Iterator<Item = char> {
    c.to_lowercase().map(|l| if l == 'ς' { 'σ' } else { l })
}

#[inline(always)]
fn push(out: &mut Vec<u8>, c: char) {
    let code = c as u32;
    let tail = |shift: u32| (code >> shift) as u8 & 0x3F | 0x80;
    // Written out, because a copy of a length that varies is a call.
    match code {
        0..0x80 => {
            if !c.is_ascii_whitespace() && code != 0x0B {
                out.push(code as u8);
            } else if out.last().is_some_and(|&last| last != b' ') {
                out.push(b' ');
            }
        }
        0x80..0x800 => out.extend_from_slice(&[(code >> 6) as u8 | 0xC0, tail(0)]),
        0x800..0x1_0000 => {
            out.extend_from_slice(&[(code >> 12) as u8 | 0xE0, tail(6), tail(0)]);
        }
        _ => out.extend_from_slice(&[(code >> 18) as u8 | 0xF0, tail(12), tail(6), tail(0)]),
    }
}

/// True for characters of scripts written without spaces between words.
pub fn is_unspaced(c: char) -> bool {
    matches!(c as u32,
        0x0E00..=0x0EFF      // Thai, Lao
        | 0x0F00..=0x0FFF    // Tibetan
        | 0x1000..=0x109F    // Myanmar
        | 0x1780..=0x17FF    // Khmer
        | 0x3005..=0x3007    // Han iteration marks and zero
        | 0x3040..=0x312F    // Hiragana, Katakana, Bopomofo
        | 0x31F0..=0x31FF
        | 0x3400..=0x4DBF    // Han
        | 0x4E00..=0x9FFF
        | 0xF900..=0xFAFF
        | 0x20000..=0x3FFFF)
}

/// True for characters that may begin a word.
pub fn is_word_char(c: char) -> bool {
    if c.is_ascii() {
        c.is_ascii_alphanumeric() || c == '_'
    } else {
        c.is_alphanumeric() || is_combining_mark(c)
    }
}

/// True for characters that may continue a word.
pub fn continues_word(c: char) -> bool {
    c == '+' || c == '#' || is_word_char(c)
}

/// Chooses the unit of one normalised text (see the module's rule).
pub fn unit_of(normalised: &str) -> Unit {
    // A job of its own is never cancelled.
    unit_of_bytes(normalised.as_bytes(), &Job::new()).unwrap_or(Unit::Word)
}

/// [`unit_of`] for what [`normalize_into`] leaves; looks at `job` every MiB.
pub(crate) fn unit_of_bytes(normalised: &[u8], job: &Job) -> Result<Unit> {
    // The scripts concerned begin with these bytes, as few others do; E2 is punctuation.
    if !normalised.iter().fold(false, |any, &b| any | ((b >= 0xE0) & (b != 0xE2))) {
        return Ok(Unit::Word);
    }
    let table = table::table();
    let (mut unspaced, mut words, mut inside, mut at) = (0usize, 0usize, false, 0);
    let mut check_at = 1 << 20;
    while let Some((c, len)) = words::decode(normalised, at) {
        if at >= check_at {
            job.check()?;
            check_at = at + (1 << 20);
        }
        at += len;
        if c.is_ascii() {
            let word = c.is_ascii_alphanumeric() | (c == '_');
            words += usize::from(word & !inside);
            inside = word | (inside & ((c == '+') | (c == '#')));
        } else if table.is_unspaced(c) {
            unspaced += usize::from(table.is_word(c));
            inside = false;
        } else {
            let word = table.is_word(c);
            words += usize::from(word & !inside);
            inside = word;
        }
    }
    Ok(if unspaced > 0 && unspaced >= words { Unit::Char } else { Unit::Word })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::naive;
    use proptest::prelude::*;

    #[test]
    fn spells_one_way() {
        assert_eq!(normalize("\tA  B\r\nC \u{b}"), "a b c");
        assert_eq!(normalize("Ａ１ ﬁne ΟΔΟΣ"), "a1 fine οδοσ");
        assert_eq!(normalize(" \n\u{3000}"), "");
        assert_eq!(normalize("e\u{301}"), normalize("é"));
    }

    #[test]
    fn units_by_script() {
        assert_eq!(unit_of("plain words"), Unit::Word);
        assert_eq!(unit_of("안녕하세요 세계"), Unit::Word);
        assert_eq!(unit_of("安装 debian 的 c++ 库"), Unit::Char);
        assert_eq!(unit_of("the name 北京 is in this long sentence"), Unit::Word);
        assert_eq!(unit_of("ภาษาไทย"), Unit::Char);
        assert_eq!(unit_of(""), Unit::Word);
    }

    #[test]
    fn every_character_between_letters_is_as_the_definition_says() {
        // Beyond the second plane almost everything is one kind of thing.
        let rare = if std::env::var_os("EMBKIT_TEST_FULL").is_some() { 1 } else { 101 };
        let all = (0..0x2_0000).chain((0x2_0000..0x11_0000).step_by(rare));
        for c in all.filter_map(char::from_u32) {
            for text in [format!("A{c}"), format!("H{c}e {c}{c}É")] {
                assert_eq!(normalize(&text), naive::normalize(&text), "{:x}", c as u32);
            }
        }
    }

    #[test]
    fn lower_case_that_combines_is_combined() {
        // LATIN SMALL LETTER H WITH LINE BELOW has no capital.
        assert_eq!(normalize("H\u{331}"), "\u{1E96}");
        assert_eq!(normalize("İ\u{323}"), normalize("i\u{323}\u{307}"));
    }

    #[test]
    fn long_bytes_are_cut_where_nothing_combines() {
        let job = Job::new();
        let mut got = Vec::new();
        let units = ["Some  Words, ", "e\u{301}", "漢字", "\u{301}\u{327}", "각", "é\u{300}", "İ "];
        for unit in units {
            for shift in 0..3 {
                let text = "x".repeat(shift) + &unit.repeat((1 << 20) / unit.len());
                normalize_bytes(text.as_bytes(), 0, &job, &mut got).unwrap();
                assert!(got == naive::normalize(&text).into_bytes(), "{unit:?}");
            }
        }
        let broken = [b"a".repeat(1 << 19), b"\xc3".to_vec(), b"a".repeat(1 << 19)].concat();
        assert!(matches!(normalize_bytes(&broken, 7, &job, &mut got), Err(Error::Usage { .. })));
        for cut in 0..4 {
            let text = "😀".repeat(100_000);
            let part = &text.as_bytes()[..text.len() - cut];
            assert_eq!(normalize_bytes(part, 0, &job, &mut got).is_ok(), cut == 0);
        }
        job.cancel();
        assert!(matches!(normalize_bytes(b"a", 0, &job, &mut got), Err(Error::Cancelled)));
    }

    fn unit_slowly(normalised: &str) -> Unit {
        let (mut unspaced, mut words, mut inside) = (0usize, 0usize, false);
        for c in normalised.chars() {
            if is_unspaced(c) {
                unspaced += usize::from(is_word_char(c));
                inside = false;
            } else if inside {
                inside = continues_word(c);
            } else if is_word_char(c) {
                inside = true;
                words += 1;
            }
        }
        if unspaced > 0 && unspaced >= words { Unit::Char } else { Unit::Word }
    }

    /// Characters of every block, those that combine or change more often than chance has them.
    fn any_text() -> impl Strategy<Value = String> {
        let hard = "İςΣßﬁｶﾞﾟ가각각H\u{331}h\u{300}\u{301}\u{327}\u{345}¨ーがกำิ่ख़\u{93C}ﷺẞǅΌ\u{1F80}";
        let hard: Vec<char> = hard.chars().collect();
        let c = prop_oneof![
            3 => prop::char::range('\0', '\u{7f}'),
            3 => prop::sample::select(hard),
            1 => prop::sample::select(vec![' ', '\u{85}', '\u{a0}', '\u{2028}', '\u{3000}']),
            2 => prop::char::range('\u{80}', '\u{2fff}'),
            1 => prop::char::range('\u{3000}', '\u{10ffff}'),
        ];
        prop::collection::vec(c, 0..24).prop_map(String::from_iter)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(cases()))]
        #[test]
        fn equals_the_definition_and_is_idempotent(text in any_text(), pad in "[ a-zA-Z]{0,70}") {
            for text in [text.clone(), format!("{pad}{text}"), format!("{text}{pad}{text}")] {
                let once = normalize(&text);
                prop_assert_eq!(&once, &naive::normalize(&text));
                prop_assert_eq!(normalize(&once), once.clone());
                prop_assert_eq!(unit_of(&once), unit_slowly(&once));
                prop_assert!(!once.contains("  ") && once.trim() == once);
            }
        }

        #[test]
        fn ascii_in_blocks_equals_the_definition(text in "([a-zA-Z\\x00-\\x7f]|[ \t\n]{1,3}){0,200}") {
            prop_assert_eq!(normalize(&text), naive::normalize(&text));
        }
    }

    fn cases() -> u32 {
        if std::env::var_os("EMBKIT_TEST_FULL").is_some() { 200_000 } else { 2_000 }
    }
}
