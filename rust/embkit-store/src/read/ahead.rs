//! Reading ahead: from memory into the processor, and from a cold disk into memory.
//!
//! The rows of a batch lie at random places. One that is asked for after the other waits for memory
//! each time (100 ns), or for a disk (100 us), although both serve many requests at once.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::{Span, Store, Tokens};
use crate::simd;

/// Rows whose tokens are on their way to the processor while one is copied.
pub(crate) const AHEAD: usize = 8;
/// A token that took longer than this came from a disk: from memory it takes 1 to 5.
const COLD_NS_PER_TOKEN: u128 = 25;
/// Batches that are announced after a cold one. Then one is not: if the store has become warm, the
/// announcements, which cost a system call a row, end.
const ANNOUNCED: u32 = 32;

/// Whether batches announce their rows to the system before they read them.
#[derive(Debug)]
pub(super) struct Announced {
    /// Batches that still do.
    left: AtomicU32,
    allowed: bool,
}

impl Default for Announced {
    fn default() -> Self {
        Self::new(true)
    }
}

impl Announced {
    /// The first batch of a store is announced: a run most often begins with a cold one.
    pub(super) fn new(allowed: bool) -> Self {
        Self { left: AtomicU32::new(allowed.into()), allowed }
    }

    fn is_on(&self) -> bool {
        self.left.load(Ordering::Relaxed) > 0
    }

    fn next(&self) -> bool {
        let less = |left: u32| left.checked_sub(1);
        self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok()
    }

    fn note(&self, tokens: u64, took: Duration) {
        if self.allowed && took.as_nanos() > COLD_NS_PER_TOKEN * u128::from(tokens) {
            self.left.store(ANNOUNCED, Ordering::Relaxed);
        }
    }
}

impl Store {
    /// What a batch does before it reads its spans: after one that came from a disk, it asks the
    /// system for all of them at once, where faults would read one after the other.
    pub(crate) fn announce(&self, spans: &[Span]) {
        if self.announced.next() {
            self.will_need(spans);
        }
    }

    /// What a batch does after it: the next ones announce theirs if this one was slow.
    pub(crate) fn note(&self, tokens: u64, took: Duration) {
        self.announced.note(tokens, took);
    }

    /// Asks the system to bring the tokens of spans into memory, without waiting for them.
    pub fn will_need(&self, spans: &[Span]) {
        for span in spans {
            let Some(shard) = self.shards.get(span.shard as usize) else { continue };
            let range = span.start as usize..span.start as usize + span.len();
            match shard.tokens {
                Tokens::Narrow(column) => shard.texts.will_need(column, range),
                Tokens::Wide(column) => shard.texts.will_need(column, range),
            }
        }
    }

    /// Brings the tokens of a span that is soon copied near the processor.
    #[inline]
    pub(crate) fn prefetch_tokens(&self, span: Option<&Span>) {
        let Some(span) = span else { return };
        let Some(shard) = self.shards.get(span.shard as usize) else { return };
        let range = span.start as usize..span.start as usize + span.len();
        match shard.tokens {
            Tokens::Narrow(column) => simd::prefetch(shard.texts.peek(column, range)),
            Tokens::Wide(column) => simd::prefetch(shard.texts.peek(column, range)),
        }
    }

    /// Brings what a batch needs of rows beside their tokens near the processor; from a disk, when
    /// batches are announced.
    pub(crate) fn prefetch(&self, rows: &[u64]) {
        if self.announced.is_on() {
            for row in rows {
                let Ok((index, local)) = self.locate(*row) else { continue };
                let Some(shard) = self.shards.get(index) else { continue };
                shard.texts.will_need(shard.offsets, local..local + 2);
                shard.texts.will_need(shard.cluster, local..local + 1);
                shard.texts.will_need(shard.role, local..local + 1);
                shard.texts.will_need(shard.prompt_len, local..local + 1);
            }
        }
        self.prefetch_offsets(rows);
        self.prefetch_clusters(rows);
        for row in rows {
            let Ok((index, local)) = self.locate(*row) else { continue };
            let Some(shard) = self.shards.get(index) else { continue };
            simd::prefetch(shard.texts.peek(shard.role, local..local + 1));
            simd::prefetch(shard.texts.peek(shard.prompt_len, local..local + 1));
        }
    }

    /// [`Store::prefetch`] for the offsets only.
    pub(crate) fn prefetch_offsets(&self, rows: &[u64]) {
        for row in rows {
            let Ok((index, local)) = self.locate(*row) else { continue };
            let Some(shard) = self.shards.get(index) else { continue };
            simd::prefetch(shard.texts.peek(shard.offsets, local..local + 2));
        }
    }

    /// [`Store::prefetch`] for the clusters only.
    pub(crate) fn prefetch_clusters(&self, rows: &[u64]) {
        for row in rows {
            let Ok((index, local)) = self.locate(*row) else { continue };
            let Some(shard) = self.shards.get(index) else { continue };
            simd::prefetch(shard.texts.peek(shard.cluster, local..local + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_are_announced_after_a_cold_one_and_sometimes_not() {
        let announced = Announced::default();
        assert!(announced.is_on() && announced.next() && !announced.is_on());
        let (warm, cold) = (Duration::from_nanos(5_000), Duration::from_nanos(50_000));
        announced.note(1000, warm);
        assert!(!announced.next());
        announced.note(1000, cold);
        announced.note(1000, warm); // those that were announced are fast
        assert_eq!((0..100).filter(|_| announced.next()).count(), ANNOUNCED as usize);
        let never = Announced::new(false);
        never.note(1000, cold);
        assert!(!never.next());
    }
}
