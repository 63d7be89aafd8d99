//! Multiply-adds per second of exact search (one element = one multiply-add = 2 flops), one thread.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use embkit_ann::{Isa, Part, SearchParams, Vectors, topk};
use embkit_core::Job;

fn unit_vectors(n: usize, d: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / 8_388_608.0 - 1.0
    };
    let mut out: Vec<f32> = (0..n * d).map(|_| next()).collect();
    for row in out.chunks_mut(d) {
        let norm = row.iter().map(|x| x * x).sum::<f32>().sqrt();
        row.iter_mut().for_each(|x| *x /= norm);
    }
    out
}

fn bench(c: &mut Criterion) {
    let (nq, n, d, k) = (1024, 65_536, 384, 100);
    let (queries, corpus) = (unit_vectors(nq, d, 1), unit_vectors(n, d, 2));
    let queries = Vectors::new(&[Part::F32(&queries)], d).unwrap();
    let corpus = Vectors::new(&[Part::F32(&corpus)], d).unwrap();
    let params = |isa| SearchParams { isa, k, threads: 1, memory: 0 };
    let mut group = c.benchmark_group("topk-64k-384");
    group.sample_size(10).throughput(Throughput::Elements((nq * n * d) as u64));
    for isa in Isa::available() {
        group.bench_function(format!("{isa:?}"), |b| {
            b.iter(|| topk(&queries, &corpus, &params(isa), &Job::new()));
        });
    }
    group.finish();
}

criterion_group!(benches, bench);
criterion_main!(benches);
