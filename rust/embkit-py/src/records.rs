//! `RecordsBuilder`: jsonl and Arrow in, distinct texts and example tables out.

use crate::arrays::array;
use crate::arrow;
use crate::door::{long, short};
use crate::error::usage;
use embkit_core::Error;
use embkit_store::records::{self, Examples, Input, Kind, Records, SourceReport};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{PyDict, PyList};
use std::path::PathBuf;

// Written out in the signature below, where Python can show it.
const _: () = assert!(records::MAX_LINE == 67108864 && records::TEXT_BYTES == 67108864);

/// Collects records from sources, then gives texts and examples as arrays.
#[pyclass]
pub(crate) struct RecordsBuilder {
    inner: Option<records::RecordsBuilder>,
}

#[pymethods]
impl RecordsBuilder {
    #[new]
    #[pyo3(signature = (max_line=67108864, dir=None, text_bytes=67108864, threads=0))]
    fn new(
        py: Python,
        max_line: usize,
        dir: Option<PathBuf>,
        text_bytes: u64,
        threads: usize,
    ) -> PyResult<RecordsBuilder> {
        let inner = match dir {
            None => records::RecordsBuilder::new(max_line),
            Some(dir) => short(py, || {
                records::RecordsBuilder::in_directory(&dir, max_line, text_bytes, threads)
            })?,
        };
        Ok(RecordsBuilder { inner: Some(inner) })
    }

    /// Read one .jsonl, .jsonl.zst or .jsonl.gz file as a new source.
    #[pyo3(signature = (path, source, task, kind="auto", progress=None))]
    fn add_jsonl(
        &mut self,
        py: Python,
        path: PathBuf,
        source: &str,
        task: &str,
        kind: &str,
        progress: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let kind = parse_kind(py, kind)?;
        let inner = self.open(py)?;
        long(py, progress, |job| inner.add_jsonl(job, &path, Input { source, task, kind }))
    }

    /// Read whole lines of plain jsonl from memory; the same source again continues it.
    #[pyo3(signature = (data, source, task, kind="auto", progress=None))]
    fn add_lines(
        &mut self,
        py: Python,
        data: PyBackedBytes,
        source: &str,
        task: &str,
        kind: &str,
        progress: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let kind = parse_kind(py, kind)?;
        let inner = self.open(py)?;
        long(py, progress, |job| inner.add_lines(job, &data, Input { source, task, kind }))
    }

    /// Read the rows of Arrow data; the same source again continues it.
    #[pyo3(signature = (data, source, task, kind="auto", progress=None))]
    fn add_arrow(
        &mut self,
        py: Python,
        data: &Bound<'_, PyAny>,
        source: &str,
        task: &str,
        kind: &str,
        progress: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let kind = parse_kind(py, kind)?;
        let stream = arrow::stream(data)?;
        let inner = self.open(py)?;
        long(py, progress, |job| {
            for batch in stream {
                let batch = batch.map_err(|e| {
                    Error::usage(
                        format!("the Arrow stream of {source:?} broke off: {e}"),
                        "Check what feeds it",
                    )
                })?;
                inner.add_batch(job, &batch, Input { source, task, kind })?;
            }
            Ok(())
        })
    }

    /// Everything read, as a dict of arrays. The builder is used up.
    fn finish<'py>(&mut self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        self.open(py)?;
        let Some(inner) = self.inner.take() else { return Ok(PyDict::new(py)) };
        let Records { texts, shards, text, text_offsets, text_id, examples, labels, reports } =
            short(py, || inner.finish())?;
        let out = PyDict::new(py);
        out.set_item("texts", texts)?;
        out.set_item("shards", shards)?;
        out.set_item("text", array(py, text))?;
        out.set_item("text_offsets", array(py, text_offsets))?;
        out.set_item("text_id", array(py, text_id))?;
        let tables = PyList::empty(py);
        for table in examples {
            tables.append(examples_dict(py, table)?)?;
        }
        out.set_item("examples", tables)?;
        out.set_item("labels", labels)?;
        let rejected = PyList::empty(py);
        for report in reports {
            rejected.append(report_dict(py, report)?)?;
        }
        out.set_item("rejected", rejected)?;
        Ok(out)
    }
}

impl RecordsBuilder {
    fn open(&mut self, py: Python) -> PyResult<&mut records::RecordsBuilder> {
        self.inner.as_mut().ok_or_else(|| {
            usage(py, "this RecordsBuilder is finished", "Make a new one for further records")
        })
    }
}

fn parse_kind(py: Python, kind: &str) -> PyResult<Option<Kind>> {
    match (kind, Kind::from_name(kind)) {
        ("auto", _) => Ok(None),
        (_, Some(kind)) => Ok(Some(kind)),
        _ => Err(usage(
            py,
            &format!("unknown kind '{kind}'"),
            "Use 'auto', 'retrieval', 'sts' or 'classification'",
        )),
    }
}

fn examples_dict<'py>(py: Python<'py>, t: Examples) -> PyResult<Bound<'py, PyDict>> {
    let out = PyDict::new(py);
    out.set_item("source", t.source)?;
    out.set_item("task", t.task)?;
    out.set_item("kind", t.kind.as_str())?;
    out.set_item("line", array(py, t.line))?;
    out.set_item("query", array(py, t.query))?;
    out.set_item("positive_offsets", array(py, t.positive_offsets))?;
    out.set_item("positive", array(py, t.positive))?;
    out.set_item("negative_offsets", array(py, t.negative_offsets))?;
    out.set_item("negative", array(py, t.negative))?;
    out.set_item("negative_score", array(py, t.negative_score))?;
    out.set_item("score", array(py, t.score))?;
    out.set_item("label", array(py, t.label))?;
    out.set_item("weight", array(py, t.weight))?;
    Ok(out)
}

fn report_dict<'py>(py: Python<'py>, r: SourceReport) -> PyResult<Bound<'py, PyDict>> {
    let out = PyDict::new(py);
    out.set_item("source", r.source)?;
    out.set_item("task", r.task)?;
    out.set_item("read", r.read)?;
    out.set_item("kept", r.kept)?;
    out.set_item("rejected", r.rejected)?;
    out.set_item("reasons", r.reasons)?;
    let samples: Vec<_> = r.samples.into_iter().map(|s| (s.line, s.reason, s.excerpt)).collect();
    out.set_item("samples", samples)?;
    out.set_item("extra_columns", r.extra_columns)?;
    Ok(out)
}
