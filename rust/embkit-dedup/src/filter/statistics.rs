//! The statistics of one text.

use super::phrases;
use super::repeats::{Firsts, LOOK, Repeats};
use super::{Rule, repeats};
use crate::normalize::is_unspaced;
use embkit_core::{Job, Result};
use xxhash_rust::xxh3::xxh3_64;

macro_rules! statistics {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// A number that a text has; shares and ratios of nothing are 0.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Statistic { $($(#[$doc])* $variant,)* }

        /// All statistics, in the order of the columns of [`super::statistics`].
        pub const STATISTICS: &[Statistic] = &[$(Statistic::$variant,)*];

        impl Statistic {
            /// Its name.
            pub fn name(self) -> &'static str {
                match self { $(Statistic::$variant => $name,)* }
            }
        }
    };
}

statistics! {
    /// Words.
    Words = "words",
    /// Characters.
    Chars = "chars",
    /// Characters of words of scripts with spaces / such words; 6 when the text has more
    /// characters of scripts without spaces than such words, so that no bound fits it badly.
    MeanWordLength = "mean_word_length",
    /// `#` / words.
    HashRatio = "hash_ratio",
    /// `...` and `…` / words.
    EllipsisRatio = "ellipsis_ratio",
    /// Digits and other numerals / characters.
    DigitShare = "digit_share",
    /// Words with a letter / words; 1 without words.
    AlphabeticWords = "alphabetic_words",
    /// Lines that begin with a bullet / lines.
    BulletLines = "bullet_lines",
    /// Lines that end with an ellipsis / lines.
    EllipsisLines = "ellipsis_lines",
    /// Lines equal to an earlier one / lines.
    DuplicateLines = "duplicate_lines",
    /// Characters in such lines / characters.
    DuplicateLineChars = "duplicate_line_chars",
    /// Paragraphs equal to an earlier one / paragraphs.
    DuplicateParagraphs = "duplicate_paragraphs",
    /// Characters in such paragraphs / characters.
    DuplicateParagraphChars = "duplicate_paragraph_chars",
    /// Characters in the most frequent word 2-gram (when it occurs twice) / characters of words.
    Top2 = "top_2gram",
    /// The same of 3-grams.
    Top3 = "top_3gram",
    /// The same of 4-grams.
    Top4 = "top_4gram",
    /// Characters in word 5-grams that occurred before / characters of words.
    Duplicate5 = "duplicate_5gram",
    /// The same of 6-grams.
    Duplicate6 = "duplicate_6gram",
    /// The same of 7-grams.
    Duplicate7 = "duplicate_7gram",
    /// The same of 8-grams.
    Duplicate8 = "duplicate_8gram",
    /// The same of 9-grams.
    Duplicate9 = "duplicate_9gram",
    /// The same of 10-grams.
    Duplicate10 = "duplicate_10gram",
    /// Upper-case letters / letters.
    UppercaseShare = "uppercase_share",
    /// How many of Gopher's eight stop words occur.
    StopWords = "stop_words",
    /// `{` and `}` / characters.
    CurlyShare = "curly_share",
    /// Occurrences of "lorem ipsum".
    LoremIpsum = "lorem_ipsum",
    /// Lines with a phrase of page furniture / lines.
    BoilerplateLines = "boilerplate_lines",
}

const COUNT: usize = STATISTICS.len();
/// Mean word length of texts that have no words between spaces.
const UNSPACED_MEAN: f64 = 6.0;
const STOP_WORDS: [&[u8]; 8] = [b"the", b"be", b"to", b"of", b"and", b"that", b"have", b"with"];

const SPACE: u8 = 1;
const DIGIT: u8 = 2;
const LETTER: u8 = 4;
const UPPER: u8 = 8;
const UNSPACED: u8 = 16;

const ASCII: [u8; 128] = {
    let mut class = [0; 128];
    let mut byte = 0u8;
    while byte < 128 {
        let upper = if byte.is_ascii_uppercase() { UPPER } else { 0 };
        let letter = if byte.is_ascii_alphabetic() { LETTER } else { 0 };
        let digit = if byte.is_ascii_digit() { DIGIT } else { 0 };
        let space = if matches!(byte, b' ' | b'\t'..=b'\r') { SPACE } else { 0 };
        class[byte as usize] = upper | letter | digit | space;
        byte += 1;
    }
    class
};

