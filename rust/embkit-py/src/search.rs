//! Exact and approximate top-k search.

use crate::arrays::array;
use crate::door::long;
use crate::error::usage;
use embkit_ann::{Isa, Part, SearchParams, TopK, Vectors};
use numpy::{PyArray2, PyArrayMethods, PyReadonlyArray2, PyUntypedArrayMethods};
use pyo3::prelude::*;

type Grid<'py> = (Bound<'py, PyArray2<u32>>, Bound<'py, PyArray2<f32>>);

/// Rows of one type; half floats come as a view of their bits.
#[derive(FromPyObject)]
pub(crate) enum Rows<'py> {
    F32(PyReadonlyArray2<'py, f32>),
    F16(PyReadonlyArray2<'py, u16>),
}

impl Rows<'_> {
    fn part(&self) -> Option<Part<'_>> {
        match self {
            Rows::F32(rows) => rows.as_slice().ok().map(Part::F32),
            Rows::F16(rows) => rows.as_slice().ok().map(Part::F16),
        }
    }
}

/// `float32 [n, d]`, `uint16 [n, d]` (the bits of float16), or several that follow one another.
#[derive(FromPyObject)]
pub(crate) enum PyVectors<'py> {
    One(Rows<'py>),
    Many(Vec<Rows<'py>>),
}

impl<'py> PyVectors<'py> {
    fn vectors(&self, py: Python, name: &str) -> PyResult<Vectors<'_>> {
        let parts = match self {
            PyVectors::One(rows) => std::slice::from_ref(rows),
            PyVectors::Many(rows) => &rows[..],
        };
        let width = |rows: &Rows| match rows {
            Rows::F32(rows) => rows.shape()[1],
            Rows::F16(rows) => rows.shape()[1],
        };
        let Some(d) = parts.first().map(width) else {
            return Err(usage(py, &format!("no arrays of {name} vectors"), "Pass at least one"));
        };
        if let Some(other) = parts.iter().map(width).find(|other| *other != d) {
            let what = format!("{name} vectors of width {d} and of width {other}");
            return Err(usage(py, &what, "Pass arrays of one model and width"));
        }
        let parts = parts.iter().map(Rows::part).collect::<Option<Vec<Part>>>();
        let Some(parts) = parts else {
            let what = format!("an array of {name} vectors is not C-contiguous");
            return Err(usage(py, &what, "Pass numpy.ascontiguousarray of it"));
        };
        Vectors::new(&parts, d).map_err(|e| crate::error::to_py(py, e))
    }
}

/// The instruction set that searches run on.
#[pyfunction]
pub(crate) fn search_isa() -> &'static str {
    Isa::best().name()
}

/// The `k` corpus rows with the largest inner product per query: `(row, score)`, both [nq, k].
#[pyfunction]
#[pyo3(signature = (queries, corpus, k, memory=0, threads=0, progress=None))]
pub(crate) fn topk<'py>(
    py: Python<'py>,
    queries: PyVectors<'py>,
    corpus: PyVectors<'py>,
    k: usize,
    memory: usize,
    threads: usize,
    progress: Option<&Bound<'py, PyAny>>,
) -> PyResult<Grid<'py>> {
    let (queries, corpus) = (queries.vectors(py, "query")?, corpus.vectors(py, "corpus")?);
    let params = SearchParams { k, memory, threads, ..SearchParams::default() };
    let found = long(py, progress, |job| embkit_ann::topk(&queries, &corpus, &params, job))?;
    grid(py, found, queries.len(), k)
}

fn grid(py: Python<'_>, found: TopK, nq: usize, k: usize) -> PyResult<Grid<'_>> {
    Ok((array(py, found.row).reshape([nq, k])?, array(py, found.score).reshape([nq, k])?))
}

/// A corpus sorted into lists around centroids, for approximate search.
#[pyclass(frozen)]
pub(crate) struct Ivf {
    inner: embkit_ann::Ivf,
}

#[pymethods]
impl Ivf {
    #[new]
    #[pyo3(signature = (corpus, lists=0, seed=0, threads=0, progress=None))]
    fn new<'py>(
        py: Python<'py>,
        corpus: PyVectors<'py>,
        lists: usize,
        seed: u64,
        threads: usize,
        progress: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Self> {
        let corpus = corpus.vectors(py, "corpus")?;
        let lists = if lists == 0 { embkit_ann::list_count(corpus.len()) } else { lists };
        let build =
            |job: &_| embkit_ann::Ivf::build(Isa::best(), &corpus, lists, seed, threads, job);
        Ok(Self { inner: long(py, progress, build)? })
    }

    /// How many lists there are.
    #[getter]
    fn lists(&self) -> usize {
        self.inner.lists()
    }

    /// `(probes, recall, error, queries)`: the fewest lists per query that reach a recall, the recall
    /// that they were measured to have, its standard error, and on how many queries.
    #[pyo3(signature = (queries, corpus, k, recall, seed=0, memory=0, threads=0))]
    fn calibrate<'py>(
        &self,
        py: Python<'py>,
        queries: PyVectors<'py>,
        corpus: PyVectors<'py>,
        k: usize,
        recall: f64,
        seed: u64,
        memory: usize,
        threads: usize,
    ) -> PyResult<(usize, f64, f64, usize)> {
        let (queries, corpus) = (queries.vectors(py, "query")?, corpus.vectors(py, "corpus")?);
        let params = SearchParams { k, memory, threads, ..SearchParams::default() };
        let found = long(py, None, |job| {
            embkit_ann::calibrate(&self.inner, &queries, &corpus, recall, seed, &params, job)
        })?;
        Ok((found.probes, found.recall, found.error, found.queries))
    }

    /// The `k` nearest rows among the `probes` lists nearest to each query: `(row, score)`.
    #[pyo3(signature = (queries, corpus, k, probes, threads=0, progress=None))]
    fn search<'py>(
        &self,
        py: Python<'py>,
        queries: PyVectors<'py>,
        corpus: PyVectors<'py>,
        k: usize,
        probes: usize,
        threads: usize,
        progress: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Grid<'py>> {
        let (queries, corpus) = (queries.vectors(py, "query")?, corpus.vectors(py, "corpus")?);
        let found = long(py, progress, |job| {
            self.inner.search(&queries, &corpus, k, probes, threads, job)
        })?;
        grid(py, found, queries.len(), k)
    }
}
