//! Gather and tokenize on made text. `cargo bench -p embkit-store`; the rows that later issues
//! compare are measured by `embkit bench store` in Python, these are for work on this crate.
#![allow(missing_docs)] // criterion's macro makes a public function

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use embkit_core::container::Verify;
use embkit_core::{Job, TextShard};
use embkit_store::naive;
use embkit_store::read::Store;
use embkit_store::records::{Input, RecordsBuilder};
use embkit_store::tokenize::{Backend, Inputs, SHARD_BYTES, Settings, tokenize};

#[path = "../tests/common/mod.rs"]
mod common;

const ROWS: usize = 20_000;
const BATCH: usize = 256;

fn store(c: &mut Criterion) {
    let mut rng = common::Rng(1);
    let texts: Vec<String> = (0..ROWS).map(|_| common::text(&mut rng, 60)).collect();
    let (bytes, offsets) = common::table(&texts);
    let shards = [TextShard { bytes: &bytes, offsets: &offsets }];
    let row: Vec<u64> = (0..ROWS as u64).collect();
    let inputs = Inputs {
        texts: &shards,
        row: &row,
        prompt: &vec![0; ROWS],
        role: &vec![1; ROWS],
        source: &vec![0; ROWS],
        text_id: &row,
        cluster: &row,
    };
    let json = common::wordpiece(0);
    let settings = Settings {
        prompts: &[String::new()],
        tokenizer_json: &json,
        max_length: &[256, 256],
        shard_bytes: SHARD_BYTES,
        threads: 1,
        backend: Backend::Auto,
        refuse_long: false,
    };

    let mut group = c.benchmark_group("tokenize");
    group.sample_size(10).throughput(Throughput::Bytes(bytes.len() as u64));
    group.bench_function("wordpiece", |b| {
        b.iter_with_large_drop(|| {
            let dir = tempfile::tempdir().unwrap();
            black_box(tokenize(&Job::new(), dir.path(), inputs, settings).unwrap());
            dir
        });
    });
    group.finish();

    let dir = tempfile::tempdir().unwrap();
    tokenize(&Job::new(), dir.path(), inputs, settings).unwrap();
    let store = Store::open(dir.path(), Verify::FirstTouch).unwrap();
    let all = naive::encode(&json, &texts, 256).unwrap();
    let batch: Vec<u64> = (0..BATCH).map(|_| rng.below(ROWS as u64)).collect();
    let picked: Vec<&[u32]> = batch.iter().map(|r| all[*r as usize].as_slice()).collect();
    let (want, want_cu) = naive::pack(&picked);
    let (mut tokens, mut cu) = (vec![0_i64; want.len()], vec![0_i32; BATCH + 1]);
    store.gather(&batch, &mut tokens, &mut cu).unwrap();
    assert!(tokens == want && cu == want_cu, "the results agree before anything is timed");

    let mut group = c.benchmark_group("gather");
    group.throughput(Throughput::Elements(want.len() as u64));
    group.bench_function("packed", |b| {
        b.iter(|| store.gather(black_box(&batch), &mut tokens, &mut cu).unwrap());
    });
    let width = picked.iter().map(|r| r.len()).max().unwrap_or(0);
    let (mut ids, mut mask) = (vec![0_i64; BATCH * width], vec![0_u8; BATCH * width]);
    group.bench_function("padded", |b| {
        b.iter(|| store.gather_padded(black_box(&batch), &mut ids, &mut mask, 0).unwrap());
    });
    group.bench_function("packed_naive", |b| b.iter(|| naive::pack(black_box(&picked))));
    group.finish();

    let mut jsonl = Vec::new();
    for pair in texts.chunks_exact(2) {
        let line = serde_json::json!({"query": pair[0], "positive": pair[1]});
        jsonl.extend_from_slice(line.to_string().as_bytes());
        jsonl.push(b'\n');
    }
    let mut group = c.benchmark_group("records");
    group.sample_size(10).throughput(Throughput::Bytes(jsonl.len() as u64));
    group.bench_function("jsonl", |b| {
        b.iter(|| {
            let mut builder = RecordsBuilder::default();
            let input = Input { source: "s", task: "t", kind: None };
            builder.add_lines(&Job::new(), &jsonl, input).unwrap();
            builder.finish()
        });
    });
    group.finish();
}

criterion_group!(benches, store);
criterion_main!(benches);
