//! The mining rules against their naive form, one by one and together.

use embkit_ann::{
    Bounds, Candidates, Corpus, FilterParams, NONE, Negatives, Queries, RELAXED, Refill, Rerank,
    Rule, Sample, Sketches, filter, naive,
};
use embkit_core::{Error, Job, Result, TextShard, Texts};
use proptest::prelude::*;

#[derive(Clone, Debug)]
struct Case {
    row: Vec<u32>,
    score: Vec<f32>,
    per_list: usize,
    list: Vec<u32>,
    number: Vec<u64>,
    own: Vec<u32>,
    own_cluster: Vec<u64>,
    own_text: Vec<u64>,
    offsets: Vec<u64>,
    positive: Vec<u32>,
    positive_score: Vec<f32>,
    cluster: Vec<u64>,
    texts: Vec<String>,
}

/// Scores of a reranker: offsets, ranks, scores, and those of the positives.
type Scores = (Vec<u64>, Vec<u32>, Vec<f32>, Vec<f32>);

impl Case {
    fn candidates(&self) -> Candidates<'_> {
        Candidates { row: &self.row, score: &self.score, per_list: self.per_list }
    }

    fn queries(&self) -> Queries<'_> {
        Queries {
            list: &self.list,
            number: &self.number,
            own: &self.own,
            cluster: &self.own_cluster,
            text: &self.own_text,
            offsets: &self.offsets,
            positive: &self.positive,
            score: &self.positive_score,
        }
    }

    fn with<T>(&self, then: impl FnOnce(Corpus) -> T) -> T {
        let mut offsets = vec![0u64];
        self.texts.iter().for_each(|t| offsets.push(offsets[offsets.len() - 1] + t.len() as u64));
        let bytes = self.texts.concat().into_bytes();
        let texts = Texts::new(&[TextShard { bytes: &bytes, offsets: &offsets }]).unwrap();
        let text: Vec<u64> = (0..self.cluster.len() as u64).collect();
        let sketches = Sketches::new(self.texts.len());
        let corpus =
            Corpus { cluster: &self.cluster, text: &text, texts: &texts, sketches: &sketches };
        then(corpus)
    }

    fn run_with(&self, scores: Option<&Scores>, params: &FilterParams) -> Result<Negatives> {
        self.with(|corpus| {
            let (c, q) = (self.candidates(), self.queries());
            filter(c, q, corpus, scores.map(rerank), params, &Job::new())
        })
    }

    fn run(&self, params: &FilterParams) -> Result<Negatives> {
        self.run_with(None, params)
    }
}

fn rerank(scores: &Scores) -> Rerank<'_> {
    Rerank { offsets: &scores.0, rank: &scores.1, score: &scores.2, positive: &scores.3 }
}

/// One query, one positive (row 0, score 0.8), candidates 1..=6 with scores from 0.9 down.
fn small() -> Case {
    let texts = ["the good answer to it", "A", "B", "The good answer to it now", "D", "E", "F"];
    Case {
        row: vec![1, 0, 2, 3, 4, 5, 6],
        score: vec![0.9, 0.8, 0.79, 0.7, 0.6, 0.2, -0.1],
        per_list: 7,
        list: vec![0],
        number: vec![0],
        own: vec![],
        own_cluster: vec![],
        own_text: vec![],
        offsets: vec![0, 1],
        positive: vec![0],
        positive_score: vec![0.8],
        cluster: vec![0, 1, 2, 3, 4, 0, 6],
        texts: texts.map(String::from).to_vec(),
    }
}

const NO: Bounds = Bounds { max: None, margin: None, percent: None };
const OFF: FilterParams = FilterParams {
    skip: 0,
    last: usize::MAX,
    bounds: NO,
    min_score: None,
    near_jaccard: None,
    rerank: NO,
    pool: None,
    k: 100,
    sample: Sample::Top,
    refill: Refill::Nothing,
    seed: 0,
    defer: false,
    trace: false,
    threads: 1,
};

fn bounds(max: Option<f64>, margin: Option<f64>, percent: Option<f64>) -> FilterParams {
    FilterParams { bounds: Bounds { max, margin, percent }, ..OFF }
}

