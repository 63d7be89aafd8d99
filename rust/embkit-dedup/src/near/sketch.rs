//! The first pass: of every text a hash, a length and its band keys; then equal forms, then buckets.

use super::spill::{Log, Room, Sorter};
use super::{DedupParams, NONE};
use crate::minhash::{Bands, Signer};
use crate::shingle::Shingler;
use embkit_core::{Job, Result, Texts, hash128, par};

const BLOCK: usize = 512;
/// Rows whose records the threads hand to the sorters between two looks at the room.
const WAVE: usize = 1 << 16;
/// Forms are dealt to parts by their first four bits.
const FORM_PARTS: usize = 16;

/// What is kept per row: 16 bytes.
pub(super) struct Rows {
    /// The row that stands for all rows of equal normalised text; [`NONE`] for an empty text.
    pub leader: Vec<u32>,
    /// High half of the hash of the normalised text.
    pub form: Vec<u64>,
    /// Normalised bytes (4 GiB and more count as one less).
    pub length: Vec<u32>,
}

/// Reads every text once. Returns the rows (leaders not yet known), their hashes (96 bits and the
/// row) and their keys, a part per band (key and row).
pub(super) fn sketch(
    texts: &Texts,
    params: &DedupParams,
    room: &Room,
    job: &Job,
) -> Result<(Rows, Sorter<u128>, Sorter<u64>)> {
    let bands = Bands::for_threshold(params.threshold);
    let n = texts.len();
    let mut rows = Rows { leader: vec![NONE; n], form: Vec::new(), length: Vec::new() };
    rows.form.reserve_exact(n);
    rows.length.reserve_exact(n);
    let dir = || room.dir.clone();
    let mut forms = Sorter::new(FORM_PARTS, room.share(4), dir(), params.threads);
    let mut keys = Sorter::new(bands.bands, room.share(4), dir(), params.threads);
    if room.dir.is_none() {
        forms.reserve(n / FORM_PARTS + n / 128);
        keys.reserve(n);
    }
    let wave = (room.share(24) / (16 + 8 * bands.bands)).clamp(16, WAVE);
    for from in (0..n).step_by(wave) {
        let parts = par::try_map_blocks(wave.min(n - from), BLOCK, params.threads, |range| {
            let (mut shingler, mut signer) =
                (Shingler::new(params.shingle), Signer::new(bands, params.seed));
            let (mut set, mut own) = (Vec::new(), Vec::with_capacity(range.len() * bands.bands));
            let (mut found, mut kept) = (Vec::with_capacity(range.len()), Vec::new());
            for row in range {
                job.check()?;
                let norm = shingler.in_order(texts.str(from + row)?, &mut set);
                let (form, length) = (hash128(norm), norm.len());
                found.push(((form >> 64) as u64, u32::try_from(length).unwrap_or(u32::MAX)));
                if length > 0 {
                    kept.push((form, (from + row) as u32));
                    signer.keys(&set, &mut own);
                }
                job.advance(1);
            }
            // The sorters sort: who comes first does not matter.
            for part in 0..FORM_PARTS {
                let here = kept.iter().filter(|(form, _)| (form >> 124) as usize == part);
                let record = |&(form, row): &(u128, u32)| form >> 32 << 32 | u128::from(row);
                forms.extend(part, here.map(record));
            }
            for band in 0..bands.bands {
                let key = own.iter().skip(band).step_by(bands.bands);
                let record =
                    |(key, kept): (&u32, &(u128, u32))| u64::from(*key) << 32 | u64::from(kept.1);
                keys.extend(band, key.zip(&kept).map(record));
            }
            Ok(found)
        })?;
        for (form, length) in parts.into_iter().flatten() {
            rows.form.push(form);
            rows.length.push(length);
        }
        forms.settle(job)?;
        keys.settle(job)?;
    }
    Ok((rows, forms, keys))
}

/// Points rows of one form at their leader: the preferred source, then the least hash of the text
/// as it came, then the first row.
pub(super) fn lead(
    rows: &mut Rows,
    forms: Sorter<u128>,
    texts: &Texts,
    priority: &impl Fn(u32) -> u16,
    job: &Job,
) -> Result<()> {
    type Rank = (u16, u128, u32);
    let mut best: (u128, Option<(u32, Option<Rank>)>) = (0, None);
    // Sorted by form and row: the first row of a form leads until a better one is met.
    forms.each(job, |_, record| {
        let (form, row) = (record >> 32, record as u32);
        let rank = |row: u32| (priority(row), hash128(texts.get(row as usize)), row);
        match &mut best {
            (of, Some((leader, known))) if *of == form => {
                let leader_rank = *known.get_or_insert_with(|| rank(*leader));
                let own = rank(row);
                if own < leader_rank {
                    rows.leader[*leader as usize] = row;
                    (*leader, *known) = (row, Some(own));
                }
                rows.leader[row as usize] = *leader;
            }
            _ => {
                best = (form, Some((row, None)));
                rows.leader[row as usize] = row;
            }
        }
        Ok(())
    })?;
    // A leader that was overtaken points on to the next one.
    for row in 0..rows.leader.len() {
        if row.is_multiple_of(1 << 16) {
            job.check()?;
        }
        let mut to = rows.leader[row];
        while to != NONE && rows.leader[to as usize] != to {
            to = rows.leader[to as usize];
        }
        rows.leader[row] = to;
    }
    Ok(())
}

/// Forms that share a band with another form.
pub(super) struct Buckets {
    /// `bucket << 32 | row`, buckets in increasing order.
    pub members: Log<u64>,
    pub count: u32,
    /// Per row: in how many bands it meets how many others, summed.
    pub weight: Vec<u32>,
}

impl Buckets {
    pub fn new(rows: &Rows, keys: Sorter<u64>, room: &Room, job: &Job) -> Result<Self> {
        let mut out = Self {
            members: Log::new(room.share(4), room.dir.clone()),
            count: 0,
            weight: vec![0; rows.leader.len()],
        };
        // One bucket is collected at a time: 4 bytes a row at most.
        let (mut at, mut same) = ((0, 0), Vec::new());
        keys.each(job, |band, record| {
            let (key, row) = ((record >> 32) as u32, record as u32);
            if rows.leader[row as usize] == row {
                if at != (band, key) {
                    out.close(&mut same)?;
                    at = (band, key);
                }
                same.push(row);
            }
            Ok(())
        })?;
        out.close(&mut same)?;
        Ok(out)
    }

    fn close(&mut self, same: &mut Vec<u32>) -> Result<()> {
        if same.len() > 1 {
            for &row in same.iter() {
                let weight = &mut self.weight[row as usize];
                *weight = weight.saturating_add(same.len() as u32 - 1);
                self.members.push(u64::from(self.count) << 32 | u64::from(row))?;
            }
            self.count += 1;
        }
        same.clear();
        Ok(())
    }

    /// Calls `f(bucket, rows)` for every bucket.
    pub fn each(&mut self, mut f: impl FnMut(u32, &mut Vec<u32>) -> Result<()>) -> Result<()> {
        let (mut bucket, mut same) = (0, Vec::new());
        self.members.each(|record| {
            if (record >> 32) as u32 != bucket {
                f(bucket, &mut same)?;
                same.clear();
                bucket = (record >> 32) as u32;
            }
            same.push(record as u32);
            Ok(())
        })?;
        if same.is_empty() { Ok(()) } else { f(bucket, &mut same) }
    }
}
