//! `Loader` and `Batch`: the plan of a run and its batches, filled into the caller's buffer.

use crate::arrays::{array, slice};
use crate::door::{long, short};
use crate::error::usage;
use crate::store::Store;
use embkit_core::Error;
use embkit_store::batch::{self, FieldType, Form, HardRule, Settings, TaskFiles, cuts};
use embkit_store::plan::{self, Exhausted};
use embkit_store::records::Kind;
use numpy::{PyArray1, PyReadonlyArray1, PyReadwriteArray1};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::path::PathBuf;
use std::sync::Arc;

/// The plan of a run: which task and examples each step takes.
#[pyclass(frozen)]
pub(crate) struct Plan {
    inner: plan::Plan,
}

fn exhausted(word: &str, epochs: u64) -> embkit_core::Result<Exhausted> {
    match word {
        "repeat" => Ok(Exhausted::Repeat),
        "drop" => Ok(Exhausted::Drop(epochs)),
        "stop" => Ok(Exhausted::Stop(epochs)),
        _ => Err(Error::usage(
            format!("unknown rule '{word}' for exhausted tasks"),
            "Use 'repeat', 'drop' or 'stop'",
        )),
    }
}

/// The batch size of a task: its own, or that of all.
fn size_of(own: &[(String, u64)], name: &str, all: u64) -> u64 {
    own.iter().find(|(n, _)| n == name).map_or(all, |(_, size)| *size)
}

/// `(task, ordinal, epoch, place)`.
type Part = (usize, u64, u64, u64);

fn part(p: plan::Part) -> Part {
    (p.task, p.ordinal, p.epoch, p.place)
}

#[pymethods]
impl Plan {
    #[new]
    #[pyo3(signature = (seed, tasks, batch_size, exhausted="repeat", epochs=1, batch_sizes=vec![]))]
    fn new(
        py: Python,
        seed: i64,
        tasks: Vec<(String, u64, f64)>,
        batch_size: u64,
        exhausted: &str,
        epochs: u64,
        batch_sizes: Vec<(String, u64)>,
    ) -> PyResult<Plan> {
        short(py, || {
            let rule = self::exhausted(exhausted, epochs)?;
            let tasks = tasks.into_iter().map(|(name, examples, weight)| {
                let batch_size = size_of(&batch_sizes, &name, batch_size);
                plan::Task { name, examples, weight, batch_size }
            });
            Ok(Plan { inner: plan::Plan::new(seed, tasks.collect(), rule)? })
        })
    }

    /// Steps until the plan ends; None when it never does.
    #[getter]
    fn steps(&self) -> Option<u64> {
        self.inner.steps()
    }

    /// Steps of each task in a block of the first mixture.
    #[getter]
    fn counts(&self) -> Vec<u64> {
        self.inner.counts().to_vec()
    }

    /// Whole batches in one pass over a task.
    fn batches_per_epoch(&self, task: usize) -> u64 {
        self.inner.batches_per_epoch(task)
    }

    /// Batches of each task in the steps before `step`.
    fn count_before(&self, py: Python, step: u64) -> PyResult<Vec<u64>> {
        short(py, || self.inner.count_before(step))
    }

    /// `(task, ordinal, epoch, place)` of a step.
    fn part(&self, py: Python, step: u64) -> PyResult<Part> {
        short(py, || Ok(part(self.inner.part(step)?)))
    }

    /// Task of each of `count` steps from `first` on; steps after the end are left out.
    fn tasks_of<'py>(
        &self,
        py: Python<'py>,
        first: u64,
        count: u64,
    ) -> PyResult<Bound<'py, PyArray1<u32>>> {
        Ok(array(py, short(py, || self.inner.tasks_of(first, count))?))
    }

    /// The examples of a step, in the order of the global batch.
    fn examples<'py>(&self, py: Python<'py>, step: u64) -> PyResult<Bound<'py, PyArray1<u64>>> {
        Ok(array(py, short(py, || Ok(self.inner.examples(&self.inner.part(step)?)))?))
    }
}

/// Number of the task and its examples.
type Examples<'py> = (usize, Bound<'py, PyArray1<u64>>);

/// Makes the batches of a run; may be used from several threads at once.
#[pyclass(frozen)]
pub(crate) struct Loader {
    inner: Arc<batch::Loader>,
    pad_id: i32,
    padded: bool,
}