#[test]
fn each_rule_alone() {
    let rows = |params: FilterParams| small().run(&params).unwrap().row;
    assert_eq!(rows(OFF), [1, 2, 3, 4, 6]); // row 0 is the positive, row 5 in its cluster
    assert_eq!(rows(FilterParams { skip: 2, ..OFF }), [3, 4, 6]);
    assert_eq!(rows(FilterParams { last: 3, ..OFF }), [1, 2, 3]);
    assert_eq!(rows(bounds(Some(0.7), None, None)), [3, 4, 6]);
    assert_eq!(rows(bounds(None, Some(0.05), None)), [3, 4, 6]);
    assert_eq!(rows(bounds(None, None, Some(0.95))), [3, 4, 6]); // 0.76
    assert_eq!(rows(FilterParams { min_score: Some(0.5), ..OFF }), [1, 2, 3, 4]);
    assert_eq!(rows(FilterParams { near_jaccard: Some(0.7), ..OFF }), [1, 2, 4, 6]); // 3 of 4 shingles
    assert_eq!(rows(FilterParams { near_jaccard: Some(0.76), ..OFF }), [1, 2, 3, 4, 6]);
    assert_eq!(rows(FilterParams { k: 2, ..OFF }), [1, 2]);
}

#[test]
fn the_query_is_no_negative_of_itself() {
    let case = Case { own: vec![2], own_cluster: vec![4], own_text: vec![6], ..small() };
    let params = FilterParams { near_jaccard: Some(1.0), ..OFF };
    let got = case.run(&params).unwrap();
    assert_eq!(got.row, [1, 3]); // 2 is its row, 4 in its cluster, 6 has its text
    assert_eq!(got.rank, [0, 1]);
}

#[test]
fn audit_counts_the_first_rule_that_removes() {
    let params = FilterParams {
        skip: 1,
        bounds: Bounds { percent: Some(0.95), ..NO },
        min_score: Some(0.0),
        near_jaccard: Some(0.7),
        k: 2,
        trace: true,
        ..OFF
    };
    let got = small().run(&params).unwrap();
    assert_eq!((got.offsets, got.row, got.rank), (vec![0, 1], vec![4], vec![3]));
    let rules = [
        Rule::Skipped,
        Rule::Positive,
        Rule::Percent,
        Rule::NearDuplicate,
        Rule::Kept,
        Rule::Cluster,
        Rule::BelowMin,
    ];
    assert_eq!(got.trace.rule, rules.map(|rule| rule as u8));
    assert_eq!(got.trace.rank, [0, NONE, 1, 2, 3, NONE, 4]);
    assert!((got.trace.number[2] - 0.76).abs() < 1e-6 && got.trace.number[3] == 0.75);
    for rule in rules {
        assert_eq!(got.audit.of(rule), 1, "{rule:?}");
    }
    assert_eq!((got.audit.queries, got.audit.candidates, got.audit.short_queries), (1, 7, 1));
}

#[test]
fn percent_is_safe_for_negative_scores_and_uses_the_lowest_positive() {
    let case = Case {
        row: vec![2, 3, 4],
        score: vec![-0.19, -0.2, -0.22],
        per_list: 3,
        offsets: vec![0, 2],
        positive: vec![0, 1],
        positive_score: vec![0.9, -0.2],
        cluster: (0..5).collect(),
        texts: vec![],
        ..small()
    };
    // s+ * 0.95 = -0.19 would keep row 3, as good as the positive; the safe bar is -0.21.
    assert_eq!(case.run(&bounds(None, None, Some(0.95))).unwrap().row, [4]);
}

