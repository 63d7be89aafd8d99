//! Positive-aware filtering of mined candidates (NV-Retriever, arXiv 2407.15831, and its edge cases).
//!
//! The rules run in this order, and the audit counts each candidate under the first that removes it:
//!
//! 1. `positive`: it is one of the query's positives; `cluster`: it is a near-duplicate of one.
//! 2. `skipped`: among the first `skip` of what is left, in rank order.
//! 3. `above_max`, `below_min`: keep `min_score <= s <= max_score`.
//! 4. `margin`: keep `s <= s+ - margin`, with `s+` the lowest score of the query's positives.
//! 5. `percent`: keep `s <= s+ - |s+| * (1 - percent)`, which is `percent * s+` for positive scores
//!    and still asks for *less* than `s+` when scores are negative.
//! 6. `near_duplicate`: the Jaccard similarity of its shingles (words, 3) with any positive's
//!    reaches `near_jaccard`. Exact, on the texts, so it holds whatever dedup's LSH missed.
//! 7. The first `k` by rank, or `k` drawn with a seed; the rest is `surplus`. Rule 6 is applied
//!    only until `k` have passed: candidates that nobody needs are not compared.
//!
//! A query left with fewer than `k` gets fewer: nothing is padded, nothing comes back in.

use embkit_core::{Error, Job, Result, TextShard, Texts, par};
use embkit_dedup::{ShingleParams, Shingler, jaccard};
use xxhash_rust::xxh3::xxh3_64_with_seed;

const BLOCK: usize = 128;

/// Mined rows, `per_query` for each query, best first: what [`crate::topk`] returns.
#[derive(Clone, Copy, Debug)]
pub struct Candidates<'a> {
    /// Corpus rows.
    pub row: &'a [u32],
    /// Their scores, from the miner.
    pub score: &'a [f32],
    /// Candidates per query.
    pub per_query: usize,
}

/// The positives of each query, jagged.
#[derive(Clone, Copy, Debug)]
pub struct Positives<'a> {
    /// `queries + 1` positions in `row` and `score`.
    pub offsets: &'a [u64],
    /// Corpus rows.
    pub row: &'a [u64],
    /// Scores of query and positive from the same miner.
    pub score: &'a [f32],
}

/// What the filter knows about the corpus.
#[derive(Clone, Copy, Debug)]
pub struct Corpus<'a> {
    /// Near-duplicate cluster of each row (its own number when alone).
    pub cluster: &'a [u64],
    /// Texts of the rows; may be empty when `near_jaccard` is `None`.
    pub texts: &'a [TextShard<'a>],
}

/// Which of the rows that pass are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sample {
    /// The best ranked.
    Top,
    /// Drawn without replacement from the seed and the query's number.
    Random,
}

/// The rules. `None` switches a rule off.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FilterParams {
    /// Ranks to skip after positives and their clusters are out.
    pub skip: usize,
    /// Highest score.
    pub max_score: Option<f64>,
    /// Lowest score.
    pub min_score: Option<f64>,
    /// Least distance below the lowest positive, >= 0.
    pub margin: Option<f64>,
    /// Share of the lowest positive's score, in `(0, 1]`; the paper's best is 0.95.
    pub percent: Option<f64>,
    /// Jaccard similarity to a positive from which on a row is a duplicate, in `(0, 1]`.
    pub near_jaccard: Option<f64>,
    /// Negatives per query, at least 1.
    pub k: usize,
    /// Which ones.
    pub sample: Sample,
    /// Seed of [`Sample::Random`].
    pub seed: u64,
    /// Threads, 0 for all; no effect on the result.
    pub threads: usize,
}

impl Default for FilterParams {
    fn default() -> Self {
        Self {
            skip: 0,
            max_score: None,
            min_score: None,
            margin: None,
            percent: Some(0.95),
            near_jaccard: Some(0.7),
            k: 7,
            sample: Sample::Top,
            seed: 0,
            threads: 0,
        }
    }
}

