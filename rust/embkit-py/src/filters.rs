//! Rule filters.

use crate::arrays::{PyShards, array, slice};
use crate::door::{long, short};
use crate::error::usage;
use embkit_core::Job;
use embkit_dedup::filter::{FilterParams, LANGUAGES, PHRASES, Rule, STATISTICS};
use numpy::{PyArray1, PyReadonlyArray1};
use pyo3::prelude::*;

type U32s<'py> = Bound<'py, PyArray1<u32>>;
type U16s<'py> = Bound<'py, PyArray1<u16>>;

/// Which rules each text fails, and its language: `(failed, language)`.
#[pyfunction]
#[pyo3(signature = (shards, rules, languages=None, detect=false, threads=0, progress=None))]
pub(crate) fn filter_texts<'py>(
    py: Python<'py>,
    shards: PyShards<'py>,
    rules: Vec<(String, bool, f64, u64)>,
    languages: Option<Vec<u16>>,
    detect: bool,
    threads: usize,
    progress: Option<&Bound<'py, PyAny>>,
) -> PyResult<(U32s<'py>, U16s<'py>)> {
    let texts = crate::arrays::shards(py, &shards)?;
    let rules = rules
        .into_iter()
        .map(|(name, least, threshold, from_words)| {
            let statistic = STATISTICS.iter().copied().find(|s| s.name() == name);
            let statistic = statistic.ok_or_else(|| {
                usage(py, &format!("no statistic {name:?}"), "Take a name of filter_names()")
            })?;
            Ok(Rule { statistic, least, threshold, from_words })
        })
        .collect::<PyResult<Vec<_>>>()?;
    let params = FilterParams { rules, languages: languages.unwrap_or_default(), detect, threads };
    let found = long(py, progress, |job| embkit_dedup::filter::filter_texts(&texts, &params, job))?;
    Ok((array(py, found.failed), array(py, found.language)))
}

/// Every statistic of the texts at `rows`, row-major.
#[pyfunction]
pub(crate) fn text_statistics<'py>(
    py: Python<'py>,
    shards: PyShards<'py>,
    rows: PyReadonlyArray1<'py, u64>,
) -> PyResult<Bound<'py, PyArray1<f64>>> {
    let texts = crate::arrays::shards(py, &shards)?;
    let rows = slice(py, &rows, "rows")?;
    let found = short(py, || embkit_dedup::filter::statistics(&texts, rows, &Job::new()))?;
    Ok(array(py, found))
}

/// Names of the statistics, languages by code, and the phrases of furniture (the first is filler).
#[pyfunction]
pub(crate) fn filter_names() -> (Vec<&'static str>, Vec<&'static str>, Vec<&'static str>) {
    let statistics = STATISTICS.iter().map(|s| s.name()).collect();
    (statistics, LANGUAGES.clone(), PHRASES.to_vec())
}
