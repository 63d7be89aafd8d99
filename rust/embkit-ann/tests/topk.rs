//! Exact search against a full sort, on every instruction set of the machine: the same bits.

use embkit_ann::{Isa, Part, SearchParams, TopK, Vectors, naive, topk};
use embkit_core::{Error, Job, Result};
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

fn search(queries: &[f32], corpus: &[f32], d: usize, params: SearchParams) -> Result<TopK> {
    let queries = Vectors::new(&[Part::F32(queries)], d)?;
    topk(&queries, &Vectors::new(&[Part::F32(corpus)], d)?, &params, &Job::new())
}

/// Rows and scores must equal the naive ones bit for bit.
fn check(queries: &[f32], corpus: &[f32], d: usize, params: SearchParams) {
    let got = search(queries, corpus, d, params).unwrap();
    let (k, want) = (params.k, naive::topk(queries, corpus, d, params.k));
    assert_eq!(got.row.len(), want.len() * k);
    for (q, want) in want.iter().enumerate() {
        let rows = got.row[q * k..][..k].iter().copied();
        let got: Vec<(u32, f32)> = rows.zip(got.score[q * k..][..k].iter().copied()).collect();
        assert_eq!(&got, want, "{params:?} d={d} query {q}");
    }
}

fn on(isa: Isa, k: usize, threads: usize) -> SearchParams {
    SearchParams { isa, k, threads, memory: 0 }
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
                    check(&queries, &corpus, d, on(isa, k, 1));
                }
            }
        }
    }
}

#[test]
fn threads_and_memory_do_not_show() {
    // Few queries share out the corpus, many share out the queries; little memory streams the corpus
    // past each group of queries: all must come to the same.
    let (n, d) = (40_000, 24);
    let corpus = vectors(n, d, 3);
    let all = Vectors::new(&[Part::F32(&corpus)], d).unwrap();
    for nq in [1, 5, 300] {
        let values = vectors(nq, d, 4);
        let queries = Vectors::new(&[Part::F32(&values)], d).unwrap();
        let mut want = None;
        for isa in Isa::available() {
            for (threads, memory) in [(1, 0), (2, 0), (3, 1), (8, 0), (2, 200_000)] {
                let job = Job::new();
                let params = SearchParams { isa, k: 50, threads, memory };
                let got = topk(&queries, &all, &params, &job).unwrap();
                assert_eq!(job.done.load(Ordering::Relaxed), nq as u64);
                let want = want.get_or_insert_with(|| (got.row.clone(), got.score.clone()));
                assert!((&got.row, &got.score) == (&want.0, &want.1), "{nq} queries, {params:?}");
            }
        }
    }
}

#[test]
fn many_queries_of_a_large_corpus_are_reordered_unseen() {
    // Enough of both that queries are sorted by likeness: each result must still be its query's.
    let (n, nq, d) = (70_000, 1100, 64);
    let (corpus, queries) = (vectors(n, d, 12), vectors(nq, d, 13));
    let got = search(&queries, &corpus, d, on(Isa::best(), 3, 2)).unwrap();
    for q in (0..nq).step_by(110) {
        let want = naive::topk(&queries[q * d..][..d], &corpus, d, 3).remove(0);
        let rows = got.row[q * 3..][..3].iter().copied();
        let found: Vec<(u32, f32)> = rows.zip(got.score[q * 3..][..3].iter().copied()).collect();
        assert_eq!(found, want, "query {q}");
    }
}

#[test]
fn copies_zeros_and_ties_go_to_the_lower_row() {
    let d = 5;
    let base = [[1., 0., 2., 0., 0.], [0., 1., 0., 0., 3.], [0.; 5], [-1., 0., -2., 0., 0.]];
    let corpus: Vec<f32> = (0..500).flat_map(|i| base[i * 7 % 4]).collect();
    let queries: Vec<f32> = base.iter().flatten().copied().collect();
    for isa in Isa::available() {
        for k in [1, 124, 125, 126, 300, 500] {
            check(&queries, &corpus, d, on(isa, k, 2));
        }
    }
}

