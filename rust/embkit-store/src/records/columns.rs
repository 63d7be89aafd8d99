//! From one line of JSON to one example: column names, kinds, types.
//!
//! Oddity: values are taken as raw JSON and decoded only when their column is known, so an unknown
//! column costs neither memory nor a type check; and the `NaN` and `Infinity` that Python's `json`
//! writes, though not JSON, are read as numbers so that they are reported as what they are.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::faults::RowFault;

/// What a row trains: the columns decide.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A query with its positives and perhaps negatives.
    Retrieval,
    /// Two sentences and their similarity.
    Sts,
    /// A text and its class.
    Classification,
}

impl Kind {
    /// The name used in manifests.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Retrieval => "retrieval",
            Self::Sts => "sts",
            Self::Classification => "classification",
        }
    }

    /// The kind of that name, if there is one.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Retrieval, Self::Sts, Self::Classification].into_iter().find(|k| k.as_str() == name)
    }
}

/// Every accepted column, for error messages.
pub(crate) const ACCEPTED: &str = "retrieval: query (anchor, question, query_text, instruction) + \
     positive (positives, pos, answer, document, passage), optional negative (negatives, neg, \
     negative_1, negative_2, ...), title, score (scores, label), pos_scores, neg_scores; \
     sts: sentence1 + sentence2 + score (scores, label); \
     classification: text + label (labels); for all: weight, id";

/// Columns by rank: with several names for one thing in a row, the first here is read.
const QUERY: [&str; 5] = ["query", "anchor", "question", "query_text", "instruction"];
const POSITIVE: [&str; 6] = ["positive", "positives", "pos", "answer", "document", "passage"];
const NEGATIVE: [&str; 3] = ["negative", "negatives", "neg"];
const SCORE: [&str; 2] = ["score", "scores"];
const LABEL: [&str; 2] = ["label", "labels"];
/// Read and dropped without being counted as unknown.
const IDS: [&str; 2] = ["id", "_id"];
/// Names of unknown columns remembered per row.
const EXTRA_PER_ROW: usize = 64;

/// A column's value with the rank of the name it came under.
type Slot<'a> = Option<(usize, &'a RawValue)>;

/// The known columns of one row, not yet decoded.
#[derive(Debug, Default)]
pub(crate) struct Row<'a> {
    query: Slot<'a>,
    positive: Slot<'a>,
    negative: Slot<'a>,
    /// `negative_1`, `negative_2`, ...; in order of their number once the row is read.
    numbered: Vec<(u32, &'a RawValue)>,
    title: Slot<'a>,
    sentence1: Slot<'a>,
    sentence2: Slot<'a>,
    text: Slot<'a>,
    label: Slot<'a>,
    score: Slot<'a>,
    pos_scores: Slot<'a>,
    neg_scores: Slot<'a>,
    weight: Slot<'a>,
    /// Names of columns that are not known.
    pub(crate) extra: Vec<Cow<'a, str>>,
}

/// One valid row with its texts.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Example {
    pub(crate) query: String,
    pub(crate) positive: Vec<String>,
    pub(crate) negative: Vec<String>,
    /// As long as `negative`, or empty.
    pub(crate) negative_score: Vec<f32>,
    /// NaN when the row has none.
    pub(crate) score: f32,
    pub(crate) label: Option<String>,
    pub(crate) weight: f32,
}

impl<'a> Row<'a> {
    /// Parses one line. Errors: not UTF-8, not JSON, not an object.
    /// `line` must outlive the row; `patched` is the caller's room for a repaired copy.
    pub(crate) fn parse(line: &'a [u8], patched: &'a mut String) -> Result<Self, RowFault> {
        let text = std::str::from_utf8(line).map_err(|_| RowFault::InvalidUtf8)?;
        match serde_json::from_str(text) {
            Ok(row) => Ok(row),
            Err(e) if e.is_data() => Err(RowFault::NotAnObject),
            Err(_) => {
                *patched = patch_non_finite(text).ok_or(RowFault::NotJson)?;
                serde_json::from_str(patched).map_err(|e| match e.is_data() {
                    true => RowFault::NotAnObject,
                    false => RowFault::NotJson,
                })
            }
        }
    }

