//! Training rows that contain text of an evaluation set.
//!
//! A training row is a hit when it shares a run of at least `words` words (or `chars` characters,
//! in scripts without spaces) with any evaluation text, or equals one whole text word for word,
//! however short; both after normalisation, punctuation aside. n-grams that more than `common`
//! training rows contain are licences, boilerplate and fixed phrases: they are reported, and do
//! not make a hit on their own. Whole-text equality does, always.
//!
//! A unit of the training text is *covered* when some window of n units around it occurs in an
//! evaluation text and is not common. The overlap is the share of covered units, the reported span
//! the longest run of consecutive windows, in bytes of the original text. n-grams are compared by
//! 64-bit hash: with 10^8 windows against 10^6 n-grams the chance of one false hit is 5e-6.

use crate::normalize::Unit;
use crate::units::{Cutter, Piece, windows};
use embkit_core::{Error, Job, Result, TextShard, Texts, hash128, par};
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

const BLOCK: usize = 256;
/// Common n-grams listed in the report; the count is complete.
const SAMPLES: usize = 100;

/// What counts as contamination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContaminationParams {
    /// Words in a shared run, at least 1.
    pub words: usize,
    /// Characters in a shared run of a script without spaces, at least 1.
    pub chars: usize,
    /// n-grams in more training rows than this are common.
    pub common: u32,
    /// Threads, 0 for all; no effect on the result.
    pub threads: usize,
}

impl Default for ContaminationParams {
    fn default() -> Self {
        Self { words: 13, chars: 50, common: 10, threads: 0 }
    }
}

/// The longest leak of one training row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hit {
    /// Training row.
    pub train_row: u64,
    /// The first evaluation row that contains the beginning of the span.
    pub eval_row: u64,
    /// First byte of the span in the training text.
    pub start: u64,
    /// Byte after the span.
    pub end: u64,
    /// Units of the training text that lie in any shared run / all its units, in `(0, 1]`.
    pub overlap: f32,
}

/// An n-gram of an evaluation text that too many training rows share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommonGram {
    /// The first evaluation row that contains it.
    pub eval_row: u64,
    /// First byte of the n-gram in the evaluation text.
    pub start: u64,
    /// Byte after it.
    pub end: u64,
    /// Training rows that contain it.
    pub train_rows: u32,
}

/// Result of [`contamination`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Contamination {
    /// At most one per training row, by row.
    pub hits: Vec<Hit>,
    /// Distinct common n-grams.
    pub common: u64,
    /// Up to 100 of them, in order of evaluation row and position.
    pub common_samples: Vec<CommonGram>,
    /// Training rows that share nothing but common n-grams.
    pub common_only_rows: u64,
}

/// Keys are hashes already.
#[derive(Default)]
struct Identity(u64);

impl Hasher for Identity {
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(byte);
        }
    }
    fn write_u64(&mut self, key: u64) {
        self.0 = key;
    }
    fn finish(&self) -> u64 {
        self.0
    }
}

type Table = HashMap<u64, u32, BuildHasherDefault<Identity>>;

/// The n-grams of all evaluation texts, with a bit filter in front of the table.
#[derive(Default)]
struct Grams {
    id: Table,
    filter: Vec<u64>,
}

impl Grams {
    fn finish(&mut self) {
        // 16 bits per n-gram: one training window in 16 or fewer goes on to the table by chance.
        let words = (self.id.len() / 4).next_power_of_two().max(1);
        self.filter = vec![0; words];
        for &gram in self.id.keys() {
            self.filter[(gram >> 6) as usize & (words - 1)] |= 1 << (gram & 63);
        }
    }

    fn get(&self, gram: u64) -> Option<u32> {
        let word = self.filter.get((gram >> 6) as usize & (self.filter.len().wrapping_sub(1)))?;
        if word >> (gram & 63) & 1 == 0 { None } else { self.id.get(&gram).copied() }
    }
}

/// What the evaluation texts contribute.
struct Index {
    word: Grams,
    char: Grams,
    /// Where each n-gram id was seen first.
    place: Vec<(u32, u64, u64)>,
    /// First row of each whole text, by the hash of its units.
    whole: HashMap<u128, u32>,
}

fn whole_hash(unit: Unit, units: &[Piece], bytes: &mut Vec<u8>) -> u128 {
    bytes.clear();
    bytes.push(u8::from(unit == Unit::Char));
    units.iter().for_each(|u| bytes.extend_from_slice(&u.hash.to_le_bytes()));
    hash128(bytes)
}

impl Index {
    fn new(eval: &Texts, params: &ContaminationParams, job: &Job) -> Result<Self> {
        let mut index = Self {
            word: Grams::default(),
            char: Grams::default(),
            place: Vec::new(),
            whole: HashMap::new(),
        };
        let (mut cutter, mut units, mut grams, mut bytes) =
            (Cutter::default(), Vec::new(), Vec::new(), Vec::new());
        for row in 0..eval.len() {
            job.check()?;
            let unit = cutter.cut(eval.str(row)?, &mut units);
            if units.is_empty() {
                continue;
            }
            index.whole.entry(whole_hash(unit, &units, &mut bytes)).or_insert(row as u32);
            let n = params.n(unit);
            windows(&units, n, &mut grams);
            let table = if unit == Unit::Word { &mut index.word } else { &mut index.char };
            for (&gram, window) in grams.iter().zip(units.windows(n)) {
                table.id.entry(gram).or_insert_with(|| {
                    let (from, to) = (window[0].start, window[n - 1].end);
                    index.place.push((row as u32, from as u64, to as u64));
                    (index.place.len() - 1) as u32
                });
            }
        }
        if index.place.len() >= u32::MAX as usize {
            return Err(Error::usage(
                format!("{} distinct n-grams in the evaluation texts", index.place.len()),
                "Check the evaluation sets one by one",
            ));
        }
        index.word.finish();
        index.char.finish();
        Ok(index)
    }
}