/// Largest count of a field of [`PACKED`], and so the bytes that are summed at once.
const FIELD_MAX: usize = 1023;
const FIELD: u64 = FIELD_MAX as u64;
const PACKED_SPACE: u64 = u64::MAX;

/// What an ASCII byte adds to letters, capitals, digits, curly brackets, `#` and dots: fields of
/// ten bits, so that a word is counted by one sum.
const PACKED: [u64; 128] = {
    let mut packed = [0; 128];
    let mut byte = 0u8;
    while byte < 128 {
        let class = ASCII[byte as usize];
        let fields = (class & LETTER != 0) as u64
            | ((class & UPPER != 0) as u64) << 10
            | ((class & DIGIT != 0) as u64) << 20
            | (matches!(byte, b'{' | b'}') as u64) << 30
            | ((byte == b'#') as u64) << 40
            | ((byte == b'.') as u64) << 50;
        packed[byte as usize] = if class & SPACE != 0 { PACKED_SPACE } else { fields };
        byte += 1;
    }
    packed
};

#[inline]
fn class(c: char) -> u8 {
    if let Some(&class) = ASCII.get(c as usize) {
        return class;
    }
    let one = |yes: bool, bit: u8| if yes { bit } else { 0 };
    one(c.is_whitespace(), SPACE)
        | one(c.is_numeric(), DIGIT)
        | one(c.is_alphabetic(), LETTER)
        | one(c.is_uppercase(), UPPER)
        | one(is_unspaced(c), UNSPACED)
}

/// What one text has, as it is counted.
#[derive(Default)]
struct Counts {
    words: u64,
    unspaced: u64,
    chars: u64,
    digits: u64,
    letters: u64,
    upper: u64,
    curly: u64,
    hashes: u64,
    ellipses: u64,
    alphabetic: u64,
    stop: u8,
}

/// Reusable buffers; one per thread.
#[derive(Default)]
pub(super) struct Scanner {
    repeats: Repeats,
    lines: Firsts,
    words: Vec<(u64, u32)>,
    paragraphs: Vec<(u64, u64)>,
    spans: Vec<(u64, u64)>, // hash and characters of each line
    phrases: Vec<usize>,
    with_repeats: bool,
    with_phrases: bool,
}

impl Scanner {
    /// Computes every statistic.
    pub fn all() -> Self {
        Self { with_repeats: true, with_phrases: true, ..Self::default() }
    }

    /// Leaves out n-grams and phrases that no rule asks for; their statistics are then 0.
    pub fn for_rules(rules: &[Rule]) -> Self {
        use Statistic::{BoilerplateLines, Duplicate10, LoremIpsum, Top2};
        let grams = Top2 as usize..=Duplicate10 as usize;
        let of = |r: &Rule| r.statistic;
        Self {
            with_repeats: rules.iter().any(|r| grams.contains(&(of(r) as usize))),
            with_phrases: rules.iter().any(|r| matches!(of(r), LoremIpsum | BoilerplateLines)),
            ..Self::default()
        }
    }

