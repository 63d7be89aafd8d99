//! A text as a sequence of units (words or characters), for comparing runs of them.
//!
//! [`Reader`] hashes the units of a text as fast as it can and forgets where they were: almost all
//! texts have nothing in common with an evaluation set. [`Cutter`] takes the few that may, keeps
//! the normalised units to compare them letter by letter, and remembers where in the original they
//! came from. Spans are of the text as the user wrote it, so the cutter normalises piece by piece:
//! whitespace-separated pieces for words (NFKC neither joins nor reorders across whitespace), a
//! character and what may combine with it for characters. Both see the same units.

use crate::normalize::table::{Fate, table};
use crate::normalize::words::{Marks, decode};
use crate::normalize::{Unit, is_word_char, normalize_bytes, normalize_into, unit_of_bytes};
use crate::shingle::for_each_word;
use embkit_core::{Error, Job, Result};

/// Units between two looks at the job: well below a millisecond.
const STEP: usize = 4096;

/// Which units texts are compared by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Units {
    /// Chosen per text by the rule of [`crate::normalize`].
    #[default]
    Auto,
    /// Words in every text.
    Words,
    /// Word characters in every text.
    Chars,
}

impl Units {
    /// "auto", "words" or "chars".
    pub fn parse(word: &str) -> Result<Self> {
        match word {
            "auto" => Ok(Self::Auto),
            "words" => Ok(Self::Words),
            "chars" => Ok(Self::Chars),
            _ => Err(Error::usage(
                format!("units = {word:?}"),
                "Use \"auto\", \"words\" or \"chars\"",
            )),
        }
    }

    /// The unit of one text in normal form (or of ASCII in any form).
    pub(crate) fn of(self, normalised: &[u8], job: &Job) -> Result<Unit> {
        match self {
            Self::Auto => unit_of_bytes(normalised, job),
            Self::Words => Ok(Unit::Word),
            Self::Chars => Ok(Unit::Char),
        }
    }
}

/// Places in a normal form are 32 bits; it can be 18 times as long as its text, and some.
fn check_length(bytes: usize, row: usize) -> Result<()> {
    if bytes > u32::MAX as usize / 32 {
        return Err(Error::usage(
            format!("text row {row} has {bytes} bytes"),
            "Split texts above 128 MiB before looking for contamination",
        ));
    }
    Ok(())
}

#[inline(always)]
pub(crate) fn mix(x: u64) -> u64 {
    let product = u128::from(x ^ 0xA076_1D64_78BD_642F) * 0xE703_7ED1_A0B4_28DB;
    product as u64 ^ (product >> 64) as u64
}

/// Hash of the unit `text[from..to]`, which is not empty.
#[inline(always)]
pub(crate) fn unit_hash(text: &[u8], from: usize, to: usize) -> u64 {
    let mut hash = (to - from) as u64;
    let mut at = from;
    while to - at > 8 {
        let eight = text.get(at..).and_then(<[u8]>::first_chunk);
        hash = mix(hash.rotate_left(32) ^ eight.map_or(0, |e| u64::from_le_bytes(*e)));
        at += 8;
    }
    let last = match text.get(at..).and_then(<[u8]>::first_chunk) {
        Some(eight) => u64::from_le_bytes(*eight) & (!0 >> (64 - 8 * (to - at))),
        // The end of the text: a byte at a time.
        None => text[at..to].iter().rev().fold(0, |x, &byte| x << 8 | u64::from(byte)),
    };
    mix(hash.rotate_left(32) ^ last)
}

/// Hashes of units, in order; one reader per thread.
#[derive(Default)]
pub(crate) struct Reader {
    text: Vec<u8>,
    marks: Marks,
}

impl Reader {
    /// Takes in a text and says what its units are.
    pub fn read(&mut self, text: &[u8], row: usize, units: Units, job: &Job) -> Result<Unit> {
        check_length(text.len(), row)?;
        self.text.clear();
        self.text.reserve(text.len());
        for part in text.chunks(1 << 18) {
            job.check()?;
            if !part.is_ascii() {
                normalize_bytes(text, row, job, &mut self.text)?;
                break;
            }
            self.text.extend_from_slice(part);
        }
        self.marks.read(&mut self.text, job)?;
        units.of(&self.text, job)
    }

    /// Calls `go_on` with the hash of each unit until it returns false.
    #[inline(always)]
    pub fn for_each(
        &self,
        unit: Unit,
        job: &Job,
        mut go_on: impl FnMut(u64) -> bool,
    ) -> Result<()> {
        let (mut at, mut count) = (0, 0usize);
        loop {
            let next = match unit {
                Unit::Word => self.marks.next(at),
                Unit::Char => self.marks.next_char(at).and_then(|from| {
                    let (_, len) = decode(&self.text, from)?;
                    Some((from, from + len))
                }),
            };
            let Some((from, to)) = next else { return Ok(()) };
            if !go_on(unit_hash(&self.text, from, to)) {
                return Ok(());
            }
            at = to;
            count += 1;
            if count.is_multiple_of(STEP) {
                job.check()?;
            }
        }
    }
}

