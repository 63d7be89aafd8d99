//! Approximate top-k for many queries: lists around centroids, visited list by list.
//!
//! The usual inverted file answers one query at a time and reads its lists from memory for each. Here
//! all queries are known: for every list the queries that visit it are put into tiles and meet its
//! panels like an exact search, so a list is read once for hundreds of queries. A query's nearest list
//! comes first, so that its bar is high when the others come. The best candidates by screened score
//! are scored in full at the end.
//!
//! Centroids are found by spherical k-means on a seeded sample; a list that runs empty takes over half
//! of the longest. Everything depends on the vectors and the seed only, not on threads.

use crate::best::{self, Best, Setting, Source, key_of, row_of};
use crate::encode::{Queries, Rows, fitting};
use crate::simd::{Hits, Isa, MAX_MR, NR, Tile};
use crate::topk::{TopK, Total, check_shapes, scan};
use crate::vectors::{Part, Vectors, dot};
use embkit_core::permute::Feistel;
use embkit_core::{Error, Job, Result, par};
use std::ops::Range;

/// Rows of the sample for each list, and rounds of k-means.
const SAMPLE: usize = 64;
const ROUNDS: usize = 6;
/// Rows that look for their list together.
const ASSIGN_BLOCK: usize = 2040;
/// Queries that visit the lists together: the more, the fuller the tiles.
const QUERY_BLOCK: usize = 8160;

/// A corpus in lists.
pub struct Ivf {
    isa: Isa,
    n: usize,
    d: usize,
    centroids: Vec<f32>,
    coarse: Rows,
    /// Panels of each list.
    lists: Vec<Range<usize>>,
    rows: Rows,
    /// The list of each panel.
    list: Vec<u32>,
    /// The corpus row at each position of `rows`; positions between lists repeat one.
    row: Vec<u32>,
}

/// How many lists suit `n` rows: the work of finding lists and of visiting them balance.
pub fn list_count(n: usize) -> usize {
    ((n as f64).sqrt() * 1.5) as usize / NR * NR
}

impl Ivf {
    /// Sorts `corpus` into about `lists` lists.
    ///
    /// Errors: [`Error::Usage`] for no list, more lists than rows, or rows that are not finite;
    /// [`Error::Cancelled`].
    pub fn build(
        isa: Isa,
        corpus: &Vectors,
        lists: usize,
        seed: u64,
        threads: usize,
        job: &Job,
    ) -> Result<Self> {
        if lists == 0 || lists > corpus.len() {
            return Err(Error::usage(
                format!("{lists} lists of {} rows", corpus.len()),
                "Ask for at least 1 list and at most as many as there are rows",
            ));
        }
        corpus.check_finite("corpus", threads, job)?;
        let isa = fitting(isa, corpus.width());
        let centroids = train(isa, corpus, lists, seed, threads, job)?;
        let n = corpus.len();
        let (list, coarse) = assign(isa, corpus, n, |i| i, &centroids, threads, job)?;
        let (starts, order) = group(&list, lists);

        // Each list begins with a panel of its own.
        let (mut row, mut masks, mut panels) = (Vec::new(), Vec::new(), Vec::with_capacity(lists));
        for members in starts.windows(2) {
            let first = masks.len();
            for panel in order[members[0]..members[1]].chunks(NR) {
                masks.push(u32::MAX >> (NR - panel.len()));
                row.extend_from_slice(panel);
                row.resize(masks.len() * NR, panel[0]);
            }
            panels.push(first..masks.len());
        }
        let of = |i: usize| row[i] as usize;
        let rows = Rows::new(isa, corpus, row.len(), of, threads, job)?.with_masks(masks);
        let list = (0u32..).zip(&panels).flat_map(|(l, p)| p.clone().map(move |_| l)).collect();
        Ok(Self { isa, n, d: corpus.width(), centroids, coarse, lists: panels, rows, list, row })
    }

    /// Number of lists.
    pub fn lists(&self) -> usize {
        self.lists.len()
    }

