//! Which of a query's neighbours are safe to call negatives, and why the others are not.
//!
//! The rules are NV-Retriever's positive-aware ones (arXiv 2407.15831) with their edge cases. They
//! run in the order of [`Rule`], and each candidate is counted under the first that removes it:
//!
//! 1. The query's positives and its own text go, then whatever shares a near-duplicate cluster with
//!    one of them or with a candidate that came before. What is left is ranked from 0: a rank does
//!    not depend on how many copies of a text the corpus has.
//! 2. Ranks below `skip` and from `last` on go.
//! 3. Scores: `s <= max_score`; `s <= s+ - margin`; `s <= s+ - |s+| * (1 - percent)`, which is
//!    `percent * s+` for positive scores and still asks for *less* than `s+` when scores are
//!    negative; `s >= min_score`. `s+` is the lowest score of the query's positives.
//! 4. The Jaccard similarity of its shingles (3 words) with any positive or with the query stays
//!    below `near_jaccard`: exact, on the texts, so it holds whatever clustering missed.
//! 5. The scores of a reranker, where there are any, by the same formulas as in 3.
//! 6. The first `k` by rank, or `k` drawn with a seed; the rest is surplus. With [`Sample::Top`]
//!    what comes after the k-th is not looked at.
//!
//! A query left with fewer than `k` gets fewer, or is filled up as [`Refill`] says.

mod near;
mod query;
mod rules;

pub use near::Sketches;
pub use rules::{Audit, Bounds, FilterParams, Refill, Rule, Sample};

use embkit_core::{Error, Job, Result, Texts, par};
use query::{Scratch, Work};
pub(crate) use query::{draw, sample_key};

const BLOCK: usize = 256;

/// In a column of rows or ranks: there is none.
pub const NONE: u32 = u32::MAX;

/// In a rank: the candidate was taken back by [`Refill::Relax`].
pub const RELAXED: u32 = 1 << 31;

/// Lists of mined rows, `per_list` each, best first: what [`crate::topk`] returns.
#[derive(Clone, Copy, Debug)]
pub struct Candidates<'a> {
    /// Corpus rows.
    pub row: &'a [u32],
    /// Their scores, from the miner.
    pub score: &'a [f32],
    /// Candidates of a list.
    pub per_list: usize,
}

/// The queries and their positives.
#[derive(Clone, Copy, Debug)]
pub struct Queries<'a> {
    /// The list of candidates of each query; several queries may share one.
    pub list: &'a [u32],
    /// The number of each query, which seeds its draws.
    pub number: &'a [u64],
    /// Corpus row of the query's own text, or [`NONE`]. Empty when no query is in the corpus.
    pub own: &'a [u32],
    /// Near-duplicate cluster of the query's text. Empty when it is not known.
    pub cluster: &'a [u64],
    /// Text row of the query. Empty when queries have no texts.
    pub text: &'a [u64],
    /// `queries + 1` positions in `positive` and `score`.
    pub offsets: &'a [u64],
    /// Corpus rows of the positives.
    pub positive: &'a [u32],
    /// Scores of query and positive from the same miner.
    pub score: &'a [f32],
}

/// What the filter knows about the corpus.
#[derive(Clone, Copy, Debug)]
pub struct Corpus<'a> {
    /// Near-duplicate cluster of each row (its own number when alone).
    pub cluster: &'a [u64],
    /// The text row of each corpus row, which is also its name in the result.
    pub text: &'a [u64],
    /// Texts; may be empty when `near_jaccard` is `None`.
    pub texts: &'a Texts<'a>,
    /// What was learnt about those texts; kept from call to call.
    pub sketches: &'a Sketches,
}

/// What a reranker said about the candidates that a first call with the same arguments returned.
#[derive(Clone, Copy, Debug)]
pub struct Rerank<'a> {
    /// `queries + 1` positions in `rank` and `score`.
    pub offsets: &'a [u64],
    /// Ranks of the candidates, ascending within a query.
    pub rank: &'a [u32],
    /// Their scores.
    pub score: &'a [f32],
    /// Scores of the positives, aligned with [`Queries::positive`].
    pub positive: &'a [f32],
}

/// Hard negatives, jagged, by rank within a query; refills come last.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Negatives {
    /// `queries + 1` positions in the columns below.
    pub offsets: Vec<u64>,
    /// Text rows of the corpus rows.
    pub row: Vec<u64>,
    /// Scores as mined; NaN for rows that were drawn.
    pub score: Vec<f32>,
    /// Rank after rule 1, from 0; with the bit [`RELAXED`] when a rule on scores was relaxed for
    /// it, [`NONE`] for rows that were drawn.
    pub rank: Vec<u32>,
    /// Why the others are missing.
    pub audit: Audit,
    /// Queries that came to the end of their list before rank `last` and could use more of it.
    pub shallow: Vec<u32>,
    /// Verdicts, when they were asked for.
    pub trace: Trace,
}

/// One entry for each candidate of each query, in the order of the lists.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Trace {
    /// The [`Rule`] that decided.
    pub rule: Vec<u8>,
    /// Rank after rule 1, or [`NONE`] where the candidate had no rank.
    pub rank: Vec<u32>,
    /// What the rule compared with: the limit of a score, the similarity to a positive, or NaN.
    pub number: Vec<f32>,
}