#[test]
fn copies_of_a_text_change_nothing() {
    // Rows 3 and 5 are copies of 1, and 6 of the positive: what is kept and its ranks stay.
    let without = Case { row: vec![1, 2, 4], score: vec![0.7, 0.6, 0.5], per_list: 3, ..small() };
    let cluster = vec![0, 1, 2, 1, 4, 1, 0];
    let with = Case {
        row: vec![1, 3, 5, 6, 2, 4],
        score: vec![0.7, 0.7, 0.7, 0.65, 0.6, 0.5],
        per_list: 6,
        cluster: cluster.clone(),
        ..small()
    };
    for sample in [Sample::Top, Sample::Random] {
        let params = FilterParams { k: 2, last: 3, sample, ..OFF };
        let (a, b) = (without.run(&params).unwrap(), with.run(&params).unwrap());
        assert_eq!((a.row, a.rank), (b.row, b.rank));
    }
    let audit = with.run(&FilterParams { k: 3, ..OFF }).unwrap().audit;
    assert_eq!((audit.of(Rule::Repeat), audit.of(Rule::Cluster)), (2, 1));
}

#[test]
fn a_list_that_ends_too_early_is_reported() {
    let case = Case { row: vec![1, 0, 2], score: vec![0.9, 0.8, 0.7], per_list: 3, ..small() };
    let shallow = |params: FilterParams| case.run(&params).unwrap().shallow;
    let none: Vec<u32> = vec![];
    assert_eq!(shallow(FilterParams { last: 4, k: 2, ..OFF }), none); // two are enough
    assert_eq!(shallow(FilterParams { last: 2, k: 3, ..OFF }), none); // no more are asked for
    assert_eq!(shallow(FilterParams { last: 4, k: 3, ..OFF }), [0]);
    assert_eq!(shallow(FilterParams { last: 4, k: 2, sample: Sample::Random, ..OFF }), [0]);
    let deferred = case.run(&FilterParams { last: 4, k: 3, defer: true, ..OFF }).unwrap();
    assert_eq!((deferred.row.len(), deferred.audit.queries), (0, 0));
}

#[test]
fn refills_are_marked() {
    let params = FilterParams { k: 4, near_jaccard: Some(0.7), ..bounds(Some(0.65), None, None) };
    let relax = FilterParams { refill: Refill::Relax, ..params };
    let got = small().run(&relax).unwrap();
    // Row 3 is nearer to the limit and a copy of the positive; 2 and 1 come back, lowest first.
    assert_eq!(got.row, [4, 6, 2, 1]);
    assert_eq!(got.rank, [3, 4, 1 | RELAXED, RELAXED]);
    assert_eq!(got.audit.of(Rule::Relaxed), 2);
    assert_eq!(got.audit.of(Rule::NearDuplicate), 1);

    let mut case = small();
    case.cluster.extend(7..40);
    case.texts.resize(40, "The good answer to it".into());
    case.texts[20] = "another".into();
    let drawn = FilterParams { refill: Refill::Random, k: 3, ..params };
    let got = case.run(&drawn).unwrap();
    assert_eq!(got.row, [4, 6, 20]); // every other row outside the list is a copy
    assert_eq!(got.rank[2], NONE);
    assert!(got.score[2].is_nan());
    assert_eq!((got.audit.drawn, got.audit.short_queries), (1, 0));
}

#[test]
fn a_reranker_removes_what_scores_as_high_as_the_positive() {
    let first = FilterParams { pool: Some(3), ..OFF };
    let got = small().run(&first).unwrap();
    assert_eq!(got.row, [1, 2, 3]);
    let scores: Scores = (vec![0, 3], got.rank, vec![4.0, 9.6, 8.0], vec![10.0]);
    let second = FilterParams { rerank: Bounds { percent: Some(0.95), ..NO }, ..first };
    let got = small().run_with(Some(&scores), &second).unwrap();
    assert_eq!(got.row, [1, 3]);
    assert_eq!(got.audit.of(Rule::Rerank), 1);
    assert_eq!(got.audit.of(Rule::Surplus), 3); // beyond the pool
}