    /// The `k` nearest rows among the `probes` lists nearest to each query, as [`crate::topk`]
    /// returns them. A query whose lists hold fewer than `k` rows is searched exactly.
    ///
    /// `corpus` is what the lists were built from. Errors: as [`crate::topk`].
    pub fn search(
        &self,
        queries: &Vectors,
        corpus: &Vectors,
        k: usize,
        probes: usize,
        threads: usize,
        job: &Job,
    ) -> Result<TopK> {
        if (corpus.len(), corpus.width()) != (self.n, self.d) {
            return Err(Error::usage(
                format!("a corpus of {} rows, lists of {}", corpus.len(), self.n),
                "Search the corpus that the lists were built from",
            ));
        }
        check_shapes(queries, self.n, self.d, k)?;
        queries.check_finite("query", threads, job)?;
        let (probes, nq) = (probes.clamp(1, self.lists()), queries.len());
        let threads = if threads == 0 { par::threads() } else { threads };
        // Queries of one list side by side: they visit the same lists, and score the same rows.
        let (nearest, _) = assign(self.isa, queries, nq, |i| i, &self.centroids, threads, job)?;
        let order = group(&nearest, self.lists()).1;
        let source = Source { queries, corpus, order: Some(&order[..]), rows: Some(&self.row) };
        let block = QUERY_BLOCK.min(nq.div_ceil(threads)).max(1);
        let found = par::try_map_blocks(nq, block, threads, |range| {
            Ok((range.clone(), self.block(&source, range, k, probes, job)?))
        })?;
        let mut out = TopK::of(nq, k);
        for (range, found) in found {
            out.place(range.map(|place| source.query(place)), k, &found);
        }
        Ok(out)
    }

    /// The fewest probes with which `recall` of the true neighbours of `queries` lie in visited
    /// lists; `neighbours` has `k` rows per query.
    pub(crate) fn probes_for(
        &self,
        queries: &Vectors,
        neighbours: &[u32],
        k: usize,
        recall: f64,
        job: &Job,
    ) -> Result<usize> {
        let mut list = vec![0u32; self.n];
        for (position, row) in self.row.iter().enumerate() {
            list[*row as usize] = self.list[position / NR];
        }
        let encoded = Queries::new(self.isa, queries, queries.len(), |i| i);
        let visits = self.visits(&encoded, self.lists(), job)?;
        let mut place = vec![0u32; self.lists()];
        let mut found = vec![0usize; self.lists()]; // neighbours by the place of their list
        for (lists, rows) in visits.chunks(self.lists()).zip(neighbours.chunks(k)) {
            (0..).zip(lists).for_each(|(i, list)| place[*list as usize] = i);
            rows.iter().for_each(|row| found[place[list[*row as usize] as usize] as usize] += 1);
        }
        let enough = (recall * neighbours.len() as f64).ceil() as usize;
        let mut sum = 0;
        let fewest = found.iter().position(|count| {
            sum += count;
            sum >= enough
        });
        Ok(fewest.map_or(self.lists(), |at| at + 1))
    }

    fn visits(&self, queries: &Queries, count: usize, job: &Job) -> Result<Vec<u32>> {
        let mut best = Best::loose(self.isa, count, count, queries.len(), 0);
        let centroids = Vectors::new(&[Part::F32(&self.centroids)], self.d)?;
        let source = Source { queries: &centroids, corpus: &centroids, order: None, rows: None };
        let total = Total::new(1, 0, job);
        let on = Setting { queries, rows: &self.coarse, source };
        scan(&mut best, 0..self.coarse.panels(), 0, &on, &total)?;
        let mut lists = Vec::with_capacity(queries.len() * count);
        for q in 0..queries.len() {
            let nearest = best.kept(q);
            nearest.sort_unstable_by(|a, b| b.cmp(a));
            lists.extend(nearest.iter().map(|key| row_of(*key)));
        }
        Ok(lists)
    }

    fn block(
        &self,
        source: &Source,
        range: Range<usize>,
        k: usize,
        probes: usize,
        job: &Job,
    ) -> Result<TopK> {
        let n = range.len();
        let query_of = |i| source.query(range.start + i);
        let encoded = Queries::new(self.isa, source.queries, n, query_of);
        let visits = self.visits(&encoded, probes, job)?;
        let mut best = Best::loose(self.isa, k, k + k / 8 + 8, n, range.start);
        let first: Vec<u32> = visits.iter().step_by(probes).copied().collect();
        let on = Setting { queries: &encoded, rows: &self.rows, source: *source };
        self.visit(&mut best, &on, &first, |i| i as u32, job)?;
        // Entry i of the rest belongs to query i / (probes - 1).
        let others: Vec<u32> = visits.chunks(probes).flat_map(|v| v[1..].iter().copied()).collect();
        let each = (probes - 1).max(1);
        self.visit(&mut best, &on, &others, |i| (i / each) as u32, job)?;

        let (starts, keys) = self.rescore(&mut best, source, range.start, n, job)?;
        let mut out = TopK { rescored: keys.len() as u64, ..TopK::default() };
        let mut own = Vec::new();
        for q in 0..n {
            own.clear();
            own.extend_from_slice(&keys[starts[q]..starts[q + 1]]);
            if own.len() < k {
                self.complete(range.start + q, source, k, &mut own, job)?;
            }
            out.take(&mut own, k);
            job.advance(1);
        }
        Ok(out)
    }