impl ContaminationParams {
    fn n(&self, unit: Unit) -> usize {
        if unit == Unit::Word { self.words } else { self.chars }
    }

    fn check(&self) -> Result<()> {
        if self.words == 0 || self.chars == 0 {
            return Err(Error::usage(
                format!("contamination runs of {} words or {} characters", self.words, self.chars),
                "Use at least 1 of each (defaults: 13 words, 50 characters)",
            ));
        }
        Ok(())
    }
}

/// Training row with something in common with an evaluation text.
struct Suspect {
    row: usize,
    grams: Vec<u32>, // distinct ids
    whole: Option<u32>,
}

/// Finds the training rows that leak evaluation text (see the module).
///
/// `job` advances by one per training row. No evaluation rows give no hits. Errors:
/// [`Error::Usage`] for a run of length 0 or text that is not UTF-8; [`Error::Cancelled`].
pub fn contamination(
    train: &[TextShard],
    eval: &[TextShard],
    params: &ContaminationParams,
    job: &Job,
) -> Result<Contamination> {
    params.check()?;
    let (train, eval) = (Texts::new(train)?, Texts::new(eval)?);
    let index = Index::new(&eval, params, job)?;
    let suspects = suspects(&train, &index, params, job)?;

    let mut train_rows = vec![0u32; index.place.len()];
    for id in suspects.iter().flat_map(|s| &s.grams) {
        train_rows[*id as usize] += 1;
    }
    let is_common = |id: u32| train_rows[id as usize] > params.common;

    let parts = par::try_map_blocks(suspects.len(), 64, params.threads, |range| {
        let (mut cutter, mut units, mut grams) = (Cutter::default(), Vec::new(), Vec::new());
        let mut hits = Vec::new();
        for suspect in &suspects[range] {
            job.check()?;
            let unit = cutter.cut(train.str(suspect.row)?, &mut units);
            windows(&units, params.n(unit), &mut grams);
            let table = if unit == Unit::Word { &index.word } else { &index.char };
            let ids = grams.iter().map(|&gram| table.get(gram).filter(|&id| !is_common(id)));
            let hit = match suspect.whole {
                Some(eval_row) => {
                    best_run(&units, units.len().max(1), [Some(eval_row)].into_iter())
                }
                None => best_run(&units, params.n(unit), ids)
                    .map(|(id, from, to, share)| (index.place[id as usize].0, from, to, share)),
            };
            hits.extend(hit.map(|(eval_row, start, end, overlap)| Hit {
                train_row: suspect.row as u64,
                eval_row: u64::from(eval_row),
                start: start as u64,
                end: end as u64,
                overlap,
            }));
        }
        Ok(hits)
    })?;
    let hits: Vec<Hit> = parts.into_iter().flatten().collect();

    let common: Vec<u32> = (0..train_rows.len() as u32).filter(|&id| is_common(id)).collect();
    let sample = |&id: &u32| {
        let (eval_row, start, end) = index.place[id as usize];
        let train_rows = train_rows[id as usize];
        CommonGram { eval_row: u64::from(eval_row), start, end, train_rows }
    };
    Ok(Contamination {
        common: common.len() as u64,
        common_samples: common.iter().take(SAMPLES).map(sample).collect(),
        common_only_rows: (suspects.len() - hits.len()) as u64,
        hits,
    })
}

fn suspects(
    train: &Texts,
    index: &Index,
    params: &ContaminationParams,
    job: &Job,
) -> Result<Vec<Suspect>> {
    let parts = par::try_map_blocks(train.len(), BLOCK, params.threads, |range| {
        let (mut cutter, mut units, mut hashes, mut bytes) =
            (Cutter::default(), Vec::new(), Vec::new(), Vec::new());
        let mut found = Vec::new();
        for row in range {
            job.check()?;
            let unit = cutter.cut(train.str(row)?, &mut units);
            windows(&units, params.n(unit), &mut hashes);
            let table = if unit == Unit::Word { &index.word } else { &index.char };
            let mut grams: Vec<u32> = hashes.iter().filter_map(|&gram| table.get(gram)).collect();
            grams.sort_unstable();
            grams.dedup();
            let whole = if units.is_empty() {
                None
            } else {
                index.whole.get(&whole_hash(unit, &units, &mut bytes)).copied()
            };
            if whole.is_some() || !grams.is_empty() {
                found.push(Suspect { row, grams, whole });
            }
            job.advance(1);
        }
        Ok(found)
    })?;
    Ok(parts.into_iter().flatten().collect())
}

/// The longest run (in bytes; the first on a tie) of consecutive windows that have an id: the id
/// of its first window, its byte span, and the share of units covered by all runs.
fn best_run(
    units: &[Piece],
    n: usize,
    ids: impl Iterator<Item = Option<u32>>,
) -> Option<(u32, usize, usize, f32)> {
    let mut best: Option<(u32, usize, usize)> = None;
    let mut run: Option<(u32, usize)> = None; // id and start of the current run
    let (mut covered, mut covered_to) = (0usize, 0usize);
    for (i, id) in ids.enumerate() {
        let Some(id) = id else {
            run = None;
            continue;
        };
        let (first, start) = *run.get_or_insert((id, units.get(i)?.start));
        let end = units.get(i + n - 1)?.end;
        if best.is_none_or(|(_, from, to)| end - start > to - from) {
            best = Some((first, start, end));
        }
        covered += i + n - covered_to.max(i);
        covered_to = i + n;
    }
    best.map(|(id, start, end)| (id, start, end, covered as f32 / units.len() as f32))
}
