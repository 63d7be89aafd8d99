//! Near-duplicates, exactly, without comparing most texts.
//!
//! A sketch of a text is the number of its shingles and 256 bits: bit `b` says that some shingle's
//! hash falls into bucket `b`. A bucket that A has and B has not holds a shingle of A that B lacks,
//! so two sketches bound the similarity of their texts from above. Only pairs whose bound reaches
//! the threshold are compared shingle by shingle.

use embkit_core::{Error, Result, Texts};
use embkit_dedup::{ShingleParams, Shingler, jaccard};
use std::sync::atomic::{AtomicU64, Ordering};

const WORDS: usize = 4; // of 64 bits

/// Sketches of texts, made when a text is first looked at; shared by threads and calls.
#[derive(Debug, Default)]
pub struct Sketches {
    cells: Vec<[AtomicU64; WORDS + 1]>,
}

/// The bits, and the number of shingles.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sketch {
    bits: [u64; WORDS],
    len: u64,
}

impl Sketches {
    /// For `texts` texts; 40 bytes each.
    pub fn new(texts: usize) -> Self {
        let mut cells = Vec::new();
        cells.resize_with(texts, Default::default);
        Self { cells }
    }

    pub(super) fn check(&self, texts: u64) -> Result<()> {
        if self.cells.len() as u64 == texts {
            return Ok(());
        }
        Err(Error::usage(
            format!("sketches of {} texts for {texts}", self.cells.len()),
            "Make the sketches for these texts",
        ))
    }

    fn get(&self, row: usize) -> Option<Sketch> {
        let cell = &self.cells[row];
        // The length plus one comes last and says that the bits are there.
        let len = cell[WORDS].load(Ordering::Acquire).checked_sub(1)?;
        Some(Sketch { bits: std::array::from_fn(|i| cell[i].load(Ordering::Relaxed)), len })
    }

    /// Two threads may both get here: they store the same.
    fn put(&self, row: usize, sketch: &Sketch) {
        let cell = &self.cells[row];
        for (word, bits) in cell.iter().zip(sketch.bits) {
            word.store(bits, Ordering::Relaxed);
        }
        cell[WORDS].store(sketch.len + 1, Ordering::Release);
    }
}

impl Sketch {
    fn of(set: &[u64]) -> Self {
        let mut bits = [0; WORDS];
        for hash in set {
            bits[(hash >> 62) as usize] |= 1 << (hash >> 56 & 63);
        }
        Self { bits, len: set.len() as u64 }
    }

    /// No pair of sets with these sketches is more similar than this.
    fn bound(&self, other: &Sketch) -> f64 {
        let (mut mine, mut theirs) = (0, 0);
        for (a, b) in self.bits.iter().zip(other.bits) {
            mine += u64::from((a & !b).count_ones());
            theirs += u64::from((!a & b).count_ones());
        }
        let shared = (self.len - mine).min(other.len - theirs);
        let all = self.len + other.len - shared;
        if all == 0 { 0.0 } else { shared as f64 / all as f64 }
    }
}

/// What one thread needs to compare candidates with the texts of one query at a time.
pub(super) struct Near {
    shingler: Shingler,
    set: Vec<u64>,
    against: Vec<(usize, Sketch)>,
    sets: Vec<Vec<u64>>, // of `against`, empty until needed
}

impl Near {
    pub(super) fn new() -> Self {
        let shingler = Shingler::new(ShingleParams::default());
        Self { shingler, set: Vec::new(), against: Vec::new(), sets: Vec::new() }
    }

    /// The text rows that candidates are compared with from now on.
    pub(super) fn begin(
        &mut self,
        rows: impl Iterator<Item = u64>,
        texts: &Texts,
        sketches: &Sketches,
    ) -> Result<()> {
        self.against.clear();
        for row in rows {
            let sketch = self.sketch(row as usize, texts, sketches)?;
            self.against.push((row as usize, sketch));
        }
        let n = self.against.len().max(self.sets.len());
        self.sets.resize_with(n, Vec::new);
        self.sets.iter_mut().for_each(Vec::clear);
        Ok(())
    }

    /// The similarity of a text with the first of those that it is as near to as `threshold`.
    pub(super) fn duplicate(
        &mut self,
        row: u64,
        threshold: f64,
        texts: &Texts,
        sketches: &Sketches,
    ) -> Result<Option<f64>> {
        let sketch = self.sketch(row as usize, texts, sketches)?;
        let mut made = false;
        for i in 0..self.against.len() {
            let (other, theirs) = self.against[i];
            if sketch.bound(&theirs) < threshold {
                continue;
            }
            if !made {
                self.shingler.shingles(texts.str(row as usize)?, &mut self.set);
                made = true;
            }
            if self.sets[i].is_empty() {
                self.shingler.shingles(texts.str(other)?, &mut self.sets[i]);
            }
            let similarity = jaccard(&self.set, &self.sets[i]);
            if similarity >= threshold {
                return Ok(Some(similarity));
            }
        }
        Ok(None)
    }

    fn sketch(&mut self, row: usize, texts: &Texts, sketches: &Sketches) -> Result<Sketch> {
        if let Some(sketch) = sketches.get(row) {
            return Ok(sketch);
        }
        self.shingler.shingles(texts.str(row)?, &mut self.set);
        let sketch = Sketch::of(&self.set);
        sketches.put(row, &sketch);
        Ok(sketch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_bound_is_never_below_the_similarity(
            shared in prop::collection::btree_set(any::<u64>(), 0..300),
            a in prop::collection::btree_set(any::<u64>(), 0..80),
            b in prop::collection::btree_set(any::<u64>(), 0..80),
        ) {
            let with = |more: &std::collections::BTreeSet<u64>| -> Vec<u64> {
                shared.union(more).copied().collect()
            };
            let (a, b) = (with(&a), with(&b));
            let (x, y) = (Sketch::of(&a), Sketch::of(&b));
            prop_assert!(x.bound(&y) >= jaccard(&a, &b));
            prop_assert_eq!(x.bound(&y), y.bound(&x));
            prop_assert_eq!(Sketch::of(&a).bound(&x), if a.is_empty() { 0.0 } else { 1.0 });
        }
    }

    #[test]
    fn unlike_texts_of_usual_length_are_not_compared() {
        let set = |seed: u64| -> Vec<u64> {
            (0..150).map(|i| xxhash_rust::xxh3::xxh3_64_with_seed(&[i], seed)).collect()
        };
        assert!(Sketch::of(&set(1)).bound(&Sketch::of(&set(2))) < 0.7);
    }
}
