//! What the fuzz tests of several crates share: an allocator that counts, a clock that other
//! programs do not disturb, and mutators that keep most of the structure of what they change.
#![allow(dead_code)]

use embkit_core::crc32c;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::time::Duration;

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
pub fn measured<T>(f: impl FnOnce() -> T) -> (T, usize) {
    let before = LIVE.get();
    PEAK.set(before);
    let out = f();
    (out, (PEAK.get() - before) as usize)
}

/// How many mutants: `reduced`, or the 10^6 of docs/promises.md under `EMBKIT_TEST_FULL`.
pub fn mutants(reduced: u64) -> u64 {
    if std::env::var_os("EMBKIT_TEST_FULL").is_some() { 1_000_000 } else { reduced }
}

/// Processor time of this thread.
pub fn cpu() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// SplitMix64.
pub struct Rng(pub u64);
impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    }
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }
}

pub const EXTREMES: [&str; 14] = [
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
pub fn numbers(text: &str) -> Vec<(usize, usize)> {
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
pub fn boundary(s: &str, mut at: usize) -> usize {
    while !s.is_char_boundary(at) {
        at -= 1;
    }
    at
}

/// One change to JSON text that keeps most of its structure.
pub fn mutate_json(rng: &mut Rng, json: &str) -> String {
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

pub fn flip(rng: &mut Rng, bytes: &mut Vec<u8>) {
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

/// Makes the block checksums right again where the file's tail still is the `crc` tensor.
pub fn reseal_blocks(bytes: &mut [u8]) {
    let Some(n) = bytes.first_chunk::<8>().map(|b| u64::from_le_bytes(*b)) else { return };
    let Some(data) = n.checked_add(8).and_then(|n| bytes.get_mut(n as usize..)) else { return };
    if let Some((data, crc)) = data.split_last_chunk_mut::<4>() {
        *crc = crc32c(data).to_le_bytes();
    }
}