/// How many candidates each rule removed. From `positive` on, the fields sum to `candidates`
/// (`kept` included, `short_queries` apart).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // the module lists them
pub struct Audit {
    pub queries: u64,
    pub candidates: u64,
    pub positive: u64,
    pub cluster: u64,
    pub skipped: u64,
    pub above_max: u64,
    pub below_min: u64,
    pub margin: u64,
    pub percent: u64,
    pub near_duplicate: u64,
    pub surplus: u64,
    pub kept: u64,
    /// Queries with fewer than `k` negatives.
    pub short_queries: u64,
}

impl Audit {
    /// Names and counts, in the order of the rules.
    pub fn rows(&self) -> [(&'static str, u64); 13] {
        [
            ("queries", self.queries),
            ("candidates", self.candidates),
            ("positive", self.positive),
            ("cluster", self.cluster),
            ("skipped", self.skipped),
            ("above_max", self.above_max),
            ("below_min", self.below_min),
            ("margin", self.margin),
            ("percent", self.percent),
            ("near_duplicate", self.near_duplicate),
            ("surplus", self.surplus),
            ("kept", self.kept),
            ("short_queries", self.short_queries),
        ]
    }

    fn add(&mut self, other: &Audit) {
        self.queries += other.queries;
        self.candidates += other.candidates;
        self.positive += other.positive;
        self.cluster += other.cluster;
        self.skipped += other.skipped;
        self.above_max += other.above_max;
        self.below_min += other.below_min;
        self.margin += other.margin;
        self.percent += other.percent;
        self.near_duplicate += other.near_duplicate;
        self.surplus += other.surplus;
        self.kept += other.kept;
        self.short_queries += other.short_queries;
    }
}

/// Hard negatives, jagged, by rank within a query.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Negatives {
    /// `queries + 1` positions in the columns below.
    pub offsets: Vec<u64>,
    /// Corpus rows.
    pub row: Vec<u64>,
    /// Scores as mined.
    pub score: Vec<f32>,
    /// Position in the query's list of candidates, from 0.
    pub rank: Vec<u32>,
    /// Why the others are missing.
    pub audit: Audit,
}

/// Applies the rules of this module to every query's candidates.
///
/// `job` advances by one per query. Errors: [`Error::Usage`] for parameters out of range, lengths
/// that do not fit, rows outside the corpus, NaN scores, or a query without a positive when `margin`
/// or `percent` needs one; [`Error::Cancelled`].
pub fn filter(
    candidates: Candidates,
    positives: Positives,
    corpus: Corpus,
    params: &FilterParams,
    job: &Job,
) -> Result<Negatives> {
    check_params(params)?;
    let queries = check_shapes(&candidates, &positives)?;
    let texts = Texts::new(corpus.texts)?;
    if params.near_jaccard.is_some() && texts.len() != corpus.cluster.len() {
        return Err(Error::usage(
            format!("{} texts for {} corpus rows", texts.len(), corpus.cluster.len()),
            "Pass the text of every corpus row, or switch near_jaccard off",
        ));
    }
    let work = Work { candidates, positives, cluster: corpus.cluster, texts: &texts, params };
    let parts = par::try_map_blocks(queries, BLOCK, params.threads, |range| {
        let mut out = Negatives::default();
        let mut scratch = Scratch::new();
        for q in range {
            job.check()?;
            work.query(q, &mut scratch, &mut out)?;
            out.offsets.push(out.row.len() as u64);
            job.advance(1);
        }
        Ok(out)
    })?;
    let mut all = Negatives { offsets: vec![0], ..Default::default() };
    for mut part in parts {
        let base = all.row.len() as u64;
        all.offsets.extend(part.offsets.iter().map(|o| base + o));
        all.row.append(&mut part.row);
        all.score.append(&mut part.score);
        all.rank.append(&mut part.rank);
        all.audit.add(&part.audit);
    }
    Ok(all)
}

