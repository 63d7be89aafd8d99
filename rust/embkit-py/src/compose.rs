//! Stores out of stores: merged rows, and rows written as shards.

use crate::arrays::{array, slice};
use crate::door::long;
use embkit_store::compose::{self, Plan, Stores};
use numpy::{PyArray1, PyReadonlyArray1};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::path::PathBuf;

type U64s<'py> = Bound<'py, PyArray1<u64>>;

/// Rows of a merged store: `(row_of per store, columns of the merged rows)`.
#[pyfunction]
#[pyo3(signature = (stores, form, source, max_length, progress=None))]
pub(crate) fn merge_rows<'py>(
    py: Python<'py>,
    stores: Vec<(PathBuf, usize)>,
    form: PyReadonlyArray1<'py, u8>,
    source: PyReadonlyArray1<'py, u16>,
    max_length: [u32; 3],
    progress: Option<&Bound<'py, PyAny>>,
) -> PyResult<(Vec<U64s<'py>>, Bound<'py, PyDict>)> {
    let (form, source) = (slice(py, &form, "form")?, slice(py, &source, "source")?);
    let (found, starts) = long(py, progress, |job| {
        let stores = Stores::open(&stores)?;
        let found = compose::merge_rows(job, &stores, form, source, max_length)?;
        Ok((found, stores.starts().to_vec()))
    })?;
    let pairs = starts.iter().zip(starts.iter().skip(1));
    let row_of = pairs
        .map(|(a, b)| PyArray1::from_slice(py, &found.row_of[*a as usize..*b as usize]))
        .collect();
    let out = PyDict::new(py);
    out.set_item("row", array(py, found.row))?;
    out.set_item("text_id", array(py, found.text_id))?;
    out.set_item("cluster", array(py, found.cluster))?;
    out.set_item("role", array(py, found.role))?;
    out.set_item("source", array(py, found.source))?;
    out.set_item("lengthened", found.lengthened)?;
    Ok((row_of, out))
}

// Written out in the signature below, where Python can show it.
const _: () = assert!(embkit_store::tokenize::SHARD_BYTES == 67108864);

/// Write rows of stores as the shards of a new store.
#[pyfunction]
#[pyo3(signature = (out_dir, stores, row, text_id, cluster, role, source, digest, max_length,
    shard_bytes=67108864, progress=None))]
pub(crate) fn compose_store<'py>(
    py: Python<'py>,
    out_dir: PathBuf,
    stores: Vec<(PathBuf, usize)>,
    row: PyReadonlyArray1<'py, u64>,
    text_id: PyReadonlyArray1<'py, u64>,
    cluster: PyReadonlyArray1<'py, u64>,
    role: PyReadonlyArray1<'py, u8>,
    source: PyReadonlyArray1<'py, u16>,
    digest: &str,
    max_length: [u32; 3],
    shard_bytes: u64,
    progress: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyDict>> {
    let plan = Plan {
        row: slice(py, &row, "row")?,
        text_id: slice(py, &text_id, "text_id")?,
        cluster: slice(py, &cluster, "cluster")?,
        role: slice(py, &role, "role")?,
        source: slice(py, &source, "source")?,
    };
    let report = long(py, progress, |job| {
        let stores = Stores::open(&stores)?;
        compose::write(job, &out_dir, &stores, plan, digest, max_length, shard_bytes)
    })?;
    let out = PyDict::new(py);
    out.set_item("shards", report.shards)?;
    out.set_item("rows", report.rows)?;
    out.set_item("tokens", report.tokens)?;
    out.set_item("truncated", report.truncated)?;
    out.set_item("linked", report.linked)?;
    out.set_item("adopted", report.adopted)?;
    Ok(out)
}
