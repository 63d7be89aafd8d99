//! Rows that threads can parse: a block of lines or a batch of cells.

use std::borrow::Cow;

use arrow_array::RecordBatch;

use super::arrow::Batch;
use super::columns::{Kind, Parsed, Place};
use super::faults::{EXCERPT_CHARS, RowFault};
use super::json;
use super::lines::{Block, Line};

pub(crate) trait Rows: Sync {
    fn len(&self) -> usize;

    /// Row `i` as `kind`, or as what its columns say; `None` when the line is no row at all.
    fn parse(&self, i: usize, kind: Option<Kind>) -> Option<Result<Parsed<'_>, RowFault>>;

    /// Number of the row in its source, from 1.
    fn number(&self, i: usize) -> u64;

    /// The beginning of the row, for a report.
    fn excerpt(&self, i: usize) -> Cow<'_, [u8]>;

    /// The names of its columns, sorted.
    fn names(&self, i: usize) -> Vec<String>;
}

/// A block of lines, after so many lines of earlier pieces.
impl Rows for (u64, Block) {
    fn len(&self) -> usize {
        self.1.len()
    }

    fn parse(&self, i: usize, kind: Option<Kind>) -> Option<Result<Parsed<'_>, RowFault>> {
        match self.1.get(i).1 {
            Line::TooLong(_) => Some(Err(RowFault::LineTooLong)),
            Line::Whole(line) if line.trim_ascii().is_empty() => None,
            Line::Whole(line) => Some(Parsed::line(line, kind)),
        }
    }

    fn number(&self, i: usize) -> u64 {
        self.0 + self.1.get(i).0
    }

    fn excerpt(&self, i: usize) -> Cow<'_, [u8]> {
        let (Line::Whole(line) | Line::TooLong(line)) = self.1.get(i).1;
        line.into()
    }

    fn names(&self, i: usize) -> Vec<String> {
        json::names(&self.excerpt(i))
    }
}

/// A batch, after so many rows of earlier ones.
pub(crate) struct BatchRows {
    batch: Batch,
    places: Vec<Place>,
    first: u64,
    most: usize,
}

impl BatchRows {
    /// `most` is the limit of a row's texts in bytes.
    pub(crate) fn new(batch: &RecordBatch, first: u64, most: usize) -> Self {
        let batch = Batch::new(batch);
        let places = batch.names.iter().map(|name| Place::of(name)).collect();
        Self { batch, places, first, most }
    }
}

impl Rows for BatchRows {
    fn len(&self) -> usize {
        self.batch.rows
    }

    fn parse(&self, i: usize, kind: Option<Kind>) -> Option<Result<Parsed<'_>, RowFault>> {
        Some(Parsed::cells(&self.batch, &self.places, i, kind, self.most))
    }

    fn number(&self, i: usize) -> u64 {
        self.first + i as u64 + 1
    }

    fn excerpt(&self, i: usize) -> Cow<'_, [u8]> {
        self.batch.excerpt(i, EXCERPT_CHARS).into_bytes().into()
    }

    fn names(&self, _: usize) -> Vec<String> {
        let mut names = self.batch.names.clone();
        names.sort();
        names
    }
}