    /// The exact keys of every query's candidates, and where each query's begin. Candidates of one
    /// list are scored together: its rows and a query's vector are then in the cache for several.
    fn rescore(
        &self,
        best: &mut Best,
        source: &Source,
        first: usize,
        n: usize,
        job: &Job,
    ) -> Result<(Vec<usize>, Vec<u64>)> {
        let (mut starts, mut pairs, mut lists) = (vec![0], Vec::new(), Vec::new());
        for q in 0..n as u32 {
            for key in best.kept(q as usize) {
                let position = row_of(*key);
                pairs.push((q, position));
                lists.push(self.list[position as usize / NR]);
            }
            starts.push(pairs.len());
        }
        let (bounds, order) = group(&lists, self.lists());
        drop(lists);
        let mut keys = vec![0; pairs.len()];
        let mut scratch = [Vec::new(), Vec::new()];
        let [a, b] = &mut scratch;
        for bounds in bounds.windows(2) {
            job.check()?;
            let mut last = (u32::MAX, &[][..]);
            for &i in &order[bounds[0]..bounds[1]] {
                let (q, position) = pairs[i as usize];
                if last.0 != q {
                    last = (q, source.queries.row(source.query(first + q as usize), a));
                }
                let row = self.row[position as usize];
                let score = dot(last.1, source.corpus.row(row as usize, b));
                keys[i as usize] = key_of(score, row);
            }
        }
        Ok((starts, keys))
    }

    /// Brings the queries of some visits to their lists; `query_of` turns a visit into a query.
    fn visit(
        &self,
        best: &mut Best,
        on: &Setting,
        lists: &[u32],
        query_of: impl Fn(usize) -> u32,
        job: &Job,
    ) -> Result<()> {
        let (starts, order) = group(lists, self.lists());
        let mut hits = Hits { above: [0; MAX_MR], scores: [[0.0; NR]; MAX_MR] };
        let (mut tile, mut which) = (Tile::default(), Vec::with_capacity(MAX_MR));
        for (list, visits) in starts.windows(2).enumerate() {
            job.check()?;
            for visits in order[visits[0]..visits[1]].chunks(on.queries.tile()) {
                which.clear();
                which.extend(visits.iter().map(|v| query_of(*v as usize)));
                on.queries.pack(&which, &mut tile);
                for panel in self.lists[list].clone() {
                    best.meet(&which, &tile, panel, panel * NR, &mut hits, on);
                }
            }
        }
        Ok(())
    }

    /// All rows for a query whose lists hold fewer than `k`: rare, and then exact.
    fn complete(
        &self,
        place: usize,
        source: &Source,
        k: usize,
        keys: &mut Vec<u64>,
        job: &Job,
    ) -> Result<()> {
        keys.clear();
        let mut some = Vec::with_capacity(4096);
        for first in (0..self.row.len()).step_by(4096) {
            job.check()?;
            let here = first..self.row.len().min(first + 4096);
            let real = here.filter(|i| self.rows.real(i / NR) >> (i % NR) & 1 == 1);
            some.clear();
            some.extend(real.map(|i| key_of(0.0, i as u32)));
            source.score(place, &some, keys);
            best::cut(keys, k);
        }
        Ok(())
    }
}

