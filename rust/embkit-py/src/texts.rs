//! Tokenisation.

use crate::arrays::{PyShards, array, info, slice};
use crate::door::{long, short};
use embkit_store::tokenize::{Backend, Inputs, SHARD_BYTES, Settings};
use numpy::{PyArray1, PyReadonlyArray1};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::path::PathBuf;

// Written out in the signature below, where Python can show it.
const _: () = assert!(SHARD_BYTES == 67108864);

/// The identity of every text, u64 [n].
#[pyfunction]
#[pyo3(signature = (shards, threads=0, progress=None))]
pub(crate) fn text_ids<'py>(
    py: Python<'py>,
    shards: PyShards<'py>,
    threads: usize,
    progress: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyArray1<u64>>> {
    let texts = crate::arrays::shards(py, &shards)?;
    let ids = long(py, progress, |job| embkit_core::Texts::new(&texts)?.ids(threads, job))?;
    Ok(array(py, ids))
}

/// Encode rows into token shards in `out_dir`; adopts verified shards that are there.
#[pyfunction]
#[pyo3(signature = (out_dir, shards, row, prompt, prompts, role, source, text_id, cluster,
    tokenizer_json, max_length, shard_bytes=67108864, threads=0, backend="auto",
    refuse_long=false, progress=None))]
pub(crate) fn tokenize<'py>(
    py: Python<'py>,
    out_dir: PathBuf,
    shards: PyShards<'py>,
    row: PyReadonlyArray1<'py, u64>,
    prompt: PyReadonlyArray1<'py, u16>,
    prompts: Vec<String>,
    role: PyReadonlyArray1<'py, u8>,
    source: PyReadonlyArray1<'py, u16>,
    text_id: PyReadonlyArray1<'py, u64>,
    cluster: PyReadonlyArray1<'py, u64>,
    tokenizer_json: &str,
    max_length: Vec<u32>,
    shard_bytes: u64,
    threads: usize,
    backend: &str,
    refuse_long: bool,
    progress: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyDict>> {
    let backend = short(py, || Backend::parse(backend))?;
    let texts = crate::arrays::shards(py, &shards)?;
    let inputs = Inputs {
        texts: &texts,
        row: slice(py, &row, "row")?,
        prompt: slice(py, &prompt, "prompt")?,
        role: slice(py, &role, "role")?,
        source: slice(py, &source, "source")?,
        text_id: slice(py, &text_id, "text_id")?,
        cluster: slice(py, &cluster, "cluster")?,
    };
    let (prompts, max_length) = (prompts.as_slice(), max_length.as_slice());
    let settings = Settings {
        prompts,
        tokenizer_json,
        max_length,
        shard_bytes,
        threads,
        backend,
        refuse_long,
    };
    let report = long(py, progress, |job| {
        embkit_store::tokenize::tokenize(job, &out_dir, inputs, settings)
    })?;
    let out = PyDict::new(py);
    out.set_item("shards", report.shards)?;
    out.set_item("rows", report.rows)?;
    out.set_item("tokens", report.tokens)?;
    out.set_item("truncated", report.truncated)?;
    out.set_item("adopted", report.adopted)?;
    out.set_item("backend", report.backend)?;
    out.set_item("slow", report.slow)?;
    let files = PyDict::new(py);
    for (name, recorded) in &report.files {
        files.set_item(name, info(py, recorded)?)?;
    }
    out.set_item("files", files)?;
    Ok(out)
}