    /// The statistics of `text`, by [`Statistic`].
    pub fn scan(&mut self, text: &str, job: &Job) -> Result<[f64; COUNT]> {
        self.words.clear();
        self.spans.clear();
        self.paragraphs.clear();
        let filler = if self.with_phrases { phrases::find(text, &mut self.phrases) } else { 0 };
        let mut marked = 0; // phrases before the current line
        let mut counts = Counts::default();
        let (mut lines, mut bullets, mut trailing, mut furniture) = (0u64, 0u64, 0u64, 0u64);
        let (mut paragraph, mut paragraphs) = ((0u64, 0u64), 0u64);
        let ascii = text.is_ascii();
        let mut end = 0;
        for raw in text.split('\n') {
            end += raw.len() + 1;
            let line = raw.trim();
            if line.is_empty() {
                paragraphs += self.close(&mut paragraph);
                continue;
            }
            let before = counts.chars;
            if ascii {
                self.ascii_words(line.as_bytes(), &mut counts);
            } else {
                self.words_of(line, &mut counts);
            }
            let chars = counts.chars - before;
            lines += 1;
            bullets += u64::from(is_bullet(line));
            trailing += u64::from(line.ends_with("...") || line.ends_with('…'));
            let marks = self.phrases.iter().skip(marked).take_while(|&&at| at < end).count();
            furniture += u64::from(self.with_phrases && marks > 0);
            marked += marks;
            let hash = xxh3_64(line.as_bytes());
            if self.spans.len() < LOOK {
                self.spans.push((hash, chars));
            }
            // As a key of the sequence of lines.
            let mixed = (paragraph.0.rotate_left(23) ^ hash).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            paragraph = (mixed, paragraph.1 + chars);
            if lines % 4096 == 0 {
                job.check()?;
            }
        }
        paragraphs += self.close(&mut paragraph);
        job.check()?;

        let c = &counts;
        let over = |part: u64, all: u64| if all == 0 { 0.0 } else { part as f64 / all as f64 };
        let (twice, twice_chars) = repeated(&mut self.lines, &self.spans);
        let (again, again_chars) = repeated(&mut self.lines, &self.paragraphs);
        let spaced = c.words - c.unspaced;
        let shares = if self.with_repeats {
            self.repeats.shares(&self.words)
        } else {
            repeats::Shares::default()
        };
        Ok([
            c.words as f64,
            c.chars as f64,
            if c.unspaced > spaced { UNSPACED_MEAN } else { over(c.chars - c.unspaced, spaced) },
            over(c.hashes, c.words),
            over(c.ellipses, c.words),
            over(c.digits, c.chars),
            if c.words == 0 { 1.0 } else { over(c.alphabetic, c.words) },
            over(bullets, lines),
            over(trailing, lines),
            over(twice, lines),
            over(twice_chars, c.chars),
            over(again, paragraphs),
            over(again_chars, c.chars),
            shares.top[2],
            shares.top[3],
            shares.top[4],
            shares.repeated[5],
            shares.repeated[6],
            shares.repeated[7],
            shares.repeated[8],
            shares.repeated[9],
            shares.repeated[10],
            over(c.upper, c.letters),
            f64::from(c.stop.count_ones()),
            over(c.curly, c.chars),
            filler as f64,
            over(furniture, lines),
        ])
    }

    /// Ends a paragraph; 1 when there was one.
    fn close(&mut self, paragraph: &mut (u64, u64)) -> u64 {
        let (hash, chars) = std::mem::take(paragraph);
        if chars > 0 && self.paragraphs.len() < LOOK {
            self.paragraphs.push((hash, chars));
        }
        u64::from(chars > 0)
    }

    /// As [`Scanner::words_of`] for ASCII.
    fn ascii_words(&mut self, line: &[u8], counts: &mut Counts) {
        let mut at = 0;
        while at < line.len() {
            let (start, mut letters, mut dots) = (at, 0, 0);
            loop {
                let stop = line.len().min(at + FIELD_MAX);
                let mut packed = 0u64;
                while let Some(&byte) = line.get(at).filter(|_| at < stop) {
                    let fields = PACKED[usize::from(byte & 127)];
                    if fields == PACKED_SPACE {
                        break;
                    }
                    packed += fields;
                    at += 1;
                }
                letters += packed & FIELD;
                dots += packed >> 50 & FIELD;
                counts.letters += packed & FIELD;
                counts.upper += packed >> 10 & FIELD;
                counts.digits += packed >> 20 & FIELD;
                counts.curly += packed >> 30 & FIELD;
                counts.hashes += packed >> 40 & FIELD;
                if at < stop || at == line.len() {
                    break;
                }
            }
            if let Some(word) = line.get(start..at).filter(|word| !word.is_empty()) {
                counts.chars += word.len() as u64;
                if dots >= 3 {
                    counts.ellipses += ellipses(word);
                }
                let length = u32::try_from(word.len()).unwrap_or(u32::MAX);
                self.word(word, length, letters > 0, counts);
            }
            at += 1;
        }
    }

