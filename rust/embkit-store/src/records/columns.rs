//! From one row to one example: column names, kinds, types.
//!
//! Oddity: values are taken as they are and decoded only when their column is known, so an unknown
//! column costs neither memory nor a type check.

use std::borrow::Cow;

use super::arrow::Batch;
use super::faults::RowFault;
use super::intern::identity;
use super::json;
use super::value::{Value, label, list_of_numbers, number, optional_strings, string, strings};

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

/// What a column is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Field {
    Query,
    Positive,
    Negative,
    Title,
    Sentence1,
    Sentence2,
    Text,
    Label,
    Score,
    PosScores,
    NegScores,
    Weight,
}

/// Where a column's name puts its value.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place {
    /// A known column, and the rank of this name among its names.
    Known(Field, usize),
    /// `negative_1`, `negative_2`, ...
    Numbered(u32),
    /// Read and dropped.
    Id,
    Unknown,
}

/// Every known column with its names by rank.
const NAMES: [(Field, &[&str]); 12] = [
    (Field::Query, &QUERY),
    (Field::Positive, &POSITIVE),
    (Field::Negative, &NEGATIVE),
    (Field::Title, &["title"]),
    (Field::Sentence1, &["sentence1"]),
    (Field::Sentence2, &["sentence2"]),
    (Field::Text, &["text"]),
    (Field::Label, &LABEL),
    (Field::Score, &SCORE),
    (Field::PosScores, &["pos_scores"]),
    (Field::NegScores, &["neg_scores"]),
    (Field::Weight, &["weight"]),
];

impl Place {
    pub(crate) fn of(name: &str) -> Self {
        for (field, names) in NAMES {
            if let Some(rank) = names.iter().position(|n| *n == name) {
                return Self::Known(field, rank);
            }
        }
        if IDS.contains(&name) {
            return Self::Id;
        }
        let number = name.strip_prefix("negative_").and_then(|n| n.parse().ok());
        number.map_or(Self::Unknown, Self::Numbered)
    }
}

/// The columns of one row, not yet decoded.
#[derive(Debug, Default)]
pub(crate) struct Row<'a> {
    /// By [`Field`]: the value with the rank of the name it came under.
    known: [Option<(usize, Value<'a>)>; 12],
    /// In order of their number once the row is read.
    pub(super) numbered: Vec<(u32, Value<'a>)>,
    /// Names of columns that are not known.
    pub(crate) extra: Vec<Cow<'a, str>>,
}

/// One valid row with its texts.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Example<'a> {
    pub(crate) query: Cow<'a, str>,
    pub(crate) positive: Vec<Cow<'a, str>>,
    pub(crate) negative: Vec<Cow<'a, str>>,
    /// As long as `negative`, or empty.
    pub(crate) negative_score: Vec<f32>,
    /// NaN when the row has none.
    pub(crate) score: f32,
    pub(crate) label: Option<String>,
    pub(crate) weight: f32,
}

/// A row that was read: its kind, its example, the identities of its texts in the order query,
/// positives, negatives, and the names of unknown columns.
pub(crate) struct Parsed<'a> {
    pub(crate) kind: Option<Kind>,
    pub(crate) example: Example<'a>,
    pub(crate) keys: Vec<u128>,
    pub(crate) extra: Vec<Cow<'a, str>>,
}

impl<'a> Parsed<'a> {
    /// Parses one line of JSON as `kind`, or as what its columns say.
    pub(crate) fn line(line: &'a [u8], kind: Option<Kind>) -> Result<Self, RowFault> {
        let text = std::str::from_utf8(line).map_err(|_| RowFault::InvalidUtf8)?;
        match json::row(text) {
            Err(RowFault::NotJson) => {
                let patched = json::patch_non_finite(text).ok_or(RowFault::NotJson)?;
                Parsed::row(json::row(&patched)?, kind).map(Parsed::into_owned)
            }
            row => Self::row(row?, kind),
        }
    }

