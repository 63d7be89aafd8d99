//! Language identification by `whatlang` (MIT; by script, then trigrams of 70 languages).
//!
//! Its choice of script is by majority, which takes a Japanese text with many Latin names for
//! another language: so texts with a fair share of Kana, Hangul or Han are named here first.

use whatlang::{Lang, detect};

/// Bytes of a text that are looked at: more cost time and decide nothing.
const LOOK: usize = 600;
/// Below this confidence of `whatlang` the language counts as not known.
const CONFIDENCE: f64 = 0.8;

/// ISO 639-3 codes by number; number 0 is "not known".
pub static LANGUAGES: std::sync::LazyLock<Vec<&'static str>> = std::sync::LazyLock::new(|| {
    let mut codes = vec!["und"];
    codes.extend(Lang::all().iter().map(|l| l.code()));
    codes
});

/// The language of one text, where it is clear.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Language(Option<Lang>);

impl Language {
    /// Looks at the beginning of `text`. Few words of a Latin script are seldom clear.
    pub fn of(text: &str) -> Language {
        let mut end = text.len().min(LOOK);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        let text = text.get(..end).unwrap_or(text);
        if let Some(lang) = east_asian(text) {
            return Language(Some(lang));
        }
        let found = detect(text);
        Language(found.filter(|i| i.confidence() >= CONFIDENCE).map(|i| i.lang()))
    }

    /// Place in [`LANGUAGES`].
    pub fn code(self) -> u16 {
        self.0.map_or(0, |lang| lang as u16 + 1)
    }

    /// Whether the text is in English, certainly.
    pub fn is_english(self) -> bool {
        self.0 == Some(Lang::Eng)
    }
}

/// The language whose own script at least a fifth of the letters belong to.
fn east_asian(text: &str) -> Option<Lang> {
    if text.is_ascii() {
        return None;
    }
    let (mut kana, mut hangul, mut han, mut letters) = (0usize, 0usize, 0usize, 0usize);
    for c in text.chars().filter(|c| c.is_alphabetic()) {
        letters += 1;
        match c as u32 {
            0x3041..=0x30FF | 0x31F0..=0x31FF | 0xFF66..=0xFF9F => kana += 1,
            0x1100..=0x11FF | 0x3131..=0x318E | 0xAC00..=0xD7A3 => hangul += 1,
            0x3400..=0x4DBF | 0x4E00..=0x9FFF | 0xF900..=0xFAFF | 0x20000..=0x3FFFF => han += 1,
            _ => {}
        }
    }
    if 5 * (kana + hangul + han) < letters.max(1) {
        None
    } else if hangul >= kana + han {
        Some(Lang::Kor)
    } else if 10 * kana >= kana + han {
        Some(Lang::Jpn)
    } else {
        Some(Lang::Cmn)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_places_in_the_list() {
        assert_eq!(LANGUAGES[0], "und");
        for &lang in Lang::all() {
            assert_eq!(LANGUAGES[usize::from(Language(Some(lang)).code())], lang.code());
        }
    }

    #[test]
    fn clear_texts_are_known_and_unclear_ones_are_not() {
        let code = |text: &str| LANGUAGES[usize::from(Language::of(text).code())];
        let english = "There was no possibility of taking a walk that day. We had been wandering, \
                       indeed, in the leafless shrubbery an hour in the morning; but since dinner \
                       the cold winter wind had brought with it clouds so sombre, and a rain so \
                       penetrating, that further outdoor exercise was now out of the question.";
        assert_eq!(code(english), "eng");
        assert_eq!(code("Le renard brun saute par-dessus le chien paresseux."), "fra");
        assert_eq!(code("敏捷的棕色狐狸跳过了懒狗"), "cmn");
        assert_eq!(code("素早い茶色の狐がのろまな犬を飛び越える"), "jpn");
        assert_eq!(code("GNOME デスクトップ用 Debian パッケージ"), "jpn");
        assert_eq!(code("GNOME 데스크톱 환경"), "kor");
        for unclear in ["text editor", "1234 5678", ""] {
            assert_eq!(code(unclear), "und");
        }
    }
}
