//! Structure-aware mutants of stores and of records: no panic, no allocation beyond four times the
//! input, at most 50 ms of processor time each, and every kind of refusal reached.
//!
//! Seeded: a failure prints the number of the mutant, which repeats. 10^6 of each under
//! `EMBKIT_TEST_FULL`. Half of the stores are written by our own writer with columns that lie, so
//! that no checksum hides the readers; the others are damaged bytes, half of them sealed again.

#[path = "../../embkit-core/tests/common/mod.rs"]
mod build;
mod common;
#[path = "../../embkit-core/tests/common/mutate.rs"]
mod mutate;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use build::{parts, reseal};
use common::{table, text, wordpiece};
use embkit_core::container::{Container, Dtype, Tensor, Verify, write};
use embkit_core::{Error, Job, TextShard};
use embkit_store::read::Store;
use embkit_store::records::{Input, RecordsBuilder};
use embkit_store::tokenize::{Inputs, Settings, tokenize};
use mutate::{Rng, cpu, flip, measured, mutants, mutate_json, reseal_blocks};

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

// ---------------------------------------------------------------- stores

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

// ---------------------------------------------------------------- records

const LINES: [&str; 6] = [
    r#"{"query":"capital of france","positive":["Paris is the capital","It is Paris"],"negative":["Rome"],"neg_scores":[0.5],"weight":1.5,"id":"a"}"#,
    r#"{"query":"naïve café","positive":"a place","title":"t","score":0.25}"#,
    r#"{"sentence1":"a cat sits","sentence2":"a cat is sitting","score":4.5}"#,
    r#"{"sentence1":"a dog runs","sentence2":"stocks fell","score":0}"#,
    r#"{"text":"the battery died","label":"bad"}"#,
    r#"{"text":"works like a charm","label":3,"extra":{"a":[1,{"b":null}]}}"#,
];

/// A few lines of one kind, one of them changed.
fn mutate_lines(rng: &mut Rng) -> Vec<u8> {
    let kind = rng.below(3) * 2;
    let mut lines: Vec<String> = (0..2 + rng.below(4))
        .map(|i| LINES[if rng.below(40) == 0 { rng.below(6) } else { kind + i % 2 }].to_owned())
        .collect();
    for _ in 0..1 + rng.below(2) {
        let at = rng.below(lines.len());
        lines[at] = match rng.below(9) {
            0 => {
                // A value of another type, or none, or a blank one, or a score that is no number.
                let odd =
                    ["null", "7", "\" \\t\"", "[]", "[null]", "{}", "true", "1e999", "[[\"x\"]]"];
                let colons: Vec<usize> = lines[at].match_indices("\":").map(|(i, _)| i).collect();
                let Some(colon) = colons.get(rng.below(colons.len())) else { continue };
                let after = &lines[at][colon + 2..];
                let tail = after.find(",\"").map_or("}", |i| &after[i..]);
                format!("{}\":{}{tail}", &lines[at][..*colon], rng.pick(&odd))
            }
            1 => rng.pick(&["[1,2]", "\"text\"", "7", "{}", " ", "null", "{\"q\":1}"]).to_string(),
            2 => lines[at].replacen('"', "\u{feff}\"", 1),
            3 => format!("{}{}", "x".repeat(rng.below(3000)), lines[at]),
            4 => lines[at].replace("0.", "-").replace("4.5", "1e40"),
            _ => mutate_json(rng, &lines[at]),
        };
    }
    if rng.below(50) == 0 {
        for line in &mut lines {
            *line = ["\"query", "\"text", "\"sentence1"]
                .iter()
                .fold(line.clone(), |l, c| l.replace(c, "\"q"));
        }
    }
    if rng.below(50) == 0 {
        lines = vec![" ".repeat(rng.below(3))];
    }
    let end = *rng.pick(&["\n", "\n", "\n", "\r\n", "\n\n", "\r"]);
    let mut bytes = lines.join(end).into_bytes();
    if rng.below(6) == 0 && !bytes.is_empty() {
        let at = rng.below(bytes.len());
        bytes[at] = *rng.pick(&[0xff, 0, 0xc3, b'"', b'\\', b'\n', 0xed]);
    }
    bytes
}

