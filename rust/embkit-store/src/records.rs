//! Raw records in, distinct texts and examples out.
//!
//! Reads jsonl, plain or packed by zstd or gzip, line by line in bounded memory. What is wrong with
//! a row is counted and sampled ([`SourceReport`]); what is wrong with a file is an error, and a
//! file that fails leaves no trace in the builder. Texts are numbered in order of first appearance,
//! so the result depends on the order of the files and on nothing else.
//!
//! Oddity: lines of only whitespace are not rows: files often end in one.

mod columns;
mod faults;
mod intern;
mod lines;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use embkit_core::{Error, Job, Result};

pub use columns::Kind;
use columns::{ACCEPTED, Example, Row, names};
pub use faults::{EXCERPT_CHARS, RowFault, SAMPLES_PER_REASON, Sample, SourceReport};
use intern::Texts;
pub use intern::{identity, nfc};
use lines::{Line, Lines, empty};

/// Default limit of one line, in bytes.
pub const MAX_LINE: usize = 64 << 20;
/// Rows without a kept one after which a file is said to have the wrong columns.
const WRONG_COLUMN_ROWS: u64 = 64;
/// Column names listed in the error about wrong columns.
const NAMES_SHOWN: usize = 24;

/// The examples of one source, as columns. Values of `query`, `positive` and `negative` are rows of
/// [`Records::text`]. The jagged columns have offsets (one more than examples) and values.
#[derive(Clone, Debug, PartialEq)]
pub struct Examples {
    /// Name of the source, unique in a [`RecordsBuilder`].
    pub source: String,
    /// Task that the source feeds; several sources may feed one.
    pub task: String,
    /// What the rows train.
    pub kind: Kind,
    /// Line of each example in its file, from 1.
    pub line: Vec<u64>,
    /// The query (retrieval), the first sentence (sts) or the text (classification).
    pub query: Vec<u64>,
    /// Offsets into `positive`.
    pub positive_offsets: Vec<u64>,
    /// The positives (retrieval), the second sentence (sts) or nothing (classification).
    pub positive: Vec<u64>,
    /// Offsets into `negative` and `negative_score`.
    pub negative_offsets: Vec<u64>,
    /// The given hard negatives.
    pub negative: Vec<u64>,
    /// Score of each negative, NaN where none was given.
    pub negative_score: Vec<f32>,
    /// Similarity (sts) or score of the first positive, NaN where none was given.
    pub score: Vec<f32>,
    /// Class as an index into [`Records::labels`] of the task, -1 for the other kinds.
    pub label: Vec<i32>,
    /// Weight, 1 where none was given.
    pub weight: Vec<f32>,
}

/// What [`RecordsBuilder::finish`] returns.
#[derive(Clone, Debug, PartialEq)]
pub struct Records {
    /// The distinct texts, one after the other, as given.
    pub text: Vec<u8>,
    /// Offsets into `text`, one more than texts.
    pub text_offsets: Vec<u64>,
    /// Low 64 bits of the text's [`identity`].
    pub text_id: Vec<u64>,
    /// One table per source, in the order of reading.
    pub examples: Vec<Examples>,
    /// Class names per task, sorted (as numbers when all of them are whole numbers).
    pub labels: BTreeMap<String, Vec<String>>,
    /// One report per source, aligned with `examples`.
    pub reports: Vec<SourceReport>,
}

/// Where rows come from and what they are for.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    /// Name of the source.
    pub source: &'a str,
    /// Task that it feeds.
    pub task: &'a str,
    /// The kind of its rows, or `None` to take it from the first row that has one.
    pub kind: Option<Kind>,
}

/// Collects records from files; see the module.
pub struct RecordsBuilder {
    max_line: usize,
    texts: Texts,
    examples: Vec<Examples>,
    reports: Vec<SourceReport>,
    /// Lines read of each source, so that a source given in pieces counts on.
    lines: Vec<u64>,
    /// Class names in order of appearance, while `Examples::label` holds their index here.
    labels: Vec<String>,
    label_rows: HashMap<String, i32>,
}

impl Default for RecordsBuilder {
    fn default() -> Self {
        Self::new(MAX_LINE)
    }
}

impl RecordsBuilder {
    /// An empty builder; lines over `max_line` bytes are rejected.
    pub fn new(max_line: usize) -> Self {
        Self {
            max_line,
            texts: Texts::default(),
            examples: Vec::new(),
            reports: Vec::new(),
            lines: Vec::new(),
            labels: Vec::new(),
            label_rows: HashMap::new(),
        }
    }

    /// Reads one jsonl, jsonl.zst or jsonl.gz file as a new source; counts rows on `job`.
    ///
    /// Errors: `Io` for a file that cannot be read, `Corrupt` for one that is empty, truncated,
    /// damaged or has none of the known columns, `Usage` for a source name used before or a task
    /// that already has another kind. After an error the builder is as it was.
    pub fn add_jsonl(&mut self, job: &Job, path: &Path, input: Input) -> Result<()> {
        if self.examples.iter().any(|e| e.source == input.source) {
            return Err(Error::usage(
                format!("the source name {:?} is used twice", input.source),
                "Give each file its own source name",
            ));
        }
        let lines = Lines::open(path, self.max_line)?;
        self.add(job, lines, path, input)
    }