    /// Counts the characters of a line and cuts it into words.
    fn words_of(&mut self, line: &str, counts: &mut Counts) {
        let (mut start, mut length, mut seen, mut dots) = (0usize, 0u32, 0u8, 0u8);
        for (at, c) in line.char_indices() {
            let class = class(c);
            if class & (SPACE | UNSPACED) != 0 && length > 0 {
                self.word(&line.as_bytes()[start..at], length, seen & LETTER != 0, counts);
                (length, seen) = (0, 0);
            }
            dots = if c == '.' { dots + 1 } else { 0 };
            if class & SPACE != 0 {
                continue;
            }
            counts.chars += 1;
            counts.digits += u64::from(class & DIGIT != 0);
            counts.letters += u64::from(class & LETTER != 0);
            counts.upper += u64::from(class & UPPER != 0);
            counts.curly += u64::from(c == '{' || c == '}');
            counts.hashes += u64::from(c == '#');
            counts.ellipses += u64::from(c == '…' || dots == 3);
            dots %= 3;
            if class & UNSPACED != 0 {
                counts.unspaced += 1;
                let one = &line.as_bytes()[at..at + c.len_utf8()];
                self.word(one, 1, class & LETTER != 0, counts);
                continue;
            }
            if length == 0 {
                start = at;
            }
            length = length.saturating_add(1);
            seen |= class;
        }
        if length > 0 {
            self.word(&line.as_bytes()[start..], length, seen & LETTER != 0, counts);
        }
    }

    #[inline(always)]
    fn word(&mut self, word: &[u8], length: u32, letter: bool, counts: &mut Counts) {
        counts.words += 1;
        counts.alphabetic += u64::from(letter);
        if self.with_repeats && self.words.len() < LOOK {
            self.words.push((hash(word), length));
        }
        // "(that)," is long for one: a stop word, perhaps with punctuation around it.
        if letter && length <= 8 {
            counts.stop |= stop_word(word);
        }
    }
}

/// A hash of a word; most words are short, and their bytes are their own hash but for the mixing.
#[inline]
fn hash(word: &[u8]) -> u64 {
    let ends = word.first_chunk::<8>().zip(word.last_chunk::<8>());
    let (low, high) = match (ends, word.first_chunk::<4>().zip(word.last_chunk::<4>())) {
        (Some(_), _) if word.len() > 16 => return xxh3_64(word),
        (Some((first, last)), _) => (u64::from_le_bytes(*first), u64::from_le_bytes(*last)),
        (None, Some((first, last))) => {
            (u64::from(u32::from_le_bytes(*first)), u64::from(u32::from_le_bytes(*last)))
        }
        (None, None) => (word.iter().fold(0, |sum, &b| sum << 8 | u64::from(b)), 0),
    };
    // Two words of one length differ in low or high; a 128-bit product folds both into 64 bits.
    let a = u128::from(low ^ 0x9E37_79B9_7F4A_7C15 ^ word.len() as u64);
    let product = a * u128::from(high ^ 0xD1B5_4A32_D192_ED03);
    (product as u64) ^ (product >> 64) as u64
}

/// Non-overlapping occurrences of three dots.
fn ellipses(word: &[u8]) -> u64 {
    word.split(|&b| b != b'.').map(|run| run.len() as u64 / 3).sum()
}

/// The bit of a stop word, whatever its case and what is no ASCII letter or digit around it.
#[inline]
fn stop_word(word: &[u8]) -> u8 {
    let outside = |b: &u8| !b.is_ascii_alphanumeric();
    let from = word.iter().take_while(|b| outside(b)).count();
    let to = word.len() - word.iter().rev().take_while(|b| outside(b)).count();
    let Some(bare) = word.get(from..to) else { return 0 };
    if !(2..=4).contains(&bare.len()) {
        return 0;
    }
    let place = STOP_WORDS.iter().position(|s| bare.eq_ignore_ascii_case(s));
    place.map_or(0, |i| 1 << i)
}

/// Whether a line begins as an item of a list: a bullet, or `-`, `*` or a dash before a space.
fn is_bullet(line: &str) -> bool {
    let mut chars = line.chars();
    match chars.next() {
        Some('•' | '‣' | '◦' | '▪' | '▫' | '■' | '□' | '●' | '○' | '·' | '▶') => {
            true
        }
        Some('-' | '*' | '–' | '—') => chars.next().is_none_or(char::is_whitespace),
        _ => false,
    }
}

/// How many items equal an earlier one, and their characters.
fn repeated(firsts: &mut Firsts, items: &[(u64, u64)]) -> (u64, u64) {
    if items.len() < 2 {
        return (0, 0);
    }
    firsts.clear(items.len());
    let (mut count, mut chars) = (0, 0);
    for (place, &(hash, length)) in items.iter().enumerate() {
        if firsts.first(hash, place as u32) != place as u32 {
            count += 1;
            chars += length;
        }
    }
    (count, chars)
}
