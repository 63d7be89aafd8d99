//! Example tables and mined negatives: every batch of an epoch over a sound store.
#![no_main]

use embkit_core::container::Verify;
use embkit_store::batch::{HardRule, Loader, Settings, TaskFiles};
use embkit_store::plan::Exhausted;
use embkit_store::read::Store;
use embkit_store::records::Kind;
use libfuzzer_sys::fuzz_target;
use std::fs;
use std::sync::{Arc, OnceLock};
use tempfile::TempDir;

static STORE: OnceLock<(TempDir, Arc<Store>)> = OnceLock::new();
static WORK: OnceLock<TempDir> = OnceLock::new();

fuzz_target!(|input: &[u8]| {
    let Some((flags, rest)) = input.split_first() else { return };
    let (_, store) = STORE.get_or_init(|| {
        let dir = embkit_fuzz::seed_store();
        let store = Store::open(dir.path(), Verify::Open).expect("a sound store");
        (dir, Arc::new(store))
    });
    let path = WORK.get_or_init(embkit_fuzz::scratch).path().join("examples.safetensors");
    fs::write(&path, embkit_fuzz::file(rest)).expect("a file");
    let kind = [Kind::Retrieval, Kind::Sts, Kind::Classification][usize::from(flags % 3)];
    let task = TaskFiles {
        name: "t".into(),
        kind,
        examples: path.clone(),
        negatives: (flags & 64 != 0).then_some(path),
        weight: 1.0,
        batch_size: 2,
    };
    let settings = Settings {
        seed: 1,
        hard: usize::from(flags >> 2 & 3),
        hard_rule: if flags & 16 == 0 { HardRule::Sample } else { HardRule::Top },
        token_budget: 16,
        padded: flags & 32 == 0,
        no_duplicates: flags & 128 == 0,
        prompt_dropout: f64::from(flags & 3) / 3.0,
        exhausted: Exhausted::Drop(1),
    };
    let Ok(loader) = Loader::open(store.clone(), &[task], settings) else { return };
    for step in 0..loader.plan().steps().unwrap_or(0).min(64) {
        if let Ok(batch) = loader.batch(step, 0, 1, None) {
            assert!(batch.rows.iter().all(|row| *row < embkit_fuzz::ROWS as u64));
        }
    }
});
