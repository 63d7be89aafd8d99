//! Exact top-k by inner product: screened in blocks, scored in full where it matters.
//!
//! A block of queries (second-level cache) meets the corpus panel by panel; [`crate::best`] keeps the
//! candidates. The encoded corpus is kept whole when it fits the memory given, otherwise it streams
//! past each super-block of queries in chunks. Rows pass in ascending order and every score that is
//! returned comes from [`crate::vectors::dot`], ties by lower row: the result is the same for every
//! instruction set, thread count and memory.

use crate::best::{Best, Setting, Source, cut, row_of, score_of};
use crate::encode::{Queries, Rows, fitting};
use crate::ivf;
use crate::simd::{Hits, Isa, MAX_MR, NR, Tile};
use crate::vectors::Vectors;
use embkit_core::{Error, Job, Result, par};
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// Queries of a block, and bytes of their encoding, at most.
const QUERY_BLOCK: usize = 1020;
const BLOCK_BYTES: usize = 8 << 20;
/// Queries that are put side by side because they are alike, about, and the corpus from which on it
/// matters.
const ALIKE: usize = 64;
const CACHE_BYTES: usize = 16 << 20;
/// Memory when none is given.
const MEMORY: usize = 2 << 30;

/// Rows and scores of `queries x k`, row-major, best first.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TopK {
    /// Corpus rows.
    pub row: Vec<u32>,
    /// Their inner products with the query.
    pub score: Vec<f32>,
    /// Rows that were scored in full, over all queries.
    pub rescored: u64,
}

/// How to search.
#[derive(Clone, Copy, Debug)]
pub struct SearchParams {
    /// The instruction set; the result does not depend on it.
    pub isa: Isa,
    /// Neighbours per query.
    pub k: usize,
    /// Bytes beside the vectors and the result; 0 for 2 GiB.
    pub memory: usize,
    /// Threads, 0 for all; no effect on the result.
    pub threads: usize,
}

impl Default for SearchParams {
    fn default() -> Self {
        Self { isa: Isa::best(), k: 1, memory: 0, threads: 0 }
    }
}

/// The `k` corpus rows with the largest inner product for each query, ties by lower row.
///
/// Zero vectors are allowed and score 0. `job` advances to the number of queries.
///
/// Errors: [`Error::Usage`] for widths that differ, `k` of 0 or more than the corpus has, and for a
/// row with NaN, an infinity or values too large to multiply; [`Error::Cancelled`].
pub fn topk(queries: &Vectors, corpus: &Vectors, params: &SearchParams, job: &Job) -> Result<TopK> {
    check(queries, corpus, params)?;
    queries.check_finite("query", params.threads, job)?;
    corpus.check_finite("corpus", params.threads, job)?;
    let isa = fitting(params.isa, corpus.width());
    let (nq, n, d, k) = (queries.len(), corpus.len(), corpus.width(), params.k);
    let threads = if params.threads == 0 { par::threads() } else { params.threads };
    let memory = if params.memory == 0 { MEMORY } else { params.memory };

    let chunk = (memory / 2 / Rows::bytes_per_row(isa, d)).max(4096) / NR * NR;
    let per_query = 8 * Best::capacity(k) + Rows::bytes_per_row(isa, d) + 64;
    // Enough blocks to keep the threads even, not more than memory holds.
    let most = (memory / 2 / per_query).max(isa.mr()).min(16 * threads * QUERY_BLOCK);
    let total = Total::new(nq as u64 * n as u64, nq as u64, job);
    let encode = |range: &Range<usize>| {
        let first = range.start;
        Rows::new(isa, corpus, range.len(), |i| first + i, threads, job)
    };
    let chunks: Vec<Range<usize>> =
        (0..n).step_by(chunk).map(|first| first..n.min(first + chunk)).collect();
    let whole = if chunks.len() == 1 { Some(encode(&chunks[0])?) } else { None };

    let order = order(isa, queries, n * d * 4, threads, job)?;
    let source = Source { queries, corpus, order: order.as_deref(), rows: None };
    let mut out = TopK::of(nq, k);
    for first in (0..nq).step_by(most) {
        let here = first..nq.min(first + most);
        let blocks = Blocks::new(isa, &source, here, threads, params.k);
        for range in &chunks {
            let made = if whole.is_none() { Some(encode(range)?) } else { None };
            if let Some(rows) = whole.as_ref().or(made.as_ref()) {
                blocks.scan(rows, range.start, &source, threads, &total)?;
            }
        }
        blocks.finish(&source, threads, job, &mut out)?;
    }
    Ok(out)
}

