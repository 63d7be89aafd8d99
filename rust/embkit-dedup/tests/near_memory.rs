//! The memory cap of near-duplicates: the same result through files, and what goes wrong there.

use embkit_core::{Error, Job, TextShard};
use embkit_dedup::{Clusters, DedupParams, ShingleParams, near_duplicates};
use proptest::prelude::*;
use std::path::PathBuf;

/// A fresh directory, removed at the end.
struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("embkit-near-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
    fn files(&self) -> usize {
        std::fs::read_dir(&self.0).unwrap().count()
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn run(texts: &[String], params: &DedupParams) -> Result<Clusters, Error> {
    let mut offsets = vec![0u64];
    texts.iter().for_each(|t| offsets.push(offsets[offsets.len() - 1] + t.len() as u64));
    let bytes = texts.concat();
    let shard = TextShard { bytes: bytes.as_bytes(), offsets: &offsets };
    near_duplicates(&[shard], None, params, &Job::new())
}

/// Texts that overlap with their neighbours of one of `topics` rings.
fn rings(n: usize, topics: usize) -> Vec<String> {
    let mut state = 7u64;
    let mut below = |n: usize| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % n
    };
    let text = |_| {
        let (topic, from, length) = (below(topics), below(60), 10 + below(30));
        let words = (from..from + length).map(|w| format!("t{topic}w{}", w % 60));
        words.collect::<Vec<_>>().join(" ")
    };
    (0..n).map(text).collect()
}

#[test]
fn caps_do_not_show() {
    let dir = Dir::new("caps");
    let texts = rings(3000, 150);
    for threshold in [0.5, 0.8] {
        let free = DedupParams { threshold, ..Default::default() };
        let want = run(&texts, &free).unwrap();
        let together = want.representative.iter().enumerate().filter(|(i, r)| *i as u64 != **r);
        assert!(together.count() > 500);
        // From the least cap (many segments) to one that holds nearly everything.
        for (room, threads) in [(1 << 16, 1), (1 << 18, 3), (1 << 20, 2), (1 << 22, 1)] {
            let memory = Some(40 * texts.len() as u64 + room);
            let spill = Some(dir.0.clone());
            let params = DedupParams { memory, spill, threads, ..free.clone() };
            assert!(run(&texts, &params).unwrap() == want, "{threshold} {room} {threads}");
            assert_eq!(dir.files(), 0);
        }
    }
}

#[test]
fn a_bucket_larger_than_the_room() {
    let dir = Dir::new("bucket");
    let base: Vec<String> = (0..40).map(|w| format!("word{w}")).collect();
    let texts: Vec<String> = (0..20_000).map(|i| format!("{} tail{i}", base.join(" "))).collect();
    let want = run(&texts, &DedupParams::default()).unwrap();
    assert!(want.representative.iter().all(|r| *r == want.representative[0]));
    let memory = Some(40 * texts.len() as u64 + (1 << 16));
    let params = DedupParams { memory, spill: Some(dir.0.clone()), ..Default::default() };
    assert_eq!(run(&texts, &params).unwrap(), want);
}

#[test]
fn bad_caps() {
    let dir = Dir::new("bad");
    let texts = rings(100, 5);
    let params = |memory, spill| DedupParams { memory, spill, ..Default::default() };
    let least = 40 * 100 + (1 << 16);
    assert!(run(&texts, &params(Some(least), Some(dir.0.clone()))).is_ok());
    match run(&texts, &params(Some(least - 1), Some(dir.0.clone()))) {
        Err(Error::Usage { fix, .. }) => assert!(fix.contains(&least.to_string()), "{fix}"),
        other => panic!("{other:?}"),
    }
    assert!(matches!(run(&texts, &params(Some(1 << 30), None)), Err(Error::Usage { .. })));
    let texts = rings(6000, 300);
    let nowhere = Some(dir.0.join("missing"));
    let got = run(&texts, &params(Some(40 * 6000 + (1 << 16)), nowhere));
    assert!(matches!(got, Err(Error::Io { .. })), "{got:?}");
}

#[test]
fn priorities_of_another_length() {
    let shard = TextShard { bytes: b"ab", offsets: &[0, 1, 2] };
    let got = near_duplicates(&[shard], Some(&[0]), &DedupParams::default(), &Job::new());
    assert!(matches!(got, Err(Error::Usage { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10))]
    #[test]
    fn any_cap_any_text(
        spans in prop::collection::vec((0usize..40, 1usize..20), 300..900),
        room in (1u64 << 16)..(1 << 18),
        threshold in 0.2f64..=1.0,
    ) {
        let dir = Dir::new("any");
        let texts: Vec<String> = spans.iter().map(|&(from, length)| {
            (from..from + length).map(|w| format!("w{w}")).collect::<Vec<_>>().join(" ")
        }).collect();
        let shingle = ShingleParams { words: 1, chars: 5 };
        let free = DedupParams { threshold, shingle, threads: 1, ..Default::default() };
        let want = run(&texts, &free).unwrap();
        let memory = Some(40 * texts.len() as u64 + room);
        let params = DedupParams { memory, spill: Some(dir.0.clone()), ..free };
        prop_assert_eq!(run(&texts, &params).unwrap(), want);
        prop_assert_eq!(dir.files(), 0);
    }
}

/// 4 MB of text in one row beside a few small ones; 100 MB when EMBKIT_TEST_FULL is set.
#[test]
fn one_large_text() {
    let full = std::env::var_os("EMBKIT_TEST_FULL").is_some();
    let words: u64 = if full { 13_000_000 } else { 500_000 };
    let large: String = (0..words).map(|i| format!("w{:06} ", i * 7919 % 1_000_003)).collect();
    let texts = vec!["a small text here".to_owned(), large.clone(), format!("{large} end")];
    let got = run(&texts, &DedupParams::default()).unwrap();
    assert_eq!(got.representative[0], 0);
    assert_eq!(got.representative[1], got.representative[2]);
}

/// The job is looked at often enough in every pass: cancelled at any time, the call ends soon.
#[test]
fn cancels_anywhere() {
    let dir = Dir::new("cancel");
    let texts = rings(2000, 100);
    let memory = Some(40 * 2000 + (1 << 16));
    let params =
        DedupParams { memory, spill: Some(dir.0.clone()), threads: 1, ..Default::default() };
    let mut offsets = vec![0u64];
    texts.iter().for_each(|t| offsets.push(offsets[offsets.len() - 1] + t.len() as u64));
    let bytes = texts.concat();
    let shard = TextShard { bytes: bytes.as_bytes(), offsets: &offsets };
    let started = std::time::Instant::now();
    near_duplicates(&[shard], None, &params, &Job::new()).unwrap();
    let whole = started.elapsed();
    let mut cancelled = 0;
    for part in 1..6 {
        let job = Job::new();
        let result = std::thread::scope(|scope| {
            let call = scope.spawn(|| near_duplicates(&[shard], None, &params, &job));
            std::thread::sleep(whole * part / 6);
            job.cancel();
            call.join().unwrap()
        });
        cancelled += usize::from(matches!(result, Err(Error::Cancelled)));
        assert_eq!(dir.files(), 0);
    }
    assert!(cancelled > 0, "no call was still running");
}
