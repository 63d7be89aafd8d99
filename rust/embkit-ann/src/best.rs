//! The candidates of a block of queries while the corpus streams by.
//!
//! A query keeps what passes its bar, as sortable integers of screened score and position. When its
//! space is full, the k-th best screened score sets the bar: less twice the query's error, because
//! both that score and a candidate's can be off by it. If candidates lie so close that this frees no
//! space (copies of one text, say), they are scored exactly on the spot, and the bar is the k-th
//! exact score less one error. So nothing that belongs to the k best is ever lost, whatever the
//! corpus looks like: the certificate is the bar.

use crate::encode::{Queries, Rows};
use crate::simd::{self, Bars, Hits, Isa, MAX_MR, NR, Tile};
use crate::vectors::{Vectors, dot};
use embkit_core::{Job, Result};

/// A score and its row as one integer that sorts by score, then by lower row.
pub(crate) fn key_of(score: f32, row: u32) -> u64 {
    let bits = (score + 0.0).to_bits(); // -0 becomes 0: they are equal scores
    let ordered = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
    u64::from(ordered) << 32 | u64::from(!row)
}

pub(crate) fn score_of(key: u64) -> f32 {
    let ordered = (key >> 32) as u32;
    f32::from_bits(if ordered >> 31 == 1 { ordered & !(1 << 31) } else { !ordered })
}

pub(crate) fn row_of(key: u64) -> u32 {
    !(key as u32)
}

/// Moves the `k` largest keys to the front; the smallest of them, when there are so many.
pub(crate) fn split(keys: &mut [u64], k: usize) -> Option<u64> {
    (keys.len() >= k).then(|| *keys.select_nth_unstable_by(k - 1, |a, b| b.cmp(a)).1)
}

/// Leaves the `k` largest keys.
pub(crate) fn cut(keys: &mut Vec<u64>, k: usize) {
    if keys.len() > k {
        split(keys, k);
        keys.truncate(k);
    }
}

/// Candidates that memory is asked for ahead of their turn, and pairs between looks at the job.
const AHEAD: usize = 8;
const CHECKED: usize = 8192;

/// What exact scores are computed from.
#[derive(Clone, Copy)]
pub(crate) struct Source<'a> {
    pub(crate) queries: &'a Vectors<'a>,
    pub(crate) corpus: &'a Vectors<'a>,
    /// Which query each place of the search is; the place itself when `None`.
    pub(crate) order: Option<&'a [u32]>,
    /// Rows of the positions in an encoding; the positions themselves when `None`.
    pub(crate) rows: Option<&'a [u32]>,
}

/// What candidates come from: encoded queries and rows, and the vectors themselves.
#[derive(Clone, Copy)]
pub(crate) struct Setting<'a> {
    pub(crate) queries: &'a Queries,
    pub(crate) rows: &'a Rows,
    pub(crate) source: Source<'a>,
}

impl Source<'_> {
    /// The query at a place.
    pub(crate) fn query(&self, place: usize) -> usize {
        self.order.map_or(place, |order| order[place] as usize)
    }

    fn row(&self, position: u32) -> u32 {
        self.rows.map_or(position, |rows| rows[position as usize])
    }

    /// Adds the exact key of each pair of a row and a query, counted from place `first`, to the
    /// query's `found`.
    fn score_pairs(
        &self,
        first: usize,
        pairs: &mut [(u32, u32)],
        found: &mut [Vec<u64>],
        job: &Job,
    ) -> Result<()> {
        pairs.sort_unstable();
        let mut scratch = [Vec::new(), Vec::new()];
        let [a, b] = &mut scratch;
        for (number, some) in pairs.chunks(CHECKED).enumerate() {
            job.check()?;
            for (i, (row, q)) in some.iter().enumerate() {
                if let Some((ahead, _)) = pairs.get(number * CHECKED + i + AHEAD)
                    && ahead != row
                {
                    self.corpus.prefetch(*ahead as usize);
                }
                let query = self.queries.row(self.query(first + *q as usize), a);
                let score = dot(query, self.corpus.row(*row as usize, b));
                found[*q as usize].push(key_of(score, *row));
            }
        }
        Ok(())
    }

    /// Adds the exact keys of some screened candidates of a query to `out`.
    pub(crate) fn score(&self, place: usize, keys: &[u64], out: &mut Vec<u64>) {
        let mut scratch = [Vec::new(), Vec::new()];
        let [a, b] = &mut scratch;
        let query = self.queries.row(self.query(place), a);
        for (i, key) in keys.iter().enumerate() {
            // Candidates lie anywhere: the wait for memory of one is spent on the ones before it.
            if let Some(ahead) = keys.get(i + AHEAD) {
                self.corpus.prefetch(self.row(row_of(*ahead)) as usize);
            }
            let row = self.row(row_of(*key));
            out.push(key_of(dot(query, self.corpus.row(row as usize, b)), row));
        }
    }
}