/// Centroids of length 1, `lists x d`.
fn train(
    isa: Isa,
    corpus: &Vectors,
    lists: usize,
    seed: u64,
    threads: usize,
    job: &Job,
) -> Result<Vec<f32>> {
    let (n, d) = (corpus.len(), corpus.width());
    let order = Feistel::new(n as u64, seed);
    let size = n.min(lists * SAMPLE);
    let sample: Vec<u32> = (0..size as u64).map(|i| order.get(i) as u32).collect();
    let mut scratch = Vec::new();
    let mut centroids = Vec::with_capacity(lists * d);
    for row in &sample[..lists] {
        centroids.extend_from_slice(corpus.row(*row as usize, &mut scratch));
    }
    centroids.chunks_mut(d).for_each(normalise);
    for round in 0..ROUNDS {
        let row_of = |i: usize| sample[i] as usize;
        let (list, _) = assign(isa, corpus, size, row_of, &centroids, threads, job)?;
        let (starts, members) = group(&list, lists);
        let sums = par::try_map_blocks(lists, 16, threads, |range| {
            job.check()?;
            let mut sums = vec![0f32; range.len() * d];
            let mut scratch = Vec::new();
            for (list, sum) in range.zip(sums.chunks_mut(d)) {
                for i in &members[starts[list]..starts[list + 1]] {
                    let row = corpus.row(sample[*i as usize] as usize, &mut scratch);
                    sum.iter_mut().zip(row).for_each(|(s, x)| *s += x);
                }
                normalise(sum);
            }
            Ok(sums)
        })?;
        centroids = sums.concat();
        if round + 1 < ROUNDS {
            refill(&mut centroids, d, &starts, |i| sample[members[i] as usize] as usize, corpus);
        }
    }
    Ok(centroids)
}

/// Gives lists that ran empty a member of the longest ones.
fn refill(
    centroids: &mut [f32],
    d: usize,
    starts: &[usize],
    row_of: impl Fn(usize) -> usize,
    corpus: &Vectors,
) {
    let size = |list: usize| starts[list + 1] - starts[list];
    let lists = starts.len() - 1;
    let mut longest: Vec<usize> = (0..lists).collect();
    longest.sort_by_key(|list| std::cmp::Reverse(size(*list)));
    let empty: Vec<usize> = (0..lists).filter(|list| size(*list) == 0).collect();
    let mut scratch = Vec::new();
    for (list, from) in empty.into_iter().zip(longest) {
        let middle = starts[from] + size(from) / 2;
        if size(from) > 1 {
            centroids[list * d..][..d].copy_from_slice(corpus.row(row_of(middle), &mut scratch));
            normalise(&mut centroids[list * d..][..d]);
        }
    }
}

/// The nearest centroid of each of `n` rows, and the encoded centroids.
pub(crate) fn assign(
    isa: Isa,
    corpus: &Vectors,
    n: usize,
    row_of: impl Fn(usize) -> usize + Sync,
    centroids: &[f32],
    threads: usize,
    job: &Job,
) -> Result<(Vec<u32>, Rows)> {
    let centroids = Vectors::new(&[Part::F32(centroids)], corpus.width())?;
    let rows = Rows::new(isa, &centroids, centroids.len(), |i| i, threads, job)?;
    let source = Source { queries: &centroids, corpus: &centroids, order: None, rows: None };
    let list = par::try_map_blocks(n, ASSIGN_BLOCK, threads, |range| {
        let queries = Queries::new(isa, corpus, range.len(), |i| row_of(range.start + i));
        let mut best = Best::loose(isa, 1, 1, queries.len(), 0);
        let on = Setting { queries: &queries, rows: &rows, source };
        scan(&mut best, 0..rows.panels(), 0, &on, &Total::new(1, 0, job))?;
        Ok((0..queries.len())
            .map(|q| best.kept(q).first().map_or(0, |key| best::row_of(*key)))
            .collect::<Vec<u32>>())
    })?;
    Ok((list.concat(), rows))
}

/// Positions sorted by their group, in order inside one: where each group begins, and the positions.
pub(crate) fn group(of: &[u32], groups: usize) -> (Vec<usize>, Vec<u32>) {
    let mut starts = vec![0usize; groups + 1];
    of.iter().for_each(|g| starts[*g as usize + 1] += 1);
    (0..groups).for_each(|g| starts[g + 1] += starts[g]);
    let mut next = starts.clone();
    let mut order = vec![0u32; of.len()];
    for (i, g) in of.iter().enumerate() {
        order[next[*g as usize]] = i as u32;
        next[*g as usize] += 1;
    }
    (starts, order)
}

fn normalise(x: &mut [f32]) {
    let norm = crate::vectors::dot(x, x).sqrt();
    if norm > 0.0 && norm.is_finite() {
        x.iter_mut().for_each(|x| *x /= norm);
    }
}
