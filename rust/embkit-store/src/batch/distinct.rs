//! No-duplicate batches: examples that share a text never meet in one global batch.
//!
//! The permutation of an epoch is cut into superblocks of 64 batches, and examples change places
//! only inside one. Each key (a near-duplicate cluster) has a word of 64 bits that says which
//! batches have it, so the first batch that has room and none of an example's keys is one `and` and
//! one count of zeros. When only batches that have the key have room, an example of another batch
//! moves there. What still fits nowhere (a key in more examples than there are batches) takes any
//! room: the losses' identity masks cover it.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// Batches that are arranged together.
pub const SUPERBLOCK: u64 = 64;

/// Hashes a key that is already a hash by one multiplication.
#[derive(Default)]
pub(crate) struct Multiply(u64);

impl Hasher for Multiply {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|b| self.write_u64(u64::from(*b)));
    }

    fn write_u64(&mut self, key: u64) {
        // The high bits of the product depend on all bits of the key; the table uses low ones.
        self.0 = (self.0 ^ key).wrapping_mul(GOLDEN).rotate_left(26);
    }
}

/// A map by identity keys.
pub(crate) type Keys<V> = HashMap<u64, V, BuildHasherDefault<Multiply>>;

/// Arranges `batches` (at most 64) of `batch_size` examples, whose two keys are `keys`. Returns the
/// examples' positions, batch by batch, and how many could not be kept from sharing a key.
pub fn arrange(keys: &[[u64; 2]], batch_size: usize, batches: usize) -> (Vec<u32>, u64) {
    let batches = batches.clamp(1, SUPERBLOCK as usize);
    let (keys, count) = number(keys.as_flattened());
    let (keys, _) = keys.as_chunks::<2>();
    let mut seen = vec![0; count as usize + 1];
    let mut room = u64::MAX >> (SUPERBLOCK as usize - batches);
    let all = room;
    let mut filled: Vec<Vec<u32>> = vec![Vec::with_capacity(batch_size); batches];
    let mut shared = 0;
    for (position, pair) in (0..).zip(keys) {
        let taken = in_batches(&seen, pair);
        let free = room & !taken;
        let mut batch = free.trailing_zeros() as usize;
        if free == 0 {
            let open = room.trailing_zeros() as usize;
            batch = match exchange(&mut filled, &mut seen, keys, all & !taken, open) {
                Some(batch) => batch,
                None => {
                    shared += 1;
                    open
                }
            };
        }
        mark(&mut seen, pair, |bits| bits | 1 << batch);
        if let Some(examples) = filled.get_mut(batch) {
            examples.push(position);
        }
        // Of two batches that changed only one grew: the one that had room.
        let grown = if free == 0 { room.trailing_zeros() as usize } else { batch };
        if filled.get(grown).is_some_and(|examples| examples.len() == batch_size) {
            room &= !(1 << grown);
        }
    }
    (filled.concat(), shared)
}

/// Numbers the keys that may be there more than once, from 1; the others are 0. Also how many.
///
/// Most keys are alone, and two small bitmaps that stay in the cache tell so: only keys whose bit
/// another one has set before go into the map.
pub(crate) fn number(keys: &[u64]) -> (Vec<u32>, u32) {
    let bits = (8 * keys.len()).next_power_of_two().max(64);
    let (mut once, mut again) = (vec![0_u64; bits / 64], vec![0_u64; bits / 64]);
    let place = |key: u64| {
        let bit = (key.wrapping_mul(GOLDEN) >> 32) as usize & (bits - 1);
        (bit / 64, 1_u64 << (bit % 64))
    };
    for key in keys {
        let (word, bit) = place(*key);
        if let (Some(once), Some(again)) = (once.get_mut(word), again.get_mut(word)) {
            *again |= *once & bit;
            *once |= bit;
        }
    }
    let mut numbers: Keys<u32> = Keys::default();
    numbers.reserve(again.iter().map(|word| word.count_ones() as usize).sum());
    let mut count = 0;
    let of = |key: &u64| {
        let (word, bit) = place(*key);
        if again.get(word).is_none_or(|again| again & bit == 0) {
            return 0;
        }
        *numbers.entry(*key).or_insert_with(|| {
            count += 1;
            count
        })
    };
    let numbered = keys.iter().map(of).collect();
    (numbered, count)
}

/// The batches that have one of the keys.
fn in_batches(seen: &[u64], pair: &[u32; 2]) -> u64 {
    pair.iter().fold(0, |bits, key| bits | seen.get(*key as usize).copied().unwrap_or(0))
}

/// Changes the batches of both keys; key 0 is in none.
fn mark(seen: &mut [u64], pair: &[u32; 2], change: impl Fn(u64) -> u64) {
    for key in pair.iter().filter(|key| **key != 0) {
        if let Some(bits) = seen.get_mut(*key as usize) {
            *bits = change(*bits);
        }
    }
}

/// Makes room in one of the batches `fit` by moving one of its examples to the batch `open`, where
/// nothing shares a key with that one. Returns the batch.
fn exchange(
    filled: &mut [Vec<u32>],
    seen: &mut [u64],
    keys: &[[u32; 2]],
    fit: u64,
    open: usize,
) -> Option<usize> {
    let candidates = (0..filled.len()).filter(|b| fit >> b & 1 == 1);
    for batch in candidates {
        let movable = filled.get(batch)?.iter().position(|e| {
            keys.get(*e as usize).is_some_and(|pair| in_batches(seen, pair) >> open & 1 == 0)
        });
        let Some(place) = movable else { continue };
        let example = filled.get_mut(batch)?.swap_remove(place);
        mark(seen, keys.get(example as usize)?, |bits| (bits & !(1 << batch)) | 1 << open);
        filled.get_mut(open)?.push(example);
        return Some(batch);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::draw;

    #[test]
    fn each_example_once_and_no_key_twice_where_it_can_be_avoided() {
        for (n, distinct) in [(64 * 8, 400), (64 * 8, 60), (12 * 8, 50), (5 * 8, 100), (8, 3)] {
            let keys: Vec<[u64; 2]> = (0..n as u64)
                .map(|i| [draw(1, i) % distinct, 1_000_000 + draw(2, i) % distinct])
                .collect();
            let (order, shared) = arrange(&keys, 8, n / 8);
            let mut sorted = order.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..n as u32).collect::<Vec<_>>());
            let mut repeats = 0;
            for batch in order.chunks(8) {
                let mut seen = std::collections::HashSet::new();
                for i in batch {
                    let fresh = keys[*i as usize].map(|k| seen.insert(k));
                    repeats += u64::from(fresh.contains(&false));
                }
            }
            assert!(repeats <= shared, "{n} {distinct}: {repeats} repeats, {shared} told");
            assert_eq!(shared > 0, distinct == 3, "{n} {distinct}: {shared}");
        }
    }

    #[test]
    fn without_shared_keys_the_order_stays() {
        let keys: Vec<[u64; 2]> = (0..48).map(|i| [i, 100 + i]).collect();
        assert_eq!(arrange(&keys, 16, 3), ((0..48).collect(), 0));
    }
}
