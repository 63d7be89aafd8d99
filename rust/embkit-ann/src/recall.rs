//! How many lists a recall takes, and what it then is: measured, never assumed.
//!
//! Half of a seeded sample of queries is searched exactly; the place of each true neighbour's list
//! among its query's nearest lists says what share of neighbours any number of probes would find. The
//! other half is then searched both ways, and what that finds is the recall that is reported.

use crate::ivf::Ivf;
use crate::topk::{SearchParams, TopK, topk};
use crate::vectors::{Part, Vectors};
use embkit_core::permute::Feistel;
use embkit_core::{Error, Job, Result};

/// Queries of the sample.
const SAMPLE: usize = 768;
/// Keeps the sample apart from the rows that the lists began from ([`Ivf::build`]), which find more of
/// their neighbours than other rows do.
const APART: u64 = 0x5245_4341_4c4c;

/// Probes for a recall.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Calibration {
    /// Lists to visit per query.
    pub probes: usize,
    /// Share of the true neighbours that this finds, by score: a found row counts when its score is
    /// at least the k-th true one.
    pub recall: f64,
    /// Standard error of `recall`.
    pub error: f64,
    /// Queries that it was measured on.
    pub queries: usize,
}

/// Finds the fewest probes that reach `recall` for the `k` nearest rows of `queries`.
///
/// Errors: [`Error::Usage`] for a recall outside `(0, 1]`, no query, and what [`topk`] refuses.
pub fn calibrate(
    ivf: &Ivf,
    queries: &Vectors,
    corpus: &Vectors,
    recall: f64,
    seed: u64,
    params: &SearchParams,
    job: &Job,
) -> Result<Calibration> {
    if !(recall > 0.0 && recall <= 1.0) || queries.is_empty() {
        return Err(Error::usage(
            format!("a recall of {recall} for {} queries", queries.len()),
            "Ask for a recall above 0 and at most 1, for at least one query",
        ));
    }
    let order = Feistel::new(queries.len() as u64, seed ^ APART);
    let size = SAMPLE.min(queries.len());
    let half = size.div_ceil(2);
    let sample = |from: usize, to: usize| {
        let mut scratch = Vec::new();
        let rows = (from..to).map(|i| order.get(i as u64) as usize);
        rows.flat_map(|row| queries.row(row, &mut scratch).to_vec()).collect::<Vec<f32>>()
    };
    // With a single query both halves are that one.
    let (tuned, held) = (sample(0, half), sample(if size > 1 { half } else { 0 }, size));
    let tuned = Vectors::new(&[Part::F32(&tuned)], queries.width())?;
    let held = Vectors::new(&[Part::F32(&held)], queries.width())?;

    let exact = |queries: &Vectors| -> Result<TopK> { topk(queries, corpus, params, job) };
    let mut probes = ivf.probes_for(&tuned, &exact(&tuned)?.row, params.k, recall, job)?;
    let want = exact(&held)?;
    loop {
        job.check()?;
        let got = ivf.search(&held, corpus, params.k, probes, params.threads, job)?;
        let (recall_now, error) = share(&want, &got, params.k);
        // Beyond the target by its own uncertainty: another sample should find it reached as well.
        if recall_now - error >= recall || probes == ivf.lists() {
            let queries = held.len();
            return Ok(Calibration { probes, recall: recall_now, error, queries });
        }
        probes = (probes + probes.div_ceil(8)).min(ivf.lists());
    }
}

/// Mean over queries of the share of true neighbours found, and its standard error.
fn share(want: &TopK, got: &TopK, k: usize) -> (f64, f64) {
    let shares: Vec<f64> = want
        .score
        .chunks(k)
        .zip(got.score.chunks(k))
        .map(|(want, got)| got.iter().filter(|s| **s >= want[k - 1]).count() as f64 / k as f64)
        .collect();
    let n = shares.len() as f64;
    let mean = shares.iter().sum::<f64>() / n;
    let variance = shares.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    (mean, (variance / n).sqrt())
}