/// An order of many queries in which neighbours are alike, when the corpus is too large for caches: the
/// rows that one of them scores in full are then still near when the next one does.
fn order(
    isa: Isa,
    queries: &Vectors,
    corpus_bytes: usize,
    threads: usize,
    job: &Job,
) -> Result<Option<Vec<u32>>> {
    let groups = (queries.len() / ALIKE).min(256);
    if groups < 16 || corpus_bytes < CACHE_BYTES {
        return Ok(None);
    }
    let mut scratch = Vec::new();
    let step = queries.len() / groups;
    let some = (0..groups).flat_map(|i| queries.row(i * step, &mut scratch).to_vec());
    let some: Vec<f32> = some.collect();
    let (group_of, _) = ivf::assign(isa, queries, queries.len(), |i| i, &some, threads, job)?;
    Ok(Some(ivf::group(&group_of, groups).1))
}

fn check(queries: &Vectors, corpus: &Vectors, params: &SearchParams) -> Result<()> {
    if !Isa::available().contains(&params.isa) {
        return Err(Error::usage(
            format!("{:?} kernels on this machine", params.isa),
            format!("Use one of {:?}", Isa::available()),
        ));
    }
    check_shapes(queries, corpus.len(), corpus.width(), params.k)
}

pub(crate) fn check_shapes(queries: &Vectors, n: usize, d: usize, k: usize) -> Result<()> {
    if queries.width() != d {
        return Err(Error::usage(
            format!("queries of width {}, corpus of width {d}", queries.width()),
            "Embed both with the same model and width",
        ));
    }
    if k == 0 || k > n {
        return Err(Error::usage(
            format!("top {k} of {n} corpus rows"),
            "Ask for at least 1 and at most as many rows as the corpus has",
        ));
    }
    Ok(())
}

/// Progress of all tasks, told in queries.
pub(crate) struct Total<'a> {
    pub(crate) job: &'a Job,
    work: u64,
    queries: u64,
    done: AtomicU64,
}

impl<'a> Total<'a> {
    pub(crate) fn new(work: u64, queries: u64, job: &'a Job) -> Self {
        Self { job, work: work.max(1), queries, done: AtomicU64::new(0) }
    }

    /// Adds to the work and reports the queries that it stands for.
    pub(crate) fn add(&self, work: u64) {
        let before = self.done.fetch_add(work, Ordering::Relaxed);
        let told = |work: u64| {
            (u128::from(work) * u128::from(self.queries) / u128::from(self.work)) as u64
        };
        self.job.advance(told(before + work) - told(before));
    }
}

/// Blocks of a super-block's queries, each with the candidates of every part of the corpus.
struct Blocks {
    isa: Isa,
    k: usize,
    block: Vec<(Range<usize>, Queries)>,
    /// Few queries are not enough for all threads: then the corpus is shared out as well.
    parts: usize,
    best: Vec<Mutex<Option<Best>>>, // block-major
}

impl Blocks {
    fn new(isa: Isa, source: &Source, here: Range<usize>, threads: usize, k: usize) -> Self {
        let (mr, n, d) = (isa.mr(), source.corpus.len(), source.corpus.width());
        let size = QUERY_BLOCK.min(BLOCK_BYTES / Rows::bytes_per_row(isa, d)).max(mr);
        let size = size.min(here.len().div_ceil(threads)).max(1).next_multiple_of(mr);
        let count = here.len().div_ceil(size);
        let parts = (threads / count.max(1)).clamp(1, n.div_ceil(4 * k + 4096));
        let block = par::map_blocks(here.len(), size, threads, |range| {
            let range = here.start + range.start..here.start + range.end;
            let query_of = |i| source.query(range.start + i);
            (range.clone(), Queries::new(isa, source.queries, range.len(), query_of))
        });
        let best = (0..count * parts).map(|_| Mutex::new(None)).collect();
        Self { isa, k, block, parts, best }
    }

