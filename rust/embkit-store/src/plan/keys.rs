//! Randomness as a function: counter-based draws, no generator, no state.
//!
//! A draw is a hash of what it is for (seed, task, epoch, example), so any position of any epoch
//! can be computed alone, in any thread, on any machine.

use blake2::digest::consts::U8;
use blake2::{Blake2b, Digest};

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// One part of the path that names a use of randomness; numbers and words are kept apart.
#[derive(Clone, Copy, Debug)]
pub enum Part<'a> {
    /// A number.
    Int(i64),
    /// A word.
    Str(&'a str),
}

/// A 64-bit key from a path such as `(seed, "rows", task, epoch)`: BLAKE2b of the parts, each with
/// its type before it, joined by the unit separator.
pub fn key_of(parts: &[Part]) -> u64 {
    let text: Vec<String> = parts
        .iter()
        .map(|part| match part {
            Part::Int(n) => format!("int:{n}"),
            Part::Str(s) => format!("str:{s}"),
        })
        .collect();
    let digest = Blake2b::<U8>::digest(text.join("\x1f").as_bytes());
    u64::from_le_bytes(digest.into())
}

/// The finaliser of SplitMix64.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A uniform number for a counter: SplitMix64 started at `key`, at position `counter`.
#[inline]
pub fn draw(key: u64, counter: u64) -> u64 {
    let start = key.wrapping_add(GOLDEN.wrapping_mul(counter.wrapping_add(1)));
    mix(mix(start) ^ key)
}

/// Draws up to `count` of `size` positions without replacement into `chosen`: those with the
/// smallest hashes, in that order. `work` is scratch.
pub(crate) fn sample(
    key: u64,
    item: u64,
    size: usize,
    count: usize,
    work: &mut Vec<(u64, u32)>,
    chosen: &mut Vec<u32>,
) {
    let own = draw(key, item);
    work.clear();
    work.extend(
        (0..size as u32).map(|column| {
            (mix(own.wrapping_add(GOLDEN.wrapping_mul(u64::from(column) + 1))), column)
        }),
    );
    let count = count.min(size);
    if count < size {
        work.select_nth_unstable(count);
        work.truncate(count);
    }
    work.sort_unstable();
    chosen.clear();
    chosen.extend(work.iter().map(|(_, column)| *column));
}
