//! Structure-aware mutants of containers and manifests: no panic, no allocation beyond four times
//! the input, nothing slow, and every kind of refusal reached.
//!
//! 50,000 mutants in the normal run, 10^6 under `EMBKIT_TEST_FULL`. Seeded: a failure prints the
//! number of the mutant, which repeats.

mod common;
#[path = "common/mutate.rs"]
mod mutate;

use common::{build, meta, parts, reseal};
use embkit_core::container::{Container, Tensor, Verify, write};
use embkit_core::{Error, manifest};
use mutate::{Rng, cpu, flip, measured, mutants, mutate_json, reseal_blocks};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

/// Tensors that tile, in an order and with types that may not be ours.
fn relayout(rng: &mut Rng) -> (String, Vec<u8>) {
    let mut names = vec!["score", "text", "offsets", "task", "crc"];
    let types = [("U8", 1), ("U16", 2), ("U32", 4), ("F32", 4), ("U64", 8)];
    let mut json =
        r#"{"__metadata__":{"header_crc32c":"00000000","format":"embkit.test","version":"1"}"#
            .to_owned();
    let mut at = 0;
    while !names.is_empty() {
        // `crc` mostly last, as U32 [1].
        let ordered = rng.below(4) != 0;
        let i = if ordered { 0 } else { rng.below(names.len()) };
        let name = names.remove(i);
        let (dtype, size) = if name == "crc" && ordered { ("U32", 4) } else { *rng.pick(&types) };
        let n = if name == "crc" && ordered { 1 } else { rng.below(4) };
        json += &format!(
            ",\"{name}\":{{\"dtype\":\"{dtype}\",\"shape\":[{n}],\"data_offsets\":[{at},{}]}}",
            at + n * size
        );
        at += n * size;
    }
    (json + "}", (0..at).map(|_| rng.next() as u8).collect())
}

fn seeds() -> Vec<Vec<u8>> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x");
    let (a, b, c, d) = ([1u64, 2, 3], [0.5f32; 6], [7u16; 3], [9u8; 5]);
    let all = [
        Tensor::vector("offsets", &a),
        Tensor::shaped("score", &[2, 3], &b),
        Tensor::vector("task", &c),
        Tensor::vector("text", &d),
    ];
    (0..=all.len())
        .map(|n| {
            write(&path, &all[..n], &meta("embkit.test", 1)).unwrap();
            std::fs::read(&path).unwrap()
        })
        .collect()
}

/// Everything a reader can ask of a file.
fn read_all(c: &Container) -> Result<(), Error> {
    c.expect("embkit.test", 1)?;
    for name in c.names() {
        let view = c.get(name)?;
        assert_eq!(view.shape.iter().product::<usize>() * view.dtype.size(), view.bytes.len());
        c.verify_range(name, 0..view.bytes.len())?;
        c.slice::<u8>(name).or_else(|_| c.slice::<u64>(name).map(|_| &[][..])).ok();
    }
    c.slice::<f32>("score").map(|_| ())
}

/// The part of a message that says which check refused.
const KINDS: [&str; 22] = [
    "at an odd place",
    "too short for a header length",
    "claims a header of",
    "ends inside its header",
    "not safetensors JSON",
    "spans bytes",
    "for its shape but spans",
    "size overflows",
    "tensors must follow each other",
    "bytes after its last tensor",
    "' twice",
    "no embkit header checksum",
    "does not match its checksum",
    "not a multiple of 4096",
    "at unaligned byte",
    "no tensor 'crc'",
    "that is not the last one",
    "do not match their checksum",
    "no usable version number",
    "has no tensor 'score'",
    "not F32",
    "up to version 1",
];