/// One unit: its bytes in the original text, and where its normal form ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub start: u32,
    pub end: u32,
    form_end: u32,
}

/// The units of one text with their places; one cutter per thread.
#[derive(Default)]
pub(crate) struct Cutter {
    norm: Vec<u8>,
    marks: Marks,
    /// Normal forms of the units: words joined by a space, characters by nothing. The same bytes
    /// are the same units.
    pub form: Vec<u8>,
    pub pieces: Vec<Piece>,
}

impl Cutter {
    /// Cuts a text into `pieces` and says what they are.
    pub fn cut(&mut self, text: &str, row: usize, units: Units, job: &Job) -> Result<Unit> {
        self.form.clear();
        self.pieces.clear();
        check_length(text.len(), row)?;
        if text.is_ascii() {
            return self.cut_ascii(text, units, job);
        }
        normalize_bytes(text.as_bytes(), row, job, &mut self.norm)?;
        let unit = units.of(&self.norm, job)?;
        let mut count = 0usize;
        let mut step = || {
            count += 1;
            if count.is_multiple_of(STEP) { job.check() } else { Ok(()) }
        };
        match unit {
            Unit::Word => {
                for piece in text.split_whitespace() {
                    step()?;
                    self.words(piece, piece.as_ptr() as usize - text.as_ptr() as usize);
                }
            }
            Unit::Char => {
                let table = table();
                let mut start = 0;
                for (at, c) in text.char_indices().skip(1) {
                    step()?;
                    if c.is_ascii() || matches!(table.fate(c), Fate::Plain(_)) {
                        self.chars(text, start, at);
                        start = at;
                    }
                }
                self.chars(text, start, text.len());
            }
        }
        Ok(unit)
    }

    fn cut_ascii(&mut self, text: &str, units: Units, job: &Job) -> Result<Unit> {
        let unit = units.of(text.as_bytes(), job)?;
        self.norm.clear();
        self.norm.extend_from_slice(text.as_bytes());
        self.marks.read(&mut self.norm, job)?;
        let (mut at, mut count) = (0, 0usize);
        let next = |marks: &Marks, at: usize| match unit {
            Unit::Word => marks.next(at),
            Unit::Char => marks.next_char(at).map(|from| (from, from + 1)),
        };
        while let Some((from, to)) = next(&self.marks, at) {
            self.begin(unit == Unit::Word);
            self.form.extend_from_slice(&self.norm[from..to]);
            self.end(from, to);
            at = to;
            count += 1;
            if count.is_multiple_of(STEP) {
                job.check()?;
            }
        }
        Ok(unit)
    }

    fn words(&mut self, piece: &str, start: usize) {
        if piece.is_ascii() {
            for_each_word(piece, |from, to| {
                self.begin(true);
                let at = self.form.len();
                self.form.extend_from_slice(&piece.as_bytes()[from..to]);
                self.form[at..].make_ascii_lowercase();
                self.end(start + from, start + to);
            });
            return;
        }
        // Positions in the normalised form say nothing about the original: each word gets the span
        // of its whole piece.
        let mut norm = std::mem::take(&mut self.norm);
        normalize_into(piece, &mut norm);
        if let Ok(text) = std::str::from_utf8(&norm) {
            for_each_word(text, |from, to| {
                self.begin(true);
                self.form.extend_from_slice(&norm[from..to]);
                self.end(start, start + piece.len());
            });
        }
        self.norm = norm;
    }

    fn chars(&mut self, text: &str, start: usize, end: usize) {
        let mut own = text[start..end].chars();
        if let (Some(c), None) = (own.next(), own.next())
            && let Fate::Plain(c) = table().fate(c)
        {
            // Nothing to combine with, as most have it.
            if table().is_word(c) {
                self.begin(false);
                self.form.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
                self.end(start, end);
            }
            return;
        }
        let mut norm = std::mem::take(&mut self.norm);
        normalize_into(&text[start..end], &mut norm);
        if let Ok(text) = std::str::from_utf8(&norm) {
            for c in text.chars().filter(|&c| is_word_char(c)) {
                self.begin(false);
                self.form.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
                self.end(start, end);
            }
        }
        self.norm = norm;
    }

    fn begin(&mut self, apart: bool) {
        if apart && !self.pieces.is_empty() {
            self.form.push(b' ');
        }
    }

    fn end(&mut self, start: usize, end: usize) {
        // Below 2^32, see `cut`.
        let form_end = self.form.len() as u32;
        self.pieces.push(Piece { start: start as u32, end: end as u32, form_end });
    }

    /// Bytes of `form` that the units `[from, to)` take.
    pub fn form_of(&self, unit: Unit, from: usize, to: usize) -> (usize, usize) {
        let apart = usize::from(unit == Unit::Word);
        let end =
            |units: usize| self.pieces.get(units.wrapping_sub(1)).map(|p| p.form_end as usize);
        (end(from).map_or(0, |end| end + apart), end(to).unwrap_or(0))
    }

    /// Hashes of the units, as the reader has them.
    pub fn hashes(&self, unit: Unit) -> impl Iterator<Item = u64> + '_ {
        (0..self.pieces.len()).map(move |i| {
            let (from, to) = self.form_of(unit, i, i + 1);
            unit_hash(&self.form, from, to)
        })
    }
}

