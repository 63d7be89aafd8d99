//! Byte-level BPE: pieces by [`Splitter`], merges by rank.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use super::chars::Classes;
use super::split::{Pattern, Splitter};
use super::table::{Cache, Ids, Map};

/// Pieces up to this many bytes are merged by looking through all pairs for the lowest rank, which
/// costs less than a heap.
const SHORT: usize = 64;
/// No merge; above every rank.
const NONE: u64 = u64::MAX;

/// Vocabulary and merges.
pub(super) struct Bpe {
    classes: Classes,
    pattern: Pattern,
    /// The id of each single byte.
    bytes: [u32; 256],
    /// Pair of ids to `rank << 32 | new id`.
    merges: Map,
    /// With `ignore_merges`: pieces that are in the vocabulary as they are.
    whole: Option<HashMap<Box<[u8]>, u32>>,
}

impl Bpe {
    /// `merges` in the order of their ranks. `None` when the vocabulary lacks a byte or a part of a
    /// merge, or gives an id twice.
    pub(super) fn new(
        classes: Classes,
        pattern: Pattern,
        vocab: &HashMap<String, u32>,
        merges: &[(String, String)],
        ignore_merges: bool,
    ) -> Option<Self> {
        let mut ids: Vec<u32> = vocab.values().copied().collect();
        ids.sort_unstable();
        if ids.windows(2).any(|pair| pair[0] == pair[1]) {
            return None; // the heap of the library tells pairs apart by their new id
        }
        let alphabet = alphabet();
        let mut bytes = [0; 256];
        for (byte, c) in alphabet.iter().enumerate() {
            bytes[byte] = match vocab.get(&c.to_string()) {
                Some(id) => *id,
                // No text has these bytes, and some vocabularies leave them out.
                None if matches!(byte, 0xc0 | 0xc1 | 0xf5..) => 0,
                None => return None,
            };
        }
        let mut table = Vec::with_capacity(merges.len());
        for ((left, right), rank) in merges.iter().zip(0_u64..) {
            let (a, b) = (*vocab.get(left)?, *vocab.get(right)?);
            let new = *vocab.get(&format!("{left}{right}"))?;
            table.push((pair(a, b), rank << 32 | u64::from(new)));
        }
        let byte_of: HashMap<char, u8> = alphabet.iter().copied().zip(0..=255).collect();
        let whole = ignore_merges.then(|| {
            let raw = |piece: &str| {
                piece.chars().map(|c| byte_of.get(&c).copied()).collect::<Option<Vec<u8>>>()
            };
            let known = vocab.iter().filter_map(|(p, id)| Some((raw(p)?, *id)));
            known.map(|(piece, id)| (piece.into(), id)).collect()
        });
        Some(Self { classes, pattern, bytes, merges: Map::new(&table), whole })
    }

    /// Appends ids until the text ends or there are more than `stop`. `buffer` holds the text and
    /// the padding behind it. `false` when the library must do this text.
    pub(super) fn encode(
        &self,
        text: &str,
        stop: usize,
        buffer: &[u8],
        cache: &mut Cache,
        out: &mut Ids,
    ) -> bool {
        Splitter::new(text, &self.classes).each(self.pattern, |start, len| {
            cache.piece(buffer, start, len, out, |piece, out| self.piece(piece, out));
            out.len() <= stop
        })
    }

    fn piece(&self, piece: &[u8], out: &mut Ids) {
        match self.whole.as_ref().and_then(|whole| whole.get(piece)) {
            Some(id) => out.push(*id),
            None if piece.len() <= SHORT => self.short(piece, out),
            None => self.long(piece, out),
        }
    }

    fn rank(&self, a: u32, b: u32) -> u64 {
        self.merges.get(pair(a, b)).unwrap_or(NONE)
    }

    /// The pair of lowest rank, the leftmost of equals, is merged until none is left.
    fn short(&self, piece: &[u8], out: &mut Ids) {
        let (mut ids, mut ranks, mut n) = ([0_u32; SHORT], [NONE; SHORT], piece.len());
        for (id, byte) in ids.iter_mut().zip(piece) {
            *id = self.bytes[usize::from(*byte)];
        }
        for i in 1..n {
            ranks[i - 1] = self.rank(ids[i - 1], ids[i]);
        }
        loop {
            // Of pair i in `ranks[i]`; `ranks[n - 1]` is always NONE.
            let (mut at, mut best) = (0, NONE);
            for (i, rank) in ranks[..n].iter().enumerate() {
                // New ids differ where ranks do, so the whole word orders as the rank does.
                if *rank < best {
                    (at, best) = (i, *rank);
                }
            }
            if best == NONE {
                break;
            }
            ids[at] = best as u32;
            ids.copy_within(at + 2..n, at + 1);
            ranks.copy_within(at + 1..n, at);
            n -= 1;
            ranks[at] = if at + 1 < n { self.rank(ids[at], ids[at + 1]) } else { NONE };
            if at > 0 {
                ranks[at - 1] = self.rank(ids[at - 1], ids[at]);
            }
        }
        ids[..n].iter().for_each(|id| out.push(*id));
    }

    /// The same with a heap: a text without any cut may be of any length.
    fn long(&self, piece: &[u8], out: &mut Ids) {
        const END: usize = usize::MAX;
        let n = piece.len();
        let mut ids: Vec<u32> = piece.iter().map(|b| self.bytes[usize::from(*b)]).collect();
        let mut next: Vec<usize> = (1..=n).map(|i| if i == n { END } else { i }).collect();
        let mut previous: Vec<usize> = (0..n).map(|i| i.wrapping_sub(1)).collect();
        let mut gone = vec![false; n];
        let mut heap = BinaryHeap::new();
        let push = |heap: &mut BinaryHeap<_>, a: u32, b: u32, at| {
            let rank = self.rank(a, b);
            if rank != NONE {
                heap.push(Reverse((rank, at)));
            }
        };
        for at in 1..n {
            push(&mut heap, ids[at - 1], ids[at], at - 1);
        }
        while let Some(Reverse((rank, at))) = heap.pop() {
            let right = next[at];
            // An entry may be older than what stands there now.
            if gone[at] || right == END || self.rank(ids[at], ids[right]) != rank {
                continue;
            }
            ids[at] = rank as u32;
            gone[right] = true;
            next[at] = next[right];
            if next[at] != END {
                previous[next[at]] = at;
                push(&mut heap, ids[at], ids[next[at]], at);
            }
            if previous[at] != END {
                push(&mut heap, ids[previous[at]], ids[at], previous[at]);
            }
        }
        let mut at = 0;
        while at != END {
            out.push(ids[at]);
            at = next[at];
        }
    }
}

fn pair(a: u32, b: u32) -> u64 {
    u64::from(a) << 32 | u64::from(b)
}

/// The printable character that stands for each byte in a byte-level vocabulary (GPT-2's).
fn alphabet() -> [char; 256] {
    let printable = |b: u32| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let mut others = 256..;
    std::array::from_fn(|b| {
        let code = if printable(b as u32) { Some(b as u32) } else { others.next() };
        code.and_then(char::from_u32).unwrap_or_default()
    })
}
