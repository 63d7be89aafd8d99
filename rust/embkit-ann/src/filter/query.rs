//! The rules on one query.

use super::near::Near;
use super::rules::RULES;
use super::{
    Candidates, Corpus, FilterParams, NONE, Negatives, Queries, RELAXED, Refill, Rerank, Rule,
    Sample,
};
use embkit_core::{Error, Result};
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// What orders the draw of [`Sample::Random`]: a hash, so that a query's sample does not depend on
/// the other queries.
pub(crate) fn sample_key(seed: u64, number: u64, rank: u32) -> u64 {
    let mut bytes = [0u8; 12];
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    bytes[8..].copy_from_slice(&rank.to_le_bytes());
    xxh3_64_with_seed(&bytes, seed)
}

/// The corpus row that [`Refill::Random`] tries at its `attempt`.
pub(crate) fn draw(seed: u64, number: u64, attempt: u32, rows: usize) -> u32 {
    let key = sample_key(seed, number, NONE - attempt);
    ((u128::from(key) * rows as u128) >> 64) as u32
}

/// Tries of [`Refill::Random`] for each row that is missing.
const ATTEMPTS: usize = 32;

pub(super) struct Work<'a> {
    pub(super) candidates: Candidates<'a>,
    pub(super) queries: Queries<'a>,
    pub(super) corpus: Corpus<'a>,
    pub(super) rerank: Option<Rerank<'a>>,
    pub(super) params: &'a FilterParams,
}

pub(super) struct Scratch {
    seen: Vec<u64>,    // clusters of the positives, the query and earlier candidates
    rule: Vec<Rule>,   // of each candidate
    rank: Vec<u32>,    // after positives and repeats
    number: Vec<f32>,  // what was compared with
    pass: Vec<u32>,    // candidates that wait for a draw
    relaxed: Vec<u32>, // candidates taken back
    drawn: Vec<u32>,   // corpus rows
    near: Near,
    near_ready: bool,
}

impl Scratch {
    pub(super) fn new() -> Self {
        Self {
            seen: Vec::new(),
            rule: Vec::new(),
            rank: Vec::new(),
            number: Vec::new(),
            pass: Vec::new(),
            relaxed: Vec::new(),
            drawn: Vec::new(),
            near: Near::new(),
            near_ready: false,
        }
    }
}

/// One query's part of the input.
struct Query<'a> {
    q: usize,
    rows: &'a [u32],
    scores: &'a [f32],
    positives: &'a [u32],
    own: u32,
    lowest: f64,
    rerank: Option<Reranked<'a>>,
}

struct Reranked<'a> {
    rank: &'a [u32],
    score: &'a [f32],
    lowest: f64,
}

