//! Approximate search against exact search.

use embkit_ann::{Calibration, Isa, Ivf, Part, SearchParams, TopK, Vectors, calibrate, topk};
use embkit_core::{Error, Job};

/// Unit vectors in clusters, every tenth one a copy of its neighbour.
fn vectors(n: usize, d: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / 8_388_608.0 - 1.0
    };
    let centres: Vec<f32> = (0..n.div_ceil(40) * d).map(|_| next()).collect();
    let mut all: Vec<f32> = Vec::with_capacity(n * d);
    for i in 0..n {
        if i % 10 == 9 {
            all.extend_from_within((i - 1) * d..i * d);
            continue;
        }
        let from = i * 7 % n.div_ceil(40);
        let row: Vec<f32> = (0..d).map(|k| centres[from * d + k] + 0.6 * next()).collect();
        let norm = row.iter().map(|x| x * x).sum::<f32>().sqrt();
        all.extend(row.iter().map(|x| x / norm));
    }
    all
}

fn recall(got: &TopK, want: &TopK, k: usize) -> f64 {
    let pairs = got.score.chunks(k).zip(want.score.chunks(k));
    let found = pairs.map(|(got, want)| got.iter().filter(|s| **s >= want[k - 1]).count());
    found.sum::<usize>() as f64 / want.score.len() as f64
}

#[test]
fn more_probes_find_more_and_all_find_everything() {
    let (n, d, k) = (6000, 32, 20);
    let values = vectors(n, d, 1);
    let all = Vectors::new(&[Part::F32(&values)], d).unwrap();
    let queries = Vectors::new(&[Part::F32(&values[..500 * d])], d).unwrap();
    for isa in Isa::available() {
        let params = SearchParams { isa, k, threads: 1, memory: 0 };
        let want = topk(&queries, &all, &params, &Job::new()).unwrap();
        let ivf = Ivf::build(isa, &all, 64, 3, 1, &Job::new()).unwrap();
        let mut last = 0.0;
        for probes in [1, 4, 16, 64] {
            let got = ivf.search(&queries, &all, k, probes, 1, &Job::new()).unwrap();
            let now = recall(&got, &want, k);
            assert!(now >= last, "{isa:?}: {probes} probes find {now}, fewer {last}");
            assert!(probes > 1 || now < 0.97, "{isa:?}: the test's corpus is too easy: {now}");
            for (q, rows) in got.row.chunks(k).enumerate() {
                let mut sorted = rows.to_vec();
                sorted.sort_unstable();
                sorted.dedup();
                assert_eq!(sorted.len(), k, "query {q} has a row twice");
                for (row, score) in rows.iter().zip(&got.score[q * k..]) {
                    let at = |i: usize| &values[i * d..][..d];
                    assert_eq!(embkit_ann::dot(at(q), at(*row as usize)), *score);
                }
            }
            last = now;
        }
        assert!(last > 0.9999, "{isa:?}: all lists hold everything, found {last}");
    }
}

#[test]
fn threads_and_blocks_do_not_show() {
    let (n, d, k) = (5000, 24, 10);
    let values = vectors(n, d, 2);
    let all = Vectors::new(&[Part::F32(&values)], d).unwrap();
    let isa = Isa::best();
    let one = Ivf::build(isa, &all, 50, 7, 1, &Job::new()).unwrap();
    let want = one.search(&all, &all, k, 6, 1, &Job::new()).unwrap();
    for threads in [2, 3, 7] {
        let many = Ivf::build(isa, &all, 50, 7, threads, &Job::new()).unwrap();
        assert!(many.search(&all, &all, k, 6, threads, &Job::new()).unwrap() == want, "{threads}");
    }
    // Queries searched in pieces.
    let half = n / 2 * d;
    let pieces = [&values[..half], &values[half..]].map(|part| {
        let part = Vectors::new(&[Part::F32(part)], d).unwrap();
        one.search(&part, &all, k, 6, 2, &Job::new()).unwrap()
    });
    assert_eq!([&pieces[0].row[..], &pieces[1].row].concat(), want.row);
}

