//! Texts that are near-duplicates of a text of another set: training texts of an evaluation set.
//!
//! MinHash bands of the other set are looked up for each text, and what they propose is checked by
//! exact Jaccard until one reaches the threshold: which of several near texts is named does not
//! matter (it depends on the texts alone), that there is one does. So a hundred thousand texts near a
//! hundred thousand others cost one comparison each.

use crate::minhash::{Bands, Signer};
use crate::near::DedupParams;
use crate::shingle::{Shingler, jaccard};
use embkit_core::{Error, Job, Result, TextShard, Texts, hash128, par};
use std::collections::HashSet;

const BLOCK: usize = 256;

/// What [`near_matches`] finds, one entry per row.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Matches {
    /// Row of a near-duplicate in the other set, [`Matches::NONE`] for rows without one.
    pub row: Vec<u64>,
    /// Jaccard similarity to it; 1 for equal normalised text, 0 without one.
    pub similarity: Vec<f32>,
}

impl Matches {
    /// No near-duplicate.
    pub const NONE: u64 = u64::MAX;
}

/// The other set: its distinct forms, and for each band the sorted keys with their rows.
struct Index {
    sets: Vec<(u32, u128, Vec<u64>)>, // row, form, shingles
    keys: Vec<Vec<(u32, u32)>>,       // per band: key, place in `sets`
}

impl Index {
    fn new(texts: &Texts, bands: Bands, params: &DedupParams, job: &Job) -> Result<Self> {
        let parts = par::try_map_blocks(texts.len(), BLOCK, params.threads, |range| {
            let (mut shingler, mut signer) =
                (Shingler::new(params.shingle), Signer::new(bands, params.seed));
            let mut out = Vec::with_capacity(range.len());
            for row in range {
                job.check()?;
                let (mut set, mut keys) = (Vec::new(), Vec::new());
                let form = hash128(shingler.shingles(texts.str(row)?, &mut set));
                signer.keys(&set, &mut keys);
                out.push((row as u32, form, set, keys));
            }
            Ok(out)
        })?;
        let mut seen = HashSet::new();
        let mut index = Self { sets: Vec::new(), keys: vec![Vec::new(); bands.bands] };
        for (row, form, set, keys) in parts.into_iter().flatten() {
            if !set.is_empty() && seen.insert(form) {
                let place = index.sets.len() as u32;
                index.keys.iter_mut().zip(keys).for_each(|(band, key)| band.push((key, place)));
                index.sets.push((row, form, set));
            }
        }
        index.keys.iter_mut().for_each(|band| band.sort_unstable());
        Ok(index)
    }

    /// Places of the forms that share a key: band by band, so that the first are found at once.
    fn candidates<'a>(&'a self, keys: &'a [u32]) -> impl Iterator<Item = u32> + 'a {
        self.keys.iter().zip(keys).flat_map(|(band, &key)| {
            let from = band.partition_point(|entry| entry.0 < key);
            band[from..].iter().take_while(move |entry| entry.0 == key).map(|entry| entry.1)
        })
    }
}

/// Finds for each row of `shards` a row of `others` whose text is a near-duplicate.
///
/// `job` advances by one per row of `shards`. Errors: [`Error::Usage`] for parameters out of range,
/// 2^32 rows or more, or text that is not UTF-8; [`Error::Cancelled`].
pub fn near_matches(
    shards: &[TextShard],
    others: &[TextShard],
    params: &DedupParams,
    job: &Job,
) -> Result<Matches> {
    params.check()?;
    let (texts, others) = (Texts::new(shards)?, Texts::new(others)?);
    if others.len() >= u32::MAX as usize {
        return Err(Error::usage(
            format!("{} texts to compare with", others.len()),
            "Split them into parts of fewer than 2^32 rows",
        ));
    }
    let bands = Bands::for_threshold(params.threshold);
    let index = Index::new(&others, bands, params, job)?;
    let parts = par::try_map_blocks(texts.len(), BLOCK, params.threads, |range| {
        let (mut shingler, mut signer) =
            (Shingler::new(params.shingle), Signer::new(bands, params.seed));
        let (mut set, mut keys, mut seen) = (Vec::new(), Vec::new(), HashSet::new());
        let mut out = Matches::default();
        for row in range {
            job.check()?;
            let form = hash128(shingler.in_order(texts.str(row)?, &mut set));
            let mut sorted = false; // most texts have no candidate
            keys.clear();
            signer.keys(&set, &mut keys);
            seen.clear();
            let mut found = (Matches::NONE, 0.0);
            for place in index.candidates(&keys) {
                if set.is_empty() || !seen.insert(place) {
                    continue;
                }
                job.check()?;
                let (other, other_form, other_set) = &index.sets[place as usize];
                if !sorted {
                    set.sort_unstable();
                    set.dedup();
                    sorted = true;
                }
                let same = *other_form == form;
                let similarity = if same { 1.0 } else { jaccard(&set, other_set) };
                if similarity >= params.threshold {
                    found = (u64::from(*other), similarity);
                    break;
                }
            }
            out.row.push(found.0);
            out.similarity.push(found.1 as f32);
            job.advance(1);
        }
        Ok(out)
    })?;
    let mut all = Matches::default();
    for mut part in parts {
        all.row.append(&mut part.row);
        all.similarity.append(&mut part.similarity);
    }
    Ok(all)
}