    /// The kind whose required columns are all there; pairs of sentences win over the others.
    pub(crate) fn kind(&self) -> Option<Kind> {
        [Kind::Sts, Kind::Retrieval, Kind::Classification]
            .into_iter()
            .find(|kind| self.missing(*kind).is_none())
    }

    /// The kind that a row without a whole set of columns seems to mean, for the message about it.
    pub(crate) fn nearest_kind(&self) -> Kind {
        if self.sentence1.is_some() || self.sentence2.is_some() {
            Kind::Sts
        } else if self.text.is_some() && self.query.is_none() {
            Kind::Classification
        } else {
            Kind::Retrieval
        }
    }

    /// The first required column of `kind` that is not in the row.
    fn missing(&self, kind: Kind) -> Option<&'static str> {
        let required: [(&'static str, bool); 3] = match kind {
            Kind::Retrieval => [
                ("query", self.query.is_some()),
                ("positive", self.positive.is_some()),
                ("positive", true),
            ],
            Kind::Sts => [
                ("sentence1", self.sentence1.is_some()),
                ("sentence2", self.sentence2.is_some()),
                ("score", self.score.is_some() || self.label.is_some()),
            ],
            Kind::Classification => {
                [("text", self.text.is_some()), ("label", self.label.is_some()), ("label", true)]
            }
        };
        required.into_iter().find(|(_, there)| !there).map(|(name, _)| name)
    }

    /// Decodes the row as `kind`. Errors: missing columns, wrong types, blank texts, bad scores,
    /// or [`RowFault::MixedKind`] when the columns are those of another kind.
    pub(crate) fn example(&self, kind: Kind) -> Result<Example, RowFault> {
        if let Some(name) = self.missing(kind) {
            return Err(match self.kind() {
                Some(_) => RowFault::MixedKind,
                None => RowFault::MissingColumn(name),
            });
        }
        let mut example = match kind {
            Kind::Retrieval => self.retrieval()?,
            Kind::Sts => Example {
                query: string(self.sentence1, "sentence1")?,
                positive: vec![string(self.sentence2, "sentence2")?],
                score: match self.score {
                    Some(_) => number(self.score, "score")?,
                    None => number(self.label, "label")?,
                }
                .ok_or(RowFault::MissingColumn("score"))?,
                ..Example::empty()
            },
            Kind::Classification => Example {
                query: string(self.text, "text")?,
                label: Some(label(self.label)?),
                ..Example::empty()
            },
        };
        if let Some(weight) = number(self.weight, "weight")? {
            if weight < 0.0 {
                return Err(RowFault::NonFiniteScore("weight"));
            }
            example.weight = weight;
        }
        Ok(example)
    }

    fn retrieval(&self) -> Result<Example, RowFault> {
        let query = string(self.query, "query")?;
        let mut positive = strings(self.positive, "positive")?;
        if positive.is_empty() {
            return Err(RowFault::MissingColumn("positive"));
        }
        let titles = optional_strings(self.title, "title")?;
        if !titles.is_empty() {
            if titles.len() != positive.len() {
                return Err(RowFault::WrongType("title"));
            }
            for (text, title) in positive.iter_mut().zip(titles) {
                if !title.trim().is_empty() {
                    *text = format!("{title} {text}");
                }
            }
        }
        let mut negative = strings(self.negative, "negative")?;
        for (_, raw) in &self.numbered {
            negative.extend(strings(Some((0, raw)), "negative")?);
        }
        let mut score = f32::NAN;
        let mut negative_score = Vec::new();
        if let Some(list) = list_of_numbers(self.score, "score")? {
            // The habit of distillation sets: the positives' scores, then the negatives'.
            if list.len() != positive.len() + negative.len() {
                return Err(RowFault::WrongType("score"));
            }
            let (of_positive, of_negative) = list.split_at(positive.len());
            score = of_positive.first().copied().unwrap_or(f32::NAN);
            negative_score = of_negative.to_vec();
        } else if let Some(value) = number(self.score, "score")? {
            score = value;
        } else if let Some(value) = number(self.label, "label")? {
            score = value;
        }
        if let Some(list) = list_of_numbers(self.pos_scores, "pos_scores")? {
            if list.len() != positive.len() {
                return Err(RowFault::WrongType("pos_scores"));
            }
            score = list.first().copied().unwrap_or(score);
        }
        if let Some(list) = list_of_numbers(self.neg_scores, "neg_scores")? {
            if list.len() != negative.len() {
                return Err(RowFault::WrongType("neg_scores"));
            }
            negative_score = list;
        }
        Ok(Example { query, positive, negative, negative_score, score, ..Example::empty() })
    }