#[pymethods]
impl Loader {
    #[new]
    #[pyo3(signature = (
        store, tasks, *, seed, batch_size, token_budget, hard=0, hard_rule="sample", padded=false,
        pad_id=0, no_duplicates=false, prompt_dropout=0.0, exhausted="repeat", epochs=1,
        batch_sizes=vec![]
    ))]
    #[allow(clippy::too_many_arguments)] // keyword arguments of one call
    fn new(
        py: Python,
        store: &Store,
        tasks: Vec<(String, String, PathBuf, Option<PathBuf>, f64)>,
        seed: i64,
        batch_size: u64,
        token_budget: u64,
        hard: usize,
        hard_rule: &str,
        padded: bool,
        pad_id: i32,
        no_duplicates: bool,
        prompt_dropout: f64,
        exhausted: &str,
        epochs: u64,
        batch_sizes: Vec<(String, u64)>,
    ) -> PyResult<Loader> {
        let store = store.inner.clone();
        short(py, || {
            let hard_rule = match hard_rule {
                "sample" => HardRule::Sample,
                "top" => HardRule::Top,
                _ => {
                    return Err(Error::usage(
                        format!("unknown rule '{hard_rule}' for hard negatives"),
                        "Use 'sample' or 'top'",
                    ));
                }
            };
            let settings = Settings {
                seed,
                hard,
                hard_rule,
                token_budget,
                padded,
                no_duplicates,
                prompt_dropout,
                exhausted: self::exhausted(exhausted, epochs)?,
            };
            let tasks: Vec<TaskFiles> = tasks
                .into_iter()
                .map(|(name, kind, examples, negatives, weight)| {
                    let kind = Kind::from_name(&kind).ok_or_else(|| {
                        Error::usage(
                            format!("task '{name}' is of unknown kind '{kind}'"),
                            "Use 'retrieval', 'sts' or 'classification'",
                        )
                    })?;
                    let batch_size = size_of(&batch_sizes, &name, batch_size);
                    Ok(TaskFiles { name, kind, examples, negatives, weight, batch_size })
                })
                .collect::<embkit_core::Result<_>>()?;
            let inner = Arc::new(batch::Loader::open(store, &tasks, settings)?);
            Ok(Loader { inner, pad_id, padded })
        })
    }

    /// The plan of the run.
    #[getter]
    fn plan(&self) -> Plan {
        Plan { inner: self.inner.plan().clone() }
    }

    /// Per task: usable examples, unusable ones, and why those are.
    #[getter]
    fn tasks(&self) -> Vec<(u64, u64, &'static str)> {
        let tasks = self.inner.plan().tasks().iter().enumerate();
        tasks
            .map(|(i, t)| {
                let (skipped, reason) = self.inner.skipped(i);
                (t.examples, skipped, reason)
            })
            .collect()
    }

    /// `(task, examples)` of a step, u64 [B], in the order of the global batch.
    fn examples<'py>(&self, py: Python<'py>, step: u64) -> PyResult<Examples<'py>> {
        let (part, examples) = short(py, || self.inner.examples_of(step))?;
        Ok((part.task, array(py, examples)))
    }

    /// Hard negatives that the table lists for each of some examples of a task, u32.
    fn listed<'py>(
        &self,
        py: Python<'py>,
        task: usize,
        examples: PyReadonlyArray1<'py, u64>,
    ) -> PyResult<Bound<'py, PyArray1<u32>>> {
        let examples = slice(py, &examples, "examples")?;
        Ok(array(py, short(py, || self.inner.listed(task, examples))?))
    }

    /// The batch of `rank` among `world` at a step: rows, keys and cuts; tokens come by `fill`.
    #[pyo3(signature = (step, rank=0, world=1, starts=None))]
    fn batch(
        &self,
        py: Python,
        step: u64,
        rank: usize,
        world: usize,
        starts: Option<PyReadonlyArray1<u64>>,
    ) -> PyResult<Batch> {
        let starts = starts.as_ref().map(|s| slice(py, s, "starts")).transpose()?;
        short(py, || {
            let inner = self.inner.batch(step, rank, world, starts)?;
            Ok(Batch {
                inner,
                loader: self.inner.clone(),
                pad_id: self.pad_id,
                padded: self.padded,
            })
        })
    }
}

/// Order and ends.
type Cuts<'py> = (Bound<'py, PyArray1<u32>>, Bound<'py, PyArray1<u64>>);

