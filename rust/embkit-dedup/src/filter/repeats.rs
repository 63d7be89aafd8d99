//! How much of a text repeats: most frequent and repeated word n-grams, repeated lines.
//!
//! An n-gram can only occur twice where both (n-1)-grams in it do. So each length looks at the few
//! places that the length before has left, and ordinary text costs little more than its words. An
//! n-gram is named by the first places of its (n-1)-gram and of its last word: two 32-bit numbers,
//! exact given the words.

/// Words and lines beyond this are not looked at, which bounds memory at some 64 MiB per thread.
pub(super) const LOOK: usize = 1 << 20;
/// Longest n-gram.
pub(super) const LONGEST: usize = 10;
const NONE: u32 = u32::MAX;

/// A hash table from keys to the first place they were seen at, emptied in constant time.
#[derive(Default)]
pub(super) struct Firsts {
    slots: Vec<(u64, u32, u32)>, // key, place, round
    round: u32,
    shift: u32,
}

impl Firsts {
    /// Forgets everything and makes room for `n` keys.
    pub fn clear(&mut self, n: usize) {
        let size = (2 * n).next_power_of_two().max(16);
        if size > self.slots.len() || self.round == u32::MAX {
            self.slots.clear();
            self.slots.resize(size, (0, 0, 0));
            self.round = 0;
        }
        self.round += 1;
        self.shift = 64 - size.trailing_zeros();
    }

    /// The place that `key` was first given with.
    #[inline]
    pub fn first(&mut self, key: u64, place: u32) -> u32 {
        let mask = (1usize << (64 - self.shift)) - 1;
        let mut at = (key.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> self.shift) as usize;
        loop {
            let Some(slot) = self.slots.get_mut(at) else { return place };
            if slot.2 != self.round {
                *slot = (key, place, self.round);
                return place;
            }
            if slot.0 == key {
                return slot.1;
            }
            at = (at + 1) & mask;
        }
    }
}

/// The shares of one text; index n for n-grams.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Shares {
    /// Characters in occurrences of the most frequent n-gram / all, at most 1; n from 2 to 4.
    pub top: [f64; LONGEST + 1],
    /// Characters in n-grams that occurred before / all; n from 5 to 10.
    pub repeated: [f64; LONGEST + 1],
}

/// Reusable buffers; one per thread.
#[derive(Default)]
pub(super) struct Repeats {
    firsts: Firsts,
    word: Vec<u32>,  // first place of each word
    gram: Vec<u32>,  // first place of the n-gram at each place, NONE where it occurs once
    count: Vec<u32>, // occurrences, at first places
    live: Vec<u32>,  // places whose n-gram occurs more than once, ascending
    next: Vec<u32>,
    chars: Vec<u64>, // characters before each word
}

impl Repeats {
    /// The shares of a text with these words (hash, characters).
    pub fn shares(&mut self, words: &[(u64, u32)]) -> Shares {
        let mut out = Shares::default();
        self.start(words);
        let all = self.chars.last().copied().unwrap_or(0) as f64;
        for n in 2..=LONGEST {
            if self.live.len() < 2 {
                break;
            }
            self.lengthen(n, words.len());
            if n <= 4 {
                out.top[n] = (self.top(n) as f64 / all).min(1.0);
            } else {
                out.repeated[n] = self.repeated(n) as f64 / all;
            }
        }
        out
    }

    /// n = 1: which words occur more than once.
    fn start(&mut self, words: &[(u64, u32)]) {
        let n = words.len();
        self.firsts.clear(n);
        self.count.clear();
        self.count.resize(n, 0);
        self.gram.clear();
        self.chars.clear();
        self.chars.push(0);
        let mut chars = 0;
        let (firsts, count) = (&mut self.firsts, &mut self.count);
        self.gram.extend(words.iter().enumerate().map(|(place, &(hash, _))| {
            let first = firsts.first(hash, place as u32);
            if let Some(count) = count.get_mut(first as usize) {
                *count += 1;
            }
            first
        }));
        self.chars.extend(words.iter().map(|&(_, length)| {
            chars += u64::from(length);
            chars
        }));
        self.word.clone_from(&self.gram);
        // Which words repeat is a coin toss to the processor: write every place, keep some.
        self.live.clear();
        self.live.resize(n, 0);
        let mut kept = 0;
        for (place, &first) in self.gram.iter().enumerate() {
            self.live[kept] = place as u32;
            kept += usize::from(self.count[first as usize] > 1);
        }
        self.live.truncate(kept);
    }