#[test]
fn fuzz_containers() {
    let seeds = seeds();
    let total = mutants(50_000);
    let mut reached = BTreeMap::from_iter(KINDS.map(|k| (k, 0u64)));
    let (mut sound, mut worst, mut slowest) = (0u64, 0f64, Duration::ZERO);
    for i in 0..total {
        let mut rng = Rng(i);
        let seed = rng.pick(&seeds).clone();
        let (mut json, mut data) = parts(&seed);
        let mut bytes = if rng.below(4) == 0 {
            let mut bytes = seed;
            flip(&mut rng, &mut bytes);
            bytes
        } else {
            if rng.below(8) == 0 {
                (json, data) = relayout(&mut rng);
            } else {
                for _ in 0..1 + rng.below(2) {
                    json = mutate_json(&mut rng, &json);
                }
            }
            if rng.below(6) == 0 {
                flip(&mut rng, &mut data);
            }
            if rng.below(16) == 0 {
                json.push_str(&" ".repeat(rng.below(8)));
                let mut b = (json.len() as u64).to_le_bytes().to_vec();
                b.extend(json.bytes().chain(data.iter().copied()));
                b
            } else {
                build(&json, &data)
            }
        };
        // Half are sealed again, so that the checksum does not hide the parser.
        let seal = rng.below(8);
        if seal < 5 {
            reseal_blocks(&mut bytes);
        }
        if seal < 6 {
            bytes = reseal(&bytes);
        }
        let path = Path::new("m");
        let start = cpu();
        let ours = |c: Result<Container, Error>| c.and_then(|c| read_all(&c));
        let (result, peak) = measured(|| ours(Container::from_bytes(path, &bytes, Verify::Open)));
        let (foreign, peak2) = measured(|| ours(Container::foreign_from_bytes(path, &bytes)));
        let lazy = ours(Container::from_bytes(path, &bytes, Verify::FirstTouch));
        slowest = slowest.max(cpu() - start);
        // The copy of the input itself is the map's stand-in: it is not what is limited.
        let held = (peak.max(peak2).saturating_sub(bytes.len().next_multiple_of(8))) as f64;
        // Below 4 KiB (no file of ours is) 64 metadata keys and the text of an error count.
        let ratio = held / bytes.len().max(4096) as f64;
        if ratio > worst {
            worst = ratio;
        }
        assert!(ratio <= 4.0, "mutant {i}: {held} bytes held for {} of input", bytes.len());
        if result.is_ok() {
            assert!(lazy.is_ok(), "mutant {i}: open and first touch disagree");
        }
        for r in [result, foreign] {
            match r {
                Ok(()) => sound += 1,
                Err(e) => {
                    let said = e.to_string();
                    let kind = KINDS.iter().find(|k| said.contains(*k));
                    let kind =
                        kind.or_else(|| KINDS.iter().find(|_| matches!(e, Error::Usage { .. })));
                    let Some(kind) = kind else { panic!("mutant {i}: unknown refusal {said}") };
                    *reached.entry(kind).or_default() += 1;
                }
            }
        }
    }
    println!(
        "{total} mutants, {sound} accepted, worst allocation {worst:.2}x, slowest {slowest:?}\n{reached:#?}"
    );
    assert!(slowest < Duration::from_millis(50), "{slowest:?}");
    for (kind, n) in reached {
        assert!(n * 1000 >= total, "'{kind}' reached only {n} times in {total}");
    }
}

#[test]
fn fuzz_manifests() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("manifest.json");
    let text = r#"{"format":"embkit.store","version":1,"files":{"a.safetensors":{"length":4144,"header_crc":1}},"x":[1.5,-2,null,true,"é\n"]}"#;
    manifest::write(&path, &manifest::parse(text).unwrap()).unwrap();
    let good = std::fs::read_to_string(&path).unwrap();
    manifest::check(&path, good.as_bytes()).unwrap();
    let kinds = [
        "is not valid JSON",
        "is not a JSON object",
        "has no checksum",
        "does not match its checksum",
        "canonical form",
    ];
    let mut reached = BTreeMap::from_iter(kinds.map(|k| (k, 0u64)));
    let total = mutants(50_000);
    let mut changed = 0;
    for i in 0..total {
        let mut rng = Rng(i);
        let bytes = match rng.below(5) {
            0 => {
                let mut b = good.clone().into_bytes();
                flip(&mut rng, &mut b);
                b
            }
            1 => {
                let odd = ["[]", "1", "\"x\"", "{}", "{\"a\":1}", "null", ""];
                rng.pick(&odd).as_bytes().to_vec()
            }
            2 => {
                let at = good.find(',').unwrap() + 1;
                let mut s = good.clone();
                s.insert(at, ' ');
                s.into_bytes()
            }
            _ => mutate_json(&mut rng, &good).into_bytes(),
        };
        if bytes == good.as_bytes() {
            continue;
        }
        changed += 1;
        match manifest::check(&path, &bytes) {
            Ok(_) => panic!("mutant {i} accepted"),
            Err(e) => {
                let said = e.to_string();
                let Some(kind) = kinds.iter().find(|k| said.contains(*k)) else {
                    panic!("mutant {i}: {said}")
                };
                *reached.entry(kind).or_default() += 1;
            }
        }
    }
    assert!(changed * 2 > total);
    for (kind, n) in reached {
        assert!(n * 1000 >= total, "'{kind}' reached only {n} times in {total}");
    }
}