    /// Reads rows from plain jsonl in memory. Called again with the same source and task it
    /// continues that source, so that a stream can be handed over in pieces of whole lines.
    /// Errors: as [`Self::add_jsonl`].
    pub fn add_lines(&mut self, job: &Job, bytes: &[u8], input: Input) -> Result<()> {
        let path = Path::new(input.source);
        let lines = Lines::of_bytes(bytes, path, self.max_line)?;
        self.add(job, lines, path, input)
    }

    fn add(&mut self, job: &Job, lines: Lines, path: &Path, input: Input) -> Result<()> {
        let (texts, labels) = (self.texts.len(), self.labels.len());
        let result = self.read(job, lines, path, input);
        if result.is_err() {
            self.texts.truncate(texts);
            for name in self.labels.drain(labels..) {
                self.label_rows.remove(&name);
            }
        }
        result
    }

    /// Reads all lines into a table of its own and joins it to the others at the end.
    fn read(&mut self, job: &Job, mut lines: Lines, path: &Path, input: Input) -> Result<()> {
        let earlier = self.examples.iter().position(|e| e.source == input.source);
        if let Some(e) = earlier.and_then(|i| self.examples.get(i))
            && e.task != input.task
        {
            return Err(Error::usage(
                format!("source {:?} feeds task {:?} already", e.source, e.task),
                format!("Give the rows for task {:?} a source name of their own", input.task),
            ));
        }
        // A source without a single kept row has no say in what its task is.
        let of_task = self.examples.iter().find(|e| e.task == input.task && !e.query.is_empty());
        let of_task = of_task.map(|e| e.kind);
        let mut kind = input.kind.or(earlier.and(of_task));
        let first_line = earlier.and_then(|i| self.lines.get(i)).copied().unwrap_or(0);
        let mut table = Examples::new(input, kind.unwrap_or(Kind::Retrieval));
        let mut report = SourceReport {
            source: input.source.into(),
            task: input.task.into(),
            ..SourceReport::default()
        };
        // Objects whose columns are not those of the file's kind, and the columns of the first.
        let (mut unmatched, mut found) = (0, Vec::new());

        while let Some((number, line)) = lines.next(job)? {
            let number = first_line + number;
            let line = match line {
                Line::Whole(line) => line,
                Line::TooLong(head) => {
                    report.reject(number, RowFault::LineTooLong, head);
                    continue;
                }
            };
            if line.trim_ascii().is_empty() {
                continue;
            }
            job.advance(1);
            let mut patched = String::new();
            let parsed = Row::parse(line, &mut patched).and_then(|row| {
                let of_row = kind.or_else(|| row.kind());
                let example = row.example(of_row.unwrap_or(row.nearest_kind()))?;
                Ok((of_row, example, row.extra))
            });
            match parsed {
                Ok((of_row, example, extra)) => {
                    kind = of_row;
                    self.push(&mut table, number, example);
                    report.keep(&extra);
                }
                Err(fault) => {
                    report.reject(number, fault, line);
                    if matches!(fault, RowFault::MissingColumn(_) | RowFault::MixedKind) {
                        unmatched += 1;
                        if unmatched == 1 && report.kept == 0 {
                            found = names(line);
                        }
                    }
                    // Only wrong columns so far: do not read gigabytes to say so at the end.
                    if unmatched == WRONG_COLUMN_ROWS && unmatched == report.read {
                        return Err(wrong_columns(path, found, input.kind));
                    }
                }
            }
        }
        if report.read == 0 {
            return Err(empty(path));
        }
        if unmatched == report.read {
            return Err(wrong_columns(path, found, input.kind));
        }
        let lines = first_line + lines.number();
        let Some(found) = kind.or(of_task) else {
            // Every row is faulty: the report says how, and the caller's limit decides.
            return self.join(earlier, table, report, lines);
        };
        table.kind = found;
        if let Some(other) = of_task
            && other != found
        {
            return Err(Error::usage(
                format!(
                    "{}: holds {} rows, but task {:?} has {} rows from another source",
                    path.display(),
                    found.as_str(),
                    input.task,
                    other.as_str()
                ),
                "Give each kind of rows its own task name",
            ));
        }
        self.join(earlier, table, report, lines)
    }

    fn push(&mut self, table: &mut Examples, line: u64, example: Example) {
        table.line.push(line);
        table.query.push(self.texts.intern(&example.query));
        for text in &example.positive {
            table.positive.push(self.texts.intern(text));
        }
        table.positive_offsets.push(table.positive.len() as u64);
        for text in &example.negative {
            table.negative.push(self.texts.intern(text));
        }
        table.negative_offsets.push(table.negative.len() as u64);
        table.negative_score.extend_from_slice(&example.negative_score);
        table.negative_score.resize(table.negative.len(), f32::NAN);
        table.score.push(example.score);
        table.weight.push(example.weight);
        table.label.push(example.label.map_or(-1, |name| self.label(name)));
    }

