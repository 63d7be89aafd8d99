//! Near-duplicate clusters: sketch every text once, let LSH propose, let exact Jaccard decide.
//!
//! 1. Per text: normalise, hash the result, shingle, MinHash, one key per band.
//! 2. Texts with one normalised form are one; the row of the preferred source, then with the
//!    smallest raw hash, stands for it.
//! 3. Forms that share a key are ordered: preferred source first, then weight (over the bands, how
//!    many forms share its key: the more likes, the heavier), then longer first, then hash.
//! 4. Greedy stars in that order: a form joins the first representative with which it shares a key
//!    and whose Jaccard similarity reaches the threshold, else it becomes a representative.
//! 5. A representative left alone, though a member of another star resembles it, gets that member's
//!    company (`rescue`).
//!
//! Heavy forms first is what keeps similar texts together: most are like the middle of their
//! cluster. Only representatives are compared with, at most [`LIST`] of one bucket, so a hundred
//! thousand variants of one text cost one comparison each. The order depends on the texts (and
//! sources) alone, so neither the input order nor threads nor the memory cap show in the clusters.
//! Texts without a visible character never cluster.
//!
//! With a cap, what exceeds it goes through unnamed files in the directory `spill`: keys as sorted
//! runs, then forms in segments. [`ROW_BYTES`] per row stay in memory, one block of sets (8 MiB of
//! text, or one text), and a 200th of all bucket entries.

mod rescue;
mod sketch;
mod spill;
mod stars;

pub(crate) use rescue::largest;

use crate::shingle::ShingleParams;
use embkit_core::{Error, Job, Result, TextShard, Texts};
use sketch::{Buckets, lead, sketch};
use spill::Room;
use std::path::PathBuf;

const NONE: u32 = u32::MAX;
/// Representatives of one bucket that later forms are compared with: the first so many.
pub(crate) const LIST: usize = 64;
/// Members of one bucket that may give company to a form left alone: the first so many.
pub(crate) const MEMBERS: usize = 8;
/// Bytes per row that no cap can move out of memory, the result included.
const ROW_BYTES: usize = 40;
/// Least room above that.
const LEAST_ROOM: usize = 1 << 16;

/// What counts as a near-duplicate.
#[derive(Clone, Debug, PartialEq)]
pub struct DedupParams {
    /// Least Jaccard similarity to the representative, in `(0, 1]`.
    pub threshold: f64,
    /// Seed of the MinHash functions: changes which pairs are proposed and who represents, never
    /// what is a duplicate.
    pub seed: u64,
    /// Units per shingle.
    pub shingle: ShingleParams,
    /// Threads, 0 for all; no effect on the result.
    pub threads: usize,
    /// Bytes of memory beside the texts and the sets of single texts; `None` for no limit. No
    /// effect on the result. Needs `spill`.
    pub memory: Option<u64>,
    /// An existing directory for what exceeds `memory`; nothing stays in it.
    pub spill: Option<PathBuf>,
}

impl Default for DedupParams {
    fn default() -> Self {
        Self {
            threshold: 0.8,
            seed: 0,
            shingle: ShingleParams::default(),
            threads: 0,
            memory: None,
            spill: None,
        }
    }
}

impl DedupParams {
    pub(crate) fn check(&self) -> Result<()> {
        if !(self.threshold > 0.0 && self.threshold <= 1.0) {
            return Err(Error::usage(
                format!("near-duplicate threshold {}", self.threshold),
                "Give a Jaccard similarity above 0 and at most 1 (default 0.8)",
            ));
        }
        self.shingle.check()
    }

    /// The room that the cap leaves for `rows` rows.
    fn room(&self, rows: usize) -> Result<Room> {
        let Some(memory) = self.memory else { return Ok(Room { bytes: usize::MAX, dir: None }) };
        let Some(dir) = &self.spill else {
            return Err(Error::usage(
                "a memory cap without a directory to spill to",
                "Name an existing directory with room for about 300 bytes per text",
            ));
        };
        let least = rows * ROW_BYTES + LEAST_ROOM;
        match usize::try_from(memory).unwrap_or(usize::MAX).checked_sub(rows * ROW_BYTES) {
            Some(bytes) if bytes >= LEAST_ROOM => Ok(Room { bytes, dir: Some(dir.clone()) }),
            _ => Err(Error::usage(
                format!("a memory cap of {memory} bytes for {rows} texts"),
                format!("Allow at least {least} bytes, or dedup the texts in parts"),
            )),
        }
    }
}

/// Star clusters, one entry per row.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Clusters {
    /// Row of the cluster's representative; a text alone is its own.
    pub representative: Vec<u64>,
    /// Jaccard similarity to the representative; 1 for itself and for equal normalised text.
    pub similarity: Vec<f32>,
    /// Comparisons of distinct normalised texts that LSH proposed.
    pub checked: u64,
}

/// Where a form belongs.
#[derive(Clone, Copy)]
struct Star {
    leader: u32,
    similarity: f32,
    /// Forms of the star that this form leads; 0 for a member.
    size: u32,
}

