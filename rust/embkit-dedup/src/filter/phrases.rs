//! Phrases of page furniture and filler, found in one pass whatever their case.

use aho_corasick::{AhoCorasick, AhoCorasickBuilder, AhoCorasickKind};
use std::sync::LazyLock;

/// The filler text first; then what marks a line as furniture of a web page. C4 drops every line
/// with "javascript" or "use cookies"; a text may be about either, so here only phrases that speak
/// to a visitor count.
pub const PHRASES: [&str; 14] = [
    "lorem ipsum",
    "enable javascript",
    "javascript is disabled",
    "javascript is required",
    "requires javascript",
    "javascript must be enabled",
    "cookie policy",
    "site uses cookies",
    "the use of cookies",
    "we use cookies",
    "accept cookies",
    "terms of use",
    "terms of service",
    "privacy policy",
];

static FINDER: LazyLock<Option<AhoCorasick>> = LazyLock::new(|| {
    AhoCorasickBuilder::new()
        .kind(Some(AhoCorasickKind::DFA))
        .ascii_case_insensitive(true)
        .build(PHRASES)
        .ok()
});

/// Finds the phrases of `text`: fills `at` with the bytes where furniture begins, ascending, and
/// returns how often the filler occurs.
pub(super) fn find(text: &str, at: &mut Vec<usize>) -> u64 {
    at.clear();
    let mut filler = 0;
    for found in FINDER.iter().flat_map(|finder| finder.find_iter(text)) {
        match found.pattern().as_usize() {
            0 => filler += 1,
            _ => at.push(found.start()),
        }
    }
    filler
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_any_case_and_where() {
        let mut at = Vec::new();
        let text = "x Privacy POLICY\nLorem Ipsum dolor, please enable JavaScript";
        assert_eq!(find(text, &mut at), 1);
        assert_eq!(at, [2, 43]);
        assert_eq!(find("about javascript and cookies", &mut at), 0);
        assert!(at.is_empty());
    }
}
