//! The example table of a task, read in place: which rows an example names, and the draws that
//! choose among them.
//!
//! Tables of up to 2^20 values are checked whole when they are opened, so that a table of another
//! store is refused before training starts. Of larger ones every value is checked when it is used,
//! which keeps the time to the first batch independent of the size.

use std::path::PathBuf;

use embkit_core::container::{Column, Container, Element, Verify};
use embkit_core::{Error, Result};

use crate::plan::draw;
use crate::records::Kind;
use crate::simd;

/// The `format` of example tables.
pub const EXAMPLES_FORMAT: &str = "embkit.examples";
/// The `format` of mined negatives.
pub const NEGATIVES_FORMAT: &str = "embkit.negatives";
const VERSION: u32 = 1;
/// Values of a table that is checked whole at open.
const CHECKED_VALUES: usize = 1 << 20;

/// A task of a run: its files and its weight.
#[derive(Clone, Debug)]
pub struct TaskFiles {
    /// Unique name.
    pub name: String,
    /// What the examples train.
    pub kind: Kind,
    /// Its `examples-NAME.safetensors`.
    pub examples: PathBuf,
    /// Mined negatives, aligned with the examples; they replace the table's own.
    pub negatives: Option<PathBuf>,
    /// Share of the steps, any scale.
    pub weight: f64,
    /// Examples of one of its global batches.
    pub batch_size: u64,
}

/// An open example table.
pub(crate) struct Table {
    pub(crate) name: String,
    pub(crate) kind: Kind,
    file: Container,
    mined: Option<Container>,
    query: Column<u64>,
    positive_offsets: Column<u64>,
    positive: Column<u64>,
    hard_offsets: Column<u64>,
    hard: Column<u64>,
    score: Column<f32>,
    label: Column<i32>,
    weight: Column<f32>,
    /// Rows of the store.
    rows: u64,
    /// Examples that can be trained on, when not all can.
    usable: Option<Vec<u64>>,
    classes: Classes,
}

/// The usable examples of each class, for classification.
#[derive(Default)]
struct Classes {
    /// Numbers of usable examples, by class, ascending inside one.
    members: Vec<u64>,
    /// Where each class begins in `members`, and the end of the last.
    starts: Vec<usize>,
}

impl Table {
    /// Opens a table for a store of `rows` rows.
    ///
    /// Errors: `Io`; `Corrupt` when it is damaged, its columns disagree, it names rows that the
    /// store does not have, or the negatives are for another number of examples; `Version`;
    /// `Usage` when no example is usable.
    pub(crate) fn open(files: &TaskFiles, rows: u64, verify: Verify) -> Result<Self> {
        let file = Container::open(&files.examples, verify)?;
        file.expect(EXAMPLES_FORMAT, VERSION)?;
        let mined = match &files.negatives {
            Some(path) => Some(Container::open(path, verify)?),
            None => None,
        };
        let (hard_offsets, hard) = match &mined {
            Some(mined) => {
                mined.expect(NEGATIVES_FORMAT, VERSION)?;
                (mined.column("offsets")?, mined.column("row")?)
            }
            None => (file.column("negative_offsets")?, file.column("negative")?),
        };
        let mut table = Self {
            name: files.name.clone(),
            kind: files.kind,
            query: file.column("query")?,
            positive_offsets: file.column("positive_offsets")?,
            positive: file.column("positive")?,
            hard_offsets,
            hard,
            score: file.column("score")?,
            label: file.column("label")?,
            weight: file.column("weight")?,
            rows,
            usable: None,
            classes: Classes::default(),
            file,
            mined,
        };
        table.check_lengths()?;
        let m = table.query.len();
        let values = m.saturating_add(table.positive.len()).saturating_add(table.hard.len());
        if table.kind == Kind::Classification {
            table.find_classes()?;
        } else if values <= CHECKED_VALUES {
            table.find_usable()?;
        }
        if values <= CHECKED_VALUES {
            table.check_rows()?;
        }
        if table.examples() == 0 {
            return Err(Error::usage(
                format!("task '{}' has no usable example: {}", table.name, table.reason()),
                "Give the task weight 0, or correct its data",
            ));
        }
        Ok(table)
    }

    /// Number of usable examples.
    pub(crate) fn examples(&self) -> u64 {
        self.usable.as_ref().map_or(self.query.len(), Vec::len) as u64
    }

    /// Examples that cannot be used.
    pub(crate) fn skipped(&self) -> u64 {
        self.query.len() as u64 - self.examples()
    }

