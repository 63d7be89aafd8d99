//! Structure-aware mutants of containers and manifests: no panic, no allocation beyond four times
//! the input, nothing slow, and every kind of refusal reached.
//!
//! 10^5 mutants in the normal run; `EMBKIT_MUTANTS=1000000` (as `make test-all` sets) for the full
//! count. Seeded: a failure prints the number of the mutant, which repeats.

mod common;

use common::{build, meta, parts, reseal};
use embkit_core::container::{Container, Tensor, Verify, write};
use embkit_core::{Error, crc32c, manifest};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

/// Counts this thread's live and peak bytes.
struct Counting;
thread_local! {
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}
fn count(by: isize) {
    let _ = LIVE.try_with(|live| {
        live.set(live.get() + by);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(live.get())));
    });
}
// SAFETY: forwards to the system allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, l: Layout) -> *mut u8 {
        count(l.size() as isize);
        unsafe { System.alloc(l) }
    }
    unsafe fn dealloc(&self, p: *mut u8, l: Layout) {
        count(-(l.size() as isize));
        unsafe { System.dealloc(p, l) }
    }
}
#[global_allocator]
static COUNTING: Counting = Counting;

/// Runs `f` and returns its result with the peak of bytes it held beyond those before.
fn measured<T>(f: impl FnOnce() -> T) -> (T, usize) {
    let before = LIVE.get();
    PEAK.set(before);
    let out = f();
    (out, (PEAK.get() - before) as usize)
}

fn mutants() -> u64 {
    std::env::var("EMBKIT_MUTANTS").ok().and_then(|v| v.parse().ok()).unwrap_or(100_000)
}

/// SplitMix64.
struct Rng(u64);
impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    }
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }
}

const EXTREMES: [&str; 14] = [
    "0",
    "1",
    "2",
    "4",
    "8",
    "-1",
    "4095",
    "2147483648",
    "4294967296",
    "9223372036854775807",
    "18446744073709551615",
    "18446744073709551616",
    "1e3",
    "null",
];

/// Spans of the numbers in `text`.
fn numbers(text: &str) -> Vec<(usize, usize)> {
    let b = text.as_bytes();
    let mut out = Vec::new();
    let mut at = 0;
    while at < b.len() {
        let n = b[at..].iter().take_while(|c| c.is_ascii_digit()).count();
        if n > 0 {
            out.push((at, at + n));
        }
        at += n.max(1);
    }
    out
}

/// The nearest character boundary at or before `at`.
fn boundary(s: &str, mut at: usize) -> usize {
    while !s.is_char_boundary(at) {
        at -= 1;
    }
    at
}

