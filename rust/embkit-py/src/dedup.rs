//! Duplicates, near-duplicates and contamination.

use crate::arrays::{PyShards, array, shards, slice};
use crate::door::{long, short};
use embkit_dedup::{
    ContaminationParams, DedupParams, ExactParams, Punctuation, ShingleParams, Units,
};
use numpy::{PyArray1, PyReadonlyArray1};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::path::PathBuf;

type U64s<'py> = Bound<'py, PyArray1<u64>>;
type F32s<'py> = Bound<'py, PyArray1<f32>>;

/// Representative row of every row; see the stub.
#[pyfunction]
#[pyo3(signature = (shards, priority=None, punctuation="keep", memory=0, spill=None, threads=0,
    progress=None))]
pub(crate) fn exact_duplicates<'py>(
    py: Python<'py>,
    shards: PyShards<'py>,
    priority: Option<PyReadonlyArray1<'py, u16>>,
    punctuation: &str,
    memory: u64,
    spill: Option<PathBuf>,
    threads: usize,
    progress: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyArray1<u64>>> {
    let texts = self::shards(py, &shards)?;
    let priority = priority.as_ref().map(|p| slice(py, p, "priority")).transpose()?;
    let punctuation = short(py, || Punctuation::parse(punctuation))?;
    let params = ExactParams { punctuation, threads, memory, spill };
    let found =
        long(py, progress, |job| embkit_dedup::exact_duplicates(&texts, priority, &params, job))?;
    Ok(array(py, found))
}

/// Near-duplicate star clusters: `(representative, similarity, pairs checked)`.
#[pyfunction]
#[pyo3(signature = (shards, threshold=0.8, seed=0, word_n=3, char_n=5, threads=0, progress=None,
    priority=None, memory=0, spill=None))]
pub(crate) fn near_duplicates<'py>(
    py: Python<'py>,
    shards: PyShards<'py>,
    threshold: f64,
    seed: u64,
    word_n: usize,
    char_n: usize,
    threads: usize,
    progress: Option<&Bound<'py, PyAny>>,
    priority: Option<PyReadonlyArray1<'py, u16>>,
    memory: u64,
    spill: Option<PathBuf>,
) -> PyResult<(U64s<'py>, F32s<'py>, u64)> {
    let texts = crate::arrays::shards(py, &shards)?;
    let shingle = ShingleParams { words: word_n, chars: char_n };
    let memory = (memory > 0).then_some(memory);
    let params = DedupParams { threshold, seed, shingle, threads, memory, spill };
    let priority = priority.as_ref().map(|all| slice(py, all, "priority")).transpose()?;
    let find = |job: &_| embkit_dedup::near_duplicates(&texts, priority, &params, job);
    let found = long(py, progress, find)?;
    Ok((array(py, found.representative), array(py, found.similarity), found.checked))
}

/// Training rows that contain evaluation text; see the stub.
#[pyfunction]
#[pyo3(signature = (train, eval, words=13, chars=50, common=10, threads=0, progress=None,
    units="auto", sets=None))]
pub(crate) fn contamination<'py>(
    py: Python<'py>,
    train: PyShards<'py>,
    eval: PyShards<'py>,
    words: usize,
    chars: usize,
    common: u32,
    threads: usize,
    progress: Option<&Bound<'py, PyAny>>,
    units: &str,
    sets: Option<PyReadonlyArray1<'py, u32>>,
) -> PyResult<Bound<'py, PyDict>> {
    let (train, eval) = (shards(py, &train)?, shards(py, &eval)?);
    let sets = sets.as_ref().map(|sets| slice(py, sets, "sets")).transpose()?;
    let units = short(py, || Units::parse(units))?;
    let params = ContaminationParams { words, chars, units, common, threads };
    let found =
        long(py, progress, |job| embkit_dedup::contamination(&train, &eval, sets, &params, job))?;
    let hits = &found.hits;
    let mut set_offsets = vec![0u64];
    let mut end = 0;
    set_offsets.extend(hits.iter().map(|hit| {
        end += hit.sets.len() as u64;
        end
    }));
    let samples: Vec<(u64, u64, u64, u32)> = found
        .common_samples
        .iter()
        .map(|gram| (gram.eval_row, gram.start, gram.end, gram.train_rows))
        .collect();
    let out = PyDict::new(py);
    out.set_item("train_row", array(py, hits.iter().map(|h| h.train_row).collect()))?;
    out.set_item("eval_row", array(py, hits.iter().map(|h| h.eval_row).collect()))?;
    out.set_item("start", array(py, hits.iter().map(|h| h.start).collect()))?;
    out.set_item("end", array(py, hits.iter().map(|h| h.end).collect()))?;
    out.set_item("overlap", array(py, hits.iter().map(|h| h.overlap).collect()))?;
    out.set_item("runs", array(py, hits.iter().map(|h| h.runs).collect()))?;
    out.set_item("whole", array(py, hits.iter().map(|h| h.whole).collect::<Vec<bool>>()))?;
    out.set_item("set_offsets", array(py, set_offsets))?;
    out.set_item("sets", array(py, hits.iter().flat_map(|h| h.sets.iter().copied()).collect()))?;
    out.set_item("set_rows", array(py, found.set_rows))?;
    out.set_item("eval_texts", found.eval_texts)?;
    out.set_item("common", found.common)?;
    out.set_item("common_only_rows", found.common_only_rows)?;
    out.set_item("common_samples", samples)?;
    Ok(out)
}

/// A near-duplicate of each text among others: `(row, similarity)`; row 2^64 - 1 without one.
#[pyfunction]
#[pyo3(signature = (shards, others, threshold=0.8, seed=0, word_n=3, char_n=5, threads=0, progress=None))]
pub(crate) fn near_matches<'py>(
    py: Python<'py>,
    shards: PyShards<'py>,
    others: PyShards<'py>,
    threshold: f64,
    seed: u64,
    word_n: usize,
    char_n: usize,
    threads: usize,
    progress: Option<&Bound<'py, PyAny>>,
) -> PyResult<(U64s<'py>, F32s<'py>)> {
    let (texts, others) = (self::shards(py, &shards)?, self::shards(py, &others)?);
    let shingle = ShingleParams { words: word_n, chars: char_n };
    let params = DedupParams { threshold, seed, shingle, threads, ..Default::default() };
    let found =
        long(py, progress, |job| embkit_dedup::near_matches(&texts, &others, &params, job))?;
    Ok((array(py, found.row), array(py, found.similarity)))
}
