//! The passes over the training rows: which may leak, what they share, and where.

use super::index::{Index, whole_hash, whole_push};
use super::{ContaminationParams, Hit};
use crate::units::{Cutter, Reader, Rolling};
use embkit_core::{Job, Result, Texts, par};

const BLOCK: usize = 256;
const SUSPECTS: usize = 32;

/// A window of a training text that occurs in an evaluation text.
#[derive(Clone, Copy)]
pub(super) struct Window {
    /// Units before it.
    at: u32,
    /// Its n-gram.
    pub id: u32,
    /// Its bytes in the training text.
    start: u32,
    end: u32,
}

/// A training row that has something in common with an evaluation text.
pub(super) struct Suspect {
    row: usize,
    pub windows: Vec<Window>,
    /// The evaluation text that it equals.
    whole: Option<u32>,
    /// Units of the text, and of a window.
    units: usize,
    n: usize,
    /// From the first unit to the last.
    start: u32,
    end: u32,
}

/// Everything that the passes look at.
pub(super) struct Scan<'a> {
    pub train: &'a Texts<'a>,
    pub index: &'a Index,
    pub params: &'a ContaminationParams,
    pub job: &'a Job,
}

impl Scan<'_> {
    /// Rows with a window or a whole whose hash the index has. Advances by the others.
    pub fn suspects(&self) -> Result<Vec<usize>> {
        let (index, params, job) = (self.index, self.params, self.job);
        let parts = par::try_map_blocks(self.train.len(), BLOCK, params.threads, |range| {
            let mut reader = Reader::default();
            let mut rolling = [Rolling::new(params.words), Rolling::new(params.chars)];
            let mut found = Vec::new();
            for row in range {
                job.check()?;
                let unit = reader.read(self.train.get(row), row, params.units, job)?;
                let grams = index.grams(unit);
                let rolling = &mut rolling[unit as usize];
                rolling.clear();
                let (mut whole, mut hit) = (whole_hash(unit), false);
                reader.for_each(unit, job, |hash| {
                    whole = whole_push(whole, hash);
                    hit = rolling.push(hash).is_some_and(|gram| grams.get(gram).is_some());
                    !hit
                })?;
                if hit || index.whole(whole).is_some() {
                    found.push(row);
                } else {
                    job.advance(1);
                }
            }
            Ok(found)
        })?;
        Ok(parts.into_iter().flatten().collect())
    }

    /// What the rows share, compared unit by unit; rows that share nothing after all are dropped
    /// and counted as done.
    pub fn confirm(&self, rows: &[usize]) -> Result<Vec<Suspect>> {
        let (index, params, job) = (self.index, self.params, self.job);
        let parts = par::try_map_blocks(rows.len(), SUSPECTS, params.threads, |range| {
            let mut cutter = Cutter::default();
            let mut rolling = [Rolling::new(params.words), Rolling::new(params.chars)];
            let mut found = Vec::new();
            for &row in &rows[range] {
                job.check()?;
                let unit = cutter.cut(self.train.str(row)?, row, params.units, job)?;
                let (grams, n) = (index.grams(unit), params.n(unit));
                let rolling = &mut rolling[unit as usize];
                rolling.clear();
                let (mut whole, mut windows) = (whole_hash(unit), Vec::new());
                for (i, hash) in cutter.hashes(unit).enumerate() {
                    if i.is_multiple_of(4096) {
                        job.check()?;
                    }
                    whole = whole_push(whole, hash);
                    let Some(id) = rolling.push(hash).and_then(|gram| grams.get(gram)) else {
                        continue;
                    };
                    let (from, to) = cutter.form_of(unit, i + 1 - n, i + 1);
                    if index.is(&index.gram[id as usize], &cutter.form[from..to]) {
                        let (at, start) = (i + 1 - n, cutter.pieces[i + 1 - n].start);
                        let end = cutter.pieces[i].end;
                        windows.push(Window { at: at as u32, id, start, end });
                    }
                }
                let whole = index.whole(whole);
                let whole = whole.filter(|&id| index.is(&index.whole[id as usize], &cutter.form));
                if whole.is_some() || !windows.is_empty() {
                    windows.shrink_to_fit();
                    let units = cutter.pieces.len();
                    let start = cutter.pieces.first().map_or(0, |p| p.start);
                    let end = cutter.pieces.last().map_or(0, |p| p.end);
                    found.push(Suspect { row, windows, whole, units, n, start, end });
                } else {
                    job.advance(1);
                }
            }
            Ok(found)
        })?;
        Ok(parts.into_iter().flatten().collect())
    }

    /// The leaks of rows whose windows are not all common; advances by all.
    pub fn hits(&self, suspects: &[Suspect], is_common: impl Fn(u32) -> bool) -> Result<Vec<Hit>> {
        let mut hits = Vec::new();
        for suspect in suspects {
            self.job.check()?;
            let windows: Vec<Window> =
                suspect.windows.iter().copied().filter(|w| !is_common(w.id)).collect();
            if suspect.whole.is_some() || !windows.is_empty() {
                hits.push(self.hit(suspect, &windows));
            }
            self.job.advance(1);
        }
        Ok(hits)
    }

    /// The longest run of consecutive windows in bytes (the first on a tie), or the whole text.
    fn hit(&self, suspect: &Suspect, windows: &[Window]) -> Hit {
        let index = self.index;
        let whole = suspect.whole.map(|id| &index.whole[id as usize]);
        let mut hit = Hit {
            train_row: suspect.row as u64,
            eval_row: 0,
            start: 0,
            end: 0,
            overlap: 1.0,
            runs: 1,
            whole: whole.is_some(),
            sets: self.sets(
                windows
                    .iter()
                    .map(|w| index.gram[w.id as usize].sets)
                    .chain(whole.map(|place| place.sets)),
            ),
        };
        if let Some(place) = whole {
            hit.eval_row = u64::from(place.row);
            (hit.start, hit.end) = (u64::from(suspect.start), u64::from(suspect.end));
            return hit;
        }
        hit.runs = 0;
        let (mut covered, mut covered_to) = (0usize, 0usize);
        for run in windows.chunk_by(|a, b| a.at + 1 == b.at) {
            let (Some(first), Some(last)) = (run.first(), run.last()) else { continue };
            let (start, end) = (u64::from(first.start), u64::from(last.end));
            if end - start > hit.end - hit.start {
                hit.eval_row = u64::from(index.gram[first.id as usize].row);
                (hit.start, hit.end) = (start, end);
            }
            hit.runs += 1;
            let (from, to) = (first.at as usize, last.at as usize + suspect.n);
            covered += to - covered_to.max(from);
            covered_to = to;
        }
        hit.overlap = covered as f32 / suspect.units as f32;
        hit
    }

    /// All sets of some combinations, ascending.
    fn sets(&self, combinations: impl Iterator<Item = u32>) -> Vec<u32> {
        let mut combinations: Vec<u32> = combinations.collect();
        combinations.sort_unstable();
        combinations.dedup();
        let all = combinations.iter().flat_map(|&c| &self.index.sets[c as usize]);
        let mut sets: Vec<u32> = all.copied().collect();
        sets.sort_unstable();
        sets.dedup();
        sets
    }
}
