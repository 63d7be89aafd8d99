//! The mining rules against their naive form, one by one and together.

use embkit_ann::{
    Audit, Candidates, Corpus, FilterParams, Negatives, Positives, Sample, filter, naive,
};
use embkit_core::{Error, Job, Result, TextShard};
use proptest::prelude::*;

#[derive(Debug)]
struct Case {
    row: Vec<u32>,
    score: Vec<f32>,
    per_query: usize,
    offsets: Vec<u64>,
    positive: Vec<u64>,
    positive_score: Vec<f32>,
    cluster: Vec<u64>,
    texts: Vec<String>,
}

impl Case {
    fn candidates(&self) -> Candidates<'_> {
        Candidates { row: &self.row, score: &self.score, per_query: self.per_query }
    }
    fn positives(&self) -> Positives<'_> {
        Positives { offsets: &self.offsets, row: &self.positive, score: &self.positive_score }
    }
    fn run(&self, params: &FilterParams) -> Result<Negatives> {
        let mut offsets = vec![0u64];
        self.texts.iter().for_each(|t| offsets.push(offsets[offsets.len() - 1] + t.len() as u64));
        let bytes = self.texts.concat().into_bytes();
        let texts = [TextShard { bytes: &bytes, offsets: &offsets }];
        let corpus = Corpus { cluster: &self.cluster, texts: &texts };
        filter(self.candidates(), self.positives(), corpus, params, &Job::new())
    }
}

/// One query, one positive (row 0, score 0.8), candidates 1..=6 with scores from 0.9 down.
fn small() -> Case {
    let texts = ["the good answer to it", "A", "B", "The good answer to it now", "D", "E", "F"];
    Case {
        row: vec![1, 0, 2, 3, 4, 5, 6],
        score: vec![0.9, 0.8, 0.79, 0.7, 0.6, 0.2, -0.1],
        per_query: 7,
        offsets: vec![0, 1],
        positive: vec![0],
        positive_score: vec![0.8],
        cluster: vec![0, 1, 2, 3, 4, 0, 6],
        texts: texts.map(String::from).to_vec(),
    }
}

const OFF: FilterParams = FilterParams {
    skip: 0,
    max_score: None,
    min_score: None,
    margin: None,
    percent: None,
    near_jaccard: None,
    k: 100,
    sample: Sample::Top,
    seed: 0,
    threads: 1,
};

#[test]
fn each_rule_alone() {
    let rows = |params: FilterParams| small().run(&params).unwrap().row;
    assert_eq!(rows(OFF), [1, 2, 3, 4, 6]); // row 0 is the positive, row 5 in its cluster
    assert_eq!(rows(FilterParams { skip: 2, ..OFF }), [3, 4, 6]);
    assert_eq!(rows(FilterParams { max_score: Some(0.7), ..OFF }), [3, 4, 6]);
    assert_eq!(rows(FilterParams { min_score: Some(0.5), ..OFF }), [1, 2, 3, 4]);
    assert_eq!(rows(FilterParams { margin: Some(0.05), ..OFF }), [3, 4, 6]);
    assert_eq!(rows(FilterParams { percent: Some(0.95), ..OFF }), [3, 4, 6]); // 0.76
    assert_eq!(rows(FilterParams { near_jaccard: Some(0.7), ..OFF }), [1, 2, 4, 6]); // 3 of 4 shingles
    assert_eq!(rows(FilterParams { near_jaccard: Some(0.76), ..OFF }), [1, 2, 3, 4, 6]);
    assert_eq!(rows(FilterParams { k: 2, ..OFF }), [1, 2]);
}

#[test]
fn audit_counts_the_first_rule_that_removes() {
    let params = FilterParams {
        skip: 1,
        min_score: Some(0.0),
        percent: Some(0.95),
        near_jaccard: Some(0.7),
        k: 2,
        ..OFF
    };
    let got = small().run(&params).unwrap();
    assert_eq!((got.offsets, got.row, got.rank), (vec![0, 1], vec![4], vec![4]));
    let want = Audit {
        queries: 1,
        candidates: 7,
        positive: 1,
        cluster: 1,
        skipped: 1,
        below_min: 1,
        percent: 1,
        near_duplicate: 1,
        kept: 1,
        short_queries: 1,
        ..Default::default()
    };
    assert_eq!(got.audit, want);
}

#[test]
fn percent_is_safe_for_negative_scores_and_uses_the_lowest_positive() {
    let case = Case {
        row: vec![2, 3, 4],
        score: vec![-0.19, -0.2, -0.22],
        per_query: 3,
        offsets: vec![0, 2],
        positive: vec![0, 1],
        positive_score: vec![0.9, -0.2],
        cluster: (0..5).collect(),
        texts: vec![],
    };
    // s+ * 0.95 = -0.19 would keep row 3, as good as the positive; the safe bar is -0.21.
    let got = case.run(&FilterParams { percent: Some(0.95), ..OFF }).unwrap();
    assert_eq!(got.row, [4]);
}

