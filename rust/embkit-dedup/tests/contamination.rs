//! Contamination against the string n-gram reference, with planted leaks.

use embkit_core::{Error, Job, TextShard};
use embkit_dedup::{Contamination, ContaminationParams, Hit, contamination, naive};
use proptest::prelude::*;

fn pack(texts: &[&str]) -> (Vec<u8>, Vec<u64>) {
    let mut offsets = vec![0u64];
    texts.iter().for_each(|t| offsets.push(offsets[offsets.len() - 1] + t.len() as u64));
    (texts.concat().into_bytes(), offsets)
}

fn run(train: &[&str], eval: &[&str], params: &ContaminationParams) -> Contamination {
    let (train, eval) = (pack(train), pack(eval));
    let train = TextShard { bytes: &train.0, offsets: &train.1 };
    let eval = TextShard { bytes: &eval.0, offsets: &eval.1 };
    contamination(&[train], &[eval], params, &Job::new()).unwrap()
}

const LEAK: &str = "it was the best of times it was the worst of times indeed";

#[test]
fn planted_span_is_found_in_original_bytes() {
    let train = format!(
        "Ärger: he said “It was the best of  TIMES, it was the worst of times” {}",
        "and so on"
    );
    let eval = format!("Quote. {LEAK}");
    let params = ContaminationParams { words: 12, ..Default::default() };
    let got = run(&["nothing here", &train], &["other", &eval], &params);
    let [Hit { train_row: 1, eval_row: 1, start, end, overlap }] = got.hits[..] else {
        panic!("{got:?}")
    };
    // The quotation marks belong to their words' pieces.
    assert_eq!(
        &train[start as usize..end as usize],
        "“It was the best of  TIMES, it was the worst of times”"
    );
    assert_eq!(overlap, 12.0 / 18.0);
    // One word fewer in common than asked for.
    let params = ContaminationParams { words: 13, ..Default::default() };
    assert!(run(&[&train], &[&eval], &params).hits.is_empty());
}

#[test]
fn short_evaluation_texts_match_whole_only() {
    let params = ContaminationParams::default();
    let got = run(
        &["what is rust", "So what is Rust, he asked", "What is  Rust?"],
        &["What is Rust"],
        &params,
    );
    assert_eq!(
        got.hits.iter().map(|h| (h.train_row, h.overlap)).collect::<Vec<_>>(),
        [(0, 1.0), (2, 1.0)]
    );
    assert!(run(&["", "?", " "], &["", "?", "!"], &params).hits.is_empty());
}

#[test]
fn characters_where_there_are_no_spaces() {
    let eval: String = (0..60).map(|i| char::from_u32(0x4E00 + i * 7).unwrap()).collect();
    let inside: String = eval.chars().skip(5).take(50).collect();
    let short: String = eval.chars().skip(5).take(49).collect();
    let train = [format!("前文。{inside}。後文"), format!("前文。{short}。後文"), "日本".into()];
    let train: Vec<&str> = train.iter().map(String::as_str).collect();
    let got = run(&train, &[&eval, "日本"], &ContaminationParams::default());
    let rows: Vec<(u64, u64)> = got.hits.iter().map(|h| (h.train_row, h.eval_row)).collect();
    assert_eq!(rows, [(0, 0), (2, 1)]);
    assert_eq!(&train[0][got.hits[0].start as usize..got.hits[0].end as usize], inside);
    assert_eq!(got.hits[0].overlap, 50.0 / 54.0);
}

#[test]
fn common_ngrams_are_reported_not_hit() {
    let licence =
        "permission is hereby granted free of charge to any person obtaining a copy of this";
    let mut train: Vec<String> = (0..11).map(|i| format!("{licence} n{i}")).collect();
    train.push(format!("{licence} n99 {LEAK}"));
    let texts: Vec<&str> = train.iter().map(String::as_str).collect();
    let eval = [licence, LEAK];
    let params = ContaminationParams { words: 10, ..Default::default() };
    let got = run(&texts, &eval, &params);
    // Row 11 leaks by its other half; the licence's n-grams, in 12 rows, count for nothing.
    assert_eq!(got.hits.len(), 1);
    assert_eq!((got.hits[0].train_row, got.hits[0].eval_row), (11, 1));
    assert_eq!((got.common, got.common_only_rows), (5 + 1, 11));
    assert_eq!(got.common_samples.len(), 6);
    assert_eq!(got.common_samples[0].train_rows, 12);
    // Ten rows are not more than ten, and the whole text is a leak however common.
    let got = run(&texts[..10], &eval, &params);
    assert_eq!((got.hits.len(), got.common), (10, 0));
    let copies = vec![licence; 40];
    assert_eq!(run(&copies, &eval, &params).hits.len(), 40);
}

#[test]
fn bad_input_and_nothing_to_check() {
    let (bytes, offsets) = pack(&["a b c"]);
    let shard = [TextShard { bytes: &bytes, offsets: &offsets }];
    let params = ContaminationParams { words: 0, ..Default::default() };
    let job = Job::new();
    assert!(matches!(contamination(&shard, &shard, &params, &job), Err(Error::Usage { .. })));
    let params = ContaminationParams::default();
    assert_eq!(contamination(&shard, &[], &params, &job).unwrap(), Contamination::default());
    assert_eq!(contamination(&[], &shard, &params, &job).unwrap(), Contamination::default());
    let bad = [TextShard { bytes: b"\xff", offsets: &[0, 1] }];
    assert!(matches!(contamination(&bad, &shard, &params, &job), Err(Error::Usage { .. })));
    assert!(matches!(contamination(&shard, &bad, &params, &job), Err(Error::Usage { .. })));
    job.cancel();
    assert!(matches!(contamination(&shard, &shard, &params, &job), Err(Error::Cancelled)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    #[test]
    fn equals_naive(
        train in prop::collection::vec("([abc]{1,2}[ ,]{1,2}){0,12}", 0..30),
        eval in prop::collection::vec("([abc]{1,2}[ .]{1,2}){0,9}", 0..4),
        words in 1usize..6,
        common in 0u32..4,
    ) {
        let train: Vec<&str> = train.iter().map(String::as_str).collect();
        let eval: Vec<&str> = eval.iter().map(String::as_str).collect();
        let params = ContaminationParams { words, chars: 3, common, threads: 1 };
        let got = run(&train, &eval, &params);
        prop_assert_eq!(&got.hits, &naive::contamination(&train, &eval, &params));
        prop_assert_eq!(got, run(&train, &eval, &ContaminationParams { threads: 3, ..params }));
    }
}