#[test]
fn bad_input_is_a_usage_error() {
    let fails = |case: &Case, params: FilterParams| {
        let got = case.run(&params);
        assert!(matches!(got, Err(Error::Usage { .. })), "{got:?}");
    };
    for params in [
        FilterParams { k: 0, ..OFF },
        FilterParams { pool: Some(0), ..OFF },
        FilterParams { skip: 3, last: 3, ..OFF },
        FilterParams { near_jaccard: Some(f64::NAN), ..OFF },
        FilterParams { min_score: Some(f64::NAN), ..OFF },
        FilterParams { rerank: Bounds { percent: Some(2.0), ..NO }, ..OFF },
        bounds(None, None, Some(0.0)),
        bounds(None, None, Some(1.5)),
        bounds(None, Some(-0.1), None),
        bounds(Some(f64::NAN), None, None),
    ] {
        fails(&small(), params);
    }
    let near = FilterParams { near_jaccard: Some(0.7), ..OFF };
    fails(&Case { row: vec![1, 0, 2, 3, 4, 5, 7], ..small() }, OFF);
    fails(&Case { positive: vec![7], ..small() }, OFF);
    fails(&Case { per_list: 6, ..small() }, OFF);
    fails(&Case { list: vec![1], ..small() }, OFF);
    fails(&Case { number: vec![], ..small() }, OFF);
    fails(&Case { own: vec![1, 2], ..small() }, OFF);
    fails(&Case { own_text: vec![7], ..small() }, near);
    fails(&Case { offsets: vec![], ..small() }, OFF);
    fails(&Case { offsets: vec![0, 2], ..small() }, OFF);
    fails(&Case { positive_score: vec![f32::NAN], ..small() }, OFF);
    fails(&Case { score: vec![0.9, 0.8, f32::NAN, 0.7, 0.6, 0.2, -0.1], ..small() }, OFF);
    fails(&Case { texts: vec![], ..small() }, near);
    let none = Case { offsets: vec![0, 0], positive: vec![], positive_score: vec![], ..small() };
    fails(&none, bounds(None, Some(0.0), None));
    assert_eq!(none.run(&OFF).unwrap().row.len(), 6); // of seven, two share a cluster
    for scores in [
        (vec![0, 1], vec![0], vec![], vec![1.0]),
        (vec![0, 1], vec![0], vec![1.0], vec![]),
        (vec![0, 1], vec![0], vec![f32::NAN], vec![1.0]),
        (vec![0, 2], vec![0], vec![1.0], vec![1.0]),
    ] {
        let got = small().run_with(Some(&scores), &OFF);
        assert!(matches!(got, Err(Error::Usage { .. })), "{got:?}");
    }
}

fn cases() -> impl Strategy<Value = Case> {
    let n = 16u32;
    let list =
        (Just((0..n).collect::<Vec<u32>>()).prop_shuffle(), prop::collection::vec(-4i8..8, 9));
    let query = (
        any::<prop::sample::Index>(),
        prop::collection::vec((0..n, -4i8..8), 1..4),
        (0..n, 0u64..12, 0..u64::from(n)),
    );
    let texts = prop::collection::vec("([ab] ){3,6}", n as usize);
    let cluster = prop::collection::vec(0u64..12, n as usize);
    let lists = prop::collection::vec(list, 1..4);
    (lists, prop::collection::vec(query, 0..6), texts, cluster, any::<bool>()).prop_map(
        |(lists, queries, texts, cluster, own)| {
            let mut case = Case {
                row: vec![],
                score: vec![],
                per_list: 9,
                list: vec![],
                number: vec![],
                own: vec![],
                own_cluster: vec![],
                own_text: vec![],
                offsets: vec![0],
                positive: vec![],
                positive_score: vec![],
                cluster,
                texts,
            };
            let n = lists.len();
            for (rows, mut scores) in lists {
                scores.sort_by(|a, b| b.cmp(a));
                case.row.extend(&rows[..9]);
                case.score.extend(scores.into_iter().map(|s| f32::from(s) / 8.0));
            }
            for (i, (list, positives, (row, cluster, text))) in queries.into_iter().enumerate() {
                case.list.push(list.index(n) as u32);
                case.number.push(1000 + i as u64);
                if own {
                    case.own.push(row);
                    case.own_cluster.push(cluster);
                    case.own_text.push(text);
                }
                for (row, score) in positives {
                    case.positive.push(row);
                    case.positive_score.push(f32::from(score) / 8.0);
                }
                case.offsets.push(case.positive.len() as u64);
            }
            case
        },
    )
}

