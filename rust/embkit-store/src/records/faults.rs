//! What can be wrong with one row, and the tally of it per source.
//!
//! A row fault never stops a run: the row is left out, counted under its reason, and the first few
//! of each reason are kept with line number and excerpt, so that a person can see what to repair.
//! Faults of a whole file (missing, empty, truncated, wrong columns) are [`embkit_core::Error`]s.

use std::borrow::Cow;
use std::collections::BTreeMap;

/// Rejected rows kept as samples, per reason.
pub const SAMPLES_PER_REASON: usize = 5;
/// Length of a sample's excerpt, in characters.
pub const EXCERPT_CHARS: usize = 120;
/// Distinct names of ignored columns that are counted by name; the rest share one entry.
const EXTRA_NAMES: usize = 64;
/// Name of the entry that the columns beyond [`EXTRA_NAMES`] share.
const EXTRA_REST: &str = "(other columns)";

/// Why one row was left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowFault {
    /// The line is not UTF-8.
    InvalidUtf8,
    /// The line is longer than the limit.
    LineTooLong,
    /// The line is not a JSON value.
    NotJson,
    /// The line is JSON, but not an object.
    NotAnObject,
    /// A column that this kind of row needs is absent or null.
    MissingColumn(&'static str),
    /// A column holds a value of another type, or lists whose lengths disagree.
    WrongType(&'static str),
    /// A text is empty or only whitespace.
    BlankText(&'static str),
    /// A score or weight is NaN, infinite, beyond f32, or a weight below zero.
    NonFiniteScore(&'static str),
    /// The row is of another kind than the rows before it in the file.
    MixedKind,
}

impl RowFault {
    /// The reason under which the row is counted; stable text, used as a key in reports.
    pub fn reason(&self) -> Cow<'static, str> {
        match self {
            Self::InvalidUtf8 => "invalid UTF-8".into(),
            Self::LineTooLong => "line too long".into(),
            Self::NotJson => "not JSON".into(),
            Self::NotAnObject => "not an object".into(),
            Self::MissingColumn(name) => format!("missing column: {name}").into(),
            Self::WrongType(name) => format!("wrong type: {name}").into(),
            Self::BlankText(name) => format!("blank text: {name}").into(),
            Self::NonFiniteScore(name) => format!("non-finite score: {name}").into(),
            Self::MixedKind => "mixed kind".into(),
        }
    }
}

/// One rejected row, for the report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Line number in the file, from 1.
    pub line: u64,
    /// [`RowFault::reason`].
    pub reason: String,
    /// The first [`EXCERPT_CHARS`] characters, control characters and broken bytes replaced.
    pub excerpt: String,
}

/// Rows read, kept and rejected of one source. `read == kept + rejected`; blank lines are not rows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SourceReport {
    /// Name of the source.
    pub source: String,
    /// Task that the source feeds.
    pub task: String,
    /// Rows seen.
    pub read: u64,
    /// Rows that became examples.
    pub kept: u64,
    /// Rows left out.
    pub rejected: u64,
    /// Rejected rows by reason.
    pub reasons: BTreeMap<String, u64>,
    /// The first [`SAMPLES_PER_REASON`] rejected rows of each reason, in file order.
    pub samples: Vec<Sample>,
    /// Columns that were ignored, with the number of kept rows that had them.
    pub extra_columns: BTreeMap<String, u64>,
}

impl SourceReport {
    /// Counts a rejected row and keeps a sample of it while its reason has few.
    pub(crate) fn reject(&mut self, line: u64, fault: RowFault, bytes: &[u8]) {
        self.read += 1;
        self.rejected += 1;
        let reason = fault.reason().into_owned();
        let count = self.reasons.entry(reason.clone()).or_insert(0);
        *count += 1;
        if *count <= SAMPLES_PER_REASON as u64 {
            self.samples.push(Sample { line, reason, excerpt: excerpt(bytes) });
        }
    }

    /// Adds what was counted in a later piece of the source.
    pub(crate) fn append(&mut self, more: Self) {
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

    /// Counts a kept row and the columns of it that were ignored.
    pub(crate) fn keep(&mut self, extra: &[Cow<'_, str>]) {
        self.read += 1;
        self.kept += 1;
        for name in extra {
            if let Some(count) = self.extra_columns.get_mut(name.as_ref()) {
                *count += 1;
            } else if self.extra_columns.len() < EXTRA_NAMES {
                self.extra_columns.insert(name.clone().into_owned(), 1);
            } else {
                *self.extra_columns.entry(EXTRA_REST.to_string()).or_insert(0) += 1;
            }
        }
    }
}

/// The head of a line as printable text. A report is read in terminals and browsers, so control
/// characters (escape sequences above all) are replaced like broken bytes are.
fn excerpt(bytes: &[u8]) -> String {
    // Four bytes a character at most, so this prefix always holds EXCERPT_CHARS characters.
    let head = bytes.get(..4 * EXCERPT_CHARS).unwrap_or(bytes);
    String::from_utf8_lossy(head)
        .chars()
        .take(EXCERPT_CHARS)
        .map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn excerpts_are_short_and_printable() {
        let long = "é\u{1b}[31m".repeat(100);
        let got = excerpt(long.as_bytes());
        assert_eq!(got.chars().count(), EXCERPT_CHARS);
        assert!(got.starts_with("é\u{fffd}[31m"));
        assert_eq!(excerpt(b"ok\xff"), "ok\u{fffd}");
    }

    #[test]
    fn samples_stop_after_five_of_a_reason() {
        let mut report = SourceReport::default();
        for line in 1..=9 {
            report.reject(line, RowFault::NotJson, b"{");
        }
        report.reject(10, RowFault::MixedKind, b"{}");
        assert_eq!(report.rejected, 10);
        assert_eq!(report.reasons["not JSON"], 9);
        let lines: Vec<u64> = report.samples.iter().map(|s| s.line).collect();
        assert_eq!(lines, [1, 2, 3, 4, 5, 10]);
    }

    #[test]
    fn many_extra_columns_stay_bounded() {
        let mut report = SourceReport::default();
        for i in 0..500 {
            report.keep(&[format!("c{i}").into()]);
        }
        assert_eq!(report.extra_columns.len(), EXTRA_NAMES + 1);
        assert_eq!(report.extra_columns[EXTRA_REST], 500 - EXTRA_NAMES as u64);
    }
}