/// Candidates of some queries.
pub(crate) struct Best {
    isa: Isa,
    k: usize,
    /// Candidates by screened score that are sure to stay: `k`, and a few more in a loose search.
    keep: usize,
    /// Whether errors are left out of the bars: fewer candidates, and one of the `k` may be missed.
    loose: bool,
    cap: usize,
    keys: Vec<u64>, // `cap` per query, in units of the query's tile scores
    len: Vec<u32>,
    bar: Vec<f32>,
    /// Twice the error, in the same units.
    window: Vec<f32>,
    /// Exactly scored candidates with their rows, at most `k` per query; mostly empty.
    exact: Vec<Vec<u64>>,
    /// The place of query 0 in the search.
    first: usize,
}

impl Best {
    /// Space for `k` and what surrounds them.
    pub(crate) fn capacity(k: usize) -> usize {
        3 * k + 2 * NR
    }

    /// Candidates of `n` queries, the first of which is query `first` of the search; windows are
    /// nothing until [`Best::widen`].
    pub(crate) fn exact(isa: Isa, k: usize, n: usize, first: usize) -> Self {
        let cap = Self::capacity(k);
        Self {
            isa,
            k,
            keep: k,
            loose: false,
            cap,
            keys: vec![0; n * cap],
            len: vec![0; n],
            bar: vec![f32::NEG_INFINITY; n],
            window: vec![0.0; n],
            exact: vec![Vec::new(); n],
            first,
        }
    }

    /// Candidates of an approximate search: the `keep >= k` best by screened score.
    pub(crate) fn loose(isa: Isa, k: usize, keep: usize, n: usize, first: usize) -> Self {
        Self { k, loose: true, ..Self::exact(isa, keep, n, first) }
    }

