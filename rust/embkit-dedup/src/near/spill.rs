//! Sequences of records that live in memory until a budget is used up, then in files.
//!
//! A [`Sorter`] sorts what it was given, part by part: in memory, or as sorted runs in files that
//! are merged while they are read. A [`Log`] keeps the order. Both give the same records in the
//! same order whatever the budget. Files lose their name as soon as they are open, so that neither
//! an error nor a kill leaves one behind.

use embkit_core::{Error, Job, Result, par};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Records sorted in one go between two looks at the job: a few milliseconds.
const SORT_CHUNK: usize = 1 << 17;
const READ_BYTES: usize = 1 << 16;

/// An unsigned number of fixed width.
pub(super) trait Record: Copy + Ord + Send {
    const BYTES: usize;
    fn put(self, out: &mut Vec<u8>);
    fn get(bytes: &[u8]) -> Self;
    /// Byte `level` from the top.
    fn digit(self, level: usize) -> usize;
}

macro_rules! record {
    ($($t:ty),*) => {$(
        impl Record for $t {
            const BYTES: usize = size_of::<$t>();
            fn put(self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_le_bytes());
            }
            fn get(bytes: &[u8]) -> Self {
                bytes.try_into().map_or(0, <$t>::from_le_bytes)
            }
            fn digit(self, level: usize) -> usize {
                (self >> (8 * (Self::BYTES - 1 - level)) & 0xFF) as usize
            }
        }
    )*};
}
record!(u64, u128);

/// Where files go and how many bytes may stay in memory.
#[derive(Clone, Debug)]
pub(super) struct Room {
    /// Bytes for the big tables of one step; `usize::MAX` without a cap.
    pub bytes: usize,
    pub dir: Option<PathBuf>,
}

impl Room {
    /// The `n`-th part of the room.
    pub fn share(&self, n: usize) -> usize {
        if self.bytes == usize::MAX { usize::MAX } else { self.bytes / n }
    }
}

/// A file without a name in `dir`.
#[derive(Debug)]
struct Scratch {
    file: File,
    dir: PathBuf,
    length: u64,
}

impl Scratch {
    fn new(dir: &Path) -> Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = dir.join(format!(".near-{}-{number}.tmp", std::process::id()));
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).open(&path);
        let file = file.map_err(|e| Error::io(&path, e))?;
        std::fs::remove_file(&path).map_err(|e| Error::io(&path, e))?;
        Ok(Self { file, dir: dir.to_owned(), length: 0 })
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|e| Error::io(&self.dir, e))?;
        self.length += bytes.len() as u64;
        Ok(())
    }

    /// Fills `out` with the bytes at `at`, up to `bytes` of them.
    fn read(&mut self, at: u64, bytes: usize, out: &mut Vec<u8>) -> Result<()> {
        let io = |e| Error::io(&self.dir, e);
        out.resize(bytes, 0);
        self.file.seek(SeekFrom::Start(at)).map_err(io)?;
        self.file.read_exact(out).map_err(io)
    }
}

/// Records in the order in which they came.
pub(super) struct Log<T> {
    tail: Vec<T>,
    room: usize,
    dir: Option<PathBuf>,
    file: Option<Scratch>,
}

impl<T: Record> Log<T> {
    pub fn new(room: usize, dir: Option<PathBuf>) -> Self {
        Self { tail: Vec::new(), room, dir, file: None }
    }

    pub fn push(&mut self, record: T) -> Result<()> {
        self.tail.push(record);
        let Some(dir) = self.dir.as_deref().filter(|_| self.tail.len() * T::BYTES >= self.room)
        else {
            return Ok(());
        };
        let file = match &mut self.file {
            Some(file) => file,
            none => none.insert(Scratch::new(dir)?),
        };
        write_all(file, &self.tail)?;
        self.tail.clear();
        Ok(())
    }

    /// Calls `f` with every record.
    pub fn each(&mut self, mut f: impl FnMut(T) -> Result<()>) -> Result<()> {
        if let Some(file) = &mut self.file {
            let (mut bytes, mut at, end) = (Vec::new(), 0, file.length);
            while at < end {
                let step = READ_BYTES.min((end - at) as usize);
                file.read(at, step, &mut bytes)?;
                at += step as u64;
                bytes.chunks_exact(T::BYTES).try_for_each(|record| f(T::get(record)))?;
            }
            file.file.seek(SeekFrom::Start(end)).map_err(|e| Error::io(&file.dir, e))?;
        }
        self.tail.iter().try_for_each(|record| f(*record))
    }
}