fn upper() -> impl Strategy<Value = Bounds> {
    (prop::option::of(-0.5f64..1.0), prop::option::of(0.0f64..0.4), prop::option::of(0.5f64..=1.0))
        .prop_map(|(max, margin, percent)| Bounds { max, margin, percent })
}

/// Ranks, bounds, similarity, pool and k, sample and refill, seed.
fn rules() -> impl Strategy<Value = FilterParams> {
    let ranks = (0usize..3, prop::option::of(3usize..9));
    let least = (prop::option::of(-0.5f64..1.0), prop::option::of(0.2f64..=1.0));
    let number = (prop::option::of(1usize..6), 1usize..9);
    let choice = (any::<bool>(), 0usize..3, any::<u64>(), any::<bool>());
    (ranks, upper(), least, upper(), number, choice).prop_map(
        |(ranks, bounds, least, rerank, number, choice)| FilterParams {
            skip: ranks.0,
            last: ranks.1.unwrap_or(usize::MAX),
            bounds,
            min_score: least.0,
            near_jaccard: least.1,
            rerank,
            pool: number.0,
            k: number.1,
            sample: if choice.0 { Sample::Random } else { Sample::Top },
            refill: [Refill::Nothing, Refill::Relax, Refill::Random][choice.1],
            seed: choice.2,
            defer: choice.3,
            trace: true,
            threads: 1,
        },
    )
}

fn same(case: &Case, scores: Option<&Scores>, params: &FilterParams) -> Negatives {
    let got = case.run_with(scores, params).unwrap();
    let want = case.with(|corpus| {
        naive::filter(case.candidates(), case.queries(), corpus, scores.map(rerank), params)
    });
    assert_eq!(got.offsets.len(), want.len() + 1);
    let mut trace = got.trace.rule.chunks(case.per_list);
    for (q, want) in want.iter().enumerate() {
        let range = got.offsets[q] as usize..got.offsets[q + 1] as usize;
        let rows = got.row[range.clone()].iter().copied();
        let found: Vec<(u64, u32)> = rows.zip(got.rank[range].iter().copied()).collect();
        assert_eq!(found, want.kept, "query {q}");
        assert_eq!(got.shallow.contains(&(q as u32)), want.shallow, "query {q}");
        if !(want.shallow && params.defer) {
            let rules: Vec<u8> = want.rules.iter().map(|rule| *rule as u8).collect();
            assert_eq!(trace.next().unwrap(), rules, "query {q}");
        }
    }
    assert!(trace.next().is_none());
    let counts: Vec<(&str, u64)> = got.audit.rows().collect();
    let (kept, relaxed) = (got.audit.of(Rule::Kept), got.audit.of(Rule::Relaxed));
    assert_eq!(counts[2..16].iter().map(|c| c.1).sum::<u64>(), got.audit.candidates);
    assert_eq!(kept + relaxed + got.audit.drawn, got.row.len() as u64);
    // Written out, because scores of drawn rows are NaN and so never equal.
    let threads = case.run_with(scores, &FilterParams { threads: 3, ..*params }).unwrap();
    assert_eq!(format!("{threads:?}"), format!("{got:?}"));
    got
}

proptest! {
    #[test]
    fn equals_naive(case in cases(), params in rules()) {
        same(&case, None, &params);
    }

    #[test]
    fn equals_naive_with_a_reranker(
        case in cases(),
        params in rules(),
        pool in 1usize..6,
        scores in prop::collection::vec(-4i8..8, 64),
    ) {
        let first = FilterParams { pool: Some(pool), defer: false, ..params };
        let found = same(&case, None, &first);
        let score = |i: usize| f32::from(scores[i % scores.len()]) / 8.0;
        let of: Vec<f32> = (0..found.rank.len()).map(score).collect();
        let positive = (0..case.positive.len()).map(|i| score(i + 29)).collect();
        let scores: Scores = (found.offsets, found.rank, of, positive);
        same(&case, Some(&scores), &first);
    }
}
