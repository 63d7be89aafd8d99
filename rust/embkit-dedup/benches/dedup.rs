//! MB of text per second through near-duplicates and contamination, on seeded pseudo-prose.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use embkit_core::{Job, TextShard};
use embkit_dedup::{ContaminationParams, DedupParams, contamination, near_duplicates};

/// `n` texts of about 350 bytes; every tenth is an earlier text with a changed ending.
fn prose(n: usize) -> (Vec<u8>, Vec<u64>) {
    let mut state = 1u64;
    let mut below = |n: u64| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % n
    };
    let (mut bytes, mut offsets) = (Vec::new(), vec![0u64]);
    for row in 0..n {
        if row % 10 == 9 {
            let of = below(row as u64) as usize;
            let (from, to) = (offsets[of] as usize, offsets[of + 1] as usize);
            bytes.extend_from_within(from..to);
            bytes.extend_from_slice(b" indeed.");
        } else {
            for _ in 0..50 + below(20) {
                // Products make small numbers frequent, as words are.
                let word = below(200) * below(200);
                bytes.extend_from_slice(format!("Word{word:x} ").as_bytes());
            }
        }
        offsets.push(bytes.len() as u64);
    }
    (bytes, offsets)
}

fn bench(c: &mut Criterion) {
    let (bytes, offsets) = prose(20_000);
    let shard = [TextShard { bytes: &bytes, offsets: &offsets }];
    let mut group = c.benchmark_group("dedup");
    group.sample_size(10).throughput(Throughput::Bytes(bytes.len() as u64));
    group.bench_function("near", |b| {
        let params = DedupParams { threads: 1, ..Default::default() };
        b.iter(|| near_duplicates(&shard, None, &params, &Job::new()));
    });
    let eval = [TextShard { bytes: &bytes, offsets: &offsets[..501] }];
    let eval = [TextShard { bytes: &bytes[..offsets[500] as usize], ..eval[0] }];
    group.bench_function("contamination", |b| {
        let params = ContaminationParams { threads: 1, ..Default::default() };
        b.iter(|| contamination(&shard, &eval, None, &params, &Job::new()));
    });
    group.finish();
}

criterion_group!(benches, bench);
criterion_main!(benches);