/// One change to JSON text that keeps most of its structure.
fn mutate_json(rng: &mut Rng, json: &str) -> String {
    let mut s = json.to_owned();
    let nums = numbers(&s);
    match rng.below(11) {
        0 | 1 if !nums.is_empty() => {
            let &(a, b) = rng.pick(&nums);
            let extreme = *rng.pick(&EXTREMES);
            s.replace_range(a..b, extreme);
        }
        2 if nums.len() > 1 => {
            let (&(a, b), &(c, d)) = (rng.pick(&nums), rng.pick(&nums));
            let (x, y) = (s[a..b].to_owned(), s[c..d].to_owned());
            if a > d {
                s.replace_range(a..b, &y);
                s.replace_range(c..d, &x);
            } else if c > b {
                s.replace_range(c..d, &x);
                s.replace_range(a..b, &y);
            }
        }
        3 => {
            let words = [
                "\"U8\"", "\"U16\"", "\"U32\"", "\"F32\"", "\"U64\"", "\"BF16\"", "\"U7\"",
                "\"crc\"",
            ];
            let (from, to) = (*rng.pick(&words), *rng.pick(&words));
            s = s.replacen(from, to, 1);
        }
        4 => {
            // Removes or doubles one `,"name":{...}`.
            let starts: Vec<usize> = s.match_indices(",\"").map(|(i, _)| i).collect();
            let a = starts.get(rng.below(starts.len())).copied().unwrap_or(0);
            if let Some(n) = s[a..].find('}') {
                let piece = s[a..a + n + 1].to_owned();
                if rng.below(2) == 0 {
                    s.replace_range(a..a + n + 1, "");
                } else {
                    s.insert_str(a, &piece);
                }
            }
        }
        5 => {
            let deep = "[".repeat(rng.below(300));
            let at = boundary(&s, rng.below(s.len()));
            s.insert_str(at, &deep);
        }
        6 => {
            let what = *rng.pick(&["{", "}", "[", "]", ",", ":", "\"", "\\u0000", "[0,", "{\"\":"]);
            let at = boundary(&s, rng.below(s.len()));
            s.insert_str(at, what);
        }
        7 => {
            let n = rng.below(200);
            let many: String = (0..n)
                .map(|i| {
                    format!(",\"{i}\":{{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}")
                })
                .collect();
            if let Some(at) = s.rfind('}') {
                s.insert_str(at, &many);
            }
        }
        8 => {
            let n = rng.below(1500);
            let many: String = (0..n).map(|i| format!(",\"{i}\":\"\"")).collect();
            if let Some(at) = s.find('}') {
                s.insert_str(at, &many);
            }
        }
        9 => {
            // A long string, with and without escapes, where a name, a value or a number was.
            let unit = ["x", "\\n", "é", "\\u0041"][rng.below(4)];
            let long = format!("\"{}\"", unit.repeat(rng.below(20_000)));
            let quotes: Vec<usize> = s.match_indices('"').map(|(i, _)| i).collect();
            let spans: Vec<(usize, usize)> = if rng.below(3) == 0 || quotes.len() < 2 {
                nums
            } else {
                quotes.chunks_exact(2).map(|q| (q[0], q[1] + 1)).collect()
            };
            if let Some(&(a, b)) = spans.get(rng.below(spans.len())) {
                s.replace_range(a..b, &long);
            }
        }
        _ => s = s.replacen("shape\":[", &format!("shape\":[{}", "1,".repeat(rng.below(20))), 1),
    }
    s
}

fn flip(rng: &mut Rng, bytes: &mut Vec<u8>) {
    match rng.below(5) {
        0 => {
            let n = if rng.below(4) == 0 { 12 } else { bytes.len() + 1 };
            bytes.truncate(rng.below(n));
        }
        1 => {
            let n = rng.below(9);
            bytes.extend((0..n).map(|i| i as u8));
        }
        2 if bytes.len() > 8 => {
            let lengths = [
                0,
                1,
                7,
                42,
                4087,
                4088,
                4089,
                8184,
                1 << 24,
                (1 << 24) + 1,
                1 << 40,
                u64::MAX,
                u64::MAX - 7,
            ];
            bytes[..8].copy_from_slice(&rng.pick(&lengths).to_le_bytes());
        }
        _ if !bytes.is_empty() => {
            for _ in 0..1 + rng.below(3) {
                let at = rng.below(bytes.len());
                bytes[at] ^= 1 << rng.below(8);
            }
        }
        _ => {}
    }
}

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

/// Makes the block checksums right again where the file's tail still is the `crc` tensor.
fn reseal_blocks(bytes: &mut [u8]) {
    let Some(n) = bytes.first_chunk::<8>().map(|b| u64::from_le_bytes(*b)) else { return };
    let Some(data) = n.checked_add(8).and_then(|n| bytes.get_mut(n as usize..)) else { return };
    if let Some((data, crc)) = data.split_last_chunk_mut::<4>() {
        *crc = crc32c(data).to_le_bytes();
    }
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
fn containers() {
    let seeds = seeds();
    let total = mutants();
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
        let start = Instant::now();
        let ours = |c: Result<Container, Error>| c.and_then(|c| read_all(&c));
        let (result, peak) = measured(|| ours(Container::from_bytes(path, &bytes, Verify::Open)));
        let (foreign, peak2) = measured(|| ours(Container::foreign_from_bytes(path, &bytes)));
        let lazy = ours(Container::from_bytes(path, &bytes, Verify::FirstTouch));
        slowest = slowest.max(start.elapsed());
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
    assert!(slowest < Duration::from_secs(2), "{slowest:?}"); // 50 ms with room for a busy machine
    for (kind, n) in reached {
        assert!(n * 1000 >= total, "'{kind}' reached only {n} times in {total}");
    }
}

#[test]
fn manifests() {
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
    let total = mutants();
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
