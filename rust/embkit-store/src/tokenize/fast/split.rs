//! The regexes that cut a text before byte-level BPE, by hand.
//!
//! Each function takes the alternatives in the order of its regex, whose first match counts, and
//! backtracks where the regex would. The classes of characters come from the library's regex
//! engine ([`Classes`]).

use super::chars::{Class, Classes};

/// GPT-2's, in `ByteLevel` with `use_regex`.
pub(super) const GPT2: &str =
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// Llama 3's and GPT-4's.
pub(super) const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen 2's and 3's: as Llama's, but every digit is alone.
pub(super) const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// How a text is cut into pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pattern {
    /// [`GPT2`]; with `digits` every numeric character is cut out before.
    Gpt2 { digits: bool },
    /// [`LLAMA3`] or [`QWEN2`]: so many digits together.
    Llama3 { digits: usize },
}

/// A text and the classes of its characters.
pub(super) struct Splitter<'a> {
    text: &'a str,
    bytes: &'a [u8],
    classes: &'a Classes,
}

impl<'a> Splitter<'a> {
    pub(super) fn new(text: &'a str, classes: &'a Classes) -> Self {
        Self { text, bytes: text.as_bytes(), classes }
    }

    /// Calls `piece` with the start and length of each piece until it says `false`. `false` when a
    /// character is outside of what is done here, so that the library must do this text.
    pub(super) fn each(
        &self,
        pattern: Pattern,
        mut piece: impl FnMut(usize, usize) -> bool,
    ) -> bool {
        match pattern {
            Pattern::Llama3 { digits } => {
                let mut at = 0;
                while at < self.bytes.len() {
                    let Some(end) = self.llama3(at, digits) else { return false };
                    if !piece(at, end - at) {
                        break;
                    }
                    at = end;
                }
            }
            Pattern::Gpt2 { digits: false } => {
                self.each_gpt2(0, self.bytes.len(), &mut piece);
            }
            Pattern::Gpt2 { digits: true } => {
                let mut at = 0;
                while at < self.bytes.len() {
                    let rest = &self.text[at..];
                    let end = rest.find(char::is_numeric).map_or(self.bytes.len(), |n| at + n);
                    if !self.each_gpt2(at, end, &mut piece) {
                        break;
                    }
                    let digit = self.text[end..].chars().next().map_or(0, char::len_utf8);
                    if digit > 0 && !piece(end, digit) {
                        break;
                    }
                    at = end + digit;
                }
            }
        }
        true
    }

    fn each_gpt2(
        &self,
        from: usize,
        end: usize,
        piece: &mut impl FnMut(usize, usize) -> bool,
    ) -> bool {
        let mut at = from;
        while at < end {
            let next = self.gpt2(at, end);
            if !piece(at, next - at) {
                return false;
            }
            at = next;
        }
        true
    }

    /// Class and length of the character at `at`; `None` at `end`.
    #[inline]
    fn class(&self, at: usize, end: usize) -> Option<(Class, usize)> {
        if at >= end {
            return None;
        }
        let byte = self.bytes[at];
        if byte.is_ascii() {
            return Some((self.classes.ascii[usize::from(byte & 127)], 1));
        }
        let c = self.text[at..].chars().next()?;
        Some((self.classes.of(c), c.len_utf8()))
    }

    /// Where the characters of one class from `at` on end.
    #[inline]
    fn run(&self, mut at: usize, end: usize, class: Class) -> usize {
        while let Some((found, len)) = self.class(at, end) {
            if found != class {
                break;
            }
            at += len;
        }
        at
    }

    fn gpt2(&self, at: usize, end: usize) -> usize {
        let byte = self.bytes[at];
        if byte == b'\''
            && let Some(len) = contraction(&self.bytes[at..end], false)
        {
            return at + len;
        }
        let (class, len) = self.class(at, end).unwrap_or((Class::Other, 1));
        if class != Class::Space {
            return self.run(at + len, end, class);
        }
        match self.class(at + len, end) {
            Some((next, more)) if byte == b' ' && next != Class::Space => {
                self.run(at + len + more, end, next)
            }
            _ => self.spaces(at, end),
        }
    }

    fn llama3(&self, at: usize, digits: usize) -> Option<usize> {
        let end = self.bytes.len();
        let byte = self.bytes[at];
        if byte == b'\'' {
            // The one other character that is an `s` when case does not count.
            if self.text[at + 1..].starts_with('ſ') {
                return None;
            }
            if let Some(len) = contraction(&self.bytes[at..], true) {
                return Some(at + len);
            }
        }
        let (class, len) = self.class(at, end)?;
        let next = self.class(at + len, end);
        let (newline, after) = (matches!(byte, b'\r' | b'\n'), at + len);
        Some(match class {
            Class::Letter => self.run(after, end, Class::Letter),
            Class::Number => {
                let mut at = after;
                for _ in 1..digits {
                    match self.class(at, end) {
                        Some((Class::Number, len)) => at += len,
                        _ => break,
                    }
                }
                at
            }
            _ if !newline && matches!(next, Some((Class::Letter, _))) => {
                self.run(after, end, Class::Letter)
            }
            Class::Other => self.newlines(self.run(after, end, Class::Other)),
            Class::Space => match next {
                Some((Class::Other, _)) if byte == b' ' => {
                    self.newlines(self.run(after, end, Class::Other))
                }
                _ => {
                    let all = self.run(at, end, Class::Space);
                    let newline = |b: &u8| matches!(b, b'\r' | b'\n');
                    match self.bytes[at..all].iter().rposition(newline) {
                        Some(last) => at + last + 1,
                        None => self.spaces(at, end),
                    }
                }
            },
        })
    }

    fn newlines(&self, at: usize) -> usize {
        let more = self.bytes[at..].iter().position(|b| !matches!(b, b'\r' | b'\n'));
        more.map_or(self.bytes.len(), |n| at + n)
    }

    /// `\s+(?!\S)|\s+`: all white space, but its last character when a word follows, unless that
    /// is the only one.
    fn spaces(&self, at: usize, end: usize) -> usize {
        let all = self.run(at, end, Class::Space);
        if all == end {
            return all;
        }
        let last = self.text[at..all].chars().next_back().map_or(1, char::len_utf8);
        if all - last > at { all - last } else { all }
    }
}

/// `'s`, `'t`, `'m`, `'d`, `'re`, `'ve`, `'ll`.
fn contraction(bytes: &[u8], any_case: bool) -> Option<usize> {
    let lower = |i: usize| {
        let byte = bytes.get(i).copied().unwrap_or(0);
        if any_case { byte.to_ascii_lowercase() } else { byte }
    };
    match (lower(1), lower(2)) {
        (b's' | b't' | b'm' | b'd', _) => Some(2),
        (b'r' | b'v', b'e') | (b'l', b'l') => Some(3),
        _ => None,
    }
}