fn check_params(params: &FilterParams) -> Result<()> {
    let refuse = |name: &str, value: f64, range: &str| {
        Err(Error::usage(
            format!("{name} = {value}"),
            format!("Give {name} {range}, or leave it out"),
        ))
    };
    for (name, value) in [("percent", params.percent), ("near_jaccard", params.near_jaccard)] {
        match value {
            Some(v) if !(v > 0.0 && v <= 1.0) => return refuse(name, v, "above 0 and at most 1"),
            _ => {}
        }
    }
    if let Some(margin) = params.margin.filter(|m| !(*m >= 0.0 && m.is_finite())) {
        return refuse("margin", margin, "of at least 0");
    }
    for (name, value) in [("max_score", params.max_score), ("min_score", params.min_score)] {
        if let Some(v) = value.filter(|v| v.is_nan()) {
            return refuse(name, v, "as a number");
        }
    }
    if params.k == 0 {
        return Err(Error::usage("0 negatives per query", "Ask for k of at least 1"));
    }
    Ok(())
}

fn check_shapes(candidates: &Candidates, positives: &Positives) -> Result<usize> {
    let queries = positives.offsets.len().saturating_sub(1);
    let (rows, scores) = (candidates.row.len(), candidates.score.len());
    if positives.offsets.is_empty()
        || queries.checked_mul(candidates.per_query) != Some(rows)
        || rows != scores
    {
        return Err(Error::usage(
            format!(
                "{rows} candidate rows and {scores} scores for {queries} queries of {} candidates",
                candidates.per_query
            ),
            "Pass rows and scores [queries, candidates] and offsets of queries + 1",
        ));
    }
    let ends = (positives.offsets.first(), positives.offsets.last());
    let fits = ends == (Some(&0), Some(&(positives.row.len() as u64)));
    if !fits || !positives.offsets.is_sorted() || positives.row.len() != positives.score.len() {
        return Err(Error::usage(
            format!(
                "positive offsets that end at {:?} over {} rows and {} scores",
                ends.1,
                positives.row.len(),
                positives.score.len()
            ),
            "Pass offsets that ascend from 0 to the number of positives, one row and score for each",
        ));
    }
    Ok(queries)
}

/// What orders the draw of [`Sample::Random`]: a hash, so that a query's sample does not depend on
/// the other queries.
pub(crate) fn sample_key(seed: u64, query: usize, rank: u32) -> u64 {
    let mut bytes = [0u8; 12];
    bytes[..8].copy_from_slice(&(query as u64).to_le_bytes());
    bytes[8..].copy_from_slice(&rank.to_le_bytes());
    xxh3_64_with_seed(&bytes, seed)
}

struct Work<'a> {
    candidates: Candidates<'a>,
    positives: Positives<'a>,
    cluster: &'a [u64],
    texts: &'a Texts<'a>,
    params: &'a FilterParams,
}

struct Scratch {
    clusters: Vec<u64>,
    pass: Vec<u32>, // ranks
    shingler: Shingler,
    set: Vec<u64>,
    positive_sets: Vec<Vec<u64>>,
}

impl Scratch {
    fn new() -> Self {
        Self {
            clusters: Vec::new(),
            pass: Vec::new(),
            shingler: Shingler::new(ShingleParams::default()),
            set: Vec::new(),
            positive_sets: Vec::new(),
        }
    }
}