impl Work<'_> {
    pub(super) fn query(&self, q: usize, s: &mut Scratch, out: &mut Negatives) -> Result<()> {
        let query = self.open(q)?;
        let n = query.rows.len();
        s.seen.clear();
        s.seen.extend(query.positives.iter().map(|row| self.corpus.cluster[*row as usize]));
        s.seen.extend(self.queries.cluster.get(q));
        s.rule.clear();
        s.rule.resize(n, Rule::Surplus);
        s.rank.clear();
        s.rank.resize(n, NONE);
        s.number.clear();
        s.number.resize(n, f32::NAN);
        s.pass.clear();
        s.relaxed.clear();
        s.drawn.clear();
        s.near_ready = false;

        let (kept, whole) = self.decide(&query, s)?;
        let more = n < self.corpus.cluster.len() && self.params.last != usize::MAX;
        if whole && more {
            out.shallow.push(q as u32);
            if self.params.defer {
                return Ok(());
            }
        }
        if kept < self.params.k && self.wants_final() {
            match self.params.refill {
                Refill::Nothing => {}
                Refill::Relax => self.relax(&query, kept, s)?,
                Refill::Random => self.draw(&query, kept, s)?,
            }
        }
        self.write(&query, s, out);
        Ok(())
    }

    fn open(&self, q: usize) -> Result<Query<'_>> {
        let per = self.candidates.per_list;
        let list = self.queries.list[q] as usize * per;
        let range = self.queries.offsets[q] as usize..self.queries.offsets[q + 1] as usize;
        let lowest = lowest(q, &self.queries.score[range.clone()])?;
        if range.is_empty() && (self.params.bounds.need_positive() || self.rerank.is_some()) {
            return Err(Error::usage(
                format!("query {q} has no positive"),
                "Leave such queries out, or switch margin, percent and the reranker off",
            ));
        }
        let rerank = match &self.rerank {
            None => None,
            Some(all) => {
                let part = all.offsets[q] as usize..all.offsets[q + 1] as usize;
                Some(Reranked {
                    rank: &all.rank[part.clone()],
                    score: &all.score[part],
                    lowest: lowest_of(&all.positive[range.clone()]),
                })
            }
        };
        Ok(Query {
            q,
            rows: &self.candidates.row[list..list + per],
            scores: &self.candidates.score[list..list + per],
            positives: &self.queries.positive[range],
            own: self.queries.own.get(q).copied().unwrap_or(NONE),
            lowest,
            rerank,
        })
    }

    /// How many are wanted from this call.
    fn wanted(&self) -> usize {
        if self.wants_final() { self.params.k } else { self.params.pool.unwrap_or(self.params.k) }
    }

    /// Whether this call's result is final, not the input of a reranker.
    fn wants_final(&self) -> bool {
        self.rerank.is_some() || self.params.pool.is_none()
    }

    /// Gives every candidate its rule; returns how many are kept, and whether the list ended while
    /// more of it could have been used.
    fn decide(&self, query: &Query, s: &mut Scratch) -> Result<(usize, bool)> {
        let p = self.params;
        let (wanted, top) = (self.wanted(), p.sample == Sample::Top);
        let (mut next, mut kept, mut survivors, mut ended) = (0u32, 0, 0, true);
        for (i, (&row, &score)) in query.rows.iter().zip(query.scores).enumerate() {
            if top && (kept == wanted || p.pool == Some(survivors)) {
                ended = false;
                break; // the rest is surplus
            }
            if next as usize >= p.last {
                s.rule[i..].fill(Rule::Beyond);
                ended = false;
                break;
            }
            if score.is_nan() {
                return Err(Error::usage(
                    format!("query {}: the score of candidate {i} is NaN", query.q),
                    "Search again with finite embeddings",
                ));
            }
            if query.positives.contains(&row) || row == query.own {
                s.rule[i] = Rule::Positive;
                continue;
            }
            let cluster = self.cluster_of(row, query.q)?;
            if let Some(rule) = self.seen_before(query, cluster, s) {
                s.rule[i] = rule;
                continue;
            }
            s.seen.push(cluster);
            s.rank[i] = next;
            next += 1;
            if let Some((rule, number)) = self.by_rank_or_score(next - 1, score, query.lowest) {
                (s.rule[i], s.number[i]) = (rule, number);
            } else if top {
                if self.not_near(query, i, s)? {
                    survivors += 1;
                    kept += usize::from(self.not_reranked(query, i, s));
                }
            } else {
                s.pass.push(i as u32);
            }
        }
        if top {
            ended &= kept < wanted && p.pool != Some(survivors);
        } else {
            kept = self.sample(query, wanted, s)?;
        }
        Ok((kept, ended && (next as usize) < p.last))
    }

    /// Whether a cluster is that of a positive or the query, or of an earlier candidate.
    fn seen_before(&self, query: &Query, cluster: u64, s: &Scratch) -> Option<Rule> {
        // Counting every hit in place of stopping at the first lets the compiler vectorise.
        let hits = |part: &[u64]| part.iter().fold(0u32, |n, seen| n + u32::from(*seen == cluster));
        if hits(&s.seen) == 0 {
            return None;
        }
        let blocked = query.positives.len() + usize::from(!self.queries.cluster.is_empty());
        Some(if hits(&s.seen[..blocked]) > 0 { Rule::Cluster } else { Rule::Repeat })
    }

    fn by_rank_or_score(&self, rank: u32, score: f32, lowest: f64) -> Option<(Rule, f32)> {
        let p = self.params;
        if (rank as usize) < p.skip {
            return Some((Rule::Skipped, p.skip as f32));
        }
        if let Some((rule, bound)) = p.bounds.removed(f64::from(score), lowest) {
            return Some((rule, bound as f32));
        }
        let min = p.min_score.filter(|min| f64::from(score) < *min)?;
        Some((Rule::BelowMin, min as f32))
    }

    /// Settles whether candidate `i` is a near-duplicate of a positive or of the query.
    fn not_near(&self, query: &Query, i: usize, s: &mut Scratch) -> Result<bool> {
        let Some(similarity) = self.near(query, query.rows[i], s)? else { return Ok(true) };
        (s.rule[i], s.number[i]) = (Rule::NearDuplicate, similarity as f32);
        Ok(false)
    }

    fn near(&self, query: &Query, row: u32, s: &mut Scratch) -> Result<Option<f64>> {
        let Some(threshold) = self.params.near_jaccard else { return Ok(None) };
        let Corpus { text, texts, sketches, .. } = self.corpus;
        if !s.near_ready {
            let positives = query.positives.iter().map(|row| text[*row as usize]);
            let own = self.queries.text.get(query.q).copied();
            s.near.begin(positives.chain(own), texts, sketches)?;
            s.near_ready = true;
        }
        s.near.duplicate(text[row as usize], threshold, texts, sketches)
    }

    /// Settles what the reranker says of candidate `i`, which passed everything else.
    fn not_reranked(&self, query: &Query, i: usize, s: &mut Scratch) -> bool {
        s.rule[i] = Rule::Kept;
        let Some(reranked) = &query.rerank else { return true };
        let Ok(at) = reranked.rank.binary_search(&s.rank[i]) else {
            s.rule[i] = Rule::Surplus; // the reranker did not see it
            return false;
        };
        let score = f64::from(reranked.score[at]);
        let Some((_, bound)) = self.params.rerank.removed(score, reranked.lowest) else {
            return true;
        };
        (s.rule[i], s.number[i]) = (Rule::Rerank, bound as f32);
        false
    }

    /// Takes from `pass` in the order of the draw; returns how many were kept.
    fn sample(&self, query: &Query, wanted: usize, s: &mut Scratch) -> Result<usize> {
        let number = self.queries.number[query.q];
        let mut pass = std::mem::take(&mut s.pass);
        pass.sort_unstable_by_key(|i| {
            let rank = s.rank[*i as usize];
            (sample_key(self.params.seed, number, rank), rank)
        });
        let (mut kept, mut survivors) = (0, 0);
        for &i in &pass {
            if kept == wanted || self.params.pool == Some(survivors) {
                break;
            }
            if self.not_near(query, i as usize, s)? {
                survivors += 1;
                kept += usize::from(self.not_reranked(query, i as usize, s));
            }
        }
        s.pass = pass;
        Ok(kept)
    }

    /// Takes back candidates that an upper bound had removed, lowest score first.
    fn relax(&self, query: &Query, kept: usize, s: &mut Scratch) -> Result<()> {
        let bounded = |rule| matches!(rule, Rule::AboveMax | Rule::Margin | Rule::Percent);
        let mut pass = std::mem::take(&mut s.pass);
        pass.clear();
        pass.extend((0..query.rows.len() as u32).filter(|i| bounded(s.rule[*i as usize])));
        pass.sort_by(|a, b| {
            let (x, y) = (query.scores[*a as usize], query.scores[*b as usize]);
            x.total_cmp(&y).then(b.cmp(a))
        });
        for &i in &pass {
            if kept + s.relaxed.len() == self.params.k {
                break;
            }
            if self.not_near(query, i as usize, s)? {
                s.rule[i as usize] = Rule::Relaxed;
                s.relaxed.push(i);
            }
        }
        s.pass = pass;
        Ok(())
    }

    /// Draws rows from outside the list.
    fn draw(&self, query: &Query, kept: usize, s: &mut Scratch) -> Result<()> {
        let (rows, missing) = (self.corpus.cluster.len(), self.params.k - kept);
        let number = self.queries.number[query.q];
        for attempt in 0..(ATTEMPTS * missing) as u32 {
            if s.drawn.len() == missing {
                break;
            }
            let row = draw(self.params.seed, number, attempt, rows);
            let cluster = self.corpus.cluster[row as usize];
            let known = row == query.own
                || query.positives.contains(&row)
                || query.rows.contains(&row)
                || s.seen.contains(&cluster);
            if !known && self.near(query, row, s)?.is_none() {
                s.seen.push(cluster);
                s.drawn.push(row);
            }
        }
        Ok(())
    }

    fn write(&self, query: &Query, s: &mut Scratch, out: &mut Negatives) {
        let before = out.row.len();
        let mut by = [0u32; RULES];
        for (i, &rule) in s.rule.iter().enumerate() {
            by[rule as usize] += 1;
            if rule == Rule::Kept {
                out.row.push(self.corpus.text[query.rows[i] as usize]);
                out.score.push(query.scores[i]);
                out.rank.push(s.rank[i]);
            }
        }
        for &i in &s.relaxed {
            out.row.push(self.corpus.text[query.rows[i as usize] as usize]);
            out.score.push(query.scores[i as usize]);
            out.rank.push(s.rank[i as usize] | RELAXED);
        }
        for &row in &s.drawn {
            out.row.push(self.corpus.text[row as usize]);
            out.score.push(f32::NAN);
            out.rank.push(NONE);
        }
        let audit = &mut out.audit;
        audit.queries += 1;
        audit.candidates += query.rows.len() as u64;
        audit.by.iter_mut().zip(by).for_each(|(sum, more)| *sum += u64::from(more));
        audit.drawn += s.drawn.len() as u64;
        audit.short_queries += u64::from(out.row.len() - before < self.params.k);
        if self.params.trace {
            out.trace.rule.extend(s.rule.iter().map(|rule| *rule as u8));
            out.trace.rank.extend_from_slice(&s.rank);
            out.trace.number.extend_from_slice(&s.number);
        }
    }

    fn cluster_of(&self, row: u32, q: usize) -> Result<u64> {
        self.corpus.cluster.get(row as usize).copied().ok_or_else(|| {
            Error::usage(
                format!(
                    "query {q}: candidate row {row} of a corpus of {}",
                    self.corpus.cluster.len()
                ),
                "Pass rows of the corpus that was searched",
            )
        })
    }
}

/// Lowest positive score; +inf, which removes nothing, when there is none.
fn lowest(q: usize, scores: &[f32]) -> Result<f64> {
    if let Some(at) = scores.iter().position(|s| s.is_nan()) {
        return Err(Error::usage(
            format!("query {q}: the score of positive {at} is NaN"),
            "Score positives with the same finite embeddings as the candidates",
        ));
    }
    Ok(lowest_of(scores))
}

fn lowest_of(scores: &[f32]) -> f64 {
    scores.iter().map(|s| f64::from(*s)).fold(f64::INFINITY, f64::min)
}