    fn set(&mut self, name: Cow<'a, str>, value: &'a RawValue) {
        // A null is an absent value: exports of tables write it for every empty cell.
        if value.get() == "null" {
            return;
        }
        let rank = |names: &[&str]| names.iter().position(|n| *n == name);
        let (slot, rank) = if let Some(r) = rank(&QUERY) {
            (&mut self.query, r)
        } else if let Some(r) = rank(&POSITIVE) {
            (&mut self.positive, r)
        } else if let Some(r) = rank(&NEGATIVE) {
            (&mut self.negative, r)
        } else if let Some(r) = rank(&SCORE) {
            (&mut self.score, r)
        } else if let Some(r) = rank(&LABEL) {
            (&mut self.label, r)
        } else if rank(&IDS).is_some() {
            return;
        } else {
            let slot = match name.as_ref() {
                "title" => &mut self.title,
                "sentence1" => &mut self.sentence1,
                "sentence2" => &mut self.sentence2,
                "text" => &mut self.text,
                "pos_scores" => &mut self.pos_scores,
                "neg_scores" => &mut self.neg_scores,
                "weight" => &mut self.weight,
                other => {
                    match other.strip_prefix("negative_").and_then(|n| n.parse().ok()) {
                        Some(n) => self.numbered.push((n, value)),
                        None if self.extra.len() < EXTRA_PER_ROW => self.extra.push(name),
                        None => {}
                    }
                    return;
                }
            };
            (slot, 0)
        };
        match slot {
            Some((taken, _)) if *taken < rank => {
                if self.extra.len() < EXTRA_PER_ROW {
                    self.extra.push(name);
                }
            }
            // A repeated name: the last one counts, as in Python and JavaScript.
            _ => *slot = Some((rank, value)),
        }
    }
}

impl Example {
    fn empty() -> Self {
        Self {
            query: String::new(),
            positive: Vec::new(),
            negative: Vec::new(),
            negative_score: Vec::new(),
            score: f32::NAN,
            label: None,
            weight: 1.0,
        }
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Row<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Columns;
        impl<'de> Visitor<'de> for Columns {
            type Value = Row<'de>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Row<'de>, A::Error> {
                let mut row = Row::default();
                while let Some(Name(name)) = map.next_key()? {
                    row.set(name, map.next_value()?);
                }
                row.numbered.sort_by_key(|(n, _)| *n);
                Ok(row)
            }
        }
        deserializer.deserialize_map(Columns)
    }
}

/// A key, borrowed from the line unless it has escapes.
struct Name<'a>(Cow<'a, str>);

impl<'de: 'a, 'a> Deserialize<'de> for Name<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Key;
        impl<'de> Visitor<'de> for Key {
            type Value = Name<'de>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a column name")
            }

            fn visit_borrowed_str<E>(self, v: &'de str) -> Result<Name<'de>, E> {
                Ok(Name(Cow::Borrowed(v)))
            }

            fn visit_str<E>(self, v: &str) -> Result<Name<'de>, E> {
                Ok(Name(Cow::Owned(v.to_owned())))
            }
        }
        deserializer.deserialize_str(Key)
    }
}

/// A required text: a JSON string that is not blank.
fn string(slot: Slot, column: &'static str) -> Result<String, RowFault> {
    let (_, raw) = slot.ok_or(RowFault::MissingColumn(column))?;
    let text: String = decode(raw, column)?;
    not_blank(text, column)
}