#[test]
fn bad_input_is_a_usage_error() {
    let fails = |case: &Case, params: FilterParams| {
        let got = case.run(&params);
        assert!(matches!(got, Err(Error::Usage { .. })), "{got:?}");
    };
    for params in [
        FilterParams { k: 0, ..OFF },
        FilterParams { percent: Some(0.0), ..OFF },
        FilterParams { percent: Some(1.5), ..OFF },
        FilterParams { near_jaccard: Some(f64::NAN), ..OFF },
        FilterParams { margin: Some(-0.1), ..OFF },
        FilterParams { max_score: Some(f64::NAN), ..OFF },
    ] {
        fails(&small(), params);
    }
    fails(&Case { row: vec![1, 0, 2, 3, 4, 5, 7], ..small() }, OFF);
    fails(&Case { positive: vec![7], ..small() }, OFF);
    fails(&Case { per_query: 6, ..small() }, OFF);
    fails(&Case { offsets: vec![], ..small() }, OFF);
    fails(&Case { offsets: vec![0, 2], ..small() }, OFF);
    fails(&Case { positive_score: vec![f32::NAN], ..small() }, OFF);
    fails(&Case { score: vec![0.9, 0.8, f32::NAN, 0.7, 0.6, 0.2, -0.1], ..small() }, OFF);
    fails(&Case { texts: vec![], ..small() }, FilterParams { near_jaccard: Some(0.7), ..OFF });
    let none = Case { offsets: vec![0, 0], positive: vec![], positive_score: vec![], ..small() };
    fails(&none, FilterParams { margin: Some(0.0), ..OFF });
    assert_eq!(none.run(&OFF).unwrap().row.len(), 7);
}

fn cases() -> impl Strategy<Value = Case> {
    let n = 12u32;
    let query = (
        prop::collection::vec(0..n, 8),
        prop::collection::vec(-4i8..8, 8),
        prop::collection::vec((0..u64::from(n), -4i8..8), 1..4),
    );
    let texts = prop::collection::vec("([ab] ){3,6}", n as usize);
    let cluster = prop::collection::vec(0u64..9, n as usize);
    (prop::collection::vec(query, 0..6), texts, cluster).prop_map(|(queries, texts, cluster)| {
        let mut case = Case {
            row: vec![],
            score: vec![],
            per_query: 8,
            offsets: vec![0],
            positive: vec![],
            positive_score: vec![],
            cluster,
            texts,
        };
        for (rows, mut scores, positives) in queries {
            scores.sort_by(|a, b| b.cmp(a));
            case.row.extend(rows);
            case.score.extend(scores.into_iter().map(|s| f32::from(s) / 8.0));
            for (row, score) in positives {
                case.positive.push(row);
                case.positive_score.push(f32::from(score) / 8.0);
            }
            case.offsets.push(case.positive.len() as u64);
        }
        case
    })
}

proptest! {
    #[test]
    fn equals_naive(
        case in cases(),
        skip in 0usize..3,
        max_score in prop::option::of(-0.5f64..1.0),
        min_score in prop::option::of(-0.5f64..1.0),
        margin in prop::option::of(0.0f64..0.4),
        percent in prop::option::of(0.5f64..=1.0),
        near_jaccard in prop::option::of(0.2f64..=1.0),
        k in 1usize..9,
        random in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let sample = if random { Sample::Random } else { Sample::Top };
        let params = FilterParams {
            skip, max_score, min_score, margin, percent, near_jaccard, k, sample, seed, threads: 1,
        };
        let got = case.run(&params).unwrap();
        let texts: Vec<&str> = case.texts.iter().map(String::as_str).collect();
        let want = naive::filter(case.candidates(), case.positives(), &case.cluster, &texts, &params);
        prop_assert_eq!(got.offsets.len(), want.len() + 1);
        for (q, want) in want.iter().enumerate() {
            let range = got.offsets[q] as usize..got.offsets[q + 1] as usize;
            let found: Vec<(u64, u32)> =
                got.row[range.clone()].iter().copied().zip(got.rank[range].iter().copied()).collect();
            prop_assert_eq!(&found, want);
        }
        for (i, rank) in got.rank.iter().enumerate() {
            let q = got.offsets.partition_point(|o| *o <= i as u64) - 1;
            prop_assert_eq!(got.score[i], case.score[q * case.per_query + *rank as usize]);
        }
        let counts = got.audit.rows();
        prop_assert_eq!(counts[2..12].iter().map(|c| c.1).sum::<u64>(), got.audit.candidates);
        prop_assert_eq!(got.audit.kept, got.row.len() as u64);
        prop_assert_eq!(case.run(&FilterParams { threads: 3, ..params }).unwrap(), got);
    }
}
