//! Near-duplicates of another set, against all pairs compared.

use embkit_core::{Error, Job, TextShard};
use embkit_dedup::{DedupParams, Matches, jaccard, near_matches, normalize, shingles};
use proptest::prelude::*;

fn shard(texts: &[String]) -> (Vec<u8>, Vec<u64>) {
    let mut offsets = vec![0];
    texts.iter().for_each(|t| offsets.push(offsets[offsets.len() - 1] + t.len() as u64));
    (texts.concat().into_bytes(), offsets)
}

fn run(texts: &[String], others: &[String], params: &DedupParams) -> Matches {
    let ((a, a_offsets), (b, b_offsets)) = (shard(texts), shard(others));
    let (a, b) = (
        TextShard { bytes: &a, offsets: &a_offsets },
        TextShard { bytes: &b, offsets: &b_offsets },
    );
    near_matches(&[a], &[b], params, &Job::new()).unwrap()
}

fn similarity(a: &str, b: &str, params: &DedupParams) -> f64 {
    if normalize(a) == normalize(b) && !normalize(a).is_empty() {
        return 1.0;
    }
    jaccard(&shingles(a, params.shingle), &shingles(b, params.shingle))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn equals_all_pairs_where_the_bands_propose_every_pair(
        texts in prop::collection::vec("([a-c] ){0,9}", 0..12),
        others in prop::collection::vec("([a-c] ){0,9}", 0..12),
    ) {
        // So low a threshold takes a thousand bands of one hash: no pair of so few shingles is missed.
        let params = DedupParams { threshold: 0.05, threads: 2, ..Default::default() };
        let found = run(&texts, &others, &params);
        for (row, text) in texts.iter().enumerate() {
            let similar = |o: &String| similarity(text, o, &params);
            match found.row[row] {
                Matches::NONE => prop_assert!(others.iter().all(|o| similar(o) < params.threshold)),
                at => {
                    let exact = similar(&others[at as usize]);
                    prop_assert!(exact >= params.threshold);
                    prop_assert_eq!(found.similarity[row], exact as f32);
                }
            }
        }
    }
}

#[test]
fn nothing_matches_nothing() {
    let params = DedupParams::default();
    let texts = [String::new(), "   ".into(), "one text".into()];
    assert_eq!(run(&texts, &[], &params).row, vec![Matches::NONE; 3]);
    assert_eq!(run(&texts, &texts[..2], &params).row, vec![Matches::NONE; 3]);
    assert!(run(&[], &texts, &params).row.is_empty());
    assert_eq!(run(&texts, &texts, &params).row, [Matches::NONE, Matches::NONE, 2]);
    let bad = DedupParams { threshold: 0.0, ..params };
    let found = near_matches(&[], &[], &bad, &Job::new());
    assert!(matches!(found, Err(Error::Usage { .. })));
}

#[test]
fn many_near_texts_cost_one_comparison_each() {
    let near = |i: usize| format!("{} variant {i}", "the same long sentence again ".repeat(3));
    let texts: Vec<String> = (0..20_000).map(near).collect();
    let others: Vec<String> = (0..20_000).map(|i| near(i + 50_000)).collect();
    let params = DedupParams { threshold: 0.6, ..Default::default() };
    let started = std::time::Instant::now();
    let found = run(&texts, &others, &params);
    assert!(found.row.iter().all(|&row| row != Matches::NONE));
    // All pairs would be 4 * 10^8 comparisons: minutes.
    assert!(started.elapsed().as_secs() < 20, "{:?}", started.elapsed());
}

#[test]
fn a_cancelled_job_ends() {
    let (bytes, offsets) = shard(&["a b c d".into(), "b c d e".into()]);
    let shards = [TextShard { bytes: &bytes, offsets: &offsets }];
    let job = Job::new();
    job.cancel();
    let found = near_matches(&shards, &shards, &DedupParams::default(), &job);
    assert!(matches!(found, Err(Error::Cancelled)));
}
