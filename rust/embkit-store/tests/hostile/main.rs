//! Structure-aware mutants of stores, example tables and records: no panic, no allocation beyond
//! four times the input, at most 50 ms of processor time each, and every kind of refusal reached.
//!
//! Seeded: a failure prints the number of the mutant, which repeats. 10^6 of each under
//! `EMBKIT_TEST_FULL`. Half of the files are written by our own writer with columns that lie, so
//! that no checksum hides the readers; the others are damaged bytes, half of them sealed again.

#[path = "../../../embkit-core/tests/common/mod.rs"]
mod build;
#[path = "../common/mod.rs"]
mod common;
mod examples;
#[path = "../../../embkit-core/tests/common/mutate.rs"]
mod mutate;
mod records;
mod stores;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use build::{parts, reseal};
use common::{table, text, wordpiece};
use embkit_core::container::{Container, Dtype, Tensor, Verify, write};
use embkit_core::{Error, Job, TextShard};
use embkit_store::tokenize::{Backend, Inputs, Settings, tokenize};
use mutate::{Rng, flip, mutate_json, reseal_blocks};

const SLOW: Duration = Duration::from_millis(50);

/// A scratch directory in memory where there is one: the writer's fsyncs are not what is tested.
fn scratch() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    match memory.is_dir() {
        true => tempfile::tempdir_in(memory).unwrap(),
        false => tempfile::tempdir().unwrap(),
    }
}

/// Counts the refusals by the part of their message that says which check refused.
struct Reached {
    kinds: BTreeMap<&'static str, u64>,
    accepted: u64,
}

impl Reached {
    fn new(kinds: &[&'static str]) -> Self {
        Self { kinds: kinds.iter().map(|k| (*k, 0)).collect(), accepted: 0 }
    }

    fn count(&mut self, mutant: u64, result: Result<(), Error>) {
        let Err(error) = result else {
            self.accepted += 1;
            return;
        };
        let said = error.to_string();
        let found = self.kinds.iter_mut().find(|(kind, _)| said.contains(**kind));
        let Some((_, n)) = found else { panic!("mutant {mutant}: unknown refusal {said}") };
        *n += 1;
    }

    fn finish(self, total: u64, worst: f64, slowest: Duration) {
        println!(
            "{total} mutants, {} accepted, worst allocation {worst:.2}x, slowest {slowest:?}\n{:#?}",
            self.accepted, self.kinds
        );
        assert!(slowest < SLOW, "{slowest:?}");
        for (kind, n) in self.kinds {
            assert!(n * 2000 >= total, "'{kind}' reached only {n} times in {total}");
        }
    }
}

/// Rows of the seed store.
const ROWS: u64 = 14;

/// A column as it will be written.
#[derive(Clone)]
struct Column {
    name: String,
    dtype: Dtype,
    bytes: Vec<u8>,
}

/// A file taken apart.
#[derive(Clone)]
struct Parts {
    columns: Vec<Column>,
    meta: BTreeMap<String, String>,
}

impl Parts {
    fn of(path: &Path) -> Self {
        let file = Container::open(path, Verify::Open).unwrap();
        let column = |name: &str| {
            let view = file.get(name).unwrap();
            Column { name: name.into(), dtype: view.dtype, bytes: view.bytes.to_vec() }
        };
        let mut meta = file.metadata().clone();
        meta.remove("header_crc32c");
        Self { columns: file.names().map(column).collect(), meta }
    }

    /// Tells one lie.
    fn lie(&mut self, rng: &mut Rng) {
        let at = rng.below(self.columns.len());
        let column = &mut self.columns[at];
        let size = column.dtype.size();
        match rng.below(10) {
            // An element with an odd value: for offsets the worst there is.
            0..=3 => {
                let odd = [0, 1, 2, 3, 1 << 31, 1 << 32, u64::MAX, u64::MAX - 1, 1 << 63];
                let value = (*rng.pick(&odd)).wrapping_add(rng.next() % 3).to_le_bytes();
                let start = rng.below(column.bytes.len() / size) * size;
                if let Some(element) = column.bytes.get_mut(start..start + size) {
                    element.copy_from_slice(&value[..size]);
                }
            }
            4 if rng.below(2) == 0 => column.bytes.clear(),
            4 => column.bytes.truncate(rng.below(column.bytes.len() / size + 1) * size),
            5 => column.bytes.extend(vec![rng.next() as u8; size * (1 + rng.below(5))]),
            6 => {
                let types = [Dtype::U8, Dtype::U16, Dtype::U32, Dtype::U64, Dtype::F32];
                column.dtype = *rng.pick(&types);
                let whole = column.bytes.len() / column.dtype.size() * column.dtype.size();
                column.bytes.truncate(whole);
            }
            7 => drop(self.columns.remove(at)),
            8 => {
                let (key, values) = *rng.pick(&[
                    ("first_row", &["0", "7", "-1", "x", "18446744073709551616"][..]),
                    ("format", &["embkit.texts", "embkit.raw", "embkit.examples", "other"][..]),
                    ("version", &["1", "2", "4294967295"][..]),
                    ("rows", &["0", "1000000000000"][..]),
                ]);
                self.meta.insert(key.into(), (*rng.pick(values)).into());
            }
            _ => {
                // Offsets in another order.
                let other = rng.below(column.bytes.len() / size) * size;
                let one = rng.below(column.bytes.len() / size) * size;
                if column.bytes.len() >= size {
                    for i in 0..size {
                        column.bytes.swap(one + i, other + i);
                    }
                }
            }
        }
    }

    fn write(&self, path: &Path) {
        let tensors: Vec<Tensor> = self
            .columns
            .iter()
            .map(|c| {
                let shape = vec![c.bytes.len() / c.dtype.size()];
                Tensor { name: &c.name, dtype: c.dtype, shape, bytes: &c.bytes }
            })
            .collect();
        write(path, &tensors, &self.meta).unwrap();
    }
}

/// A small store of two shards.
fn seed_store(dir: &Path) {
    let mut rng = common::Rng(3);
    let texts: Vec<String> = (0..ROWS).map(|_| text(&mut rng, 9)).collect();
    let (bytes, offsets) = table(&texts);
    let rows: Vec<u64> = (0..ROWS).collect();
    let inputs = Inputs {
        texts: &[TextShard { bytes: &bytes, offsets: &offsets }],
        row: &rows,
        prompt: &[0; ROWS as usize],
        role: &[1; ROWS as usize],
        source: &[0; ROWS as usize],
        text_id: &rows,
        cluster: &rows,
    };
    let settings = Settings {
        prompts: &[String::new()],
        tokenizer_json: &wordpiece(0),
        max_length: &[16, 16],
        shard_bytes: 190,
        threads: 1,
        backend: Backend::Auto,
        refuse_long: false,
    };
    assert_eq!(tokenize(&Job::new(), dir, inputs, settings).unwrap().shards, 2);
}

/// Damages the bytes of a file, and seals most of them again.
fn damage(rng: &mut Rng, file: &[u8]) -> Vec<u8> {
    let mut bytes = if rng.below(2) == 0 {
        let (json, data) = parts(file);
        build::build(&mutate_json(rng, &json), &data)
    } else {
        let mut bytes = file.to_vec();
        match rng.below(3) {
            0 => {
                let at = 4096 + rng.below(bytes.len() - 4096);
                bytes[at] ^= 1 << rng.below(8);
            }
            _ => flip(rng, &mut bytes),
        }
        bytes
    };
    if rng.below(2) == 0 {
        reseal_blocks(&mut bytes);
    }
    if rng.below(4) != 0 {
        bytes = reseal(&bytes);
    }
    bytes
}