/// A text or a list of texts, none of them blank; nulls in a list are skipped.
fn strings(slot: Slot, column: &'static str) -> Result<Vec<String>, RowFault> {
    optional_strings(slot, column)?.into_iter().map(|text| not_blank(text, column)).collect()
}

/// Like [`strings`], but blank texts may stay (a passage without a title is a passage).
fn optional_strings(slot: Slot, column: &'static str) -> Result<Vec<String>, RowFault> {
    let Some((_, raw)) = slot else { return Ok(Vec::new()) };
    if raw.get().starts_with('[') {
        let list: Vec<Option<String>> = decode(raw, column)?;
        Ok(list.into_iter().flatten().collect())
    } else {
        Ok(vec![decode(raw, column)?])
    }
}

fn not_blank(text: String, column: &'static str) -> Result<String, RowFault> {
    if text.trim().is_empty() { Err(RowFault::BlankText(column)) } else { Ok(text) }
}

fn decode<'a, T: Deserialize<'a>>(raw: &'a RawValue, column: &'static str) -> Result<T, RowFault> {
    // The raw value was checked to be JSON, except for the surrogates in its strings.
    serde_json::from_str(raw.get()).map_err(|e| match e.is_data() {
        true => RowFault::WrongType(column),
        false => RowFault::NotJson,
    })
}

/// A number, or `None` when the column is absent.
fn number(slot: Slot, column: &'static str) -> Result<Option<f32>, RowFault> {
    slot.map(|(_, raw)| finite(raw.get(), column)).transpose()
}

/// A list of numbers, or `None` when the column is absent or not a list.
fn list_of_numbers(slot: Slot, column: &'static str) -> Result<Option<Vec<f32>>, RowFault> {
    match slot {
        Some((_, raw)) if raw.get().starts_with('[') => {
            let list: Vec<&RawValue> = decode(raw, column)?;
            list.into_iter()
                .map(|raw| finite(raw.get(), column))
                .collect::<Result<_, _>>()
                .map(Some)
        }
        _ => Ok(None),
    }
}

/// Reads a JSON number as f32; what f32 cannot hold is not finite.
fn finite(raw: &str, column: &'static str) -> Result<f32, RowFault> {
    if !raw.starts_with(|c: char| c == '-' || c.is_ascii_digit()) {
        return Err(RowFault::WrongType(column));
    }
    let value: f32 = raw.parse().map_err(|_| RowFault::WrongType(column))?;
    if value.is_finite() { Ok(value) } else { Err(RowFault::NonFiniteScore(column)) }
}

/// A class name: a text, or a whole number as its decimal digits (`3` and `3.0` are one class).
fn label(slot: Slot) -> Result<String, RowFault> {
    let (_, raw) = slot.ok_or(RowFault::MissingColumn("label"))?;
    if raw.get().starts_with('"') {
        return string(slot, "label");
    }
    let digits = raw.get().strip_suffix(".0").unwrap_or(raw.get());
    match digits.parse::<i64>() {
        Ok(n) => Ok(n.to_string()),
        Err(_) => Err(RowFault::WrongType("label")),
    }
}

/// Replaces `NaN`, `Infinity` and `-Infinity` outside strings by a number beyond every float.
/// `None` when there are none, so that the line is simply not JSON.
fn patch_non_finite(text: &str) -> Option<String> {
    let mut out = String::with_capacity(text.len());
    let (mut in_string, mut escaped, mut found) = (false, false, false);
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        if !in_string {
            let word = ["NaN", "-Infinity", "Infinity"].into_iter().find(|w| rest.starts_with(w));
            if let Some(word) = word {
                out.push_str("1e999");
                rest = rest.get(word.len()..).unwrap_or_default();
                found = true;
                continue;
            }
        }
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = in_string,
            '"' => in_string = !in_string,
            _ => {}
        }
        out.push(c);
        rest = rest.get(c.len_utf8()..).unwrap_or_default();
    }
    found.then_some(out)
}

/// The column names of a line, sorted; nothing when it is not an object.
pub(crate) fn names(line: &[u8]) -> Vec<String> {
    let row: BTreeMap<String, IgnoredAny> = serde_json::from_slice(line).unwrap_or_default();
    row.into_keys().collect()
}