    /// From n - 1 to n.
    fn lengthen(&mut self, n: usize, words: usize) {
        self.firsts.clear(self.live.len());
        self.next.clear();
        for (k, &place) in self.live.iter().enumerate() {
            let (i, last) = (place as usize, place as usize + n - 1);
            if last >= words || self.live.get(k + 1) != Some(&(place + 1)) {
                self.gram[i] = NONE;
                continue;
            }
            let key = u64::from(self.gram[i]) << 32 | u64::from(self.word[last]);
            let first = self.firsts.first(key, place);
            self.gram[i] = first;
            self.count[first as usize] =
                if first == place { 1 } else { self.count[first as usize] + 1 };
            self.next.push(place);
        }
        std::mem::swap(&mut self.live, &mut self.next);
        let (count, gram) = (&self.count, &mut self.gram);
        self.live.retain(|&place| {
            let again = count[gram[place as usize] as usize] > 1;
            if !again {
                gram[place as usize] = NONE;
            }
            again
        });
    }

    /// Characters in the most frequent n-gram, all occurrences; the longest of equally frequent ones.
    fn top(&self, n: usize) -> u64 {
        let firsts = self.live.iter().map(|&p| p as usize).filter(|&i| self.gram[i] == i as u32);
        let best = firsts.map(|i| (self.count[i], self.chars[i + n] - self.chars[i])).max();
        best.map_or(0, |(count, chars)| u64::from(count) * chars)
    }

    /// Characters in n-grams that occurred before, none counted twice.
    fn repeated(&self, n: usize) -> u64 {
        let (mut sum, mut to) = (0, 0);
        for i in self.live.iter().map(|&p| p as usize).filter(|&i| self.gram[i] != i as u32) {
            sum += self.chars[i + n] - self.chars[i.max(to)];
            to = i + n;
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn naive(words: &[(u64, u32)]) -> Shares {
        let mut out = Shares::default();
        let chars = |w: &[(u64, u32)]| w.iter().map(|x| u64::from(x.1)).sum::<u64>();
        let all = chars(words) as f64;
        for n in 2..=LONGEST {
            let mut seen: HashMap<Vec<u64>, u64> = HashMap::new();
            let mut covered = vec![false; words.len()];
            for (i, w) in words.windows(n).enumerate() {
                let times = seen.entry(w.iter().map(|x| x.0).collect()).or_insert(0);
                *times += 1;
                if *times > 1 {
                    covered[i..i + n].fill(true);
                }
            }
            if n <= 4 {
                let most = seen.values().copied().max().unwrap_or(0);
                let top = words
                    .windows(n)
                    .filter(|w| seen[&w.iter().map(|x| x.0).collect::<Vec<_>>()] == most)
                    .map(|w| most * chars(w))
                    .max();
                if most > 1 {
                    out.top[n] = (top.unwrap_or(0) as f64 / all).min(1.0);
                }
            } else {
                let words = words.iter().zip(&covered).filter(|x| *x.1);
                let sum: u64 = words.map(|x| u64::from(x.0.1)).sum();
                out.repeated[n] = if sum == 0 { 0.0 } else { sum as f64 / all };
            }
        }
        out
    }

    proptest! {
        #[test]
        fn shares_equal_the_naive_ones(
            texts in prop::collection::vec(prop::collection::vec(0u64..6, 0..60), 1..4),
            copies in 1usize..4,
        ) {
            let mut repeats = Repeats::default(); // its buffers serve several texts
            for ids in texts {
                let ids = ids.repeat(copies);
                let words: Vec<(u64, u32)> = ids.iter().map(|&i| (i << 60 | i, i as u32 + 1)).collect();
                prop_assert_eq!(repeats.shares(&words), naive(&words));
            }
        }
    }
}