#[test]
fn calibration_reaches_the_recall_and_measures_it() {
    let (n, d, k) = (8000, 32, 20);
    let values = vectors(n, d, 4);
    let all = Vectors::new(&[Part::F32(&values)], d).unwrap();
    let params = SearchParams { k, ..SearchParams::default() };
    let ivf = Ivf::build(params.isa, &all, 80, 0, 0, &Job::new()).unwrap();
    let run = |recall| calibrate(&ivf, &all, &all, recall, 5, &params, &Job::new()).unwrap();
    let want = topk(&all, &all, &params, &Job::new()).unwrap();
    let mut before: Option<Calibration> = None;
    for asked in [0.8, 0.95, 0.99] {
        let found = run(asked);
        assert!(found.recall >= asked && found.queries > 300, "{found:?}");
        assert!(before.is_none_or(|b| b.probes < found.probes), "{before:?} {found:?}");
        let got = ivf.search(&all, &all, k, found.probes, 0, &Job::new()).unwrap();
        let whole = recall(&got, &want, k);
        assert!(
            (whole - found.recall).abs() < 5.0 * found.error + 1e-3,
            "{found:?}, in all {whole}"
        );
        before = Some(found);
    }
    assert_eq!(run(1.0).probes, run(1.0).probes);
}

#[test]
fn the_sample_is_not_where_the_lists_began() {
    // One seed for both, queries that are the corpus: lists lie around the rows that they began from,
    // so those rows find more than others do.
    let (n, d, k) = (12_000, 24, 20);
    let values = vectors(n, d, 5);
    let all = Vectors::new(&[Part::F32(&values)], d).unwrap();
    let params = SearchParams { k, ..SearchParams::default() };
    let ivf = Ivf::build(params.isa, &all, 800, 0, 0, &Job::new()).unwrap();
    let found = calibrate(&ivf, &all, &all, 0.9, 0, &params, &Job::new()).unwrap();
    let got = ivf.search(&all, &all, k, found.probes, 0, &Job::new()).unwrap();
    let whole = recall(&got, &topk(&all, &all, &params, &Job::new()).unwrap(), k);
    assert!((whole - found.recall).abs() < 4.0 * found.error, "{found:?}, in all {whole}");
}

#[test]
fn calibration_stops_when_it_is_cancelled() {
    // Slow on purpose: the exact search of the sample alone takes seconds in plain Rust.
    let (n, d) = (60_000, 64);
    let values = vectors(n, d, 8);
    let all = Vectors::new(&[Part::F32(&values)], d).unwrap();
    let ivf = Ivf::build(Isa::best(), &all, 32, 0, 1, &Job::new()).unwrap();
    let params = SearchParams { isa: Isa::PortableInt8, k: 10, threads: 1, memory: 0 };
    let job = Job::new();
    let took = std::thread::scope(|scope| {
        let work = scope.spawn(|| calibrate(&ivf, &all, &all, 0.9, 0, &params, &job));
        std::thread::sleep(std::time::Duration::from_millis(100));
        let cancelled = std::time::Instant::now();
        job.cancel();
        assert!(matches!(work.join().unwrap(), Err(Error::Cancelled)));
        cancelled.elapsed()
    });
    assert!(took.as_millis() < 300, "{took:?}");
}

#[test]
fn short_lists_are_completed_and_bad_input_is_refused() {
    // One far-off row in a list of its own: its query needs rows of other lists.
    let (n, d, k) = (400, 8, 60);
    let values = vectors(n, d, 6);
    let all = Vectors::new(&[Part::F32(&values)], d).unwrap();
    let params = SearchParams { k, ..SearchParams::default() };
    let ivf = Ivf::build(params.isa, &all, 40, 0, 1, &Job::new()).unwrap();
    let got = ivf.search(&all, &all, k, 1, 1, &Job::new()).unwrap();
    assert_eq!(got.row.len(), n * k);
    // Copies only: most lists stay empty.
    let same = [1.0, 2.0].repeat(100);
    let same = Vectors::new(&[Part::F32(&same)], 2).unwrap();
    let ivf = Ivf::build(params.isa, &same, 10, 0, 1, &Job::new()).unwrap();
    let got = ivf.search(&same, &same, 100, 1, 1, &Job::new()).unwrap();
    assert!(got.row.len() == 10_000 && got.score.iter().all(|s| *s == 5.0));

    let usage = |lists| Ivf::build(params.isa, &all, lists, 0, 1, &Job::new()).err();
    for lists in [0, n + 1] {
        assert!(matches!(usage(lists), Some(Error::Usage { .. })));
    }
    for recall in [0.0, -1.0, 1.5, f64::NAN] {
        let got = calibrate(&ivf, &same, &same, recall, 0, &params, &Job::new());
        assert!(matches!(got, Err(Error::Usage { .. })), "{recall}");
    }
    let job = Job::new();
    job.cancel();
    assert!(matches!(ivf.search(&same, &same, 1, 1, 1, &job), Err(Error::Cancelled)));
    assert!(matches!(Ivf::build(params.isa, &all, 4, 0, 1, &job), Err(Error::Cancelled)));
}