/// Applies the rules of this module to every query's candidates.
///
/// `job` advances by one per query. Errors: [`Error::Usage`] for parameters out of range, lengths
/// that do not fit, rows outside the corpus, NaN scores, or a query without a positive when `margin`
/// or `percent` needs one; [`Error::Cancelled`].
pub fn filter(
    candidates: Candidates,
    queries: Queries,
    corpus: Corpus,
    rerank: Option<Rerank>,
    params: &FilterParams,
    job: &Job,
) -> Result<Negatives> {
    params.check()?;
    check_shapes(&candidates, &queries)?;
    check_corpus(&queries, &corpus, params)?;
    if let Some(rerank) = &rerank {
        check_rerank(rerank, &queries)?;
    }
    let work = Work { candidates, queries, corpus, rerank, params };
    let parts = par::try_map_blocks(queries.list.len(), BLOCK, params.threads, |range| {
        let mut out = Negatives::default();
        let mut scratch = Scratch::new();
        let n = range.len() as u64;
        for q in range {
            job.check()?;
            work.query(q, &mut scratch, &mut out)?;
            out.offsets.push(out.row.len() as u64);
        }
        job.advance(n);
        Ok(out)
    })?;
    let mut all = Negatives { offsets: vec![0], ..Default::default() };
    for mut part in parts {
        let base = all.row.len() as u64;
        all.offsets.extend(part.offsets.iter().map(|o| base + o));
        all.row.append(&mut part.row);
        all.score.append(&mut part.score);
        all.rank.append(&mut part.rank);
        all.shallow.append(&mut part.shallow);
        all.audit.add(&part.audit);
        all.trace.rule.append(&mut part.trace.rule);
        all.trace.rank.append(&mut part.trace.rank);
        all.trace.number.append(&mut part.trace.number);
    }
    Ok(all)
}

fn check_shapes(candidates: &Candidates, queries: &Queries) -> Result<()> {
    let (rows, scores, per) = (candidates.row.len(), candidates.score.len(), candidates.per_list);
    let lists = rows.checked_div(per).unwrap_or(0);
    if rows != scores || lists * per != rows {
        return Err(Error::usage(
            format!("{rows} candidate rows and {scores} scores in lists of {per}"),
            "Pass rows and scores [lists, candidates]",
        ));
    }
    if let Some(list) = queries.list.iter().find(|list| **list as usize >= lists) {
        return Err(Error::usage(
            format!("list {list} of {lists} lists of candidates"),
            "Give each query the number of its list",
        ));
    }
    let m = queries.list.len();
    let lengths = [
        ("number", queries.number.len(), false),
        ("own", queries.own.len(), true),
        ("cluster", queries.cluster.len(), true),
        ("text", queries.text.len(), true),
    ];
    for (name, length, optional) in lengths {
        if length != m && !(optional && length == 0) {
            return Err(Error::usage(
                format!("{length} values of {name} for {m} queries"),
                "Pass one for each query",
            ));
        }
    }
    let positives = queries.positive.len();
    if positives != queries.score.len() {
        return Err(Error::usage(
            format!("{positives} positives and {} of their scores", queries.score.len()),
            "Pass one score for each positive",
        ));
    }
    check_offsets(queries.offsets, m, positives, "positive")
}

fn check_offsets(offsets: &[u64], queries: usize, values: usize, what: &str) -> Result<()> {
    let ends = offsets.first() == Some(&0) && offsets.last() == Some(&(values as u64));
    if offsets.len() == queries + 1 && ends && offsets.is_sorted() {
        return Ok(());
    }
    Err(Error::usage(
        format!("{what} offsets of {} values for {queries} queries, {values} rows", offsets.len()),
        "Pass offsets of queries + 1 that ascend from 0 to the number of values",
    ))
}

fn check_corpus(queries: &Queries, corpus: &Corpus, params: &FilterParams) -> Result<()> {
    let n = corpus.cluster.len();
    if corpus.text.len() != n {
        return Err(Error::usage(
            format!("{} text rows for {n} corpus rows", corpus.text.len()),
            "Pass one for each corpus row",
        ));
    }
    if let Some(row) = queries.positive.iter().find(|row| **row as usize >= n) {
        return Err(Error::usage(
            format!("positive row {row} of a corpus of {n}"),
            "Pass rows of the corpus that was searched",
        ));
    }
    let texts = corpus.texts.len() as u64;
    if params.near_jaccard.is_none() {
        return Ok(());
    }
    let beyond = |rows: &[u64]| rows.iter().find(|row| **row >= texts).copied();
    if let Some(row) = beyond(corpus.text).or_else(|| beyond(queries.text)) {
        return Err(Error::usage(
            format!("text row {row} of {texts} texts"),
            "Pass the text of every corpus row, or switch near_jaccard off",
        ));
    }
    corpus.sketches.check(texts)
}

fn check_rerank(rerank: &Rerank, queries: &Queries) -> Result<()> {
    let n = rerank.rank.len();
    if n != rerank.score.len() || rerank.positive.len() != queries.positive.len() {
        return Err(Error::usage(
            format!(
                "{} reranked scores for {n} candidates, {} for {} positives",
                rerank.score.len(),
                rerank.positive.len(),
                queries.positive.len()
            ),
            "Score every candidate that the first call returned, and every positive",
        ));
    }
    if rerank.score.iter().chain(rerank.positive).any(|s| s.is_nan()) {
        return Err(Error::usage("a reranked score is NaN", "Let the reranker give numbers"));
    }
    check_offsets(rerank.offsets, queries.list.len(), n, "rerank")
}
