//! The rules that turn neighbours into hard negatives.

use crate::arrays::{PyShards, array, shards, slice};
use crate::door::long;
use crate::error::usage;
use embkit_ann::{
    Bounds, Candidates, Corpus, FilterParams, Queries, Refill, Rerank, Sample, Sketches,
};
use embkit_core::Texts;
use numpy::{PyArray1, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2, PyUntypedArrayMethods};
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// One shard of texts, kept.
type Shard = (Py<PyArray1<u8>>, Py<PyArray1<u64>>);

/// The same as it comes.
type GivenShard<'py> = (Bound<'py, PyArray1<u8>>, Bound<'py, PyArray1<u64>>);

/// A corpus whose candidates are filtered, block of queries by block.
#[pyclass(frozen)]
pub(crate) struct NegativeFilter {
    cluster: Py<PyArray1<u64>>,
    text: Py<PyArray1<u64>>,
    texts: Vec<Shard>,
    sketches: Sketches,
}

/// Of each query: list, number, own row, cluster, text row, then positives: offsets, rows, scores.
type PyQueries<'py> = (
    PyReadonlyArray1<'py, u32>,
    PyReadonlyArray1<'py, u64>,
    PyReadonlyArray1<'py, u32>,
    PyReadonlyArray1<'py, u64>,
    PyReadonlyArray1<'py, u64>,
    PyReadonlyArray1<'py, u64>,
    PyReadonlyArray1<'py, u32>,
    PyReadonlyArray1<'py, f32>,
);

/// Offsets, ranks and scores of reranked candidates, and the positives' scores.
type PyRerank<'py> = (
    PyReadonlyArray1<'py, u64>,
    PyReadonlyArray1<'py, u32>,
    PyReadonlyArray1<'py, f32>,
    PyReadonlyArray1<'py, f32>,
);

#[pymethods]
impl NegativeFilter {
    #[new]
    fn new(
        py: Python,
        cluster: Bound<'_, PyArray1<u64>>,
        text: Bound<'_, PyArray1<u64>>,
        texts: Vec<GivenShard<'_>>,
    ) -> PyResult<Self> {
        let readonly: PyShards =
            texts.iter().map(|(bytes, offsets)| (bytes.readonly(), offsets.readonly())).collect();
        let count = Texts::new(&shards(py, &readonly)?).map_err(|e| crate::error::to_py(py, e))?;
        let sketches = Sketches::new(count.len());
        let texts = texts.iter().map(|(b, o)| (b.clone().unbind(), o.clone().unbind())).collect();
        Ok(Self { cluster: cluster.unbind(), text: text.unbind(), texts, sketches })
    }