fn write_all<T: Record>(file: &mut Scratch, records: &[T]) -> Result<()> {
    let mut bytes = Vec::with_capacity(READ_BYTES);
    for chunk in records.chunks(READ_BYTES / T::BYTES) {
        bytes.clear();
        chunk.iter().for_each(|record| record.put(&mut bytes));
        file.append(&bytes)?;
    }
    Ok(())
}

/// Records sorted within each of a fixed number of parts.
pub(super) struct Sorter<T> {
    parts: Vec<Mutex<Vec<T>>>,
    kept: AtomicUsize,
    room: usize,
    dir: Option<PathBuf>,
    threads: usize,
    /// Sorted runs, and where in each the parts end (bytes).
    runs: Vec<(Scratch, Vec<u64>)>,
}

impl<T: Record> Sorter<T> {
    /// A sorter that holds up to `room` bytes in memory (everything when `dir` is `None`).
    pub fn new(parts: usize, room: usize, dir: Option<PathBuf>, threads: usize) -> Self {
        let parts = (0..parts).map(|_| Mutex::default()).collect();
        Self { parts, kept: AtomicUsize::new(0), room, dir, threads, runs: Vec::new() }
    }

    /// Makes place for `records` in every part.
    pub fn reserve(&mut self, records: usize) {
        self.parts.iter_mut().for_each(|part| lock(part).reserve_exact(records));
    }

    pub fn push(&mut self, part: usize, record: T, job: &Job) -> Result<()> {
        lock(&mut self.parts[part]).push(record);
        *self.kept.get_mut() += 1;
        self.settle(job)
    }

    /// Adds records from any thread, in any order; [`Sorter::settle`] must follow before long.
    pub fn extend(&self, part: usize, records: impl Iterator<Item = T>) {
        let mut part = self.parts[part].lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let before = part.len();
        part.extend(records);
        self.kept.fetch_add(part.len() - before, Ordering::Relaxed);
    }

    /// Writes what exceeds the room to a file.
    pub fn settle(&mut self, job: &Job) -> Result<()> {
        // Sorting takes a second buffer and vectors grow by doubling: count each record thrice.
        if self.dir.is_some() && *self.kept.get_mut() * T::BYTES >= self.room / 3 {
            self.spill(job)?;
        }
        Ok(())
    }

    fn spill(&mut self, job: &Job) -> Result<()> {
        let Some(dir) = self.dir.as_deref() else { return Ok(()) };
        let mut file = Scratch::new(dir)?;
        sort_parts(&self.parts, self.threads, job)?;
        let mut ends = Vec::with_capacity(self.parts.len());
        for part in &mut self.parts {
            job.check()?;
            write_all(&mut file, lock(part))?;
            lock(part).clear();
            ends.push(file.length);
        }
        *self.kept.get_mut() = 0;
        self.runs.push((file, ends));
        Ok(())
    }

    /// Calls `f(part, record)` with every record, part after part, each sorted.
    pub fn each(mut self, job: &Job, mut f: impl FnMut(usize, T) -> Result<()>) -> Result<()> {
        if self.runs.is_empty() {
            sort_parts(&self.parts, self.threads, job)?;
            for (number, part) in self.parts.iter_mut().enumerate() {
                let part = std::mem::take(lock(part)); // freed when read
                for block in part.chunks(4096) {
                    job.check()?;
                    block.iter().try_for_each(|record| f(number, *record))?;
                }
            }
            return Ok(());
        }
        self.spill(job)?;
        let buffer = (self.room / self.runs.len()).clamp(512, READ_BYTES) / T::BYTES * T::BYTES;
        for part in 0..self.parts.len() {
            let mut cursors: Vec<Cursor> =
                self.runs.iter().map(|run| Cursor::new(run, part)).collect();
            let mut heap = BinaryHeap::new();
            for (run, cursor) in cursors.iter_mut().enumerate() {
                let next = cursor.next::<T>(&mut self.runs[run].0, buffer)?;
                heap.extend(next.map(|record| Reverse((record, run))));
            }
            let mut seen = 0u32;
            while let Some(Reverse((record, run))) = heap.pop() {
                seen = seen.wrapping_add(1);
                if seen.is_multiple_of(1024) {
                    job.check()?;
                }
                let next = cursors[run].next::<T>(&mut self.runs[run].0, buffer)?;
                heap.extend(next.map(|record| Reverse((record, run))));
                f(part, record)?;
            }
        }
        Ok(())
    }
}

