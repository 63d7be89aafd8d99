//! Exact top-k by inner product, blocked.
//!
//! A task is a block of queries (packed once, about a megabyte: second-level cache) against a range
//! of the corpus. The corpus is packed panel by panel as it streams by, so memory is bounded by
//! threads x (queries of a block x (d x 4 + k x 16 bytes)), whatever the corpus. Each query keeps up
//! to 2k candidates as sortable integers and cuts them to k when full; the k-th score is the bar
//! that a tile's scores must exceed. Rows pass in ascending order, so an equal score that comes
//! later never displaces an earlier one: ties go to the lower row.

use crate::simd::{Isa, MAX_MR, MAX_TILE, tile};
use embkit_core::{Error, Job, Result, par};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// Queries of a block, and bytes of its packed vectors and of its candidates, at most.
const QUERY_BLOCK: usize = 1024;
const PACKED_BYTES: usize = 8 << 20;
const CANDIDATE_BYTES: usize = 64 << 20;

/// Rows and scores of `queries x k`, row-major, best first.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TopK {
    /// Corpus rows.
    pub row: Vec<u32>,
    /// Their inner products with the query.
    pub score: Vec<f32>,
}

/// The `k` corpus rows with the largest inner product for each query, ties by lower row.
///
/// `queries` is `[nq, d]`, `corpus` `[n, d]`, both row-major; `threads` 0 means all. Zero vectors
/// are allowed and score 0. The result is the same for every thread count; between instruction sets
/// scores may differ in the last bits. `job` advances to `nq`.
///
/// Errors: [`Error::Usage`] for shapes that do not fit, `k` of 0 or more than `n`, and for a row
/// with NaN, an infinity or values too large to multiply; [`Error::Cancelled`].
pub fn topk(
    queries: &[f32],
    corpus: &[f32],
    d: usize,
    k: usize,
    threads: usize,
    job: &Job,
) -> Result<TopK> {
    topk_on(Isa::best(), queries, corpus, d, k, threads, job)
}

/// [`topk`] on a given instruction set, for tests and benches.
pub fn topk_on(
    isa: Isa,
    queries: &[f32],
    corpus: &[f32],
    d: usize,
    k: usize,
    threads: usize,
    job: &Job,
) -> Result<TopK> {
    let (nq, n) = check_shapes(queries, corpus, d, k)?;
    if !Isa::available().contains(&isa) {
        return Err(Error::usage(
            format!("{isa:?} kernels on this machine"),
            format!("Use one of {:?}", Isa::available()),
        ));
    }
    check_finite("query", queries, d, threads, job)?;
    check_finite("corpus", corpus, d, threads, job)?;

    let threads = if threads == 0 { par::threads() } else { threads };
    let block = block_of(isa, nq.div_ceil(threads), d, k);
    let blocks = nq.div_ceil(block);
    // Too few queries for all threads: share out the corpus as well, in parts of at least a few k.
    let parts = (threads / blocks.max(1)).clamp(1, n.div_ceil(4 * k + 4096));
    let part = n.div_ceil(parts).next_multiple_of(isa.nr());
    let parts = n.div_ceil(part);
    let total = Total::new(parts, job);

    let found = par::try_map_blocks(blocks * parts, 1, threads, |task| {
        let (b, p) = (task.start / parts, task.start % parts);
        let range = b * block..nq.min((b + 1) * block);
        let rows = p * part..n.min((p + 1) * part);
        Search::new(isa, &queries[range.start * d..range.end * d], d, k).run(corpus, rows, &total)
    })?;

    let mut out = TopK { row: Vec::with_capacity(nq * k), score: Vec::with_capacity(nq * k) };
    let mut merged = Vec::new();
    for tasks in found.chunks(parts) {
        let queries = tasks.first().map_or(0, |t| t.len.len());
        for q in 0..queries {
            merged.clear();
            tasks.iter().for_each(|t| merged.extend_from_slice(t.best(q)));
            cut(&mut merged, k);
            merged.sort_unstable_by(|a, b| b.cmp(a));
            out.row.extend(merged.iter().map(|&key| row_of(key)));
            out.score.extend(merged.iter().map(|&key| score_of(key)));
        }
    }
    Ok(out)
}

