//! The rules by name, their parameters, and what they count.

use embkit_core::{Error, Result};

/// What decided about a candidate, in the order in which the rules run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Rule {
    /// A positive of the query, or the query's own text.
    Positive,
    /// In the near-duplicate cluster of a positive or of the query.
    Cluster,
    /// In the cluster of a candidate that came before.
    Repeat,
    /// Rank below `skip`.
    Skipped,
    /// Rank from `last` on.
    Beyond,
    /// Score above `max`.
    AboveMax,
    /// Score above the lowest positive's minus `margin`.
    Margin,
    /// Score above `percent` of the lowest positive's.
    Percent,
    /// Score below `min_score`.
    BelowMin,
    /// As a near-duplicate of a positive or of the query.
    NearDuplicate,
    /// By the reranker's score.
    Rerank,
    /// Nobody needed it.
    Surplus,
    /// A negative.
    Kept,
    /// A negative that a rule on scores had removed, see [`Refill::Relax`].
    Relaxed,
}

/// Number of [`Rule`]s.
pub(crate) const RULES: usize = Rule::Relaxed as usize + 1;

/// Names of the rules, by number.
pub(crate) const NAMES: [&str; RULES] = [
    "positive",
    "cluster",
    "repeat",
    "skipped",
    "beyond",
    "above_max",
    "margin",
    "percent",
    "below_min",
    "near_duplicate",
    "rerank",
    "surplus",
    "kept",
    "relaxed",
];

/// Which of the rows that pass are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sample {
    /// The best ranked.
    Top,
    /// Drawn without replacement from the seed and the query's number.
    Random,
}

/// What a query gets that is left with fewer than `k`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refill {
    /// Nothing.
    Nothing,
    /// Candidates that `max`, `margin` or `percent` removed, lowest score first, when they are no
    /// near-duplicates.
    Relax,
    /// Rows drawn from the rest of the corpus: not in the query's list, not in the cluster of a
    /// positive, no near-duplicates.
    Random,
}

/// Upper bounds of a score. `None` switches one off.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Bounds {
    /// Highest score.
    pub max: Option<f64>,
    /// Least distance below the lowest positive, >= 0.
    pub margin: Option<f64>,
    /// Share of the lowest positive's score, in `(0, 1]`.
    pub percent: Option<f64>,
}

impl Bounds {
    /// The first bound that a score passes, and where it lies.
    pub(crate) fn removed(&self, s: f64, lowest: f64) -> Option<(Rule, f64)> {
        let margin = self.margin.map(|margin| lowest - margin);
        let percent = self.percent.map(|percent| lowest - lowest.abs() * (1.0 - percent));
        let bounds = [(Rule::AboveMax, self.max), (Rule::Margin, margin), (Rule::Percent, percent)];
        bounds.into_iter().find_map(|(rule, bound)| Some((rule, bound.filter(|b| s > *b)?)))
    }

    /// Whether the score of a positive is needed.
    pub(crate) fn need_positive(&self) -> bool {
        self.margin.is_some() || self.percent.is_some()
    }

    fn check(&self, prefix: &str) -> Result<()> {
        let name = |field: &str| format!("{prefix}{field}");
        share(&name("percent"), self.percent)?;
        if let Some(margin) = self.margin.filter(|m| !(*m >= 0.0 && m.is_finite())) {
            return refuse(&name("margin"), margin, "of at least 0");
        }
        number(&name("max_score"), self.max)
    }
}

/// The rules. `None` switches one off.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FilterParams {
    /// First rank that is looked at.
    pub skip: usize,
    /// First rank that is not.
    pub last: usize,
    /// Of the miner's scores; NV-Retriever's best is a `percent` of 0.95.
    pub bounds: Bounds,
    /// Lowest score.
    pub min_score: Option<f64>,
    /// Jaccard similarity to a positive from which on a row is a duplicate, in `(0, 1]`.
    pub near_jaccard: Option<f64>,
    /// Of the reranker's scores, where there are any.
    pub rerank: Bounds,
    /// How many candidates per query are handed to the reranker: a call without its scores
    /// returns so many in place of `k`.
    pub pool: Option<usize>,
    /// Negatives per query, at least 1.
    pub k: usize,
    /// Which ones.
    pub sample: Sample,
    /// What a query gets that has fewer.
    pub refill: Refill,
    /// Seed of the draws.
    pub seed: u64,
    /// Give shallow queries no negatives and do not count them: they come again with more
    /// candidates.
    pub defer: bool,
    /// Return every candidate's verdict.
    pub trace: bool,
    /// Threads, 0 for all; no effect on the result.
    pub threads: usize,
}

impl Default for FilterParams {
    fn default() -> Self {
        Self {
            skip: 0,
            last: usize::MAX,
            bounds: Bounds { percent: Some(0.95), ..Bounds::default() },
            min_score: None,
            near_jaccard: Some(0.7),
            rerank: Bounds::default(),
            pool: None,
            k: 7,
            sample: Sample::Top,
            refill: Refill::Nothing,
            seed: 0,
            defer: false,
            trace: false,
            threads: 0,
        }
    }
}

impl FilterParams {
    pub(crate) fn check(&self) -> Result<()> {
        self.bounds.check("")?;
        self.rerank.check("rerank_")?;
        share("near_jaccard", self.near_jaccard)?;
        number("min_score", self.min_score)?;
        if self.k == 0 || self.pool == Some(0) {
            return Err(Error::usage("0 negatives per query", "Ask for k of at least 1"));
        }
        if self.skip >= self.last {
            return Err(Error::usage(
                format!("ranks from {} to {}", self.skip, self.last),
                "Look at more candidates than are skipped",
            ));
        }
        Ok(())
    }
}

fn share(name: &str, value: Option<f64>) -> Result<()> {
    match value {
        Some(v) if !(v > 0.0 && v <= 1.0) => refuse(name, v, "above 0 and at most 1"),
        _ => Ok(()),
    }
}

fn number(name: &str, value: Option<f64>) -> Result<()> {
    value.filter(|v| v.is_nan()).map_or(Ok(()), |v| refuse(name, v, "as a number"))
}

fn refuse(name: &str, value: f64, range: &str) -> Result<()> {
    let fix = format!("Give {name} {range}, or leave it out");
    Err(Error::usage(format!("{name} = {value}"), fix))
}

/// How many candidates each rule decided about; they sum to `candidates`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Audit {
    /// Queries.
    pub queries: u64,
    /// Candidates in their lists.
    pub candidates: u64,
    /// By [`Rule`].
    pub by: [u64; RULES],
    /// Rows drawn from outside the lists.
    pub drawn: u64,
    /// Queries with fewer than `k` negatives in the end.
    pub short_queries: u64,
}

impl Audit {
    /// Names and counts, in the order of the rules.
    pub fn rows(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let rules = NAMES.into_iter().zip(self.by);
        let (before, after) = (
            [("queries", self.queries), ("candidates", self.candidates)],
            [("drawn", self.drawn), ("short_queries", self.short_queries)],
        );
        before.into_iter().chain(rules).chain(after)
    }

    /// Candidates that a rule decided about.
    pub fn of(&self, rule: Rule) -> u64 {
        self.by[rule as usize]
    }

    pub(crate) fn add(&mut self, other: &Audit) {
        self.queries += other.queries;
        self.candidates += other.candidates;
        self.drawn += other.drawn;
        self.short_queries += other.short_queries;
        self.by.iter_mut().zip(other.by).for_each(|(sum, more)| *sum += more);
    }
}
