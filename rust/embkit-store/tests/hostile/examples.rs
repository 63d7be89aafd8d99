//! Example tables and mined negatives, at the loader: from opening to filled buffers.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use embkit_core::Error;
use embkit_core::container::{Dtype, Verify};
use embkit_store::batch::{
    EXAMPLES_FORMAT, Form, HardRule, Loader, NEGATIVES_FORMAT, Settings, TaskFiles,
};
use embkit_store::plan::Exhausted;
use embkit_store::read::Store;
use embkit_store::records::Kind;

use crate::mutate::{Rng, cpu, measured, mutants};
use crate::{Column, Parts, ROWS, Reached, damage, scratch, seed_store};

const EXAMPLES: usize = 8;

fn column(name: &str, dtype: Dtype, bytes: Vec<u8>) -> Column {
    Column { name: name.into(), dtype, bytes }
}

fn words(values: impl IntoIterator<Item = u64>) -> Vec<u8> {
    values.into_iter().flat_map(u64::to_le_bytes).collect()
}

fn repeated(bytes: [u8; 4]) -> Vec<u8> {
    bytes.repeat(EXAMPLES)
}

/// A sound table of a kind: two positives and three negatives each.
fn table(kind: Kind) -> Parts {
    let m = EXAMPLES as u64;
    let offsets = |each: u64| words((0..=m).map(|i| i * each));
    let rows = |n: u64| words((0..n).map(|i| (i * 5 + 1) % ROWS));
    let (each, label) = match kind {
        Kind::Retrieval => (2, -1_i32),
        Kind::Sts => (1, -1),
        Kind::Classification => (0, 1),
    };
    Parts {
        columns: vec![
            column("task", Dtype::U16, vec![0; 2 * EXAMPLES]),
            column("query", Dtype::U64, rows(m)),
            column("positive_offsets", Dtype::U64, offsets(each)),
            column("positive", Dtype::U64, rows(m * each)),
            column("negative_offsets", Dtype::U64, offsets(3)),
            column("negative", Dtype::U64, rows(m * 3)),
            column("negative_score", Dtype::F32, repeated(0.5_f32.to_le_bytes()).repeat(3)),
            column("score", Dtype::F32, repeated(0.5_f32.to_le_bytes())),
            column("label", Dtype::I32, repeated(label.to_le_bytes())),
            column("weight", Dtype::F32, repeated(1_f32.to_le_bytes())),
            column("provenance", Dtype::U32, repeated([0; 4])),
        ],
        meta: crate::build::meta(EXAMPLES_FORMAT, 1),
    }
}

/// Mined negatives for such a table.
fn negatives() -> Parts {
    let m = EXAMPLES as u64;
    Parts {
        columns: vec![
            column("offsets", Dtype::U64, words((0..=m).map(|i| i * 2))),
            column("row", Dtype::U64, words((0..2 * m).map(|i| i % ROWS))),
            column("score", Dtype::F32, repeated([0; 4]).repeat(2)),
            column("rank", Dtype::U32, repeated([0; 4]).repeat(2)),
        ],
        meta: crate::build::meta(NEGATIVES_FORMAT, 1),
    }
}

/// Makes a table odd as a whole: classes that cannot be, nothing to train on, next to no examples.
fn odd(rng: &mut Rng, parts: &mut Parts) {
    let mut set = |name: &str, bytes: Vec<u8>| {
        if let Some(c) = parts.columns.iter_mut().find(|c| c.name == name) {
            c.bytes = bytes;
        }
    };
    match rng.below(5) {
        0 => {
            let class = *rng.pick(&[i32::MAX, i32::MAX - 1, 9, 8, 7, -2, i32::MIN]);
            let mut labels = repeated(1_i32.to_le_bytes());
            labels[4 * rng.below(EXAMPLES)..][..4].copy_from_slice(&class.to_le_bytes());
            set("label", labels);
        }
        1 => set("label", (0..EXAMPLES as i32).flat_map(i32::to_le_bytes).collect()),
        2 => set("score", repeated(f32::NAN.to_le_bytes())),
        3 => {
            set("positive_offsets", vec![0; 8 * (EXAMPLES + 1)]);
            set("positive", Vec::new());
        }
        _ => {
            // The first few examples only; their lists begin at 0, so the rest can go.
            let m = rng.below(3);
            let offsets = |each: u64| words((0..=m as u64).map(|i| i * each));
            set("query", words((0..m as u64).map(|i| i % ROWS)));
            for (name, size) in [("score", 4), ("label", 4), ("weight", 4)] {
                set(name, vec![0; m * size]);
            }
            set("positive_offsets", offsets(1));
            set("positive", words((0..m as u64).map(|i| i + 1)));
            set("negative_offsets", offsets(0));
            set("negative", Vec::new());
        }
    }
}