/// Cut rows of some lengths into micro-batches: their order, longest first, and where each
/// micro-batch ends in it.
#[pyfunction]
#[pyo3(signature = (lengths, budget, padded=true))]
pub(crate) fn micro_batches<'py>(
    py: Python<'py>,
    lengths: PyReadonlyArray1<'py, u32>,
    budget: u64,
    padded: bool,
) -> PyResult<Cuts<'py>> {
    let lengths = slice(py, &lengths, "lengths")?;
    let order = cuts::longest_first(lengths);
    let falling: Vec<u32> =
        order.iter().map(|i| lengths.get(*i as usize).copied().unwrap_or(0)).collect();
    let cut = if padded { cuts::padded } else { cuts::packed };
    let ends = cut(&falling, budget).into_iter().map(|range| range.end as u64).collect();
    Ok((array(py, order), array(py, ends)))
}

type Dealt<'py> = (Bound<'py, PyArray1<u64>>, Bound<'py, PyArray1<u64>>);

/// Rows in batches in which no value comes twice: the rows, and where each batch ends in them.
#[pyfunction]
#[pyo3(signature = (keys, columns, order, batch_size, progress=None))]
pub(crate) fn first_fit<'py>(
    py: Python<'py>,
    keys: PyReadonlyArray1<'py, u64>,
    columns: usize,
    order: PyReadonlyArray1<'py, u64>,
    batch_size: usize,
    progress: Option<&Bound<'py, PyAny>>,
) -> PyResult<Dealt<'py>> {
    let (keys, order) = (slice(py, &keys, "keys")?, slice(py, &order, "order")?);
    let made = long(py, progress, |job| batch::first_fit(job, keys, columns, order, batch_size))?;
    Ok((array(py, made.rows), array(py, made.ends)))
}

/// One step's input on one rank.
#[pyclass(frozen)]
pub(crate) struct Batch {
    inner: batch::Batch,
    loader: Arc<batch::Loader>,
    pad_id: i32,
    padded: bool,
}

impl Batch {
    fn form(&self, wide: bool) -> Form {
        Form { padded: self.padded, wide, pad_id: self.pad_id }
    }
}

#[pymethods]
impl Batch {
    /// `(task, ordinal, epoch, place)`.
    #[getter]
    fn part(&self) -> Part {
        part(self.inner.part)
    }

    /// Kind of its task.
    #[getter]
    fn kind(&self) -> &'static str {
        self.inner.kind.as_str()
    }

    /// Numbers of the task's usable examples, u64 [b].
    #[getter]
    fn examples<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<u64>> {
        array(py, self.inner.examples.clone())
    }

    /// The distinct rows, in the order of the micro-batches, u64 [R].
    #[getter]
    fn rows<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<u64>> {
        array(py, self.inner.rows.clone())
    }

    /// Hard negatives per example.
    #[getter]
    fn hard_count(&self) -> usize {
        self.inner.hard_count
    }

    /// Real tokens.
    #[getter]
    fn tokens(&self) -> u64 {
        self.inner.tokens
    }

    /// Micro-batches that every rank runs.
    #[getter]
    fn micro_count(&self) -> usize {
        self.inner.micro_count
    }

    /// Per micro-batch `(first row, rows, longest, first token, tokens)`.
    #[getter]
    fn micro(&self) -> Vec<(usize, usize, usize, usize, usize)> {
        let micro = self.inner.micro.iter();
        micro.map(|m| (m.start, m.rows, m.longest, m.token_start, m.tokens)).collect()
    }

    /// `({name: (dtype, elements, first byte)}, bytes)` of a buffer that holds the arrays.
    #[pyo3(signature = (wide=true))]
    fn layout<'py>(&self, py: Python<'py>, wide: bool) -> PyResult<(Bound<'py, PyDict>, usize)> {
        let (fields, size) = self.inner.layout(self.form(wide));
        let out = PyDict::new(py);
        for field in fields {
            let dtype = match field.dtype {
                FieldType::Bool => "bool",
                FieldType::U8 => "uint8",
                FieldType::I32 => "int32",
                FieldType::I64 => "int64",
                FieldType::F32 => "float32",
            };
            out.set_item(field.name, (dtype, field.len, field.offset))?;
        }
        Ok((out, size))
    }

    /// Fill a buffer of bytes with the arrays of `layout`.
    #[pyo3(signature = (buffer, wide=true))]
    fn fill(&self, py: Python, mut buffer: PyReadwriteArray1<u8>, wide: bool) -> PyResult<()> {
        let Ok(buffer) = buffer.as_slice_mut() else {
            return Err(usage(py, "the buffer is not contiguous", "Pass a C-contiguous array"));
        };
        short(py, || self.inner.fill(self.loader.store(), self.form(wide), buffer))
    }
}
