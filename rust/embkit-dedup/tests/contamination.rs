//! Contamination against the string n-gram reference, with planted leaks.

use embkit_core::{Error, Job, TextShard};
use embkit_dedup::{Contamination, ContaminationParams, Hit, Units, contamination, naive};
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
    contamination(&[train], &[eval], None, params, &Job::new()).unwrap()
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
    let [Hit { train_row: 1, eval_row: 1, start, end, overlap, runs: 1, whole: false, .. }] =
        got.hits[..]
    else {
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
fn every_set_that_has_it_is_named() {
    let eval = ["one two three four", "zero one two three", "nine eight seven", "one two", "?"];
    let train = [
        "one two three",                     // in two sets, as a part
        "so one two three four five",        // two runs of windows together, in two sets
        "one two",                           // a whole text of set 1
        "nine eight seven and zero one two", // two sets, two runs
        "nothing",
    ];
    let (train, eval) = (pack(&train), pack(&eval));
    let train = TextShard { bytes: &train.0, offsets: &train.1 };
    let eval = TextShard { bytes: &eval.0, offsets: &eval.1 };
    let params = ContaminationParams { words: 3, ..Default::default() };
    let job = Job::new();
    let sets = [0, 2, 3, 1, 4];
    let got = contamination(&[train], &[eval], Some(&sets), &params, &job).unwrap();
    let hits: Vec<_> =
        got.hits.iter().map(|h| (h.train_row, h.sets.clone(), h.runs, h.whole)).collect();
    let want = [
        (0, vec![0, 2], 1, false),
        (1, vec![0, 2], 1, false),
        (2, vec![1], 1, true),
        (3, vec![2, 3], 2, false),
    ];
    assert_eq!(hits, want);
    assert_eq!((got.set_rows, got.eval_texts), (vec![2, 1, 3, 1, 0], 4));
    assert_eq!(job.done.load(std::sync::atomic::Ordering::Relaxed), 5);
    for wrong in [&[0, 1][..], &[0, 1, 2, 3, 5]] {
        let got = contamination(&[train], &[eval], Some(wrong), &params, &job);
        assert!(matches!(got, Err(Error::Usage { .. })));
    }
}

#[test]
fn characters_of_every_text_when_asked() {
    let params = ContaminationParams { units: Units::Chars, chars: 12, ..Default::default() };
    let got = run(
        &["Pre-trained LAN-GUAGE models", "trained languages"],
        &["a trained language", "b"],
        &params,
    );
    let spans: Vec<_> = got.hits.iter().map(|h| (h.train_row, h.start, h.end)).collect();
    assert_eq!(spans, [(0, 4, 21), (1, 0, 16)]);
    let params = ContaminationParams { units: Units::Words, words: 1, ..Default::default() };
    assert_eq!(run(&["在 北京"], &["北京"], &params).hits.len(), 1);
    assert_eq!(run(&["在北京"], &["北京"], &params).hits.len(), 0);
}

#[test]
fn rows_are_found_at_any_threads_and_splits() {
    let eval: Vec<String> = (0..300).map(|i| format!("q{i} a{i} b{i} c{i} and {LEAK}")).collect();
    let mut train: Vec<String> = (0..3000).map(|i| format!("x{i} y{i} z{i} é{i}")).collect();
    for i in (0..3000).step_by(7) {
        train[i] += &format!(" Q{} a{}, b{} c{}\0and", i % 400, i % 400, i % 400, i % 400);
    }
    let eval: Vec<&str> = eval.iter().map(String::as_str).collect();
    let train: Vec<&str> = train.iter().map(String::as_str).collect();
    let params = ContaminationParams { words: 4, threads: 1, ..Default::default() };
    let want = run(&train, &eval, &params);
    assert!(want.hits.len() > 200, "{}", want.hits.len());
    let eval = pack(&eval);
    let eval = TextShard { bytes: &eval.0, offsets: &eval.1 };
    for (threads, cut) in [(1, 1), (2, 1500), (7, 2999)] {
        let parts = [pack(&train[..cut]), pack(&[]), pack(&train[cut..])];
        let shards: Vec<TextShard> =
            parts.iter().map(|(bytes, offsets)| TextShard { bytes, offsets }).collect();
        let params = ContaminationParams { threads, ..params };
        let got = contamination(&shards, &[eval], None, &params, &Job::new()).unwrap();
        assert_eq!(got, want);
    }
}

#[test]
fn degenerate_rows() {
    let params = ContaminationParams::default();
    let same = vec![LEAK; 5000];
    let got = run(&same, &[LEAK], &params);
    assert_eq!((got.hits.len(), got.common, got.common_only_rows), (5000, 1, 0));
    assert!(got.hits.iter().all(|hit| hit.whole && hit.overlap == 1.0));
    let inside = format!("before {LEAK}");
    let got = run(&vec![inside.as_str(); 5000], &[LEAK], &params);
    assert_eq!((got.hits.len(), got.common_only_rows), (0, 5000));
    // Nothing to look for is said.
    let got = run(&[LEAK, "", "\0"], &["", " ?! ", "\0"], &params);
    assert_eq!((got.hits.len(), got.eval_texts, got.set_rows), (0, 0, vec![0]));
    let job = Job::new();
    let got = contamination(&[], &[], Some(&[]), &params, &job).unwrap();
    assert_eq!(got, Contamination::default());
}

#[test]
fn one_long_document_is_searched_and_stops_within_50_ms() {
    let full = std::env::var_os("EMBKIT_TEST_FULL").is_some();
    let times = if full { 4 << 20 } else { 1 << 18 };
    let long = format!("{} {LEAK} {}", "some words, and é 漢. ".repeat(times), "tail ".repeat(9));
    let plain = "word after word, again ".repeat(times) + LEAK;
    for units in [Units::Auto, Units::Chars] {
        let params =
            ContaminationParams { words: 12, chars: 40, units, threads: 1, ..Default::default() };
        let got = run(&[&long, &plain], &[LEAK], &params);
        let spans: Vec<_> = got.hits.iter().map(|h| (h.train_row, h.end - h.start)).collect();
        let at = long.find(LEAK).unwrap() as u64;
        assert_eq!(
            (spans, got.hits[0].start),
            (vec![(0, LEAK.len() as u64), (1, LEAK.len() as u64)], at)
        );
    }
    let (bytes, offsets) = pack(&[&long, &plain]);
    let train = [TextShard { bytes: &bytes, offsets: &offsets }];
    let (bytes, offsets) = pack(&[LEAK]);
    let eval = [TextShard { bytes: &bytes, offsets: &offsets }];
    for after in [1, 10, 30, 100] {
        let params = ContaminationParams { threads: 1, ..Default::default() };
        let job = Job::new();
        let waited = std::thread::scope(|scope| {
            let work = scope.spawn(|| contamination(&train, &eval, None, &params, &job));
            std::thread::sleep(std::time::Duration::from_millis(after));
            job.cancel();
            let since = std::time::Instant::now();
            let _ = work.join().unwrap(); // Cancelled, or over before
            since.elapsed()
        });
        // Ten times the promise: tests run unoptimised beside others.
        assert!(waited.as_millis() < 500, "{waited:?}");
    }
}

#[test]
fn bad_input_and_nothing_to_check() {
    let (bytes, offsets) = pack(&["a b c"]);
    let shard = [TextShard { bytes: &bytes, offsets: &offsets }];
    let params = ContaminationParams { words: 0, ..Default::default() };
    let job = Job::new();
    assert!(matches!(contamination(&shard, &shard, None, &params, &job), Err(Error::Usage { .. })));
    let params = ContaminationParams::default();
    assert_eq!(contamination(&shard, &[], None, &params, &job).unwrap(), Contamination::default());
    let found = contamination(&[], &shard, None, &params, &job).unwrap();
    assert_eq!((found.hits.len(), found.set_rows, found.eval_texts), (0, vec![0], 1));
    let bad = [TextShard { bytes: b"\xff", offsets: &[0, 1] }];
    assert!(matches!(contamination(&bad, &shard, None, &params, &job), Err(Error::Usage { .. })));
    assert!(matches!(contamination(&shard, &bad, None, &params, &job), Err(Error::Usage { .. })));
    job.cancel();
    assert!(matches!(contamination(&shard, &shard, None, &params, &job), Err(Error::Cancelled)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    #[test]
    fn equals_naive(
        train in prop::collection::vec("([abc]{1,2}[ ,]{1,2}){0,12}", 0..30),
        eval in prop::collection::vec("([abc]{1,2}[ .]{1,2}){0,9}", 0..4),
        words in 1usize..6,
        common in 0u32..4,
        units in prop::sample::select(vec![Units::Auto, Units::Chars]),
    ) {
        let train: Vec<&str> = train.iter().map(String::as_str).collect();
        let eval: Vec<&str> = eval.iter().map(String::as_str).collect();
        let params = ContaminationParams { words, chars: 3, units, common, threads: 1 };
        let sets = vec![0; eval.len()];
        let got = run(&train, &eval, &params);
        prop_assert_eq!(&got.hits, &naive::contamination(&train, &eval, &sets, &params));
        prop_assert_eq!(got, run(&train, &eval, &ContaminationParams { threads: 3, ..params }));
    }
}