    fn scan(
        &self,
        rows: &Rows,
        first: usize,
        source: &Source,
        threads: usize,
        total: &Total,
    ) -> Result<()> {
        let share = rows.panels().div_ceil(self.parts);
        par::try_map_blocks(self.best.len(), 1, threads, |task| {
            let (range, queries) = &self.block[task.start / self.parts];
            let part = task.start % self.parts;
            let panels = part * share..rows.panels().min((part + 1) * share);
            let mut slot = self.best[task.start].lock().unwrap_or_else(|p| p.into_inner());
            let fresh = || Best::exact(self.isa, self.k, queries.len(), range.start);
            let best = slot.get_or_insert_with(fresh);
            best.widen(queries, rows);
            scan(best, panels, first, &Setting { queries, rows, source: *source }, total)
        })
        .map(|_| ())
    }

    fn finish(&self, source: &Source, threads: usize, job: &Job, out: &mut TopK) -> Result<()> {
        let found = par::try_map_blocks(self.block.len(), 1, threads, |task| {
            let b = task.start;
            let mut keys = vec![Vec::new(); self.block[b].1.len()];
            let mut found = TopK::default();
            for slot in &self.best[b * self.parts..(b + 1) * self.parts] {
                let mut slot = slot.lock().unwrap_or_else(|p| p.into_inner());
                let Some(best) = slot.as_mut() else { continue };
                let part = best.finish(source, &self.block[b].1, job)?;
                keys.iter_mut().zip(part).for_each(|(all, mut part)| all.append(&mut part));
            }
            for keys in &mut keys {
                found.rescored += keys.len() as u64;
                found.take(keys, self.k);
            }
            Ok(found)
        })?;
        for ((range, _), found) in self.block.iter().zip(found) {
            out.place(range.clone().map(|place| source.query(place)), self.k, &found);
        }
        Ok(())
    }
}

impl TopK {
    /// Adds a query's best `k` of `keys`.
    pub(crate) fn take(&mut self, keys: &mut Vec<u64>, k: usize) {
        cut(keys, k);
        keys.sort_unstable_by(|a, b| b.cmp(a));
        self.row.extend(keys.iter().map(|&key| row_of(key)));
        self.score.extend(keys.iter().map(|&key| score_of(key)));
    }

    /// Space for `nq` queries.
    pub(crate) fn of(nq: usize, k: usize) -> Self {
        Self { row: vec![0; nq * k], score: vec![0.0; nq * k], rescored: 0 }
    }

    /// Puts what was found where `queries` belong.
    pub(crate) fn place(&mut self, queries: impl Iterator<Item = usize>, k: usize, found: &TopK) {
        let rows = found.row.chunks(k).zip(found.score.chunks(k));
        for (query, (row, score)) in queries.zip(rows) {
            self.row[query * k..][..k].copy_from_slice(row);
            self.score[query * k..][..k].copy_from_slice(score);
        }
        self.rescored += found.rescored;
    }
}

/// Brings all queries past some panels; the first panel's first position is `first`.
pub(crate) fn scan(
    best: &mut Best,
    panels: Range<usize>,
    first: usize,
    on: &Setting,
    total: &Total,
) -> Result<()> {
    let all: Vec<u32> = (0..on.queries.len() as u32).collect();
    let pack = |which| {
        let mut tile = Tile::default();
        on.queries.pack(which, &mut tile);
        (which, tile)
    };
    let tiles: Vec<(&[u32], Tile)> = all.chunks(on.queries.tile()).map(pack).collect();
    let mut hits = Hits { above: [0; MAX_MR], scores: [[0.0; NR]; MAX_MR] };
    for panel in panels {
        total.job.check()?;
        for (which, tile) in &tiles {
            best.meet(which, tile, panel, first + panel * NR, &mut hits, on);
        }
        total.add(best.len() as u64 * NR.min(on.rows.len() - panel * NR) as u64);
    }
    Ok(())
}
