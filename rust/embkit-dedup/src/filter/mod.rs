//! Rule filters: statistics of every text, and which bounds each text breaks.
//!
//! The statistics are those that Gopher, C4 and RefinedWeb made standard, each with one definition
//! ([`Statistic`]); a [`Rule`] is a bound on one of them. One pass over a text computes all, with
//! buffers that a thread keeps, so nothing is allocated per text except by language detection.
//!
//! * A *character* is one that is not white space.
//! * A *word* is a run of characters of scripts with spaces, or one character of a script without
//!   ([`is_unspaced`](crate::normalize::is_unspaced)).
//! * A *line* ends at `\n`, is trimmed, and counts when something is left; a *paragraph* is a run
//!   of such lines.

mod language;
mod phrases;
mod repeats;
mod statistics;

pub use language::{LANGUAGES, Language};
pub use phrases::PHRASES;
pub use statistics::{STATISTICS, Statistic};

use embkit_core::{Error, Job, Result, TextShard, Texts, par};
use statistics::Scanner;

/// Texts that a thread takes at once.
const BLOCK: usize = 256;
/// The bit of a text in a language that is not wanted; rules have the bits below.
pub const LANGUAGE_BIT: u32 = 31;

/// A bound on one statistic.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rule {
    /// What is bounded. [`Statistic::StopWords`] is only judged in English texts.
    pub statistic: Statistic,
    /// Whether values below the threshold fail (otherwise values above it do).
    pub least: bool,
    /// The bound, which itself passes.
    pub threshold: f64,
    /// Texts of fewer words pass: a share means little in them.
    pub from_words: u64,
}

/// What [`filter_texts`] checks.
#[derive(Clone, Debug, Default)]
pub struct FilterParams {
    /// At most 31; rule `i` sets bit `i`.
    pub rules: Vec<Rule>,
    /// Codes ([`LANGUAGES`]) that are wanted; empty for all, and then nothing is detected.
    pub languages: Vec<u16>,
    /// Detect and return the language although every one is wanted.
    pub detect: bool,
    /// Threads, 0 for all; no effect on the result.
    pub threads: usize,
}

/// Result of [`filter_texts`], one entry per text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filtered {
    /// Bit `i`: rule `i` failed; bit 31: another language than those wanted.
    pub failed: Vec<u32>,
    /// Place in [`LANGUAGES`], 0 when it is not known (or nothing was to be detected).
    pub language: Vec<u16>,
}

/// Checks every text against the rules. A text whose language is not known is of no unwanted one.
///
/// Progress counts texts. Errors: [`Error::Usage`] for more than 31 rules, a threshold that is no
/// number, an unknown language code, or text that is not UTF-8.
pub fn filter_texts(shards: &[TextShard], params: &FilterParams, job: &Job) -> Result<Filtered> {
    check(params)?;
    let texts = Texts::new(shards)?;
    let detect = params.detect || !params.languages.is_empty();
    let parts = par::try_map_blocks(texts.len(), BLOCK, params.threads, |range| {
        let mut scanner = Scanner::for_rules(&params.rules);
        let mut part = Filtered::default();
        for row in range {
            job.check()?;
            let text = texts.str(row)?;
            let values = scanner.scan(text, job)?;
            let mut failed = 0u32;
            let mut language = detect.then(|| Language::of(text));
            for (bit, rule) in params.rules.iter().enumerate() {
                let value = values[rule.statistic as usize];
                let bad = if rule.least { value < rule.threshold } else { value > rule.threshold };
                if !bad || values[Statistic::Words as usize] < rule.from_words as f64 {
                    continue;
                }
                // The list of stop words is English: only then, and only for texts without them,
                // is it worth to find out what the language is.
                let english = rule.statistic != Statistic::StopWords
                    || language.get_or_insert_with(|| Language::of(text)).is_english();
                failed |= u32::from(english) << bit;
            }
            let code = if detect { language.map_or(0, Language::code) } else { 0 };
            if code > 0 && !params.languages.is_empty() && !params.languages.contains(&code) {
                failed |= 1 << LANGUAGE_BIT;
            }
            part.failed.push(failed);
            part.language.push(code);
            job.advance(1);
        }
        Ok(part)
    })?;
    let mut out = Filtered::default();
    for part in parts {
        out.failed.extend(part.failed);
        out.language.extend(part.language);
    }
    Ok(out)
}

/// All statistics of the texts at `rows`, `rows.len() x STATISTICS.len()`, row-major.
pub fn statistics(shards: &[TextShard], rows: &[u64], job: &Job) -> Result<Vec<f64>> {
    let texts = Texts::new(shards)?;
    let mut scanner = Scanner::all();
    let mut out = Vec::with_capacity(rows.len() * STATISTICS.len());
    for &row in rows {
        job.check()?;
        let text = texts.str(usize::try_from(row).unwrap_or(usize::MAX))?;
        out.extend_from_slice(&scanner.scan(text, job)?);
        job.advance(1);
    }
    Ok(out)
}

fn check(params: &FilterParams) -> Result<()> {
    if params.rules.len() > LANGUAGE_BIT as usize {
        let what = format!("{} rules, there may be {LANGUAGE_BIT}", params.rules.len());
        return Err(Error::usage(what, "Leave out rules that never fail"));
    }
    if let Some(rule) = params.rules.iter().find(|r| r.threshold.is_nan()) {
        let what = format!("the threshold of {} is not a number", rule.statistic.name());
        return Err(Error::usage(what, "Leave the rule out instead"));
    }
    if let Some(code) = params.languages.iter().find(|&&c| usize::from(c) >= LANGUAGES.len()) {
        let what = format!("language code {code} of {}", LANGUAGES.len());
        return Err(Error::usage(what, "Use places in the list of languages"));
    }
    Ok(())
}