/// What the passes over the ordered forms share.
struct Pass<'a> {
    texts: &'a Texts<'a>,
    params: &'a DedupParams,
    priority: Option<&'a [u16]>,
    room: &'a Room,
    /// Row of the form at each position.
    order: Vec<u32>,
    /// Position of each row's form, [`NONE`] without company.
    position: Vec<u32>,
}

impl Pass<'_> {
    fn row(&self, position: u32) -> u32 {
        self.order[position as usize]
    }

    fn text(&self, position: u32) -> Result<&str> {
        self.texts.str(self.row(position) as usize)
    }

    fn priority(&self, row: u32) -> u16 {
        self.priority.map_or(0, |all| all[row as usize])
    }

    fn leads(&self, stars: &[Star], row: u32) -> bool {
        stars[row as usize].size > 0
    }

    /// Whether two sets may reach the threshold, by size (J <= smaller / larger) and then by the
    /// high halves in common, which are at least as many as the shingles in common.
    fn can_reach(&self, set: &[u64], halves: &[u32]) -> bool {
        let (a, b) = (set.len(), halves.len());
        let enough =
            |shared: usize, all: usize| shared as f64 / all as f64 >= self.params.threshold;
        if !enough(a.min(b), a.max(b)) {
            return false;
        }
        let (mut i, mut j, mut shared) = (0, 0, 0);
        while let (Some(x), Some(y)) = (set.get(i), halves.get(j)) {
            let x = (x >> 32) as u32;
            shared += usize::from(x == *y);
            i += usize::from(x <= *y);
            j += usize::from(*y <= x);
        }
        enough(shared, a + b - shared)
    }
}

/// Groups rows whose texts are near-duplicates.
///
/// `priority` holds a number per row (lower wins): a representative is of the best source among its
/// star. `job` advances by one per row in the first pass (most of the work); the total is the number
/// of rows. Errors: [`Error::Usage`] for parameters out of range (a cap too small says the least),
/// priorities of another length, 2^32 rows or more, or text that is not UTF-8; [`Error::Io`] of the
/// spill directory; [`Error::Cancelled`].
pub fn near_duplicates(
    shards: &[TextShard],
    priority: Option<&[u16]>,
    params: &DedupParams,
    job: &Job,
) -> Result<Clusters> {
    params.check()?;
    let texts = Texts::new(shards)?;
    let n = texts.len();
    if n >= NONE as usize {
        return Err(Error::usage(
            format!("{n} texts in one call"),
            "Split the texts into parts of fewer than 2^32 rows",
        ));
    }
    if let Some(given) = priority.map(<[u16]>::len).filter(|given| *given != n) {
        return Err(Error::usage(
            format!("{given} priorities for {n} texts"),
            "Give one priority per row, or none",
        ));
    }
    let room = params.room(n)?;
    let (mut rows, forms, keys) = sketch(&texts, params, &room, job)?;
    let of = |row: u32| priority.map_or(0, |all| all[row as usize]);
    lead(&mut rows, forms, &texts, &of, job)?;
    let mut buckets = Buckets::new(&rows, keys, &room, job)?;

    let weight = std::mem::take(&mut buckets.weight);
    let mut order: Vec<u32> = (0..n as u32).filter(|&row| weight[row as usize] > 0).collect();
    sort_by(&mut order, job, |row| {
        let at = row as usize;
        let heavy = u64::from(!weight[at]) << 32 | u64::from(!rows.length[at]);
        (of(row), heavy, rows.form[at], row)
    })?;
    let leader = rows.leader;
    drop((weight, rows.form, rows.length));
    let mut position = vec![NONE; n];
    order.iter().enumerate().for_each(|(at, row)| position[*row as usize] = at as u32);
    let pass = Pass { texts: &texts, params, priority, room: &room, order, position };

    let alone = |row: u32| Star { leader: row, similarity: 1.0, size: 1 };
    let mut star: Vec<Star> = (0..n as u32).map(alone).collect();
    let join = |row: u32, leader: u32, similarity: f64| {
        star[row as usize] = Star { leader, similarity: similarity as f32, size: 0 };
        star[leader as usize].size += 1;
    };
    let mut checked = stars::run(&pass, &mut buckets, join, job)?;
    checked += rescue::run(&pass, &mut buckets, &mut star, job)?;
    drop(pass);

    // Copies of a form follow their leader to its representative.
    let form = |row: usize| match leader[row] {
        NONE => star[row],
        leader => star[leader as usize],
    };
    Ok(Clusters {
        representative: (0..n).map(|row| u64::from(form(row).leader)).collect(),
        similarity: (0..n).map(|row| form(row).similarity).collect(),
        checked,
    })
}

/// Sorts by key in runs of a few milliseconds, then merges them in place by the library's sort,
/// which finds the runs.
fn sort_by<K: Ord>(rows: &mut [u32], job: &Job, key: impl Fn(u32) -> K) -> Result<()> {
    for run in rows.chunks_mut(1 << 16) {
        job.check()?;
        run.sort_unstable_by_key(|row| key(*row));
    }
    let mut width = 1 << 16;
    while width < rows.len() {
        for pair in rows.chunks_mut(2 * width) {
            job.check()?;
            pair.sort_by_key(|row| key(*row));
        }
        width *= 2;
    }
    Ok(())
}
