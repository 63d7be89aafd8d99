//! The two hash tables of the fast path: one built once and only read, one a cache per thread.
//!
//! Oddity: both are keyed by whole machine words, because a general hash map of byte strings costs
//! more than everything else that is done for a short word.

/// Zero bytes that follow every text in a scratch buffer, so that a key is one fixed load.
pub(super) const PADDING: usize = 32;
/// Bytes of a piece that the cache can hold; one more byte of the key is its length.
pub(super) const KEY: usize = 31;
/// Ids that the cache keeps for a piece, at most.
const IDS: usize = 7;
/// Most pieces have no more bytes and ids than these: two of them fit into a cache line.
const SMALL_KEY: usize = 15;
const SMALL_IDS: usize = 3;
/// Pairs of slots: 64 bytes each for small pieces, 128 bytes for others; 6 MiB in all. A miss costs
/// a hundred times as much as a hit, so the cache may be larger than the processor's second level.
const SMALL_PAIRS: usize = 1 << 16;
const LARGE_PAIRS: usize = 1 << 14;

/// `u64` to `u64`, open addressing, never changed once built.
pub(super) struct Map {
    slots: Vec<(u64, u64)>,
    shift: u32,
}

/// A key that no caller has.
const EMPTY: u64 = u64::MAX;

impl Map {
    /// A table of these pairs; a later one replaces an earlier one of the same key.
    pub(super) fn new(pairs: &[(u64, u64)]) -> Self {
        let size = (pairs.len() * 2).next_power_of_two().max(2);
        let mut map = Self { slots: vec![(EMPTY, 0); size], shift: 64 - size.trailing_zeros() };
        for (key, value) in pairs {
            let at = map.find(*key);
            map.slots[at] = (*key, *value);
        }
        map
    }

    /// The slot of a key, or the free one where it would be.
    fn find(&self, key: u64) -> usize {
        let mask = self.slots.len() - 1;
        let mut at = (key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> self.shift) as usize;
        while self.slots[at].0 != key && self.slots[at].0 != EMPTY {
            at = (at + 1) & mask;
        }
        at
    }

    pub(super) fn get(&self, key: u64) -> Option<u64> {
        let (found, value) = self.slots[self.find(key)];
        (found == key).then_some(value)
    }
}

/// Ids written one piece after the other.
#[derive(Default)]
pub(super) struct Ids {
    /// Longer than `len`: a cached piece is one copy of fixed size.
    buffer: Vec<u32>,
    len: usize,
}

impl Ids {
    pub(super) fn clear(&mut self) {
        self.len = 0;
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn as_slice(&self) -> &[u32] {
        &self.buffer[..self.len]
    }

    pub(super) fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    pub(super) fn push(&mut self, id: u32) {
        self.room();
        self.buffer[self.len] = id;
        self.len += 1;
    }

    fn room(&mut self) {
        if self.buffer.len() < self.len + IDS {
            self.buffer.resize((self.len + IDS) * 2, 0);
        }
    }

    /// Appends the first `count` of these.
    #[inline]
    fn extend<const N: usize>(&mut self, ids: &[u32; N], count: usize) {
        self.room();
        self.buffer[self.len..self.len + N].copy_from_slice(ids);
        self.len += count;
    }
}

/// A piece of up to `8 * K - 1` bytes, its length in the last one, and up to `N` ids.
#[derive(Clone, Copy)]
struct Slot<const K: usize, const N: usize> {
    key: [u64; K],
    ids: [u32; N],
    count: u32,
}

/// Two slots for pieces of one hash, the one used last in front.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Pair<const K: usize, const N: usize>([Slot<K, N>; 2]);

struct Table<const K: usize, const N: usize> {
    pairs: Vec<Pair<K, N>>,
}

impl<const K: usize, const N: usize> Table<K, N> {
    fn new(pairs: usize) -> Self {
        // No key is zero: a piece has at least one byte.
        Self { pairs: vec![Pair([Slot { key: [0; K], ids: [0; N], count: 0 }; 2]); pairs] }
    }

    fn pair(&mut self, key: &[u64; K]) -> &mut [Slot<K, N>; 2] {
        let at = hash(key) as usize & (self.pairs.len() - 1);
        &mut self.pairs[at].0
    }

    #[inline]
    fn get(&mut self, key: &[u64; K]) -> Option<&Slot<K, N>> {
        let pair = self.pair(key);
        if pair[0].key != *key {
            if pair[1].key != *key {
                return None;
            }
            pair.swap(0, 1);
        }
        Some(&pair[0])
    }