    /// Why examples of this kind cannot be used.
    pub(crate) fn reason(&self) -> &'static str {
        match self.kind {
            Kind::Retrieval => "no positive",
            Kind::Sts => "no second text or no score",
            Kind::Classification => "no other text of its class",
        }
    }

    /// The row of the table that holds a usable example.
    pub(crate) fn line(&self, example: u64) -> u64 {
        match &self.usable {
            Some(usable) => usable.get(example as usize).copied().unwrap_or(u64::MAX),
            None => example,
        }
    }

    /// Brings what a batch needs of rows of the table near the processor, see [`Store::prefetch`].
    ///
    /// [`Store::prefetch`]: crate::read::Store::prefetch
    pub(crate) fn prefetch(&self, lines: &[u64]) {
        let negatives = self.mined.as_ref().unwrap_or(&self.file);
        for line in lines {
            let at = *line as usize;
            let (one, two) = (at..at.saturating_add(1), at..at.saturating_add(2));
            simd::prefetch(self.file.peek(self.query, one.clone()));
            simd::prefetch(self.file.peek(self.positive_offsets, two.clone()));
            simd::prefetch(negatives.peek(self.hard_offsets, two));
            simd::prefetch(self.file.peek(self.weight, one));
            // Where its positive is when each has as many: mostly one.
            let near = at.saturating_mul(self.positive.len()) / self.query.len().max(1);
            simd::prefetch(self.file.peek(self.positive, near..near.saturating_add(1)));
        }
    }

    pub(crate) fn query(&self, line: u64) -> Result<u64> {
        self.row(line, self.value(self.query, line)?)
    }

    pub(crate) fn score(&self, line: u64) -> Result<f32> {
        let score: f32 = self.value(self.score, line)?;
        Ok(if score.is_finite() { score } else { 0.0 })
    }

    pub(crate) fn weight(&self, line: u64) -> Result<f32> {
        self.value(self.weight, line)
    }

    pub(crate) fn label(&self, line: u64) -> Result<i32> {
        self.value(self.label, line)
    }

    /// One positive of an example, drawn with `key`: of its own list, or another text of its class.
    pub(crate) fn positive(&self, example: u64, line: u64, key: u64) -> Result<u64> {
        let random = draw(key, example);
        if self.kind == Kind::Classification {
            let class = self.label(line)? as usize;
            let bounds = (self.classes.starts.get(class), self.classes.starts.get(class + 1));
            let (Some(start), Some(end)) = bounds else { return Err(self.unusable(line)) };
            let members = self.classes.members.get(*start..*end).unwrap_or_default();
            let own = members.partition_point(|m| *m < example);
            let others = members.len().saturating_sub(1) as u64;
            let place = random.checked_rem(others).ok_or_else(|| self.unusable(line))? as usize;
            let chosen = members.get(place + usize::from(place >= own));
            return self.query(self.line(*chosen.ok_or_else(|| self.unusable(line))?));
        }
        let (start, end) = self.bounds(&self.file, self.positive_offsets, line)?;
        let place = random.checked_rem(end - start).ok_or_else(|| self.unusable(line))?;
        match self
            .file
            .items(self.positive, (start + place) as usize..(start + place) as usize + 1)?
        {
            Some(&[row]) => self.row(line, row),
            _ => Err(self.broken(line)),
        }
    }

    /// All hard negatives of an example, in the order of the table.
    pub(crate) fn hard(&self, line: u64) -> Result<&[u64]> {
        let file = self.mined.as_ref().unwrap_or(&self.file);
        let (start, end) = self.bounds(file, self.hard_offsets, line)?;
        let found = file.items(self.hard, start as usize..end as usize)?;
        found.ok_or_else(|| self.broken(line))
    }

    /// `row` when the store has it.
    pub(crate) fn row(&self, line: u64, row: u64) -> Result<u64> {
        if row < self.rows {
            return Ok(row);
        }
        Err(Error::Corrupt {
            path: self.file.path().to_path_buf(),
            what: format!(
                "example {line} of task '{}' names row {row}, the store has {}",
                self.name, self.rows
            ),
            fix: "Use the table with its own store, or tokenize (and mine) again".into(),
        })
    }

    #[inline]
    fn value<T: Element>(&self, column: Column<T>, line: u64) -> Result<T> {
        let line = line as usize;
        match self.file.items(column, line..line.saturating_add(1))? {
            Some(&[value]) => Ok(value),
            _ => Err(self.broken(line as u64)),
        }
    }

    #[inline]
    fn bounds(&self, file: &Container, offsets: Column<u64>, line: u64) -> Result<(u64, u64)> {
        let line = line as usize;
        match file.items(offsets, line..line.saturating_add(2))? {
            Some(&[start, end]) if start <= end => Ok((start, end)),
            _ => Err(self.broken(line as u64)),
        }
    }

    /// Lists the usable examples when some are not.
    fn find_usable(&mut self) -> Result<()> {
        let m = self.query.len();
        let ends = self.file.items(self.positive_offsets, 0..m + 1)?.unwrap_or_default();
        let scores = match self.kind {
            Kind::Sts => self.file.items(self.score, 0..m)?.unwrap_or_default(),
            _ => &[],
        };
        let all = ends.is_sorted_by(|a, b| a < b) && scores.iter().all(|s| s.is_finite());
        if !all {
            let pairs = ends.windows(2);
            if let Some(line) = pairs.into_iter().position(|pair| !pair.is_sorted()) {
                return Err(self.broken(line as u64));
            }
            let has = ends.windows(2).map(|pair| matches!(pair, [start, end] if start < end));
            let scored = scores.iter().map(|s| s.is_finite()).chain(std::iter::repeat(true));
            let usable = (0..).zip(has.zip(scored)).filter(|(_, (has, scored))| *has && *scored);
            self.usable = Some(usable.map(|(i, _)| i).collect());
        }
        Ok(())
    }

    /// Groups the examples by class; those that are alone in theirs are not usable.
    fn find_classes(&mut self) -> Result<()> {
        let m = self.query.len();
        let labels = self.file.items(self.label, 0..m)?.unwrap_or_default();
        let largest = labels.iter().max().and_then(|l| usize::try_from(*l).ok());
        let classes = largest.map_or(0, |l| l + 1); // as wide as memory: no overflow
        if classes > m {
            return Err(Error::corrupt(
                self.file.path(),
                format!("has a class {} among {m} examples", classes - 1),
            ));
        }
        let mut sizes = vec![0_usize; classes];
        for label in labels {
            if let Some(size) = usize::try_from(*label).ok().and_then(|l| sizes.get_mut(l)) {
                *size += 1;
            }
        }
        let kept = |label: i32| {
            let class = usize::try_from(label).ok()?;
            sizes.get(class).filter(|size| **size >= 2).map(|_| class)
        };
        let usable: Vec<u64> =
            (0..).zip(labels).filter(|(_, l)| kept(**l).is_some()).map(|(i, _)| i).collect();
        let mut starts = vec![0];
        let mut end = 0;
        for size in &sizes {
            end += if *size >= 2 { *size } else { 0 };
            starts.push(end);
        }
        let mut next = starts.clone();
        let mut members = vec![0; end];
        for (example, line) in usable.iter().enumerate() {
            let class = labels.get(*line as usize).and_then(|l| kept(*l));
            let Some(at) = class.and_then(|c| next.get_mut(c)) else { continue };
            if let Some(member) = members.get_mut(*at) {
                *member = example as u64;
            }
            *at += 1;
        }
        self.classes = Classes { members, starts };
        self.usable = (usable.len() < m).then_some(usable);
        Ok(())
    }

    fn check_lengths(&self) -> Result<()> {
        let m = self.query.len();
        for (column, len, want) in [
            ("positive_offsets", self.positive_offsets.len(), m + 1),
            ("score", self.score.len(), m),
            ("label", self.label.len(), m),
            ("weight", self.weight.len(), m),
        ] {
            if len != want {
                let what = format!("has {len} values in '{column}' for {m} examples");
                return Err(Error::corrupt(self.file.path(), what));
            }
        }
        let hard = self.hard_offsets.len();
        if hard != m + 1 {
            let file = self.mined.as_ref().unwrap_or(&self.file);
            return Err(Error::Corrupt {
                path: file.path().to_path_buf(),
                what: format!(
                    "the negatives of task '{}' are for {} examples, the store has {m}",
                    self.name,
                    hard.saturating_sub(1)
                ),
                fix: "Mine again on this store".into(),
            });
        }
        Ok(())
    }

    /// Every row that the table names exists, and its offsets ascend to their ends.
    fn check_rows(&self) -> Result<()> {
        let hard_file = self.mined.as_ref().unwrap_or(&self.file);
        for (file, offsets, values) in [
            (&self.file, self.positive_offsets, self.positive),
            (hard_file, self.hard_offsets, self.hard),
        ] {
            let offsets = file.items(offsets, 0..offsets.len())?.unwrap_or_default();
            let ascend = offsets.is_sorted() && offsets.first() == Some(&0);
            if !ascend || offsets.last() != Some(&(values.len() as u64)) {
                return Err(Error::corrupt(
                    file.path(),
                    "has offsets that do not ascend from 0 to the end",
                ));
            }
            let values = file.items(values, 0..values.len())?.unwrap_or_default();
            // The largest is found many values at a time; which one it is matters only in an error.
            let largest = values.iter().fold(0, |most, row| most.max(*row));
            if largest >= self.rows
                && let Some(at) = values.iter().position(|row| *row >= self.rows)
            {
                let line = offsets.partition_point(|o| *o <= at as u64).saturating_sub(1);
                self.row(line as u64, values.get(at).copied().unwrap_or(u64::MAX))?;
            }
        }
        let queries = self.file.items(self.query, 0..self.query.len())?.unwrap_or_default();
        if queries.iter().fold(0, |most, row| most.max(*row)) >= self.rows {
            for (line, row) in (0..).zip(queries) {
                self.row(line, *row)?;
            }
        }
        Ok(())
    }

    fn unusable(&self, line: u64) -> Error {
        let what = format!("example {line} of task '{}' has {}", self.name, self.reason());
        Error::corrupt(self.file.path(), what)
    }

    fn broken(&self, line: u64) -> Error {
        let what = format!("the columns of example {line} of task '{}' disagree", self.name);
        Error::corrupt(self.file.path(), what)
    }
}
