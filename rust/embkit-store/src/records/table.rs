//! The examples of one source.

use super::{Input, Kind};

/// The examples of one source, as columns. Values of `query`, `positive` and `negative` are rows of
/// [`Records::text`]. The jagged columns have offsets (one more than examples) and values.
#[derive(Clone, Debug, PartialEq)]
pub struct Examples {
    /// Name of the source, unique in a [`RecordsBuilder`].
    pub source: String,
    /// Task that the source feeds; several sources may feed one.
    pub task: String,
    /// What the rows train.
    pub kind: Kind,
    /// Line of each example in its file, from 1.
    pub line: Vec<u64>,
    /// The query (retrieval), the first sentence (sts) or the text (classification).
    pub query: Vec<u64>,
    /// Offsets into `positive`.
    pub positive_offsets: Vec<u64>,
    /// The positives (retrieval), the second sentence (sts) or nothing (classification).
    pub positive: Vec<u64>,
    /// Offsets into `negative` and `negative_score`.
    pub negative_offsets: Vec<u64>,
    /// The given hard negatives.
    pub negative: Vec<u64>,
    /// Score of each negative, NaN where none was given.
    pub negative_score: Vec<f32>,
    /// Similarity (sts) or score of the first positive, NaN where none was given.
    pub score: Vec<f32>,
    /// Class as an index into [`Records::labels`] of the task, -1 for the other kinds.
    pub label: Vec<i32>,
    /// Weight, 1 where none was given.
    pub weight: Vec<f32>,
}

impl Examples {
    pub(super) fn new(input: Input, kind: Kind) -> Self {
        Self {
            source: input.source.into(),
            task: input.task.into(),
            kind,
            line: Vec::new(),
            query: Vec::new(),
            positive_offsets: vec![0],
            positive: Vec::new(),
            negative_offsets: vec![0],
            negative: Vec::new(),
            negative_score: Vec::new(),
            score: Vec::new(),
            label: Vec::new(),
            weight: Vec::new(),
        }
    }

    pub(super) fn append(&mut self, more: Self) {
        if self.query.is_empty() {
            self.kind = more.kind;
        }
        let shift = |into: &mut Vec<u64>, offsets: &[u64], base: u64| {
            into.extend(offsets.iter().skip(1).map(|o| o + base));
        };
        shift(&mut self.positive_offsets, &more.positive_offsets, self.positive.len() as u64);
        shift(&mut self.negative_offsets, &more.negative_offsets, self.negative.len() as u64);
        self.line.extend(more.line);
        self.query.extend(more.query);
        self.positive.extend(more.positive);
        self.negative.extend(more.negative);
        self.negative_score.extend(more.negative_score);
        self.score.extend(more.score);
        self.label.extend(more.label);
        self.weight.extend(more.weight);
    }
}