/// Rolling polynomial hash of the last `n` units.
pub(crate) struct Rolling {
    last: Vec<u64>,
    at: usize,
    full: bool,
    top: u64,
    hash: u64,
}

impl Rolling {
    const BASE: u64 = 0x9E37_79B9_7F4A_7C15; // odd, so that no unit is ever shifted out

    /// Windows of `n` units, at least 1.
    pub fn new(n: usize) -> Self {
        let top = (0..n).fold(1u64, |power, _| power.wrapping_mul(Self::BASE));
        Self { last: vec![0; n.max(1)], at: 0, full: false, top, hash: 0 }
    }

    /// Forgets all units.
    pub fn clear(&mut self) {
        self.last.fill(0);
        (self.at, self.full, self.hash) = (0, false, 0);
    }

    /// The hash of the last `n` units once there are so many.
    #[inline(always)]
    pub fn push(&mut self, unit: u64) -> Option<u64> {
        let place = &mut self.last[self.at];
        let left = std::mem::replace(place, unit);
        self.hash = self.hash.wrapping_mul(Self::BASE).wrapping_add(unit);
        self.hash = self.hash.wrapping_sub(left.wrapping_mul(self.top));
        self.at += 1;
        if self.at == self.last.len() {
            (self.at, self.full) = (0, true);
        }
        // Tables take bits from both ends; the polynomial alone mixes only upwards.
        let folded = self.hash ^ (self.hash >> 32);
        self.full.then_some(folded.wrapping_mul(0xD6E8_FEB8_6659_FD93))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn cut(text: &str, units: Units) -> (Unit, Cutter) {
        let mut cutter = Cutter::default();
        let unit = cutter.cut(text, 0, units, &Job::new()).unwrap();
        (unit, cutter)
    }

    fn spans<'a>(text: &'a str, cutter: &Cutter) -> Vec<&'a str> {
        cutter.pieces.iter().map(|p| &text[p.start as usize..p.end as usize]).collect()
    }

    #[test]
    fn spans_point_into_the_original() {
        let text = "  The QUICK, “naïve” fox!";
        let (_, cutter) = cut(text, Units::Auto);
        assert_eq!(spans(text, &cutter), ["The", "QUICK", "“naïve”", "fox"]);
        assert_eq!(cutter.form, "the quick naïve fox".as_bytes());
        let text = "ｶﾞス 設備。";
        let (unit, cutter) = cut(text, Units::Auto);
        assert_eq!((unit, spans(text, &cutter)), (Unit::Char, vec!["ｶﾞ", "ス", "設", "備"]));
        assert_eq!(cutter.form, "ガス設備".as_bytes());
        let text = "A b-C";
        let (unit, cutter) = cut(text, Units::Chars);
        assert_eq!((unit, spans(text, &cutter)), (Unit::Char, vec!["A", "b", "C"]));
    }

    proptest! {
        #[test]
        fn reader_and_cutter_see_the_units_of_the_normalised_text(
            text in "[a-cA-C é漢字かﾞﾟがｶ,.+#ﬁÅ가각\u{1161}\u{11a8}\u{1112}ำ¨\u{301}\u{327}\u{3000}\n]{0,24}|\\PC{0,24}|[a-z ]{60,90}",
            units in prop::sample::select(vec![Units::Auto, Units::Words, Units::Chars]),
        ) {
            let norm = crate::normalize(&text);
            let (want_unit, want) = crate::naive::units(&text, units);
            let (unit, cutter) = cut(&text, units);
            prop_assert_eq!(unit, want_unit);
            let got: Vec<String> = (0..cutter.pieces.len()).map(|i| {
                let (from, to) = cutter.form_of(unit, i, i + 1);
                String::from_utf8(cutter.form[from..to].to_vec()).unwrap()
            }).collect();
            prop_assert_eq!(&got, &want);
            for p in &cutter.pieces {
                prop_assert!(text.get(p.start as usize..p.end as usize).is_some());
            }
            for text in [&text, &norm] {
                let mut reader = Reader::default();
                let job = Job::new();
                let unit = reader.read(text.as_bytes(), 0, units, &job).unwrap();
                prop_assert_eq!(unit, want_unit);
                let mut hashes = Vec::new();
                reader.for_each(unit, &job, |hash| { hashes.push(hash); true }).unwrap();
                prop_assert_eq!(hashes, cutter.hashes(unit).collect::<Vec<_>>());
            }
        }

        #[test]
        fn rolling_equals_direct(keys in prop::collection::vec(0u64..4, 0..40), n in 1usize..9) {
            let mut rolling = Rolling::new(n);
            for round in 0..2 {
                let got: Vec<u64> = keys.iter().filter_map(|&key| rolling.push(key)).collect();
                let want: Vec<u64> = keys.windows(n).map(|window| {
                    let mut one = Rolling::new(n);
                    window.iter().filter_map(|&key| one.push(key)).last().unwrap()
                }).collect();
                prop_assert_eq!(got, want, "{}", round);
                rolling.clear();
            }
        }
    }
}
