//! Exact duplicates: rows whose normalised texts are equal.
//!
//! Every text is reduced to the 128-bit hash of its normal form ([`crate::normalize`]), or of its
//! words alone ([`Punctuation::Drop`]), and rows with equal hashes, compared in full, are one
//! cluster. Its representative is the row of the lowest priority number, then the first. Texts that
//! are empty after normalisation (or have no word, with `Drop`) say nothing and never cluster.
//!
//! In memory a row takes 40 bytes: a record of 32 and its place in the result. Above a cap the
//! records go to partition files by hash, and a partition keeps one entry per distinct text; the
//! result is the same, bit for bit.

mod spill;

use crate::normalize::words::Marks;
use crate::normalize::{Unit, normalize_bytes, unit_of_bytes};
use embkit_core::{Error, Job, Result, TextShard, Texts, hash128, par};
use spill::Partitions;
use std::path::PathBuf;
use std::sync::Mutex;

const BLOCK: usize = 256;
/// Bytes per row in memory, the result included.
const PER_ROW: u64 = 40;

/// Whether texts that differ in punctuation are the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Punctuation {
    /// They are not.
    #[default]
    Keep,
    /// They are: only the words count (the characters, in texts of scripts without spaces), in
    /// their order. "e-mail" is two words.
    Drop,
}

impl Punctuation {
    /// "keep" or "drop".
    pub fn parse(word: &str) -> Result<Self> {
        match word {
            "keep" => Ok(Self::Keep),
            "drop" => Ok(Self::Drop),
            _ => Err(Error::usage(format!("punctuation = {word:?}"), "Use \"keep\" or \"drop\"")),
        }
    }
}

/// What an exact duplicate is, and what finding them may take.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExactParams {
    /// What becomes of punctuation.
    pub punctuation: Punctuation,
    /// Threads, 0 for all; no effect on the result.
    pub threads: usize,
    /// Bytes to hold at most beside the mapped texts and the result (8 bytes per row); 0: no cap.
    pub memory: u64,
    /// An existing directory for partition files, which are gone afterwards; needed with a cap.
    pub spill: Option<PathBuf>,
}

/// One row: what sorts by this order groups equal texts, the representative first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Record {
    empty: bool,
    high: u64,
    low: u64,
    priority: u32,
    row: u64,
}

/// The representative row of every row: itself when no other row has its text.
///
/// `priority` has one number per row, lower is kept first; `None` is 0 for all. `job` advances by
/// one per row. Errors: [`Error::Usage`] for text that is not UTF-8, priorities of another length,
/// a cap without a directory; [`Error::Io`] of partition files; [`Error::Cancelled`].
pub fn exact_duplicates(
    shards: &[TextShard],
    priority: Option<&[u16]>,
    params: &ExactParams,
    job: &Job,
) -> Result<Vec<u64>> {
    let texts = Texts::new(shards)?;
    let n = texts.len();
    if let Some(given) = priority.filter(|given| given.len() != n) {
        let what = format!("{} priorities for {n} texts", given.len());
        return Err(Error::usage(what, "Pass one priority per row"));
    }
    let priority = |row: usize| u32::from(priority.and_then(|p| p.get(row)).copied().unwrap_or(0));
    let read = |reader: &mut Reader, row: usize| -> Result<Record> {
        let hash = reader.hash(texts.get(row), row, params.punctuation, job)?;
        let (high, low) = hash.map_or((0, 0), |hash| ((hash >> 64) as u64, hash as u64));
        job.advance(1);
        Ok(Record { empty: hash.is_none(), high, low, priority: priority(row), row: row as u64 })
    };
    let mut representative: Vec<u64> = (0..n as u64).collect();
    if params.memory > 0 && PER_ROW * n as u64 > params.memory {
        let Some(dir) = &params.spill else {
            return Err(Error::usage(
                format!("{n} texts take more than {} bytes of memory", params.memory),
                "Raise the cap, or name a directory for partition files",
            ));
        };
        let files = Partitions::create(dir, n as u64, params.memory)?;
        par::try_map_blocks(n, BLOCK, params.threads, |range| {
            let mut reader = Reader::default();
            let records: Vec<Record> =
                range.map(|row| read(&mut reader, row)).collect::<Result<_>>()?;
            files.write(&records)
        })?;
        files.group(&mut representative, job)?;
        return Ok(representative);
    }

    let mut records = vec![Record::default(); n];
    let blocks: Vec<Mutex<&mut [Record]>> = records.chunks_mut(BLOCK).map(Mutex::new).collect();
    par::try_map_blocks(n, BLOCK, params.threads, |range| {
        let mut reader = Reader::default();
        let mut block = blocks[range.start / BLOCK].lock().unwrap_or_else(|p| p.into_inner());
        for (record, row) in block.iter_mut().zip(range) {
            *record = read(&mut reader, row)?;
        }
        Ok(())
    })?;
    drop(blocks);
    job.check()?;
    records.sort_unstable();
    for group in records.chunk_by(|a, b| (a.high, a.low, a.empty) == (b.high, b.low, b.empty)) {
        if let Some(first) = group.first().filter(|first| !first.empty) {
            group.iter().for_each(|r| representative[r.row as usize] = first.row);
        }
    }
    Ok(representative)
}

/// Reusable buffers; one per thread.
#[derive(Default)]
struct Reader {
    norm: Vec<u8>,
    form: Vec<u8>,
    marks: Marks,
}

impl Reader {
    /// Hash of the text's normal form; `None` for a text that says nothing.
    fn hash(
        &mut self,
        text: &[u8],
        row: usize,
        punctuation: Punctuation,
        job: &Job,
    ) -> Result<Option<u128>> {
        normalize_bytes(text, row, job, &mut self.norm)?;
        let form = match punctuation {
            Punctuation::Keep => &self.norm,
            Punctuation::Drop => {
                self.keep_words(job)?;
                &self.form
            }
        };
        Ok((!form.is_empty()).then(|| hash128(form)))
    }

    /// Words joined by a space, characters by nothing.
    fn keep_words(&mut self, job: &Job) -> Result<()> {
        let apart = unit_of_bytes(&self.norm, job)? == Unit::Word;
        self.marks.read(&mut self.norm, job)?;
        self.form.clear();
        let (mut at, mut check_at) = (0, 0);
        while let Some((from, to)) = self.marks.next(at) {
            if from >= check_at {
                job.check()?;
                check_at = from + (1 << 20);
            }
            if apart && !self.form.is_empty() {
                self.form.push(b' ');
            }
            self.form.extend_from_slice(&self.norm[from..to]);
            at = to;
        }
        Ok(())
    }
}
