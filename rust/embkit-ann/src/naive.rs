//! The slow forms that define what [`crate::topk`] and [`crate::filter`] answer.

use crate::filter::{Candidates, FilterParams, Positives, Sample, sample_key};
use embkit_dedup::{ShingleParams, jaccard, shingles};

/// One dot product: a chain of fused multiply-adds from the first element to the last.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).fold(0f32, |sum, (x, y)| x.mul_add(*y, sum))
}

/// Full sort per query: (row, score), best first, ties by lower row.
pub fn topk(queries: &[f32], corpus: &[f32], d: usize, k: usize) -> Vec<Vec<(u32, f32)>> {
    let search = |query: &[f32]| {
        let mut all: Vec<(u32, f32)> = corpus
            .chunks(d)
            .map(|row| dot(query, row))
            .enumerate()
            .map(|(i, s)| (i as u32, s))
            .collect();
        all.sort_by(|a, b| b.1.total_cmp(&(a.1 + 0.0)).then(a.0.cmp(&b.0)));
        all.truncate(k);
        all
    };
    queries.chunks(d).map(search).collect()
}

/// Per query the (row, rank) that pass every rule of [`crate::filter`], by rank.
pub fn filter(
    candidates: Candidates,
    positives: Positives,
    cluster: &[u64],
    texts: &[&str],
    params: &FilterParams,
) -> Vec<Vec<(u64, u32)>> {
    let set = |row: u64| shingles(texts[row as usize], ShingleParams::default());
    let mut out = Vec::new();
    for q in 0..positives.offsets.len() - 1 {
        let range = positives.offsets[q] as usize..positives.offsets[q + 1] as usize;
        let pos = &positives.row[range.clone()];
        let lowest =
            positives.score[range].iter().map(|s| f64::from(*s)).fold(f64::INFINITY, f64::min);
        let list = q * candidates.per_query..(q + 1) * candidates.per_query;
        let rows = list.clone().map(|i| u64::from(candidates.row[i])).zip(&candidates.score[list]);
        let rows: Vec<(u64, u32, f64)> = rows
            .enumerate()
            .map(|(rank, (row, score))| (row, rank as u32, f64::from(*score)))
            .filter(|(row, ..)| !pos.contains(row))
            .filter(|(row, ..)| pos.iter().all(|p| cluster[*p as usize] != cluster[*row as usize]))
            .collect();
        let mut rows: Vec<(u64, u32, f64)> = rows
            .into_iter()
            .skip(params.skip)
            .filter(|(.., s)| params.max_score.is_none_or(|max| *s <= max))
            .filter(|(.., s)| params.min_score.is_none_or(|min| *s >= min))
            .filter(|(.., s)| params.margin.is_none_or(|margin| *s <= lowest - margin))
            .filter(|(.., s)| {
                params.percent.is_none_or(|p| *s <= lowest - lowest.abs() * (1.0 - p))
            })
            .filter(|(row, ..)| {
                params
                    .near_jaccard
                    .is_none_or(|near| pos.iter().all(|p| jaccard(&set(*row), &set(*p)) < near))
            })
            .collect();
        if params.sample == Sample::Random {
            rows.sort_by_key(|(_, rank, _)| (sample_key(params.seed, q, *rank), *rank));
        }
        rows.truncate(params.k);
        rows.sort_by_key(|(_, rank, _)| *rank);
        out.push(rows.into_iter().map(|(row, rank, _)| (row, rank)).collect());
    }
    out
}