fn check_shapes(queries: &[f32], corpus: &[f32], d: usize, k: usize) -> Result<(usize, usize)> {
    if d == 0 || !queries.len().is_multiple_of(d) || !corpus.len().is_multiple_of(d) {
        return Err(Error::usage(
            format!("{} query and {} corpus values of width {d}", queries.len(), corpus.len()),
            "Pass row-major [nq, d] and [n, d] of the same d, at least 1",
        ));
    }
    let n = corpus.len() / d;
    if n > u32::MAX as usize {
        return Err(Error::usage(
            format!("{n} corpus rows"),
            "Search parts of fewer than 2^32 rows and merge their results",
        ));
    }
    if k == 0 || k > n {
        return Err(Error::usage(
            format!("top {k} of {n} corpus rows"),
            "Ask for at least 1 and at most as many rows as the corpus has",
        ));
    }
    Ok((queries.len() / d, n))
}

/// Refuses a row whose squared norm is not finite. By Cauchy-Schwarz no score of the others can
/// then overflow, nor any partial sum of one, so that every comparison below is between numbers.
fn check_finite(what: &str, vectors: &[f32], d: usize, threads: usize, job: &Job) -> Result<()> {
    let check = |range: Range<usize>| {
        job.check()?;
        for row in range {
            let values = &vectors[row * d..(row + 1) * d];
            let (lanes, rest) = values.as_chunks::<16>();
            let mut sum = [0f32; 16];
            lanes.iter().for_each(|v| (0..16).for_each(|i| sum[i] += v[i] * v[i]));
            let squares = sum.iter().sum::<f32>() + rest.iter().map(|v| v * v).sum::<f32>();
            if !squares.is_finite() {
                let value = values.iter().position(|v| !v.is_finite());
                let detail = match value {
                    Some(at) => format!("holds {} at position {at}", values[at]),
                    None => "is too long: its squared norm is not a finite f32".to_owned(),
                };
                return Err(Error::usage(
                    format!("{what} row {row} {detail}"),
                    "Look at that row's text and at the model; NaN usually means a broken checkpoint",
                ));
            }
        }
        Ok(())
    };
    par::try_map_blocks(vectors.len() / d, 4096, threads, check).map(|_| ())
}

/// Queries per block: even over the threads, whole tiles, and within the memory bounds.
fn block_of(isa: Isa, per_thread: usize, d: usize, k: usize) -> usize {
    let most = QUERY_BLOCK.min(PACKED_BYTES / (4 * d)).min(CANDIDATE_BYTES / (16 * k));
    let whole_tiles = (most / isa.mr()).max(1) * isa.mr();
    whole_tiles.min(per_thread.next_multiple_of(isa.mr()).max(isa.mr()))
}

/// Progress of all tasks in queries: a query counts in `parts` shares, a share as it is scanned.
struct Total<'a> {
    job: &'a Job,
    scanned: AtomicU64,
    per_query: u64,
}

impl<'a> Total<'a> {
    const STEPS: u64 = 1 << 16;

    fn new(parts: usize, job: &'a Job) -> Self {
        Self { job, scanned: AtomicU64::new(0), per_query: parts as u64 * Self::STEPS }
    }

    /// Adds work in 2^-16 of a task's query and reports whole queries.
    fn add(&self, work: u64) {
        let before = self.scanned.fetch_add(work, Ordering::Relaxed);
        self.job.advance((before + work) / self.per_query - before / self.per_query);
    }
}

/// A score and its row as one integer that sorts by score, then by lower row.
fn key_of(score: f32, row: u32) -> u64 {
    let bits = (score + 0.0).to_bits(); // -0 becomes 0: they are equal scores
    let ordered = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
    u64::from(ordered) << 32 | u64::from(!row)
}

fn score_of(key: u64) -> f32 {
    let ordered = (key >> 32) as u32;
    f32::from_bits(if ordered >> 31 == 1 { ordered & !(1 << 31) } else { !ordered })
}

fn row_of(key: u64) -> u32 {
    !(key as u32)
}

/// Leaves the `k` largest keys, the smallest of them last when anything was cut.
fn cut(keys: &mut Vec<u64>, k: usize) {
    if keys.len() > k {
        keys.select_nth_unstable_by(k - 1, |a, b| b.cmp(a));
        keys.truncate(k);
    }
}

/// One block of queries on its way through a range of the corpus.
struct Search {
    isa: Isa,
    d: usize,
    k: usize,
    packed: Vec<f32>, // tiles of mr queries, k-major
    least: Vec<f32>,  // the score to exceed, +inf for the padding of the last tile
    cap: usize,
    keys: Vec<u64>, // `cap` per query
    len: Vec<usize>,
}

/// The candidates of one task.
struct Found {
    cap: usize,
    keys: Vec<u64>,
    len: Vec<usize>,
}

