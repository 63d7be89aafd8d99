//! Deduplication, contamination and tokenisation.

use crate::arrays::{PyShards, array, info, shards, slice};
use crate::door::{long, short};
use embkit_dedup::{ContaminationParams, DedupParams, ShingleParams, Units};
use embkit_store::tokenize::{Backend, Inputs, SHARD_BYTES, Settings};
use numpy::{PyArray1, PyReadonlyArray1};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::path::PathBuf;

type U64s<'py> = Bound<'py, PyArray1<u64>>;
type F32s<'py> = Bound<'py, PyArray1<f32>>;

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

// Written out in the signature below, where Python can show it.
const _: () = assert!(SHARD_BYTES == 67108864);

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