    /// Row `i` of a batch; its texts may have `most` bytes.
    pub(crate) fn cells(
        batch: &'a Batch,
        places: &[Place],
        i: usize,
        kind: Option<Kind>,
        most: usize,
    ) -> Result<Self, RowFault> {
        let mut row = Row::default();
        for ((column, name), place) in batch.columns.iter().zip(&batch.names).zip(places) {
            if let Some(value) = column.value(i) {
                row.set(*place, name.into(), value);
            }
        }
        row.numbered.sort_by_key(|(n, _)| *n);
        let parsed = Self::row(row, kind)?;
        let example = &parsed.example;
        let passages = example.positive.iter().chain(&example.negative);
        match example.query.len() + passages.map(|t| t.len()).sum::<usize>() > most {
            true => Err(RowFault::LineTooLong),
            false => Ok(parsed),
        }
    }

    fn row(row: Row<'a>, kind: Option<Kind>) -> Result<Self, RowFault> {
        let kind = kind.or_else(|| row.kind());
        let example = row.example(kind.unwrap_or(row.nearest_kind()))?;
        let passages = example.positive.iter().chain(&example.negative);
        let keys = [&example.query].into_iter().chain(passages).map(|t| identity(t)).collect();
        Ok(Self { kind, example, keys, extra: row.extra })
    }

    fn into_owned(self) -> Parsed<'static> {
        let own = |text: Cow<str>| Cow::Owned(text.into_owned());
        let all =
            |texts: Vec<Cow<str>>| texts.into_iter().map(own).collect::<Vec<Cow<'static, str>>>();
        Parsed {
            kind: self.kind,
            example: Example {
                query: own(self.example.query),
                positive: all(self.example.positive),
                negative: all(self.example.negative),
                negative_score: self.example.negative_score,
                score: self.example.score,
                label: self.example.label,
                weight: self.example.weight,
            },
            keys: self.keys,
            extra: all(self.extra),
        }
    }
}