    /// Raises the windows to what a further part of the corpus asks for.
    pub(crate) fn widen(&mut self, queries: &Queries, rows: &Rows) {
        for (i, window) in self.window.iter_mut().enumerate() {
            *window = window.max(2.0 * queries.error(i, rows) / queries.scale(i));
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.len.len()
    }

    /// Meets the queries `which` (at most a tile of them, packed in `tile`) with panel `panel`, whose
    /// first position is `first`.
    pub(crate) fn meet(
        &mut self,
        which: &[u32],
        tile: &Tile,
        panel: usize,
        first: usize,
        hits: &mut Hits,
        on: &Setting,
    ) {
        let mut bars: Bars = [f32::INFINITY; MAX_MR];
        which.iter().zip(&mut bars).for_each(|(q, bar)| *bar = self.bar[*q as usize]);
        simd::tile(self.isa, tile, &on.rows.panel(panel), &bars, hits);
        let real = on.rows.real(panel);
        for (i, &q) in which.iter().enumerate() {
            let mut bits = hits.above[i] & real;
            if bits == 0 {
                continue;
            }
            let q = q as usize;
            let keys = &mut self.keys[q * self.cap..][..self.cap];
            let mut len = self.len[q] as usize;
            while bits != 0 {
                let j = bits.trailing_zeros() as usize;
                bits &= bits - 1;
                keys[len] = key_of(hits.scores[i][j], (first + j) as u32);
                len += 1;
            }
            self.len[q] = len as u32;
            if len + NR > self.cap {
                self.tighten(q, on);
            }
        }
    }

    /// Frees space: raises the bar, or scores exactly what is too close for that.
    fn tighten(&mut self, q: usize, on: &Setting) {
        let keys = &mut self.keys[q * self.cap..][..self.len[q] as usize];
        if let Some(kth) = split(keys, self.keep) {
            self.bar[q] = self.bar[q].max(score_of(kth) - self.window[q]);
        }
        if self.loose {
            self.len[q] = self.len[q].min(self.keep as u32);
            return;
        }
        let mut kept = 0;
        for i in 0..keys.len() {
            if score_of(keys[i]) > self.bar[q] {
                keys[kept] = keys[i];
                kept += 1;
            }
        }
        self.len[q] = kept as u32;
        if kept + NR > self.cap / 4 * 3 {
            self.settle(q, &on.source, on.queries);
        }
    }

    /// Scores a query's candidates exactly and keeps the best.
    fn settle(&mut self, q: usize, source: &Source, queries: &Queries) {
        let exact = &mut self.exact[q];
        let keys = &self.keys[q * self.cap..][..self.len[q] as usize];
        source.score(self.first + q, keys, exact);
        self.len[q] = 0;
        if let Some(kth) = split(exact, self.k) {
            exact.truncate(self.k);
            let least = score_of(kth) / queries.scale(q) - self.window[q] * 0.5;
            self.bar[q] = self.bar[q].max(least);
        }
    }

    /// The candidates of a loose search as they were screened, at most `keep`.
    pub(crate) fn kept(&mut self, q: usize) -> &mut [u64] {
        let keys = &mut self.keys[q * self.cap..][..self.len[q] as usize];
        split(keys, self.keep);
        let keep = self.keep.min(keys.len());
        &mut keys[..keep]
    }

    /// The exact keys of every query's best rows, at least the `k` best of each. Candidates of all
    /// queries are scored in the order of their rows, so that a row comes from memory once.
    pub(crate) fn finish(
        &mut self,
        source: &Source,
        queries: &Queries,
        job: &Job,
    ) -> Result<Vec<Vec<u64>>> {
        let mut found = std::mem::take(&mut self.exact);
        let mut pairs = Vec::new();
        for q in 0..self.len() {
            let keys = &mut self.keys[q * self.cap..][..self.len[q] as usize];
            split(keys, self.keep);
            let sure = self.keep.min(keys.len());
            pairs.extend(keys[..sure].iter().map(|key| (source.row(row_of(*key)), q as u32)));
        }
        source.score_pairs(self.first, &mut pairs, &mut found, job)?;
        // The k-th exact score so far bounds the result from below: what could still pass it is
        // scored too, the rest is certainly worse.
        pairs.clear();
        for (q, found) in found.iter_mut().enumerate() {
            let kth = split(found, self.k).map_or(f32::NEG_INFINITY, score_of);
            let least = kth / queries.scale(q) - self.window[q] * 0.5;
            let keys = &self.keys[q * self.cap..][..self.len[q] as usize];
            let close = keys.iter().skip(self.keep).filter(|key| score_of(**key) >= least);
            pairs.extend(close.map(|key| (source.row(row_of(*key)), q as u32)));
        }
        source.score_pairs(self.first, &mut pairs, &mut found, job)?;
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_sort_by_score_then_lower_row() {
        let scores = [f32::MIN, -1.5, -f32::MIN_POSITIVE, -0.0, f32::MIN_POSITIVE, 1.0, f32::MAX];
        for pair in scores.windows(2) {
            assert!(key_of(pair[0], 0) < key_of(pair[1], u32::MAX - 1), "{pair:?}");
        }
        assert!(key_of(1.0, 3) > key_of(1.0, 4));
        assert_eq!(key_of(-0.0, 5), key_of(0.0, 5));
        for score in scores {
            assert_eq!((score_of(key_of(score, 77)), row_of(key_of(score, 77))), (score, 77));
        }
    }
}