#[test]
fn thousands_of_copies_and_almost_copies_are_exact() {
    // Half the corpus is one vector, a quarter differs from it by less than int8 can see.
    let (n, d) = (6000, 40);
    let mut corpus = vectors(n, d, 5);
    let one = corpus[..d].to_vec();
    for (i, row) in corpus.chunks_mut(d).enumerate() {
        if i % 4 < 3 {
            row.copy_from_slice(&one);
        }
        if i % 4 == 2 {
            row[i % d] += 1e-5 * (i % 7) as f32;
        }
    }
    let queries = [one, vectors(3, d, 6)].concat();
    for isa in Isa::available() {
        for k in [1, 10, 100] {
            check(&queries, &corpus, d, on(isa, k, 1));
        }
    }
}

#[test]
fn lengths_of_every_size_are_exact() {
    // Rows from 1e-25 to 1e15 long, one element far above the rest: what int8 is worst at.
    let (n, d) = (900, 24);
    let mut corpus = vectors(n, d, 7);
    for (i, row) in corpus.chunks_mut(d).enumerate() {
        let length = 10f32.powi(i as i32 % 41 - 25);
        row[i % d] *= 50.0;
        row.iter_mut().for_each(|x| *x *= length);
    }
    for scale in [1e-20, 1e-6, 1.0, 1e12] {
        let mut queries = vectors(7, d, 8);
        queries.iter_mut().for_each(|x| *x *= scale);
        for isa in Isa::available() {
            check(&queries, &corpus, d, on(isa, 40, 1));
        }
    }
}

#[test]
fn half_floats_are_searched_as_their_values() {
    // Sixteenths are exact in half floats.
    let d = 6;
    let values: Vec<f32> = vectors(300, d, 9).iter().map(|x| (x * 16.0).round() / 16.0).collect();
    let half = |x: &f32| match x.to_bits() {
        0 | 0x8000_0000 => 0,
        bits => {
            (bits >> 16 & 0x8000 | ((bits >> 23 & 0xff) - 112) << 10 | bits >> 13 & 0x3ff) as u16
        }
    };
    let halves: Vec<u16> = values[..100 * d].iter().map(half).collect();
    let parts = [Part::F16(&halves), Part::F32(&values[100 * d..])];
    let corpus = Vectors::new(&parts, d).unwrap();
    let whole = Vectors::new(&[Part::F32(&values)], d).unwrap();
    for isa in Isa::available() {
        let got = topk(&corpus, &corpus, &on(isa, 20, 1), &Job::new()).unwrap();
        let want = topk(&whole, &whole, &on(isa, 20, 1), &Job::new()).unwrap();
        assert!(got.row == want.row && got.score == want.score);
    }
}

#[test]
fn little_is_scored_in_full() {
    // The point of screening: on spread-out vectors the window holds a few times k.
    let (n, d) = (20_000, 128);
    let corpus = vectors(n, d, 10);
    let queries = vectors(20, d, 11);
    for isa in Isa::available() {
        let got = search(&queries, &corpus, d, on(isa, 50, 1)).unwrap();
        assert!(got.rescored < 20 * 50 * 4, "{isa:?}: {}", got.rescored);
    }
}

#[test]
fn bad_input_names_the_row() {
    let job = Job::new();
    let good = vectors(6, 4, 1);
    let usage = |queries: &[f32], corpus: &[f32], d, k| match search(
        queries,
        corpus,
        d,
        SearchParams { k, threads: 2, ..SearchParams::default() },
    ) {
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
    let two = SearchParams { k: 2, ..SearchParams::default() };
    assert_eq!(search(&[], &good, 4, two).unwrap(), TopK::default());
    // As large as a row may be: scores stay finite and ordered.
    let large = search(&[1.8e19], &[-1.8e19, 1.8e19], 1, two).unwrap();
    assert!(large.row == [1, 0] && large.score.iter().all(|s| s.is_finite()));
    job.cancel();
    let all = Vectors::new(&[Part::F32(&good)], 4).unwrap();
    assert!(matches!(topk(&all, &all, &two, &job), Err(Error::Cancelled)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn equals_naive(
        n in 1usize..200, nq in 1usize..40, d in 1usize..40, k in 1usize..80, seed in any::<u64>(),
        coarse in any::<bool>(), threads in 1usize..4, memory in 0usize..3,
    ) {
        let k = k.min(n);
        // Coarse values make exact ties common.
        let draw = |n, seed| -> Vec<f32> {
            let v = vectors(n, d, seed);
            if coarse { v.iter().map(|x| (x * 2.0).round()).collect() } else { v }
        };
        let (queries, corpus) = (draw(nq, seed), draw(n, seed ^ 1));
        for isa in Isa::available() {
            check(&queries, &corpus, d, SearchParams { isa, k, threads, memory });
        }
    }
}