    /// Negatives of a block of queries, as a dict of arrays.
    #[pyo3(signature = (row, score, queries, params, rerank=None, threads=0, progress=None))]
    fn run<'py>(
        &self,
        py: Python<'py>,
        row: PyReadonlyArray2<'py, u32>,
        score: PyReadonlyArray2<'py, f32>,
        queries: PyQueries<'py>,
        params: &Bound<'py, PyDict>,
        rerank: Option<PyRerank<'py>>,
        threads: usize,
        progress: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let rules = rules(py, params, threads)?;
        let (Ok(rows), Ok(scores)) = (row.as_slice(), score.as_slice()) else {
            let fix = "Pass numpy.ascontiguousarray of it";
            return Err(usage(py, "row or score is not C-contiguous", fix));
        };
        let candidates = Candidates { row: rows, score: scores, per_list: row.shape()[1] };
        let queries = Queries {
            list: slice(py, &queries.0, "list")?,
            number: slice(py, &queries.1, "number")?,
            own: slice(py, &queries.2, "own")?,
            cluster: slice(py, &queries.3, "cluster")?,
            text: slice(py, &queries.4, "text")?,
            offsets: slice(py, &queries.5, "offsets")?,
            positive: slice(py, &queries.6, "positive")?,
            score: slice(py, &queries.7, "positive score")?,
        };
        let rerank = match &rerank {
            None => None,
            Some(r) => Some(Rerank {
                offsets: slice(py, &r.0, "rerank offsets")?,
                rank: slice(py, &r.1, "rerank rank")?,
                score: slice(py, &r.2, "rerank score")?,
                positive: slice(py, &r.3, "rerank positive")?,
            }),
        };
        let (cluster, text) = (self.cluster.bind(py).readonly(), self.text.bind(py).readonly());
        let held: PyShards = self
            .texts
            .iter()
            .map(|(bytes, offsets)| (bytes.bind(py).readonly(), offsets.bind(py).readonly()))
            .collect();
        let texts = Texts::new(&shards(py, &held)?).map_err(|e| crate::error::to_py(py, e))?;
        let corpus = Corpus {
            cluster: slice(py, &cluster, "cluster")?,
            text: slice(py, &text, "text")?,
            texts: &texts,
            sketches: &self.sketches,
        };
        let found = long(py, progress, |job| {
            embkit_ann::filter(candidates, queries, corpus, rerank, &rules, job)
        })?;
        let audit = PyDict::new(py);
        for (name, count) in found.audit.rows() {
            audit.set_item(name, count)?;
        }
        let out = PyDict::new(py);
        out.set_item("offsets", array(py, found.offsets))?;
        out.set_item("row", array(py, found.row))?;
        out.set_item("score", array(py, found.score))?;
        out.set_item("rank", array(py, found.rank))?;
        out.set_item("shallow", array(py, found.shallow))?;
        out.set_item("audit", audit)?;
        if rules.trace {
            out.set_item("trace_rule", array(py, found.trace.rule))?;
            out.set_item("trace_rank", array(py, found.trace.rank))?;
            out.set_item("trace_number", array(py, found.trace.number))?;
        }
        Ok(out)
    }
}

const RULES: &str = "skip, last, max_score, margin, percent, min_score, near_jaccard, \
    rerank_max_score, rerank_margin, rerank_percent, pool, k, sample, refill, seed, defer, trace";

/// The rules by name; an absent key keeps its default, `None` switches a rule off.
fn rules(py: Python, from: &Bound<'_, PyDict>, threads: usize) -> PyResult<FilterParams> {
    let mut p = FilterParams { threads, ..FilterParams::default() };
    p.bounds = Bounds::default();
    for (key, value) in from {
        let key: String = key.extract()?;
        match key.as_str() {
            "skip" => p.skip = value.extract()?,
            "last" => p.last = value.extract()?,
            "max_score" => p.bounds.max = value.extract()?,
            "margin" => p.bounds.margin = value.extract()?,
            "percent" => p.bounds.percent = value.extract()?,
            "min_score" => p.min_score = value.extract()?,
            "near_jaccard" => p.near_jaccard = value.extract()?,
            "rerank_max_score" => p.rerank.max = value.extract()?,
            "rerank_margin" => p.rerank.margin = value.extract()?,
            "rerank_percent" => p.rerank.percent = value.extract()?,
            "pool" => p.pool = value.extract()?,
            "k" => p.k = value.extract()?,
            "seed" => p.seed = value.extract()?,
            "defer" => p.defer = value.extract()?,
            "trace" => p.trace = value.extract()?,
            "sample" => {
                let all = [("top", Sample::Top), ("random", Sample::Random)];
                p.sample = one_of(py, "sample", &value.extract::<String>()?, &all)?;
            }
            "refill" => {
                let all = [
                    ("none", Refill::Nothing),
                    ("relax", Refill::Relax),
                    ("random", Refill::Random),
                ];
                p.refill = one_of(py, "refill", &value.extract::<String>()?, &all)?;
            }
            _ => {
                let what = format!("unknown filter rule '{key}'");
                return Err(usage(py, &what, &format!("Use some of {RULES}")));
            }
        }
    }
    Ok(p)
}

fn one_of<T: Copy>(py: Python, name: &str, value: &str, all: &[(&str, T)]) -> PyResult<T> {
    match all.iter().find(|(known, _)| *known == value) {
        Some((_, found)) => Ok(*found),
        None => {
            let known: Vec<&str> = all.iter().map(|(known, _)| *known).collect();
            let fix = format!("Use one of {}", known.join(", "));
            Err(usage(py, &format!("unknown {name} '{value}'"), &fix))
        }
    }
}
