//! Exact top-k search.

use crate::arrays::array;
use crate::door::long;
use crate::error::usage;
use numpy::{PyArray2, PyArrayMethods, PyReadonlyArray2, PyUntypedArrayMethods};
use pyo3::prelude::*;

type Grid<'py> = (Bound<'py, PyArray2<u32>>, Bound<'py, PyArray2<f32>>);

/// The `k` corpus rows with the largest inner product per query: `(row, score)`, both [nq, k].
#[pyfunction]
#[pyo3(signature = (queries, corpus, k, threads=0, progress=None))]
pub(crate) fn topk<'py>(
    py: Python<'py>,
    queries: PyReadonlyArray2<'py, f32>,
    corpus: PyReadonlyArray2<'py, f32>,
    k: usize,
    threads: usize,
    progress: Option<&Bound<'py, PyAny>>,
) -> PyResult<Grid<'py>> {
    let (nq, d) = (queries.shape()[0], queries.shape()[1]);
    if corpus.shape()[1] != d {
        let what = format!("queries of width {d}, corpus of width {}", corpus.shape()[1]);
        return Err(usage(py, &what, "Embed both with the same model and width"));
    }
    let flat = |a: &PyReadonlyArray2<'py, f32>| a.as_slice().map(<[f32]>::len).is_ok();
    if !flat(&queries) || !flat(&corpus) {
        let fix = "Pass numpy.ascontiguousarray of it";
        return Err(usage(py, "queries or corpus is not C-contiguous", fix));
    }
    let (q, c) = (queries.as_slice().unwrap_or(&[]), corpus.as_slice().unwrap_or(&[]));
    let found = long(py, progress, |job| embkit_ann::topk(q, c, d, k, threads, job))?;
    Ok((array(py, found.row).reshape([nq, k])?, array(py, found.score).reshape([nq, k])?))
}