fn lock<T>(part: &mut Mutex<T>) -> &mut T {
    part.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn sort_parts<T: Record>(parts: &[Mutex<Vec<T>>], threads: usize, job: &Job) -> Result<()> {
    par::try_map_blocks(parts.len(), 1, threads, |at| {
        let mut part = parts[at.start].lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        sort(&mut part, 0, job)
    })?;
    Ok(())
}

/// Sorts, looking at the job every few milliseconds: large slices are first dealt out by one byte.
fn sort<T: Record>(records: &mut [T], level: usize, job: &Job) -> Result<()> {
    job.check()?;
    if records.len() <= SORT_CHUNK || level == T::BYTES {
        records.sort_unstable();
        return Ok(());
    }
    let mut ends = [0usize; 256];
    records.iter().for_each(|record| ends[record.digit(level)] += 1);
    let mut next = [0usize; 256];
    let mut sum = 0;
    for (next, end) in next.iter_mut().zip(&mut ends) {
        *next = sum;
        sum += *end;
        *end = sum;
    }
    if next.iter().zip(&ends).any(|(from, to)| to - from == records.len()) {
        return sort(records, level + 1, job); // they agree in this byte
    }
    let from = records.to_vec();
    for chunk in from.chunks(SORT_CHUNK) {
        job.check()?;
        for record in chunk {
            let slot = &mut next[record.digit(level)];
            records[*slot] = *record;
            *slot += 1;
        }
    }
    drop(from);
    let mut start = 0;
    for end in ends {
        sort(&mut records[start..end], level + 1, job)?;
        start = end;
    }
    Ok(())
}

/// Where the merge stands in one part of one run.
struct Cursor {
    at: u64,
    end: u64,
    bytes: Vec<u8>,
    used: usize,
}

impl Cursor {
    fn new((_, ends): &(Scratch, Vec<u64>), part: usize) -> Self {
        let at = if part == 0 { 0 } else { ends[part - 1] };
        Self { at, end: ends[part], bytes: Vec::new(), used: 0 }
    }

    fn next<T: Record>(&mut self, file: &mut Scratch, buffer: usize) -> Result<Option<T>> {
        if self.used == self.bytes.len() {
            if self.at == self.end {
                return Ok(None);
            }
            let step = buffer.min((self.end - self.at) as usize);
            file.read(self.at, step, &mut self.bytes)?;
            self.at += step as u64;
            self.used = 0;
        }
        let from = self.used;
        self.used += T::BYTES;
        Ok(Some(T::get(&self.bytes[from..self.used])))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn budgets_do_not_show(records in prop::collection::vec((0usize..3, 0u64..500), 0..400),
                               room in 24usize..4000) {
            let dir = std::env::temp_dir();
            let job = Job::new();
            let mut want = records.clone();
            want.sort_unstable();
            let mut sorter = Sorter::<u128>::new(3, room, Some(dir.clone()), 1);
            let mut log = Log::new(room, Some(dir));
            for &(part, record) in &records {
                sorter.push(part, u128::from(record) << 40, &job).unwrap();
                log.push(record).unwrap();
            }
            let mut got = Vec::new();
            sorter.each(&job, |part, record| { got.push((part, (record >> 40) as u64)); Ok(()) }).unwrap();
            prop_assert_eq!(got, want);
            for _ in 0..2 {
                let mut got = Vec::new();
                log.each(|record| { got.push(record); Ok(()) }).unwrap();
                prop_assert_eq!(&got, &records.iter().map(|r| r.1).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn large_parts_are_sorted() {
        for mask in [u64::MAX, 0xFF, 0xFFFF_0000_0000_0000, 0] {
            let spread = |i: u64| i.wrapping_mul(0x9E37_79B9_7F4A_7C15) & mask;
            let mut got: Vec<u64> = (0..300_000).map(spread).collect();
            let mut want = got.clone();
            want.sort_unstable();
            sort(&mut got, 0, &Job::new()).unwrap();
            assert_eq!(got, want);
        }
    }

    #[test]
    fn a_missing_directory_is_an_io_error() {
        let dir = std::env::temp_dir().join("embkit-no-such-directory");
        let mut log = Log::new(8, Some(dir));
        assert!(matches!(log.push(1u64), Err(Error::Io { .. })));
    }
}
