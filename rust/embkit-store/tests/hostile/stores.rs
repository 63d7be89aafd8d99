//! Stores: at [`Store::open`] and at every read of an open one.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use embkit_core::Error;
use embkit_core::container::Verify;
use embkit_store::read::Store;

use crate::mutate::{Rng, cpu, measured, mutants};
use crate::{Parts, Reached, damage, scratch, seed_store};

/// Everything a caller can ask of a store.
fn read_all(dir: &Path, verify: Verify, tokens: &mut [i32], mask: &mut [u8]) -> Result<(), Error> {
    let store = Store::open(dir, verify)?;
    let all: [u64; 40] = std::array::from_fn(|i| i as u64);
    let rows = &all[..(store.rows() as usize).min(all.len())];
    let mut bounds = [0; 41];
    // One after the other, so that the first fault does not hide the rest; the first is returned.
    let lengths = store.lengths(rows);
    let mut faults = vec![
        store.text_id(rows).map(drop),
        store.cluster(rows).map(drop),
        store.role(rows).map(drop),
        store.source(rows).map(drop),
        store.prompt_len(rows).map(drop),
        store.gather(rows, tokens, &mut bounds[..=rows.len()]).map(drop),
    ];
    for row in rows {
        faults.push(store.text(*row).map(drop));
        if let Ok([length]) = store.lengths(&[*row]).as_deref() {
            let width = *length as usize;
            let (ids, mask) = (&mut tokens[..width], &mut mask[..width]);
            faults.push(store.gather_padded(&[*row], ids, mask, 0).map(drop));
        }
    }
    assert!(store.lengths(&[store.rows()]).is_err() && store.text(u64::MAX).is_err());
    lengths?;
    faults.into_iter().collect()
}

#[test]
fn fuzz_stores() {
    let kinds = [
        // Of the store.
        "should start at row",
        "'offsets' is empty",
        "rows. Restore",
        "offsets for the",
        "lie outside its shard",
        "is not UTF-8",
        "lacks texts-",
        "No such file",
        "holds no token shards",
        "did not finish",
        "two different runs",
        "has no texts",
        // Of the container below it.
        "has no tensor '",
        ", not U",
        ", not embkit.",
        "up to version 1",
        "does not match its checksum",
        "do not match their checksum",
        "not safetensors JSON",
    ];
    let others = [
        "Restore the file", // any other fault that the container finds, counted elsewhere
        "no embkit header", // with advice of its own
        "no usable version",
        "tokens, the buffer", // a row as long as the shard's offsets let it be
    ];
    let seed = scratch();
    seed_store(seed.path());
    let names: Vec<String> = ["raw-00000", "raw-00001", "texts-00000", "texts-00001"]
        .map(|n| format!("{n}-of-00002.safetensors"))
        .into();
    let good: Vec<Vec<u8>> = names.iter().map(|n| fs::read(seed.path().join(n)).unwrap()).collect();
    let seeds: Vec<Parts> = names.iter().map(|n| Parts::of(&seed.path().join(n))).collect();
    let total = mutants(10_000);
    let mut reached = Reached::new(&kinds);
    let mut rest = 0;
    let (mut worst, mut slowest) = (0_f64, Duration::ZERO);
    let (mut tokens, mut mask) = (vec![0_i32; 4096], vec![0_u8; 4096]);
    let dir = scratch();
    let path = |i: usize| dir.path().join(&names[i]);
    for mutant in 0..total {
        let mut rng = Rng(mutant);
        for (i, bytes) in good.iter().enumerate() {
            fs::write(path(i), bytes).unwrap();
        }
        let mut extra: Option<PathBuf> = None;
        match rng.below(20) {
            0 => {
                // The set of files itself.
                let i = rng.below(4);
                match rng.below(6) {
                    0 => fs::remove_file(path(i)).unwrap(),
                    1 => (0..4).for_each(|i| fs::remove_file(path(i)).unwrap()),
                    2 => drop(fs::copy(path(i), path(rng.below(4))).unwrap()),
                    3 => {
                        let name = path(i).to_str().unwrap().replace("of-00002", "of-00003");
                        fs::copy(path(i), &name).unwrap();
                        extra = Some(name.into());
                    }
                    4 => (0..2).for_each(|i| fs::remove_file(path(i)).unwrap()),
                    _ => {
                        (2..4).for_each(|i| fs::remove_file(path(i)).unwrap());
                        let name = dir.path().join("texts-00000.safetensors");
                        fs::write(&name, &good[2]).unwrap();
                        extra = Some(name);
                    }
                }
            }
            1..=10 => {
                let i = rng.below(4);
                let mut parts = seeds[i].clone();
                for _ in 0..1 + rng.below(2) {
                    if !parts.columns.is_empty() {
                        parts.lie(&mut rng);
                    }
                }
                parts.write(&path(i));
            }
            _ => {
                let i = rng.below(4);
                fs::write(path(i), damage(&mut rng, &good[i])).unwrap();
            }
        }
        let verify =
            *rng.pick(&[Verify::FirstTouch, Verify::FirstTouch, Verify::Open, Verify::Off]);
        let sizes = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().metadata().unwrap().len());
        let input = (sizes.sum::<u64>() as usize).max(4096);
        let start = cpu();
        let (result, held) = measured(|| read_all(dir.path(), verify, &mut tokens, &mut mask));
        slowest = slowest.max(cpu() - start);
        worst = worst.max(held as f64 / input as f64);
        assert!(held <= 4 * input, "mutant {mutant}: {held} bytes held for {input}");
        match &result {
            Err(e)
                if !kinds.iter().any(|k| e.to_string().contains(k))
                    && others.iter().any(|k| e.to_string().contains(k)) =>
            {
                rest += 1
            }
            _ => reached.count(mutant, result),
        }
        if let Some(extra) = extra {
            fs::remove_file(extra).unwrap();
        }
    }
    println!("{rest} other faults of the container");
    reached.finish(total, worst, slowest);
}