fn packed(rng: &mut Rng, plain: &[u8]) -> (&'static str, Vec<u8>) {
    let gzip = |plain: &[u8]| {
        let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        out.write_all(plain).unwrap();
        out.finish().unwrap()
    };
    let (name, mut bytes) = match rng.below(2) {
        0 => ("x.jsonl.zst", zstd::encode_all(plain, 1).unwrap()),
        _ => ("x.jsonl.gz", gzip(plain)),
    };
    match rng.below(4) {
        0 => {}
        1 => bytes.truncate(rng.below(bytes.len())),
        2 => bytes = plain.to_vec(),
        _ => {
            let at = 4 + rng.below(bytes.len() - 4);
            bytes[at] ^= 1 << rng.below(8);
        }
    }
    (name, bytes)
}

#[test]
fn fuzz_records() {
    let files = [
        "the file is empty",
        "wrong columns",
        "truncated zstd stream",
        "corrupt zstd stream",
        "truncated gzip stream",
        "corrupt gzip stream",
        "the content is not zstd",
        "the content is not gzip",
        "rows from another source",
    ];
    let rows = [
        "invalid UTF-8",
        "line too long",
        "not JSON",
        "not an object",
        "missing column",
        "wrong type",
        "blank text",
        "non-finite score",
        "mixed kind",
    ];
    let mut reached = Reached::new(&files);
    let mut reasons: BTreeMap<&str, u64> = rows.map(|r| (r, 0)).into();
    let total = mutants(20_000);
    let (mut worst, mut slowest) = (0_f64, Duration::ZERO);
    let dir = scratch();
    for mutant in 0..total {
        let mut rng = Rng(mutant);
        let plain = mutate_lines(&mut rng);
        let mut file = None;
        if rng.below(4) == 0 {
            let (name, bytes) = packed(&mut rng, &plain);
            fs::write(dir.path().join(name), &bytes).unwrap();
            file = Some(dir.path().join(name));
        }
        let input = |source| Input { source, task: "t", kind: None };
        let read = || {
            let mut builder = RecordsBuilder::new(1000);
            let job = Job::new();
            if mutant % 8 == 0 {
                builder.add_lines(
                    &job,
                    LINES[mutant as usize / 8 % 6].as_bytes(),
                    input("first"),
                )?;
            }
            match &file {
                Some(path) => builder.add_jsonl(&job, path, input("s"))?,
                None => builder.add_lines(&job, &plain, input("s"))?,
            }
            Ok(builder.finish())
        };
        let start = cpu();
        let (result, held) = measured(read);
        slowest = slowest.max(cpu() - start);
        // Packed files come with the decoder's fixed window, which is not what is limited.
        if file.is_none() {
            let input = plain.len().max(4096);
            worst = worst.max(held as f64 / input as f64);
            assert!(held <= 4 * input, "mutant {mutant}: {held} bytes held for {input}");
        }
        let result = result.map(|records| {
            for (i, report) in records.reports.iter().enumerate() {
                assert_eq!(report.read, report.kept + report.rejected, "mutant {mutant}");
                assert_eq!(records.examples[i].query.len() as u64, report.kept);
                for (reason, n) in &report.reasons {
                    let known = reasons.iter_mut().find(|(r, _)| reason.starts_with(**r));
                    *known.unwrap_or_else(|| panic!("unknown reason {reason}")).1 += n;
                }
            }
            let texts = records.text_id.len() as u64;
            for table in &records.examples {
                let named = table.query.iter().chain(&table.positive).chain(&table.negative);
                assert!(named.into_iter().all(|row| *row < texts), "mutant {mutant}");
            }
            std::str::from_utf8(&records.text).unwrap();
        });
        reached.count(mutant, result);
    }
    println!("{reasons:#?}");
    for (reason, n) in reasons {
        assert!(n * 1000 >= total, "'{reason}' reached only {n} times in {total}");
    }
    reached.finish(total, worst, slowest);
}
