//! One spelling per text: NFKC, lower case, single spaces, and the words of the result.
//!
//! * NFKC, then lower case without context (final sigma becomes sigma), whitespace runs become one
//!   space, none at the ends. Punctuation stays: exact duplicates differ in letters nowhere.
//! * A *word* is a run of alphanumeric characters, combining marks and `_`; `+` and `#` continue a
//!   word but do not begin one, so that `c`, `c++` and `c#` stay three words.
//! * Scripts that put no spaces between words (Han, Kana, Thai, Lao, Khmer, Myanmar, Tibetan) have
//!   characters as units instead. The choice is made per text: characters when the text has at
//!   least as many characters of such scripts as words of all others.

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
    if text.is_ascii() {
        let mut gap = false;
        for &byte in text.as_bytes() {
            if matches!(byte, b' ' | b'\t'..=b'\r') {
                gap = true;
            } else {
                if gap && !out.is_empty() {
                    out.push(b' ');
                }
                gap = false;
                out.push(byte.to_ascii_lowercase());
            }
        }
        return;
    }
    if lower_collapsed(text.nfkc(), out) {
        // A character whose lower case is several (U+0130) can put marks out of canonical order.
        let again: Vec<char> = String::from_utf8_lossy(out).nfkc().collect();
        out.clear();
        lower_collapsed(again.into_iter(), out);
    }
}

/// Pushes the lower case of `chars` with collapsed spaces; true when one character became several.
fn lower_collapsed(chars: impl Iterator<Item = char>, out: &mut Vec<u8>) -> bool {
    let (mut gap, mut several) = (false, false);
    let mut utf8 = [0u8; 4];
    for c in chars {
        if c.is_whitespace() {
            gap = true;
            continue;
        }
        if gap && !out.is_empty() {
            out.push(b' ');
        }
        gap = false;
        let lower = c.to_lowercase();
        several |= lower.len() > 1;
        for l in lower {
            let l = if l == 'ς' { 'σ' } else { l };
            out.extend_from_slice(l.encode_utf8(&mut utf8).as_bytes());
        }
    }
    several
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
    if normalised.is_ascii() {
        return Unit::Word;
    }
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

#[cfg(test)]
mod tests {
    use super::*;
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

    proptest! {
        #[test]
        fn is_idempotent(text in "\\PC{0,40}|[ -~\\s]{0,40}|[İςΣßﬁｶﾞ가-깋 \u{300}-\u{345}]{0,12}") {
            let once = normalize(&text);
            prop_assert_eq!(normalize(&once), once.clone());
            prop_assert!(!once.contains("  ") && once.trim() == once);
        }

        #[test]
        fn ascii_path_equals_general_path(text in "[\\x00-\\x7f]{0,60}") {
            let mut general = Vec::new();
            lower_collapsed(text.chars(), &mut general);
            prop_assert_eq!(normalize(&text).into_bytes(), general);
        }
    }
}
