//! Raw records in, distinct texts and examples out.
//!
//! Reads jsonl, plain or packed by zstd or gzip, and Arrow batches. Rows are parsed on all threads,
//! a block at a time, and taken over in their order. Texts go to shards on disk as they come
//! ([`RecordsBuilder::in_directory`]), so memory holds about 32 bytes per distinct text and the
//! example columns. What is wrong with a row is counted and sampled ([`SourceReport`]); what is
//! wrong with a file is an error, and a file that fails leaves no trace in the builder. Texts are
//! numbered in order of first appearance, so the result depends on the order of the files and on
//! nothing else.
//!
//! Oddity: lines of only whitespace are not rows: files often end in one.

mod arrow;
mod columns;
mod faults;
mod intern;
mod json;
mod lines;
mod rows;
mod shards;
mod table;
mod value;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use arrow_array::RecordBatch;
use embkit_core::{Error, Job, Result, par};

pub use columns::Kind;
use columns::{ACCEPTED, Parsed};
pub use faults::{EXCERPT_CHARS, RowFault, SAMPLES_PER_REASON, Sample, SourceReport};
use intern::Texts;
pub use intern::{identity, nfc};
use lines::{Lines, empty};
use rows::{BatchRows, Rows};
use shards::Shards;
pub use shards::TEXT_BYTES;
pub use table::Examples;

/// Default limit of one line, in bytes.
pub const MAX_LINE: usize = 64 << 20;
/// Rows without a kept one after which a file is said to have the wrong columns.
const WRONG_COLUMN_ROWS: u64 = 64;
/// Bytes of lines, and rows of them, that the threads parse together and one at a time.
const BLOCK_BYTES: usize = 4 << 20;
const BLOCK_ROWS: usize = 64;
/// Column names listed in the error about wrong columns.
const NAMES_SHOWN: usize = 24;

/// What [`RecordsBuilder::finish`] returns.
#[derive(Clone, Debug, PartialEq)]
pub struct Records {
    /// Number of distinct texts.
    pub texts: u64,
    /// Raw shards written; 0 when the texts are in the three fields that follow, which are empty
    /// otherwise.
    pub shards: usize,
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
    threads: usize,
    texts: Texts,
    sources: Vec<Source>,
    /// Class names in order of appearance, while `Examples::label` holds their index here.
    labels: Vec<String>,
    label_rows: HashMap<String, i32>,
}

/// What was read of one source.
struct Source {
    examples: Examples,
    report: SourceReport,
    /// Lines read, so that a source given in pieces counts on.
    lines: u64,
    /// Rows whose columns are not those of the source's kind, and the columns of the first.
    unmatched: u64,
    found: Vec<String>,
}

/// The part of a source that is being read, in tables of its own.
struct Piece<'a> {
    path: &'a Path,
    input: Input<'a>,
    kind: Option<Kind>,
    /// Rows that the source had before, and whether one was kept.
    read_before: u64,
    kept_before: bool,
    part: Source,
}

impl Default for RecordsBuilder {
    fn default() -> Self {
        Self::new(MAX_LINE)
    }
}

impl RecordsBuilder {
    /// An empty builder that keeps all texts in memory; lines over `max_line` bytes are rejected.
    pub fn new(max_line: usize) -> Self {
        Self::with(Shards::in_memory(), max_line, 0)
    }

    /// An empty builder that writes texts to raw shards of at most `text_bytes` in `dir` (which
    /// must exist) as they come, and parses on `threads` threads (0 for [`par::threads`]). Raw
    /// shards that an unfinished run has left there are removed. Errors: `Io`.
    pub fn in_directory(
        dir: &Path,
        max_line: usize,
        text_bytes: u64,
        threads: usize,
    ) -> Result<Self> {
        Ok(Self::with(Shards::in_directory(dir, text_bytes)?, max_line, threads))
    }

