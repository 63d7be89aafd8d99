//! Stores: one of the two files of a shard is the fuzzer's.
#![no_main]

use embkit_core::container::Verify;
use embkit_store::read::Store;
use libfuzzer_sys::fuzz_target;
use std::fs;
use std::sync::OnceLock;
use tempfile::TempDir;

static SEED: OnceLock<TempDir> = OnceLock::new();
static WORK: OnceLock<TempDir> = OnceLock::new();

fuzz_target!(|input: &[u8]| {
    let Some((which, rest)) = input.split_first() else { return };
    let seed = SEED.get_or_init(embkit_fuzz::seed_store).path();
    let work = WORK.get_or_init(embkit_fuzz::scratch).path();
    let names = ["raw", "texts"].map(|n| format!("{n}-00000-of-00001.safetensors"));
    for name in &names {
        fs::copy(seed.join(name), work.join(name)).expect("a copy");
    }
    fs::write(work.join(&names[usize::from(which % 2)]), embkit_fuzz::file(rest)).expect("a file");
    let verify = [Verify::FirstTouch, Verify::Open, Verify::Off][usize::from(which >> 1) % 3];
    let Ok(store) = Store::open(work, verify) else { return };
    let mut tokens = vec![0_i64; 4096];
    for row in 0..store.rows().min(64) {
        let rows = [row];
        let _ = (store.lengths(&rows), store.text(row), store.text_id(&rows), store.role(&rows));
        let _ = (store.cluster(&rows), store.source(&rows), store.prompt_len(&rows));
        let _ = store.gather(&rows, &mut tokens, &mut [0; 2]);
    }
    assert!(store.lengths(&[store.rows()]).is_err());
});
