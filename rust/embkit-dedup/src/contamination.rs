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
//! the longest run of consecutive windows, in bytes of the original text.
//!
//! Windows are looked up by a 64-bit hash, and only then compared letter by letter, so a hit is
//! never chance. (Two evaluation n-grams of one hash would hide the second; with 10^7 of them that
//! happens once in 400,000 times.) Memory: the evaluation index of about 60 bytes per distinct
//! n-gram and the evaluation texts, at most 16 bytes per training window that occurs in it, and
//! per thread a few times the longest text.

mod index;
mod scan;

use crate::normalize::Unit;
use crate::units::Units;
use embkit_core::{Error, Job, Result, TextShard, Texts};
use index::Index;
use scan::Scan;

/// Common n-grams listed in the report; the count is complete.
const SAMPLES: usize = 100;

/// What counts as contamination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContaminationParams {
    /// Words in a shared run, at least 1.
    pub words: usize,
    /// Characters in a shared run of a script without spaces, at least 1.
    pub chars: usize,
    /// Which of the two a text is compared by. Words are never compared with characters.
    pub units: Units,
    /// n-grams in more training rows than this are common.
    pub common: u32,
    /// Threads, 0 for all; no effect on the result.
    pub threads: usize,
}

impl Default for ContaminationParams {
    fn default() -> Self {
        Self { words: 13, chars: 50, units: Units::Auto, common: 10, threads: 0 }
    }
}

/// What one training row leaks.
#[derive(Clone, Debug, PartialEq)]
pub struct Hit {
    /// Training row.
    pub train_row: u64,
    /// The first evaluation row that contains the beginning of the longest span.
    pub eval_row: u64,
    /// First byte of the longest span in the training text.
    pub start: u64,
    /// Byte after the span.
    pub end: u64,
    /// Units of the training text that lie in any shared run / all its units, in `(0, 1]`.
    pub overlap: f32,
    /// Separate runs of windows; 1 when the whole text is equal.
    pub runs: u32,
    /// Whether the row equals an evaluation text, unit by unit.
    pub whole: bool,
    /// The evaluation sets that have any of it, ascending.
    pub sets: Vec<u32>,
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
    /// Training rows that hit each evaluation set; one set when none were given, none without
    /// evaluation rows.
    pub set_rows: Vec<u64>,
    /// Evaluation texts that have a word or a character to compare: 0 says that nothing was.
    pub eval_texts: u64,
    /// Distinct common n-grams.
    pub common: u64,
    /// Up to 100 of them, in order of evaluation row and position.
    pub common_samples: Vec<CommonGram>,
    /// Training rows that share nothing but common n-grams.
    pub common_only_rows: u64,
}

impl ContaminationParams {
    fn n(&self, unit: Unit) -> usize {
        if unit == Unit::Word { self.words } else { self.chars }
    }

    fn check(&self) -> Result<()> {
        const MOST: usize = 1 << 20;
        if !(1..=MOST).contains(&self.words) || !(1..=MOST).contains(&self.chars) {
            return Err(Error::usage(
                format!("contamination runs of {} words or {} characters", self.words, self.chars),
                "Use 1 to 1,048,576 of each (defaults: 13 words, 50 characters)",
            ));
        }
        Ok(())
    }
}

/// Finds the training rows that leak evaluation text (see the module).
///
/// `sets` has the number of the evaluation set of each evaluation row, below the number of rows;
/// `None` is one set. `job` advances by one per training row, when it is known whether it leaks. No
/// evaluation rows, or only empty ones, give no hits.
///
/// Errors: [`Error::Usage`] for a run of length 0 or above 2^20, text that is not UTF-8 or longer
/// than 128 MiB, or wrong sets; [`Error::Cancelled`].
pub fn contamination(
    train: &[TextShard],
    eval: &[TextShard],
    sets: Option<&[u32]>,
    params: &ContaminationParams,
    job: &Job,
) -> Result<Contamination> {
    params.check()?;
    let (train, eval) = (Texts::new(train)?, Texts::new(eval)?);
    let set_rows = vec![0; count_sets(sets, eval.len())?];
    let index = Index::new(&eval, sets, params, job)?;
    let scan = Scan { train: &train, index: &index, params, job };
    let suspects = scan.suspects()?;
    let suspects = scan.confirm(&suspects)?;

    let mut train_rows = vec![0u32; index.gram.len()];
    let mut counted = vec![0u32; index.gram.len()]; // the last suspect that counted, from 1
    for (number, suspect) in (1u32..).zip(&suspects) {
        for window in &suspect.windows {
            let id = window.id as usize;
            train_rows[id] += u32::from(counted[id] != number);
            counted[id] = number;
        }
    }
    drop(counted);
    let is_common = |id: u32| train_rows[id as usize] > params.common;
    let hits = scan.hits(&suspects, is_common)?;

    let common: Vec<u32> = (0..train_rows.len() as u32).filter(|&id| is_common(id)).collect();
    let sample = |&id: &u32| {
        let place = index.gram[id as usize];
        CommonGram {
            eval_row: place.row.into(),
            start: place.start.into(),
            end: place.end.into(),
            train_rows: train_rows[id as usize],
        }
    };
    let mut found = Contamination {
        set_rows,
        eval_texts: index.texts,
        common: common.len() as u64,
        common_samples: common.iter().take(SAMPLES).map(sample).collect(),
        common_only_rows: (suspects.len() - hits.len()) as u64,
        hits,
    };
    for set in found.hits.iter().flat_map(|hit| &hit.sets) {
        found.set_rows[*set as usize] += 1;
    }
    Ok(found)
}

fn count_sets(sets: Option<&[u32]>, rows: usize) -> Result<usize> {
    let Some(sets) = sets else { return Ok(rows.min(1)) };
    let count = sets.iter().max().map_or(0, |&most| most as usize + 1);
    if sets.len() != rows || count > rows {
        return Err(Error::usage(
            format!("{} set numbers below {count} for {rows} evaluation rows", sets.len()),
            "Pass one number per evaluation row, counted from 0 without large gaps",
        ));
    }
    Ok(count)
}