    fn with(shards: Shards, max_line: usize, threads: usize) -> Self {
        Self {
            max_line,
            threads,
            texts: Texts::new(shards),
            sources: Vec::new(),
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
        if self.sources.iter().any(|s| s.examples.source == input.source) {
            return Err(Error::usage(
                format!("the source name {:?} is used twice", input.source),
                "Give each file its own source name",
            ));
        }
        let lines = Lines::open(path, self.max_line)?;
        self.add(path, input, |builder, piece| {
            builder.read_lines(job, lines, piece)?;
            match piece.part.unmatched == piece.part.report.read {
                true => Err(piece.wrong_columns()),
                false => Ok(()),
            }
        })
    }

    /// Reads rows from plain jsonl in memory. Called again with the same source and task it
    /// continues that source, so that a stream can be handed over in pieces of whole lines.
    /// Errors: as [`Self::add_jsonl`], except that wrong columns are an error only after
    /// some tens of rows: fewer may be followed by others.
    pub fn add_lines(&mut self, job: &Job, bytes: &[u8], input: Input) -> Result<()> {
        let path = Path::new(input.source);
        let lines = Lines::of_bytes(bytes, path, self.max_line)?;
        self.add(path, input, |builder, piece| builder.read_lines(job, lines, piece))
    }

    /// Reads the rows of an Arrow batch, as [`Self::add_lines`] reads lines: the same columns, kinds
    /// and faults as in jsonl. Nulls are absent; texts may be strings of any Arrow type, bytes that
    /// are UTF-8, or dictionaries of them. A row's texts may have `max_line` bytes.
    pub fn add_batch(&mut self, job: &Job, batch: &RecordBatch, input: Input) -> Result<()> {
        let most = self.max_line;
        self.add(Path::new(input.source), input, |builder, piece| {
            let rows = BatchRows::new(batch, piece.part.lines, most);
            piece.part.lines += rows.len() as u64;
            builder.take(job, &rows, piece)
        })
    }

    /// Reads a piece of a source and joins it to the others; after an error nothing of it is left.
    fn add(
        &mut self,
        path: &Path,
        input: Input,
        read: impl FnOnce(&mut Self, &mut Piece) -> Result<()>,
    ) -> Result<()> {
        let (texts, labels) = (self.texts.len(), self.labels.len());
        let result = self.begin(path, input).and_then(|mut piece| {
            read(self, &mut piece)?;
            self.join(piece)
        });
        if result.is_err() {
            for name in self.labels.drain(labels..) {
                self.label_rows.remove(&name);
            }
            self.texts.truncate(texts)?;
        }
        result
    }

    fn begin<'a>(&self, path: &'a Path, input: Input<'a>) -> Result<Piece<'a>> {
        let earlier = self.sources.iter().find(|s| s.examples.source == input.source);
        if let Some(s) = earlier
            && s.examples.task != input.task
        {
            return Err(Error::usage(
                format!("source {:?} feeds task {:?} already", input.source, s.examples.task),
                format!("Give the rows for task {:?} a source name of their own", input.task),
            ));
        }
        let kind = input.kind.or(earlier.and(self.kind_of(input.task)));
        Ok(Piece {
            path,
            input,
            kind,
            read_before: earlier.map_or(0, |s| s.report.read),
            kept_before: earlier.is_some_and(|s| s.report.kept > 0),
            part: Source {
                examples: Examples::new(input, kind.unwrap_or(Kind::Retrieval)),
                report: SourceReport {
                    source: input.source.into(),
                    task: input.task.into(),
                    ..SourceReport::default()
                },
                lines: earlier.map_or(0, |s| s.lines),
                unmatched: earlier.map_or(0, |s| s.unmatched),
                found: earlier.map_or_else(Vec::new, |s| s.found.clone()),
            },
        })
    }

    /// The kind of a task's rows. A source without a single kept row has no say in it.
    fn kind_of(&self, task: &str) -> Option<Kind> {
        let of_task = |s: &&Source| s.examples.task == task && !s.examples.query.is_empty();
        self.sources.iter().find(of_task).map(|s| s.examples.kind)
    }

    fn read_lines(&mut self, job: &Job, mut lines: Lines, piece: &mut Piece) -> Result<()> {
        let first = piece.part.lines;
        loop {
            let block = lines.block(job, BLOCK_BYTES)?;
            if block.len() == 0 {
                break;
            }
            self.take(job, &(first, block), piece)?;
        }
        piece.part.lines = first + lines.number();
        match piece.part.report.read {
            0 => Err(empty(piece.path)),
            _ => Ok(()),
        }
    }

    /// Parses rows on all threads and takes them over in their order.
    fn take(&mut self, job: &Job, rows: &impl Rows, piece: &mut Piece) -> Result<()> {
        let mut at = 0;
        while at < rows.len() {
            // The first row that has a kind decides how all others are read.
            let n = if piece.kind.is_some() { rows.len() - at } else { 1 };
            let kind = piece.kind;
            let parsed = par::try_map_blocks(n, BLOCK_ROWS, self.threads, |range| {
                job.check()?;
                Ok(range.map(|i| rows.parse(at + i, kind)).collect::<Vec<_>>())
            })?;
            for (i, row) in (at..).zip(parsed.into_iter().flatten()) {
                let Some(row) = row else { continue };
                job.advance(1);
                match row {
                    Ok(row) => {
                        piece.kind = row.kind;
                        piece.part.report.keep(&row.extra);
                        self.push(&mut piece.part.examples, rows.number(i), row)?;
                    }
                    Err(fault) => {
                        piece.reject(rows, i, fault);
                        // Only wrong columns so far: do not read gigabytes to say so at the end.
                        if piece.part.unmatched == WRONG_COLUMN_ROWS
                            && piece.part.unmatched == piece.read_before + piece.part.report.read
                        {
                            return Err(piece.wrong_columns());
                        }
                    }
                }
            }
            at += n;
        }
        Ok(())
    }

    fn push(&mut self, table: &mut Examples, line: u64, row: Parsed) -> Result<()> {
        let mut keys = row.keys.into_iter();
        let mut intern = |text: &str| match keys.next() {
            Some(key) => self.texts.intern(key, text),
            None => self.texts.intern(identity(text), text),
        };
        let example = row.example;
        table.line.push(line);
        table.query.push(intern(&example.query)?);
        for text in &example.positive {
            table.positive.push(intern(text)?);
        }
        table.positive_offsets.push(table.positive.len() as u64);
        for text in &example.negative {
            table.negative.push(intern(text)?);
        }
        table.negative_offsets.push(table.negative.len() as u64);
        table.negative_score.extend_from_slice(&example.negative_score);
        table.negative_score.resize(table.negative.len(), f32::NAN);
        table.score.push(example.score);
        table.weight.push(example.weight);
        table.label.push(example.label.map_or(-1, |name| self.label(name)));
        Ok(())
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

    fn join(&mut self, piece: Piece) -> Result<()> {
        let of_task = self.kind_of(piece.input.task);
        let mut part = piece.part;
        // Without a kind every row is faulty: the report says how, the caller's limit decides.
        part.examples.kind = piece.kind.or(of_task).unwrap_or(part.examples.kind);
        if let (Some(found), Some(other)) = (piece.kind, of_task)
            && other != found
        {
            return Err(Error::usage(
                format!(
                    "{}: holds {} rows, but task {:?} has {} rows from another source",
                    piece.path.display(),
                    found.as_str(),
                    piece.input.task,
                    other.as_str()
                ),
                "Give each kind of rows its own task name",
            ));
        }
        match self.sources.iter_mut().find(|s| s.examples.source == piece.input.source) {
            Some(there) => {
                there.examples.append(part.examples);
                there.report.append(part.report);
                (there.lines, there.unmatched, there.found) =
                    (part.lines, part.unmatched, part.found);
            }
            None => self.sources.push(part),
        }
        Ok(())
    }

    /// The texts and examples of everything read. Errors: `Io` when the last shard cannot be
    /// written.
    pub fn finish(self) -> Result<Records> {
        let texts = self.texts.len() as u64;
        let (mut examples, reports): (Vec<_>, Vec<_>) =
            self.sources.into_iter().map(|s| (s.examples, s.report)).unzip();
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
        let held = self.texts.shards.finish()?;
        Ok(Records {
            texts,
            shards: held.shards,
            text: held.text,
            text_offsets: held.offsets,
            text_id: held.text_id,
            examples,
            labels,
            reports,
        })
    }
}

impl Piece<'_> {
    fn reject(&mut self, rows: &impl Rows, i: usize, fault: RowFault) {
        self.part.report.reject(rows.number(i), fault, &rows.excerpt(i));
        if matches!(fault, RowFault::MissingColumn(_) | RowFault::MixedKind) {
            self.part.unmatched += 1;
            if self.part.unmatched == 1 && self.part.report.kept == 0 && !self.kept_before {
                self.part.found = rows.names(i);
            }
        }
    }

    fn wrong_columns(&self) -> Error {
        let found = &self.part.found;
        let shown = found.iter().take(NAMES_SHOWN).map(String::as_str).collect::<Vec<_>>();
        let mut what = format!("wrong columns: found {}", shown.join(", "));
        if found.len() > NAMES_SHOWN {
            what += &format!(" and {} more", found.len() - NAMES_SHOWN);
        }
        if let Some(kind) = self.input.kind {
            what += &format!(", which are not those of {} rows", kind.as_str());
        }
        Error::Corrupt {
            path: self.path.to_path_buf(),
            what,
            fix: format!("Rename the columns. Accepted are {ACCEPTED}"),
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