    fn put(&mut self, key: &[u64; K], ids: &[u32]) {
        let pair = self.pair(key);
        pair.swap(0, 1);
        pair[0].key = *key;
        pair[0].ids[..ids.len()].copy_from_slice(ids);
        pair[0].count = ids.len() as u32;
    }
}

/// Pieces seen before and their ids.
pub(super) struct Cache {
    small: Table<2, SMALL_IDS>,
    large: Table<4, IDS>,
}

impl Default for Cache {
    fn default() -> Self {
        Self { small: Table::new(SMALL_PAIRS), large: Table::new(LARGE_PAIRS) }
    }
}

/// For each length the bytes of a key that count.
const MASKS: [[u64; 4]; KEY + 1] = {
    let mut masks = [[0; 4]; KEY + 1];
    let mut len = 0;
    while len <= KEY {
        let mut i = 0;
        while i < len {
            masks[len][i / 8] |= 0xff << (8 * (i % 8));
            i += 1;
        }
        len += 1;
    }
    masks
};

impl Cache {
    /// Appends the ids of `buffer[start..start + len]`, from the cache or else from `encode`, which
    /// appends them. [`PADDING`] bytes must follow the piece.
    #[inline]
    pub(super) fn piece(
        &mut self,
        buffer: &[u8],
        start: usize,
        len: usize,
        out: &mut Ids,
        encode: impl FnOnce(&[u8], &mut Ids),
    ) {
        if len > KEY {
            return encode(&buffer[start..start + len], out);
        }
        let words = words(buffer, start);
        let mut small = [words[0] & MASKS[len][0], words[1] & MASKS[len][1]];
        let mut large = [small[0], small[1], words[2] & MASKS[len][2], words[3] & MASKS[len][3]];
        large[3] |= (len as u64) << 56;
        if len <= SMALL_KEY {
            small[1] |= (len as u64) << 56;
            if let Some(slot) = self.small.get(&small) {
                return out.extend(&slot.ids, slot.count as usize);
            }
        }
        if let Some(slot) = self.large.get(&large) {
            return out.extend(&slot.ids, slot.count as usize);
        }
        let before = out.len();
        encode(&buffer[start..start + len], out);
        let ids = &out.as_slice()[before..];
        if len <= SMALL_KEY && ids.len() <= SMALL_IDS {
            self.small.put(&small, ids);
        } else if ids.len() <= IDS {
            self.large.put(&large, ids);
        }
    }
}

/// The 32 bytes from `start` on as little-endian words.
#[inline]
pub(super) fn words(buffer: &[u8], start: usize) -> [u64; 4] {
    let bytes: &[u8; 32] = match buffer.get(start..).and_then(|b| b.first_chunk()) {
        Some(bytes) => bytes,
        None => &[0; 32], // never: PADDING bytes follow every piece
    };
    let word = |i: usize| {
        let mut word = [0; 8];
        word.copy_from_slice(&bytes[i * 8..i * 8 + 8]);
        u64::from_le_bytes(word)
    };
    [word(0), word(1), word(2), word(3)]
}

#[inline]
fn hash<const K: usize>(key: &[u64; K]) -> u64 {
    let mut hash = 0x9e37_79b9_7f4a_7c15;
    for two in key.chunks_exact(2) {
        let wide = u128::from(two[0] ^ hash) * u128::from(two[1] ^ 0xbf58_476d_1ce4_e5b9);
        hash = wide as u64 ^ (wide >> 64) as u64;
    }
    hash
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_finds_what_was_put_in_and_nothing_else() {
        for n in [0_u64, 1, 2, 1000] {
            let pairs: Vec<(u64, u64)> = (0..n).map(|i| (i << 8, i * 3)).collect();
            let map = Map::new(&pairs);
            for (key, value) in &pairs {
                assert_eq!(map.get(*key), Some(*value));
                assert_eq!(map.get(key | 1), None);
            }
        }
        assert_eq!(Map::new(&[(7, 1), (7, 2)]).get(7), Some(2));
    }

    #[test]
    fn a_cached_piece_is_the_encoded_one_at_every_length() {
        let mut buffer: Vec<u8> = (0..200).map(|i| if i % 3 == 0 { 0 } else { b'a' }).collect();
        buffer.extend([0; PADDING]);
        // A stand-in for a model: a number of ids and values that depend on every byte.
        let encode = |piece: &[u8], out: &mut Ids| {
            for i in 0..=piece.len() % 9 {
                let sum: u32 = piece.iter().zip(1..).map(|(b, i)| u32::from(*b) * i).sum();
                out.push(sum * 10 + i as u32 + 1000 * piece.len() as u32);
            }
        };
        let mut cache = Cache::default();
        for _ in 0..3 {
            for start in 0..150 {
                for len in 1..50 {
                    let (mut got, mut want) = (Ids::default(), Ids::default());
                    cache.piece(&buffer, start, len, &mut got, encode);
                    encode(&buffer[start..start + len], &mut want);
                    assert_eq!(got.as_slice(), want.as_slice());
                }
            }
        }
    }
}
