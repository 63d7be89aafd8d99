//! Exact duplicates against a map of strings, in memory and through partition files.

use embkit_core::{Error, Job, TextShard};
use embkit_dedup::{ExactParams, Punctuation, exact_duplicates, naive};
use proptest::prelude::*;

fn pack(texts: &[&str]) -> (Vec<u8>, Vec<u64>) {
    let mut offsets = vec![0u64];
    texts.iter().for_each(|t| offsets.push(offsets[offsets.len() - 1] + t.len() as u64));
    (texts.concat().into_bytes(), offsets)
}

fn run(parts: &[&[&str]], priority: Option<&[u16]>, params: &ExactParams) -> Vec<u64> {
    let packed: Vec<_> = parts.iter().map(|part| pack(part)).collect();
    let shards: Vec<TextShard> =
        packed.iter().map(|(bytes, offsets)| TextShard { bytes, offsets }).collect();
    exact_duplicates(&shards, priority, params, &Job::new()).unwrap()
}

#[test]
fn what_is_equal_and_who_stays() {
    let texts =
        ["Hello,  World", "", "hello, world\n", "hello world", "  ", "HELLO-WORLD!", "??", "??"];
    let keep = ExactParams::default();
    assert_eq!(run(&[&texts], None, &keep), [0, 1, 0, 3, 4, 5, 6, 6]);
    let drop = ExactParams { punctuation: Punctuation::Drop, ..ExactParams::default() };
    assert_eq!(run(&[&texts], None, &drop), [0, 1, 0, 0, 4, 0, 6, 7]);
    // A source of a lower number wins, then the first row.
    let priority = [2, 0, 1, 1, 0, 1, 0, 0];
    assert_eq!(run(&[&texts], Some(&priority), &drop), [2, 1, 2, 2, 4, 2, 6, 7]);
    // Spaces part words, and nothing parts characters of scripts without spaces.
    let texts = ["你好，世界", "你好 世界", "a b", "ab", "c++", "c", "a\0b", "a b"];
    assert_eq!(run(&[&texts], None, &drop), [0, 0, 2, 3, 4, 5, 2, 2]);
    assert_eq!(run(&[&texts], None, &keep), [0, 1, 2, 3, 4, 5, 6, 2]);
}

#[test]
fn partition_files_hold_a_cap_and_are_removed() {
    let dir = tempfile::tempdir().unwrap();
    // Half of the rows are one text: the partition that has it is no larger for that.
    let texts: Vec<String> = (0..20_000)
        .map(|i| if i % 2 == 0 { "Same.".into() } else { format!("t {}", i / 4) })
        .collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let want = run(&[&texts], None, &ExactParams::default());
    assert_eq!(&want[..4], [0, 1, 0, 1]);
    for threads in [1, 2, 7] {
        let params = ExactParams {
            threads,
            memory: 100_000,
            spill: Some(dir.path().into()),
            ..ExactParams::default()
        };
        assert_eq!(run(&[&texts[..7], &[], &texts[7..]], None, &params), want);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
    let (bytes, offsets) = pack(&texts);
    let shard = [TextShard { bytes: &bytes, offsets: &offsets }];
    let none = ExactParams { memory: 1, ..ExactParams::default() };
    let nowhere = ExactParams { spill: Some("/nowhere/at/all".into()), ..none.clone() };
    let job = Job::new();
    assert!(matches!(exact_duplicates(&shard, None, &none, &job), Err(Error::Usage { .. })));
    assert!(matches!(exact_duplicates(&shard, None, &nowhere, &job), Err(Error::Io { .. })));
    job.cancel();
    let stopped = ExactParams { spill: Some(dir.path().into()), ..none };
    assert!(matches!(exact_duplicates(&shard, None, &stopped, &job), Err(Error::Cancelled)));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn degenerate_and_bad_input() {
    let params = ExactParams::default();
    assert!(run(&[], None, &params).is_empty());
    assert!(run(&[&[]], None, &params).is_empty());
    assert_eq!(run(&[&[""; 3]], None, &params), [0, 1, 2]);
    let same = vec!["All rows are identical"; 100_000];
    assert_eq!(run(&[&same], None, &params), vec![0; 100_000]);
    let job = Job::new();
    let shard = [TextShard { bytes: b"ok\xff", offsets: &[0, 2, 3] }];
    match exact_duplicates(&shard, None, &params, &job) {
        Err(Error::Usage { what, .. }) => {
            assert!(what.contains("text row 1 is not UTF-8"), "{what}")
        }
        other => panic!("{other:?}"),
    }
    let shard = [TextShard { bytes: b"ok", offsets: &[0, 2] }];
    let wrong = exact_duplicates(&shard, Some(&[]), &params, &job);
    assert!(matches!(wrong, Err(Error::Usage { .. })));
    assert!(matches!(Punctuation::parse("loose"), Err(Error::Usage { .. })));
}

#[test]
fn one_long_document_stops_within_50_ms() {
    let long = "Some words, é and 漢字.  ".repeat(1 << 20);
    let (bytes, offsets) = pack(&[&long, &long]);
    let shard = [TextShard { bytes: &bytes, offsets: &offsets }];
    for punctuation in [Punctuation::Keep, Punctuation::Drop] {
        let params = ExactParams { punctuation, threads: 1, ..ExactParams::default() };
        let job = Job::new();
        let waited = std::thread::scope(|scope| {
            let work = scope.spawn(|| exact_duplicates(&shard, None, &params, &job));
            std::thread::sleep(std::time::Duration::from_millis(20));
            job.cancel();
            let since = std::time::Instant::now();
            assert!(matches!(work.join().unwrap(), Err(Error::Cancelled)));
            since.elapsed()
        });
        // Ten times the promise: tests run unoptimised beside others.
        assert!(waited.as_millis() < 500, "{waited:?}");
    }
}

proptest! {
    #[test]
    fn equals_naive(
        texts in prop::collection::vec("[aAbé,. ]{0,4}|[漢字，\u{301}e ]{0,3}", 0..40),
        seed in 0u32..5,
        drop in any::<bool>(),
        cut in 0usize..40,
    ) {
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let priority: Vec<u16> = (0..texts.len() as u32).map(|i| ((i * 7 + seed) % 3) as u16).collect();
        let punctuation = if drop { Punctuation::Drop } else { Punctuation::Keep };
        let want = naive::exact_duplicates(&texts, &priority, punctuation);
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = texts.split_at(cut.min(texts.len()));
        for (threads, memory) in [(1, 0), (2, 500), (7, 1 << 20)] {
            let spill = Some(dir.path().into());
            let params = ExactParams { punctuation, threads, memory, spill };
            prop_assert_eq!(&run(&[a, b], Some(&priority), &params), &want);
        }
    }
}
