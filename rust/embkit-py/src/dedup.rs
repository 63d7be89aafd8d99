//! Exact duplicates.

use crate::arrays::{PyShards, array, shards, slice};
use crate::door::{long, short};
use embkit_dedup::{ExactParams, Punctuation};
use numpy::{PyArray1, PyReadonlyArray1};
use pyo3::prelude::*;
use std::path::PathBuf;

/// Representative row of every row; see the stub.
#[pyfunction]
#[pyo3(signature = (shards, priority=None, punctuation="keep", memory=0, spill=None, threads=0,
    progress=None))]
pub(crate) fn exact_duplicates<'py>(
    py: Python<'py>,
    shards: PyShards<'py>,
    priority: Option<PyReadonlyArray1<'py, u32>>,
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