/// Opens the table and makes every batch of an epoch.
fn train(store: &Arc<Store>, task: &TaskFiles, rng: u64, buffer: &mut [u8]) -> Result<(), Error> {
    let settings = Settings {
        seed: 7,
        hard: (rng >> 8) as usize % 3,
        hard_rule: if rng >> 16 & 1 == 0 { HardRule::Sample } else { HardRule::Top },
        token_budget: 40,
        padded: rng >> 17 & 1 == 0,
        no_duplicates: rng >> 18 & 1 == 0,
        prompt_dropout: (rng >> 19 & 3) as f64 / 3.0,
        exhausted: Exhausted::Drop(1),
    };
    let task = TaskFiles { batch_size: 1 + rng % 3, ..task.clone() };
    let loader = Loader::open(store.clone(), std::slice::from_ref(&task), settings)?;
    let steps = loader.plan().steps().unwrap_or(0);
    for step in 0..steps {
        for (rank, world) in [(0, 1), (0, task.batch_size as usize)] {
            let batch = loader.batch(step, rank, world, None)?;
            let form = Form { wide: rng >> 19 & 1 == 0, padded: settings.padded, pad_id: 0 };
            let (_, bytes) = batch.layout(form);
            assert!(batch.rows.iter().all(|row| *row < ROWS));
            batch.fill(store, form, &mut buffer[..bytes])?;
        }
    }
    Ok(())
}

#[test]
fn fuzz_examples() {
    let kinds = [
        "names row",
        "disagree",
        "do not ascend",
        "values in '",
        "the negatives of task",
        "has a class",
        "no usable example",
        "fewer than a batch",
        "has no tensor '",
        ", not U",
        ", not F",
        ", not embkit.",
        "up to version 1",
        "No such file",
        "does not match its checksum",
        "do not match their checksum",
        "not safetensors JSON",
    ];
    let seed = scratch();
    seed_store(seed.path());
    let store = Arc::new(Store::open(seed.path(), Verify::Open).unwrap());
    let dir = scratch();
    let (path, mined) = (dir.path().join("examples.safetensors"), dir.path().join("mined"));
    let all = [Kind::Retrieval, Kind::Sts, Kind::Classification];
    let tables = all.map(table);
    let bytes_of = |parts: &Parts, path: &Path| {
        parts.write(path);
        fs::read(path).unwrap()
    };
    let good = [0, 1, 2].map(|i| bytes_of(&tables[i], &path));
    let good_mined = bytes_of(&negatives(), &mined);
    let total = mutants(10_000);
    let mut reached = Reached::new(&kinds);
    let (mut rest, mut worst, mut slowest) = (0, 0_f64, Duration::ZERO);
    let mut buffer = vec![0_u8; 1 << 20];
    for mutant in 0..total {
        let mut rng = Rng(mutant);
        let kind = rng.below(3);
        fs::write(&path, &good[kind]).unwrap();
        fs::write(&mined, &good_mined).unwrap();
        let with_mined = kind == 0 && rng.below(2) == 0;
        let (victim, parts, bytes): (&PathBuf, _, _) = match with_mined && rng.below(2) == 0 {
            true => (&mined, negatives(), &good_mined),
            false => (&path, tables[kind].clone(), &good[kind]),
        };
        match rng.below(40) {
            0 => fs::remove_file(victim).unwrap(),
            1..=5 => {
                let mut parts = parts;
                odd(&mut rng, &mut parts);
                parts.write(victim);
            }
            6..=24 => {
                let mut parts = parts;
                for _ in 0..1 + rng.below(2) {
                    if !parts.columns.is_empty() {
                        parts.lie(&mut rng);
                    }
                }
                parts.write(victim);
            }
            _ => fs::write(victim, damage(&mut rng, bytes)).unwrap(),
        }
        let task = TaskFiles {
            name: "t".into(),
            kind: all[kind],
            examples: path.clone(),
            negatives: with_mined.then(|| mined.clone()),
            weight: 1.0,
            batch_size: 1,
        };
        let sizes = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().metadata().unwrap().len());
        let input = (sizes.sum::<u64>() as usize).max(4096);
        let start = cpu();
        let (result, held) = measured(|| train(&store, &task, rng.next(), &mut buffer));
        slowest = slowest.max(cpu() - start);
        worst = worst.max(held as f64 / input as f64);
        assert!(held <= 4 * input, "mutant {mutant}: {held} bytes held for {input}");
        // Any other fault that the container finds, counted by its own fuzz test.
        match &result {
            Err(e @ Error::Corrupt { .. }) if !kinds.iter().any(|k| e.to_string().contains(k)) => {
                rest += 1;
            }
            _ => reached.count(mutant, result),
        }
    }
    println!("{rest} other faults of the container");
    reached.finish(total, worst, slowest);
}
