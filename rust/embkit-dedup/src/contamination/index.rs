//! The n-grams and whole texts of the evaluation sets.

use super::ContaminationParams;
use crate::normalize::Unit;
use crate::units::{Cutter, Rolling, Units, mix};
use embkit_core::{Error, Job, Result, Texts};
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// Keys are hashes already.
#[derive(Default)]
pub(super) struct Identity(u64);

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

/// Ids of n-grams by hash, with a bit filter in front of the table.
#[derive(Default)]
pub(super) struct Grams {
    id: Table,
    filter: Vec<u64>,
}

impl Grams {
    fn finish(&mut self) {
        // 8 bits per n-gram, two of which are set: 5% of the windows go on to the table by chance.
        self.filter = vec![0; (self.id.len() / 8).max(1)];
        for &gram in self.id.keys() {
            let (word, bits) = self.place(gram);
            self.filter[word] |= bits;
        }
    }

    #[inline(always)]
    fn place(&self, gram: u64) -> (usize, u64) {
        let word = (u128::from(gram) * self.filter.len() as u128) >> 64;
        (word as usize, 1 << (gram & 63) | 1 << (gram >> 6 & 63))
    }

    #[inline(always)]
    pub fn get(&self, gram: u64) -> Option<u32> {
        let (word, bits) = self.place(gram);
        if self.filter.get(word)? & bits != bits {
            return None;
        }
        self.id.get(&gram).copied()
    }
}

/// Where an n-gram or a whole text was seen first.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub row: u32,
    /// Its span in the evaluation text.
    pub start: u32,
    pub end: u32,
    /// Its normal form, in `Index::form`.
    form_len: u32,
    form_at: u64,
    /// Which evaluation sets have it: an index into `Index::sets`.
    pub sets: u32,
}

/// What the evaluation texts contribute: about 60 bytes per distinct n-gram beside their normal
/// forms.
#[derive(Default)]
pub(super) struct Index {
    word: Grams,
    char: Grams,
    pub gram: Vec<Place>,
    /// First row of each whole text, by the hash of its units and their kind.
    whole_id: HashMap<u64, u32>,
    pub whole: Vec<Place>,
    form: Vec<u8>,
    /// The combinations of sets that occur, each ascending.
    pub sets: Vec<Vec<u32>>,
    /// Texts that have any unit.
    pub texts: u64,
}

/// Combination and set to the combination with that set.
type Joins = HashMap<(Option<u32>, u32), u32>;

/// Hash of all units of a text.
pub(super) fn whole_hash(unit: Unit) -> u64 {
    1 + u64::from(unit == Unit::Char)
}

/// Adds one unit to [`whole_hash`].
#[inline(always)]
pub(super) fn whole_push(hash: u64, unit: u64) -> u64 {
    mix(hash.rotate_left(32) ^ unit)
}

impl Index {
    pub fn new(
        eval: &Texts,
        sets: Option<&[u32]>,
        params: &ContaminationParams,
        job: &Job,
    ) -> Result<Self> {
        let mut index = Self::default();
        // A guess of the number of n-grams: growing tables moves all of them again and again.
        let bytes: usize = eval.iter().map(<[u8]>::len).sum();
        index.word.id.reserve(if params.units == Units::Chars { 0 } else { bytes / 8 });
        let (mut cutter, mut joins) = (Cutter::default(), Joins::new());
        for row in 0..eval.len() {
            job.check()?;
            let unit = cutter.cut(eval.str(row)?, row, params.units, job)?;
            if cutter.pieces.is_empty() {
                continue;
            }
            index.texts += 1;
            let set = sets.and_then(|sets| sets.get(row)).copied().unwrap_or(0);
            index.add(&cutter, unit, row as u32, set, params, &mut joins);
            if index.gram.len() >= u32::MAX as usize {
                return Err(Error::usage(
                    format!("{} distinct n-grams in the evaluation texts", index.gram.len()),
                    "Check the evaluation sets one by one",
                ));
            }
        }
        index.word.finish();
        index.char.finish();
        Ok(index)
    }

    fn add(
        &mut self,
        cutter: &Cutter,
        unit: Unit,
        row: u32,
        set: u32,
        params: &ContaminationParams,
        joins: &mut Joins,
    ) {
        let form_base = self.form.len() as u64;
        self.form.extend_from_slice(&cutter.form);
        let alone = join(&mut self.sets, joins, None, set);
        let place = |from: usize, to: usize| {
            let (start, end) = (cutter.pieces[from].start, cutter.pieces[to - 1].end);
            let (form_from, form_to) = cutter.form_of(unit, from, to);
            let form_len = (form_to - form_from) as u32;
            Place { row, start, end, form_len, form_at: form_base + form_from as u64, sets: alone }
        };
        let n = params.n(unit);
        let (mut rolling, mut whole) = (Rolling::new(n), whole_hash(unit));
        let table = if unit == Unit::Word { &mut self.word.id } else { &mut self.char.id };
        for (i, hash) in cutter.hashes(unit).enumerate() {
            whole = whole_push(whole, hash);
            let Some(gram) = rolling.push(hash) else { continue };
            let id = *table.entry(gram).or_insert_with(|| {
                self.gram.push(place(i + 1 - n, i + 1));
                (self.gram.len() - 1) as u32
            });
            let sets = &mut self.gram[id as usize].sets;
            if *sets != alone {
                *sets = join(&mut self.sets, joins, Some(*sets), set);
            }
        }
        let id = *self.whole_id.entry(whole).or_insert_with(|| {
            self.whole.push(place(0, cutter.pieces.len()));
            (self.whole.len() - 1) as u32
        });
        let sets = &mut self.whole[id as usize].sets;
        *sets = join(&mut self.sets, joins, Some(*sets), set);
    }

    /// The n-grams of texts of such units.
    pub fn grams(&self, unit: Unit) -> &Grams {
        if unit == Unit::Word { &self.word } else { &self.char }
    }

    /// The whole text of this hash.
    pub fn whole(&self, hash: u64) -> Option<u32> {
        self.whole_id.get(&hash).copied()
    }

    /// Whether a place's units are these: hashes only propose.
    pub fn is(&self, place: &Place, form: &[u8]) -> bool {
        let at = place.form_at as usize;
        self.form.get(at..at + place.form_len as usize) == Some(form)
    }
}

/// The combination of `sets[known]` and `set`.
fn join(sets: &mut Vec<Vec<u32>>, joins: &mut Joins, known: Option<u32>, set: u32) -> u32 {
    *joins.entry((known, set)).or_insert_with(|| {
        let mut joined = known.map_or(Vec::new(), |known| sets[known as usize].clone());
        if let Err(at) = joined.binary_search(&set) {
            joined.insert(at, set);
        }
        let at = sets.iter().position(|there| *there == joined).unwrap_or(sets.len());
        if at == sets.len() {
            sets.push(joined);
        }
        at as u32
    })
}