impl Work<'_> {
    fn query(&self, q: usize, scratch: &mut Scratch, out: &mut Negatives) -> Result<()> {
        let range = self.positives.offsets[q] as usize..self.positives.offsets[q + 1] as usize;
        let positives = &self.positives.row[range.clone()];
        let lowest = self.lowest(q, &self.positives.score[range])?;
        scratch.clusters.clear();
        for &row in positives {
            scratch.clusters.push(self.cluster_of(row, q, "positive")?);
        }

        let list = q * self.candidates.per_query..(q + 1) * self.candidates.per_query;
        let (rows, scores) = (&self.candidates.row[list.clone()], &self.candidates.score[list]);
        let audit = &mut out.audit;
        audit.queries += 1;
        audit.candidates += rows.len() as u64;
        scratch.pass.clear();
        let mut left = 0;
        for (rank, (&row, &score)) in rows.iter().zip(scores).enumerate() {
            if score.is_nan() {
                return Err(Error::usage(
                    format!("query {q}: the score of candidate {rank} is NaN"),
                    "Search again with finite embeddings",
                ));
            }
            let cluster = self.cluster_of(u64::from(row), q, "candidate")?;
            if positives.contains(&u64::from(row)) {
                audit.positive += 1;
            } else if scratch.clusters.contains(&cluster) {
                audit.cluster += 1;
            } else {
                left += 1;
                match self.removed_by_score(left, f64::from(score), lowest) {
                    Some(count) => *count(audit) += 1,
                    None => scratch.pass.push(rank as u32),
                }
            }
        }

        if self.params.sample == Sample::Random {
            scratch
                .pass
                .sort_unstable_by_key(|&rank| (sample_key(self.params.seed, q, rank), rank));
        }
        let taken = self.take(rows, positives, scratch, audit)?;
        scratch.pass.truncate(taken);
        scratch.pass.sort_unstable();
        for &rank in &scratch.pass {
            out.row.push(u64::from(rows[rank as usize]));
            out.score.push(scores[rank as usize]);
            out.rank.push(rank);
        }
        Ok(())
    }

    /// The counter of the first rule on rank or score that removes a candidate.
    fn removed_by_score(
        &self,
        place: usize,
        s: f64,
        lowest: f64,
    ) -> Option<fn(&mut Audit) -> &mut u64> {
        let p = self.params;
        if place <= p.skip {
            return Some(|a| &mut a.skipped);
        }
        if p.max_score.is_some_and(|max| s > max) {
            return Some(|a| &mut a.above_max);
        }
        if p.min_score.is_some_and(|min| s < min) {
            return Some(|a| &mut a.below_min);
        }
        if p.margin.is_some_and(|margin| s > lowest - margin) {
            return Some(|a| &mut a.margin);
        }
        if p.percent.is_some_and(|percent| s > lowest - lowest.abs() * (1.0 - percent)) {
            return Some(|a| &mut a.percent);
        }
        None
    }

    /// Moves the first `k` of `pass` that are no near-duplicates to its front; returns how many.
    fn take(
        &self,
        rows: &[u32],
        positives: &[u64],
        scratch: &mut Scratch,
        audit: &mut Audit,
    ) -> Result<usize> {
        let Scratch { pass, shingler, set, positive_sets, .. } = scratch;
        let (mut taken, mut seen) = (0, 0);
        if let Some(near) = self.params.near_jaccard.filter(|_| !pass.is_empty()) {
            positive_sets.resize_with(positives.len().max(positive_sets.len()), Vec::new);
            for (&row, set) in positives.iter().zip(positive_sets.iter_mut()) {
                shingler.shingles(self.texts.str(row as usize)?, set);
            }
            while taken < self.params.k && seen < pass.len() {
                let row = rows[pass[seen] as usize] as usize;
                shingler.shingles(self.texts.str(row)?, set);
                if positive_sets[..positives.len()].iter().any(|p| jaccard(p, set) >= near) {
                    audit.near_duplicate += 1;
                } else {
                    pass[taken] = pass[seen];
                    taken += 1;
                }
                seen += 1;
            }
        } else {
            taken = pass.len().min(self.params.k);
            seen = taken;
        }
        audit.surplus += (pass.len() - seen) as u64;
        audit.kept += taken as u64;
        audit.short_queries += u64::from(taken < self.params.k);
        Ok(taken)
    }

    /// Lowest positive score; +inf (which removes nothing) when no rule needs it and there is none.
    fn lowest(&self, q: usize, scores: &[f32]) -> Result<f64> {
        if let Some(at) = scores.iter().position(|s| s.is_nan()) {
            return Err(Error::usage(
                format!("query {q}: the score of positive {at} is NaN"),
                "Score positives with the same finite embeddings as the candidates",
            ));
        }
        if scores.is_empty() && (self.params.margin.is_some() || self.params.percent.is_some()) {
            return Err(Error::usage(
                format!("query {q} has no positive"),
                "Leave such queries out, or switch margin and percent off",
            ));
        }
        Ok(scores.iter().map(|s| f64::from(*s)).fold(f64::INFINITY, f64::min))
    }

    fn cluster_of(&self, row: u64, q: usize, what: &str) -> Result<u64> {
        let cluster = usize::try_from(row).ok().and_then(|row| self.cluster.get(row));
        cluster.copied().ok_or_else(|| {
            Error::usage(
                format!("query {q}: {what} row {row} of a corpus of {}", self.cluster.len()),
                "Pass rows of the corpus that was searched",
            )
        })
    }
}
