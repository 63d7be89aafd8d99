//! BERT's WordPiece: characters to words by table, words to ids by longest match.

use std::collections::HashMap;

use super::chars::BertChars;
use super::table::{Cache, Ids, KEY, Map, PADDING, words};

/// Bytes of text that are normalised before any is encoded, so that a text far beyond its limit
/// is not read to its end.
const CHUNK: usize = 2048;
const NONE: u32 = u32::MAX;

/// The vocabulary as two tries, for the first piece of a word and for the others.
pub(super) struct WordPiece {
    chars: BertChars,
    /// Node and byte to node.
    next: Map,
    /// The id that ends at a node, or `NONE`.
    id: Vec<u32>,
    unknown: u32,
    max_chars: usize,
}

/// Roots of the two tries.
const FIRST: u64 = 0;
const INNER: u64 = 1;

impl WordPiece {
    pub(super) fn new(
        chars: BertChars,
        vocab: &HashMap<String, u32>,
        prefix: &str,
        unknown: u32,
        max_chars: usize,
    ) -> Self {
        let mut edges = HashMap::new();
        let mut id = vec![NONE; 2];
        let mut add = |root, piece: &str, value| {
            let mut node = root;
            for byte in piece.bytes() {
                node = *edges.entry(node << 8 | u64::from(byte)).or_insert_with(|| {
                    id.push(NONE);
                    id.len() as u64 - 1
                });
            }
            id[node as usize] = value;
        };
        for (piece, value) in vocab {
            if !piece.is_empty() {
                add(FIRST, piece, *value);
            }
            if let Some(rest) = piece.strip_prefix(prefix).filter(|rest| !rest.is_empty()) {
                add(INNER, rest, *value);
            }
        }
        let edges: Vec<(u64, u64)> = edges.into_iter().collect();
        Self { chars, next: Map::new(&edges), id, unknown, max_chars }
    }

    /// Appends ids until the text ends or there are more than `stop`. `false` when a character
    /// depends on its neighbours, so that the library must do this text.
    pub(super) fn encode(
        &self,
        text: &str,
        stop: usize,
        buffer: &mut Vec<u8>,
        cache: &mut Cache,
        out: &mut Ids,
    ) -> bool {
        let mut rest = text;
        while !rest.is_empty() && out.len() <= stop {
            // A space ends a word and is no accent, so what stands before it does not depend on
            // what follows.
            let bytes = rest.as_bytes();
            let space = bytes.get(CHUNK..).and_then(|later| memchr::memchr(b' ', later));
            let (now, later) = rest.split_at(space.map_or(bytes.len(), |at| CHUNK + at));
            rest = later;
            let Some(len) = self.normalise(now, buffer) else {
                return false;
            };
            self.words(&buffer[..len + PADDING], len, stop, cache, out);
        }
        true
    }

    /// Writes the characters' texts, a final space and [`PADDING`] into `buffer`; how many bytes
    /// without the padding.
    fn normalise(&self, text: &str, buffer: &mut Vec<u8>) -> Option<usize> {
        let bytes = text.as_bytes();
        let (mut from, mut at) = (0, 0);
        while from < bytes.len() {
            let plain = bytes[from..].iter().position(|b| !b.is_ascii());
            let end = plain.map_or(bytes.len(), |n| from + n);
            grow(buffer, at + 4 * (end - from));
            for byte in &bytes[from..end] {
                let (text, len) = self.chars.ascii[usize::from(*byte & 127)];
                buffer[at..at + 4].copy_from_slice(&text);
                at += usize::from(len);
            }
            from = end;
            for c in text[from..].chars() {
                if c.is_ascii() {
                    break;
                }
                let new = self.chars.of(c)?.as_bytes();
                grow(buffer, at + new.len());
                buffer[at..at + new.len()].copy_from_slice(new);
                at += new.len();
                from += c.len_utf8();
            }
        }
        grow(buffer, at);
        buffer[at..at + 1 + PADDING].fill(b' ');
        Some(at + 1)
    }

    fn words(&self, buffer: &[u8], end: usize, stop: usize, cache: &mut Cache, out: &mut Ids) {
        let mut at = 0;
        while at < end {
            let mut len = first_space(words(buffer, at));
            if len > KEY {
                len = memchr::memchr(b' ', &buffer[at..]).unwrap_or(buffer.len() - at);
            }
            if len > 0 {
                cache.piece(buffer, at, len, out, |word, out| self.word(word, out));
                if out.len() > stop {
                    return;
                }
            }
            at += len + 1;
        }
    }

    /// The longest piece that fits, again and again; a word that ends before its pieces do is
    /// unknown as a whole.
    fn word(&self, word: &[u8], out: &mut Ids) {
        let chars = || word.iter().filter(|b| **b & 0xc0 != 0x80).count();
        if word.len() > self.max_chars && chars() > self.max_chars {
            return out.push(self.unknown);
        }
        let (mut start, mut root, before) = (0, FIRST, out.len());
        while start < word.len() {
            let (mut node, mut best) = (root, None);
            for (i, byte) in word.iter().enumerate().skip(start) {
                let Some(next) = self.next.get(node << 8 | u64::from(*byte)) else { break };
                node = next;
                let id = self.id[node as usize];
                if id != NONE {
                    best = Some((id, i + 1));
                }
            }
            let Some((id, end)) = best else {
                out.truncate(before);
                return out.push(self.unknown);
            };
            out.push(id);
            (start, root) = (end, INNER);
        }
    }
}

/// Room for `len` bytes, a space, the padding, and the fixed copy of an ASCII character.
fn grow(buffer: &mut Vec<u8>, len: usize) {
    let need = len + 1 + PADDING + 4;
    if buffer.len() < need {
        buffer.resize(need * 2, 0);
    }
}

/// Position of the first space among 32 bytes, or 32.
#[inline]
fn first_space(words: [u64; 4]) -> usize {
    const ONES: u64 = 0x0101_0101_0101_0101;
    for (i, word) in words.into_iter().enumerate() {
        // The lowest set bit marks the first zero byte; higher ones may be wrong, and are not used.
        let x = word ^ (ONES * 0x20);
        let zeros = x.wrapping_sub(ONES) & !x & (ONES << 7);
        if zeros != 0 {
            return i * 8 + zeros.trailing_zeros() as usize / 8;
        }
    }
    32
}
