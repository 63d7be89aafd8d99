//! The rules that turn neighbours into hard negatives.

use crate::arrays::{PyShards, array, slice};
use crate::door::long;
use crate::error::usage;
use embkit_ann::{Candidates, Corpus, FilterParams, Positives, Sample};
use numpy::{PyArray1, PyReadonlyArray1, PyReadonlyArray2, PyUntypedArrayMethods};
use pyo3::prelude::*;
use pyo3::types::PyDict;

type Negatives<'py> = (
    Bound<'py, PyArray1<u64>>,
    Bound<'py, PyArray1<u64>>,
    Bound<'py, PyArray1<f32>>,
    Bound<'py, PyArray1<u32>>,
    Bound<'py, PyDict>,
);

/// Hard negatives among candidates: `(offsets, row, score, rank, audit)`.
#[pyfunction]
#[pyo3(signature = (row, score, pos_offsets, pos, pos_score, cluster, shards, params,
    threads=0, progress=None))]
pub(crate) fn filter_negatives<'py>(
    py: Python<'py>,
    row: PyReadonlyArray2<'py, u32>,
    score: PyReadonlyArray2<'py, f32>,
    pos_offsets: PyReadonlyArray1<'py, u64>,
    pos: PyReadonlyArray1<'py, u64>,
    pos_score: PyReadonlyArray1<'py, f32>,
    cluster: PyReadonlyArray1<'py, u64>,
    shards: PyShards<'py>,
    params: &Bound<'py, PyDict>,
    threads: usize,
    progress: Option<&Bound<'py, PyAny>>,
) -> PyResult<Negatives<'py>> {
    let rules = rules(py, params, threads)?;
    let (Ok(rows), Ok(scores)) = (row.as_slice(), score.as_slice()) else {
        let fix = "Pass numpy.ascontiguousarray of it";
        return Err(usage(py, "row or score is not C-contiguous", fix));
    };
    let candidates = Candidates { row: rows, score: scores, per_query: row.shape()[1] };
    let positives = Positives {
        offsets: slice(py, &pos_offsets, "pos_offsets")?,
        row: slice(py, &pos, "pos")?,
        score: slice(py, &pos_score, "pos_score")?,
    };
    let texts = crate::arrays::shards(py, &shards)?;
    let corpus = Corpus { cluster: slice(py, &cluster, "cluster")?, texts: &texts };
    let found =
        long(py, progress, |job| embkit_ann::filter(candidates, positives, corpus, &rules, job))?;
    let audit = PyDict::new(py);
    for (name, count) in found.audit.rows() {
        audit.set_item(name, count)?;
    }
    Ok((
        array(py, found.offsets),
        array(py, found.row),
        array(py, found.score),
        array(py, found.rank),
        audit,
    ))
}

const RULES: &str = "skip, max_score, min_score, margin, percent, near_jaccard, k, sample, seed";

/// The rules by name; an absent key keeps its default, `None` switches a rule off.
fn rules(py: Python, from: &Bound<'_, PyDict>, threads: usize) -> PyResult<FilterParams> {
    let mut p = FilterParams { threads, ..FilterParams::default() };
    for (key, value) in from {
        let key: String = key.extract()?;
        match key.as_str() {
            "skip" => p.skip = value.extract()?,
            "max_score" => p.max_score = value.extract()?,
            "min_score" => p.min_score = value.extract()?,
            "margin" => p.margin = value.extract()?,
            "percent" => p.percent = value.extract()?,
            "near_jaccard" => p.near_jaccard = value.extract()?,
            "k" => p.k = value.extract()?,
            "seed" => p.seed = value.extract()?,
            "sample" => {
                p.sample = match value.extract::<String>()?.as_str() {
                    "top" => Sample::Top,
                    "random" => Sample::Random,
                    other => {
                        let what = format!("unknown sample '{other}'");
                        return Err(usage(py, &what, "Use 'top' or 'random'"));
                    }
                }
            }
            _ => {
                let what = format!("unknown filter rule '{key}'");
                return Err(usage(py, &what, &format!("Use some of {RULES}")));
            }
        }
    }
    Ok(p)
}
