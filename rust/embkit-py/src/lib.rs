//! `embkit._rust`: the Python face of the Rust crates. Conversion, GIL and errors; no algorithm.
//!
//! Arrays cross as numpy arrays, C-contiguous and of exactly the stated type. Errors become the
//! classes of `embkit.errors`, or Python's own `OSError` for the operating system's. Everything
//! long goes through one [`door`]. The signatures are `python/embkit/_rust.pyi`.

// The doc comments of #[pyfunction]s are the Python docstrings: they speak of Python types.
#![allow(clippy::too_many_arguments)]

mod arrays;
mod arrow;
mod compose;
mod dedup;
mod door;
mod error;
mod files;
mod filters;
mod loader;
mod negatives;
mod records;
mod search;
mod store;
mod texts;

use pyo3::prelude::*;

/// The Rust half of embkit; see the stubs for signatures.
#[pymodule]
fn _rust(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("__version__", env!("CARGO_PKG_VERSION"))?;
    m.add_function(wrap_pyfunction!(files::crc32c, m)?)?;
    m.add_function(wrap_pyfunction!(files::blake3, m)?)?;
    m.add_function(wrap_pyfunction!(files::blake3_file, m)?)?;
    m.add_function(wrap_pyfunction!(files::publish_file, m)?)?;
    m.add_function(wrap_pyfunction!(files::publish_dir, m)?)?;
    m.add_function(wrap_pyfunction!(files::sweep_tmp, m)?)?;
    m.add_function(wrap_pyfunction!(files::temp_path, m)?)?;
    m.add_function(wrap_pyfunction!(files::write_manifest, m)?)?;
    m.add_function(wrap_pyfunction!(files::read_manifest, m)?)?;
    m.add_function(wrap_pyfunction!(files::write_tensors, m)?)?;
    m.add_function(wrap_pyfunction!(files::open_tensors, m)?)?;
    m.add_function(wrap_pyfunction!(files::file_info, m)?)?;
    m.add_function(wrap_pyfunction!(files::permute, m)?)?;
    m.add_class::<records::RecordsBuilder>()?;
    m.add_function(wrap_pyfunction!(dedup::exact_duplicates, m)?)?;
    m.add_function(wrap_pyfunction!(dedup::near_duplicates, m)?)?;
    m.add_function(wrap_pyfunction!(dedup::near_matches, m)?)?;
    m.add_function(wrap_pyfunction!(dedup::contamination, m)?)?;
    m.add_function(wrap_pyfunction!(filters::filter_texts, m)?)?;
    m.add_function(wrap_pyfunction!(filters::text_statistics, m)?)?;
    m.add_function(wrap_pyfunction!(filters::filter_names, m)?)?;
    m.add_function(wrap_pyfunction!(texts::tokenize, m)?)?;
    m.add_function(wrap_pyfunction!(texts::text_ids, m)?)?;
    m.add_class::<store::Store>()?;
    m.add_class::<loader::Plan>()?;
    m.add_class::<loader::Loader>()?;
    m.add_class::<loader::Batch>()?;
    m.add_function(wrap_pyfunction!(loader::micro_batches, m)?)?;
    m.add_function(wrap_pyfunction!(loader::first_fit, m)?)?;
    m.add_function(wrap_pyfunction!(compose::merge_rows, m)?)?;
    m.add_function(wrap_pyfunction!(compose::compose_store, m)?)?;
    m.add_function(wrap_pyfunction!(search::topk, m)?)?;
    m.add_function(wrap_pyfunction!(search::search_isa, m)?)?;
    m.add_class::<search::Ivf>()?;
    m.add_class::<negatives::NegativeFilter>()?;
    Ok(())
}
