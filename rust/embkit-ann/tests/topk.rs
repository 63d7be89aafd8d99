//! Exact search against a full sort, on every instruction set of the machine.

use embkit_ann::{Isa, TopK, naive, topk, topk_on};
use embkit_core::{Error, Job};
use proptest::prelude::*;
use std::sync::atomic::Ordering;

fn vectors(n: usize, d: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / 8_388_608.0 - 1.0
    };
    (0..n * d).map(|_| next()).collect()
}

/// Rows and scores must equal the naive ones: bit for bit with FMA, and for the portable form (which
/// rounds twice) up to swaps of scores that rounding cannot tell apart.
fn check(isa: Isa, queries: &[f32], corpus: &[f32], d: usize, k: usize, threads: usize) -> TopK {
    let got = topk_on(isa, queries, corpus, d, k, threads, &Job::new()).unwrap();
    let want = naive::topk(queries, corpus, d, k);
    assert_eq!(got.row.len(), want.len() * k);
    for (q, want) in want.iter().enumerate() {
        let rows = &got.row[q * k..][..k];
        let scores = &got.score[q * k..][..k];
        if isa == Isa::Portable {
            let norms = |v: &[f32]| naive::dot(v, v).sqrt();
            for (i, (row, score)) in want.iter().enumerate() {
                let query = &queries[q * d..][..d];
                let slack =
                    1e-6 * d as f32 * norms(query) * norms(&corpus[*row as usize * d..][..d]);
                assert!((scores[i] - score).abs() <= slack, "d={d} k={k} query {q} place {i}");
                let own = naive::dot(query, &corpus[rows[i] as usize * d..][..d]);
                assert!((scores[i] - own).abs() <= slack + 1e-6);
            }
            assert!(scores.is_sorted_by(|a, b| a >= b));
        } else {
            let got: Vec<(u32, f32)> = rows.iter().copied().zip(scores.iter().copied()).collect();
            assert_eq!(&got, want, "{isa:?} d={d} k={k} threads={threads} query {q}");
        }
    }
    got
}

#[test]
fn odd_sizes_on_every_isa() {
    const SIZES: [usize; 8] = [1, 2, 3, 17, 97, 129, 256, 1000];
    for isa in Isa::available() {
        for n in SIZES {
            for (d, nq) in
                [(1, 3), (2, 17), (3, 1), (17, 97), (97, 2), (129, 13), (256, 5), (1000, 3)]
            {
                let (queries, corpus) = (vectors(nq, d, 1), vectors(n, d, 2));
                for k in SIZES.into_iter().filter(|k| *k <= n) {
                    check(isa, &queries, &corpus, d, k, 1);
                }
            }
        }
    }
}

#[test]
fn threads_do_not_show() {
    // Few queries share out the corpus, many share out the queries: both must merge to the same.
    let (n, d) = (40_000, 24);
    let corpus = vectors(n, d, 3);
    for nq in [1, 5, 300] {
        let queries = vectors(nq, d, 4);
        for isa in Isa::available() {
            let want = topk_on(isa, &queries, &corpus, d, 50, 1, &Job::new()).unwrap();
            for threads in [2, 3, 8] {
                let job = Job::new();
                let got = topk_on(isa, &queries, &corpus, d, 50, threads, &job).unwrap();
                assert!(got == want, "{isa:?} {nq} queries, {threads} threads");
                assert_eq!(job.done.load(Ordering::Relaxed), nq as u64);
            }
        }
    }
}

#[test]
fn duplicates_zeros_and_ties_go_to_the_lower_row() {
    // Integers: every score is exact in every form, so even the portable rows are fixed.
    let d = 5;
    let base = [[1., 0., 2., 0., 0.], [0., 1., 0., 0., 3.], [0.; 5], [-1., 0., -2., 0., 0.]];
    let corpus: Vec<f32> = (0..500).flat_map(|i| base[i * 7 % 4]).collect();
    let queries: Vec<f32> = base.iter().flatten().copied().collect();
    for isa in Isa::available() {
        for k in [1, 124, 125, 126, 300, 500] {
            let got = topk_on(isa, &queries, &corpus, d, k, 2, &Job::new()).unwrap();
            for (q, want) in naive::topk(&queries, &corpus, d, k).iter().enumerate() {
                let got: Vec<(u32, f32)> =
                    (q * k..(q + 1) * k).map(|i| (got.row[i], got.score[i])).collect();
                assert_eq!(&got, want, "{isa:?} k={k} query {q}");
            }
        }
    }
}

#[test]
fn bad_input_names_the_row() {
    let job = Job::new();
    let good = vectors(6, 4, 1);
    let usage = |queries: &[f32], corpus: &[f32], d, k| match topk(queries, corpus, d, k, 2, &job) {
        Err(Error::Usage { what, .. }) => what,
        other => panic!("expected a usage error, got {other:?}"),
    };
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 2e19] {
        let mut rows = good.clone();
        rows[4 * 4 + 2] = bad;
        assert!(usage(&rows, &good, 4, 1).starts_with("query row 4 "), "{bad}");
        assert!(usage(&good, &rows, 4, 1).starts_with("corpus row 4 "), "{bad}");
    }
    usage(&good, &good, 0, 1);
    usage(&good, &good, 5, 1);
    usage(&good, &good, 4, 0);
    usage(&good, &good, 4, 7);
    usage(&good, &[], 4, 1);
    assert_eq!(topk(&[], &good, 4, 2, 0, &job).unwrap(), TopK::default());
    // As large as a row may be: scores stay finite and ordered.
    let large = vec![1.8e19f32; 1];
    let got = topk(&large, &[-1.8e19, 1.8e19], 1, 2, 1, &job).unwrap();
    assert!(got.row == [1, 0] && got.score.iter().all(|s| s.is_finite()));
    job.cancel();
    assert!(matches!(topk(&good, &good, 4, 1, 1, &job), Err(Error::Cancelled)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn equals_naive(
        n in 1usize..200, nq in 1usize..40, d in 1usize..40, k in 1usize..80, seed in any::<u64>(),
        coarse in any::<bool>(), threads in 1usize..4,
    ) {
        let k = k.min(n);
        // Coarse values make exact ties common.
        let draw = |n, seed| -> Vec<f32> {
            let v = vectors(n, d, seed);
            if coarse { v.iter().map(|x| (x * 2.0).round()).collect() } else { v }
        };
        let (queries, corpus) = (draw(nq, seed), draw(n, seed ^ 1));
        for isa in Isa::available() {
            check(isa, &queries, &corpus, d, k, threads);
        }
    }
}