    fn label(&mut self, name: String) -> i32 {
        if let Some(id) = self.label_rows.get(&name) {
            return *id;
        }
        // More classes than i32 counts cannot come from lines that fit into memory.
        let id = i32::try_from(self.labels.len()).unwrap_or(i32::MAX);
        self.labels.push(name.clone());
        self.label_rows.insert(name, id);
        id
    }

    fn join(
        &mut self,
        at: Option<usize>,
        table: Examples,
        report: SourceReport,
        lines: u64,
    ) -> Result<()> {
        let Some(at) = at else {
            self.examples.push(table);
            self.reports.push(report);
            self.lines.push(lines);
            return Ok(());
        };
        if let Some(examples) = self.examples.get_mut(at) {
            examples.append(table);
        }
        if let Some(total) = self.reports.get_mut(at) {
            total.append(report);
        }
        if let Some(seen) = self.lines.get_mut(at) {
            *seen = lines;
        }
        Ok(())
    }

    /// The texts and examples of everything read.
    pub fn finish(self) -> Records {
        let mut examples = self.examples;
        let mut labels: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for table in examples.iter().filter(|t| t.kind == Kind::Classification) {
            let names = labels.entry(table.task.clone()).or_default();
            let used = table.label.iter().filter_map(|id| self.labels.get(*id as usize));
            names.extend(used.cloned());
        }
        for names in labels.values_mut() {
            sort_labels(names);
        }
        for table in examples.iter_mut().filter(|t| t.kind == Kind::Classification) {
            let names = labels.get(&table.task).map_or(&[] as &[String], Vec::as_slice);
            let dense: HashMap<&str, i32> =
                (0..).zip(names).map(|(i, n)| (n.as_str(), i)).collect();
            for id in &mut table.label {
                let name = self.labels.get(*id as usize);
                *id = name.and_then(|n| dense.get(n.as_str())).copied().unwrap_or(-1);
            }
        }
        let (text, text_offsets, text_id) = self.texts.finish();
        Records { text, text_offsets, text_id, examples, labels, reports: self.reports }
    }
}

impl Examples {
    fn new(input: Input, kind: Kind) -> Self {
        Self {
            source: input.source.into(),
            task: input.task.into(),
            kind,
            line: Vec::new(),
            query: Vec::new(),
            positive_offsets: vec![0],
            positive: Vec::new(),
            negative_offsets: vec![0],
            negative: Vec::new(),
            negative_score: Vec::new(),
            score: Vec::new(),
            label: Vec::new(),
            weight: Vec::new(),
        }
    }

    fn append(&mut self, more: Self) {
        if self.query.is_empty() {
            self.kind = more.kind;
        }
        let shift = |into: &mut Vec<u64>, offsets: &[u64], base: u64| {
            into.extend(offsets.iter().skip(1).map(|o| o + base));
        };
        shift(&mut self.positive_offsets, &more.positive_offsets, self.positive.len() as u64);
        shift(&mut self.negative_offsets, &more.negative_offsets, self.negative.len() as u64);
        self.line.extend(more.line);
        self.query.extend(more.query);
        self.positive.extend(more.positive);
        self.negative.extend(more.negative);
        self.negative_score.extend(more.negative_score);
        self.score.extend(more.score);
        self.label.extend(more.label);
        self.weight.extend(more.weight);
    }
}

impl SourceReport {
    fn append(&mut self, more: Self) {
        for sample in more.samples {
            let before = self.samples.iter().filter(|s| s.reason == sample.reason).count();
            if before < SAMPLES_PER_REASON {
                self.samples.push(sample);
            }
        }
        self.read += more.read;
        self.kept += more.kept;
        self.rejected += more.rejected;
        for (reason, n) in more.reasons {
            *self.reasons.entry(reason).or_insert(0) += n;
        }
        for (name, n) in more.extra_columns {
            *self.extra_columns.entry(name).or_insert(0) += n;
        }
    }
}

/// Sorts class names and removes repeats. Whole numbers sort as numbers, so that a data set that
/// counts its classes from 0 keeps its ids.
fn sort_labels(names: &mut Vec<String>) {
    let numbers: Option<Vec<i64>> = names.iter().map(|n| n.parse().ok()).collect();
    match numbers {
        Some(mut numbers) => {
            numbers.sort_unstable();
            *names = numbers.into_iter().map(|n| n.to_string()).collect();
        }
        None => names.sort_unstable(),
    }
    names.dedup();
}

fn wrong_columns(path: &Path, mut found: Vec<String>, kind: Option<Kind>) -> Error {
    let more = found.len().saturating_sub(NAMES_SHOWN);
    found.truncate(NAMES_SHOWN);
    let mut what = format!("wrong columns: found {}", found.join(", "));
    if more > 0 {
        what += &format!(" and {more} more");
    }
    if let Some(kind) = kind {
        what += &format!(", which are not those of {} rows", kind.as_str());
    }
    Error::Corrupt {
        path: path.to_path_buf(),
        what,
        fix: format!("Rename the columns. Accepted are {ACCEPTED}"),
    }
}