impl Found {
    fn best(&self, query: usize) -> &[u64] {
        &self.keys[query * self.cap..][..self.len[query]]
    }
}

impl Search {
    fn new(isa: Isa, queries: &[f32], d: usize, k: usize) -> Self {
        let (mr, nq) = (isa.mr(), queries.len() / d);
        let tiles = nq.div_ceil(mr);
        let mut packed = vec![0f32; tiles * mr * d];
        for (tile, queries) in packed.chunks_exact_mut(mr * d).zip(queries.chunks(mr * d)) {
            pack(tile, queries, d, mr);
        }
        let mut least = vec![f32::INFINITY; tiles * mr];
        least[..nq].fill(f32::NEG_INFINITY);
        let cap = 2 * k + 64; // room for a whole tile row beyond the last cut
        Self { isa, d, k, packed, least, cap, keys: vec![0; nq * cap], len: vec![0; nq] }
    }

    fn run(mut self, corpus: &[f32], rows: Range<usize>, total: &Total) -> Result<Found> {
        let (mr, nr, d) = (self.isa.mr(), self.isa.nr(), self.d);
        let mut panel = vec![0f32; nr * d];
        let (mut scores, mut above) = ([0f32; MAX_TILE], [0u32; MAX_MR]);
        let work = self.len.len() as u64 * Total::STEPS;
        let mut done = 0;
        for first in rows.clone().step_by(nr) {
            total.job.check()?;
            let here = nr.min(rows.end - first);
            pack(&mut panel, &corpus[first * d..(first + here) * d], d, nr);
            let real = u32::MAX >> (32 - here);
            for (t, queries) in self.packed.chunks_exact(mr * d).enumerate() {
                let mut least = [f32::INFINITY; MAX_MR];
                least[..mr].copy_from_slice(&self.least[t * mr..][..mr]);
                tile(self.isa, queries, &panel, &least, &mut scores, &mut above);
                for i in 0..mr {
                    let mut bits = above[i] & real;
                    if bits == 0 {
                        continue;
                    }
                    let q = t * mr + i;
                    let keys = &mut self.keys[q * self.cap..][..self.cap];
                    let len = &mut self.len[q];
                    while bits != 0 {
                        let j = bits.trailing_zeros() as usize;
                        bits &= bits - 1;
                        keys[*len] = key_of(scores[i * nr + j], (first + j) as u32);
                        *len += 1;
                    }
                    if *len + nr > self.cap {
                        let (_, kth, _) =
                            keys[..*len].select_nth_unstable_by(self.k - 1, |a, b| b.cmp(a));
                        self.least[q] = score_of(*kth);
                        *len = self.k;
                    }
                }
            }
            let reached = work * (first + here - rows.start) as u64 / rows.len() as u64;
            total.add(reached - done);
            done = reached;
        }
        for (q, len) in self.len.iter_mut().enumerate() {
            if *len > self.k {
                let keys = &mut self.keys[q * self.cap..][..*len];
                keys.select_nth_unstable_by(self.k - 1, |a, b| b.cmp(a));
                *len = self.k;
            }
        }
        Ok(Found { cap: self.cap, keys: self.keys, len: self.len })
    }
}

/// Writes up to `width` row-major vectors k-major; what is missing becomes zeros.
fn pack(out: &mut [f32], vectors: &[f32], d: usize, width: usize) {
    let count = vectors.len() / d;
    if count < width {
        out.fill(0.0);
    }
    // Sixteen elements (a cache line) of each vector at a time: reads and writes both stay in L1.
    for from in (0..d).step_by(16) {
        let to = d.min(from + 16);
        for (j, vector) in vectors.chunks_exact(d).enumerate() {
            for (step, value) in vector[from..to].iter().enumerate() {
                out[(from + step) * width + j] = *value;
            }
        }
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

    #[test]
    fn blocks_are_whole_tiles_within_bounds() {
        for isa in [Isa::Avx512, Isa::Avx2, Isa::Portable] {
            for (d, k) in [(1, 1), (384, 100), (4096, 1000), (1 << 20, 1 << 20)] {
                for per_thread in [0, 1, 5, 1000, 1 << 20] {
                    let block = block_of(isa, per_thread, d, k);
                    assert!(block > 0 && block.is_multiple_of(isa.mr()) && block <= QUERY_BLOCK);
                    assert!(block == isa.mr() || block * d * 4 <= PACKED_BYTES);
                }
            }
        }
    }
}