impl<'a> Row<'a> {
    fn at(&self, field: Field) -> Option<Value<'a>> {
        self.known.get(field as usize).copied().flatten().map(|(_, value)| value)
    }

    fn has(&self, field: Field) -> bool {
        self.at(field).is_some()
    }

    /// The kind whose required columns are all there; pairs of sentences win over the others.
    fn kind(&self) -> Option<Kind> {
        [Kind::Sts, Kind::Retrieval, Kind::Classification]
            .into_iter()
            .find(|kind| self.missing(*kind).is_none())
    }

    /// The kind that a row without a whole set of columns seems to mean, for the message about it.
    fn nearest_kind(&self) -> Kind {
        if self.has(Field::Sentence1) || self.has(Field::Sentence2) {
            Kind::Sts
        } else if self.has(Field::Text) && !self.has(Field::Query) {
            Kind::Classification
        } else {
            Kind::Retrieval
        }
    }

    /// The first required column of `kind` that is not in the row.
    fn missing(&self, kind: Kind) -> Option<&'static str> {
        let required: &[(&'static str, bool)] = match kind {
            Kind::Retrieval => {
                &[("query", self.has(Field::Query)), ("positive", self.has(Field::Positive))]
            }
            Kind::Sts => &[
                ("sentence1", self.has(Field::Sentence1)),
                ("sentence2", self.has(Field::Sentence2)),
                ("score", self.has(Field::Score) || self.has(Field::Label)),
            ],
            Kind::Classification => {
                &[("text", self.has(Field::Text)), ("label", self.has(Field::Label))]
            }
        };
        required.iter().find(|(_, there)| !there).map(|(name, _)| *name)
    }

    /// A required text.
    fn string(&self, field: Field, column: &'static str) -> Result<Cow<'a, str>, RowFault> {
        string(self.at(field).ok_or(RowFault::MissingColumn(column))?, column)
    }

    /// Decodes the row as `kind`. Errors: missing columns, wrong types, blank texts, bad scores,
    /// or [`RowFault::MixedKind`] when the columns are those of another kind.
    fn example(&self, kind: Kind) -> Result<Example<'a>, RowFault> {
        if let Some(name) = self.missing(kind) {
            return Err(match self.kind() {
                Some(_) => RowFault::MixedKind,
                None => RowFault::MissingColumn(name),
            });
        }
        let mut example = match kind {
            Kind::Retrieval => self.retrieval()?,
            Kind::Sts => Example {
                query: self.string(Field::Sentence1, "sentence1")?,
                positive: vec![self.string(Field::Sentence2, "sentence2")?],
                score: match self.at(Field::Score) {
                    Some(score) => number(Some(score), "score")?,
                    None => number(self.at(Field::Label), "label")?,
                }
                .ok_or(RowFault::MissingColumn("score"))?,
                ..Example::empty()
            },
            Kind::Classification => Example {
                query: self.string(Field::Text, "text")?,
                label: self.at(Field::Label).map(label).transpose()?,
                ..Example::empty()
            },
        };
        if let Some(weight) = number(self.at(Field::Weight), "weight")? {
            if weight < 0.0 {
                return Err(RowFault::NonFiniteScore("weight"));
            }
            example.weight = weight;
        }
        Ok(example)
    }

    fn retrieval(&self) -> Result<Example<'a>, RowFault> {
        let query = self.string(Field::Query, "query")?;
        let mut positive = strings(self.at(Field::Positive), "positive")?;
        if positive.is_empty() {
            return Err(RowFault::MissingColumn("positive"));
        }
        let titles = optional_strings(self.at(Field::Title), "title")?;
        if !titles.is_empty() {
            if titles.len() != positive.len() {
                return Err(RowFault::WrongType("title"));
            }
            for (text, title) in positive.iter_mut().zip(titles) {
                if !title.trim().is_empty() {
                    *text = format!("{title} {text}").into();
                }
            }
        }
        let mut negative = strings(self.at(Field::Negative), "negative")?;
        for (_, value) in &self.numbered {
            negative.extend(strings(Some(*value), "negative")?);
        }
        let mut score = f32::NAN;
        let mut negative_score = Vec::new();
        let given = self.at(Field::Score);
        if let Some(list) = list_of_numbers(given, "score")? {
            // The habit of distillation sets: the positives' scores, then the negatives'.
            if list.len() != positive.len() + negative.len() {
                return Err(RowFault::WrongType("score"));
            }
            let (of_positive, of_negative) = list.split_at(positive.len());
            score = of_positive.first().copied().unwrap_or(f32::NAN);
            negative_score = of_negative.to_vec();
        } else if let Some(value) = number(given, "score")? {
            score = value;
        } else if let Some(value) = number(self.at(Field::Label), "label")? {
            score = value;
        }
        if let Some(list) = list_of_numbers(self.at(Field::PosScores), "pos_scores")? {
            if list.len() != positive.len() {
                return Err(RowFault::WrongType("pos_scores"));
            }
            score = list.first().copied().unwrap_or(score);
        }
        if let Some(list) = list_of_numbers(self.at(Field::NegScores), "neg_scores")? {
            if list.len() != negative.len() {
                return Err(RowFault::WrongType("neg_scores"));
            }
            negative_score = list;
        }
        Ok(Example { query, positive, negative, negative_score, score, ..Example::empty() })
    }

    pub(super) fn set(&mut self, place: Place, name: Cow<'a, str>, value: Value<'a>) {
        let unread = match place {
            Place::Known(field, rank) => match self.known.get_mut(field as usize) {
                Some(Some((taken, _))) if *taken < rank => Some(name),
                // A repeated name: the last one counts, as in Python and JavaScript.
                Some(slot) => {
                    let before = slot.replace((rank, value)).filter(|(taken, _)| *taken != rank);
                    let (_, names) = NAMES.get(field as usize).copied().unwrap_or((field, &[]));
                    before.and_then(|(taken, _)| names.get(taken)).map(|name| (*name).into())
                }
                None => None,
            },
            Place::Numbered(n) => {
                self.numbered.push((n, value));
                None
            }
            Place::Id => None,
            Place::Unknown => Some(name),
        };
        if let Some(name) = unread
            && self.extra.len() < EXTRA_PER_ROW
        {
            self.extra.push(name);
        }
    }
}

impl Example<'_> {
    fn empty() -> Self {
        Self {
            query: Cow::Borrowed(""),
            positive: Vec::new(),
            negative: Vec::new(),
            negative_score: Vec::new(),
            score: f32::NAN,
            label: None,
            weight: 1.0,
        }
    }
}
