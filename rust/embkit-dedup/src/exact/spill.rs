//! Records of one hash range per file, for more rows than fit in memory.

use super::Record;
use embkit_core::publish::temp_path;
use embkit_core::{Error, Job, Result};
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufReader, BufWriter, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// Bytes of a record in a file: high, low, row, priority.
const RECORD: usize = 28;
/// Bytes that a distinct text takes while its partition is grouped: an entry of 32 and a byte of
/// the table, at most 16/7 times because of its growth.
const ENTRY: u64 = 76;
const MOST: u64 = 512;

struct Partition {
    path: PathBuf,
    file: Mutex<BufWriter<File>>,
}

/// Open partition files; removed when dropped.
pub(super) struct Partitions {
    parts: Vec<Partition>,
}

impl Partitions {
    /// Enough files that the distinct texts of one fit the cap, even if all rows are distinct.
    pub fn create(dir: &Path, rows: u64, memory: u64) -> Result<Self> {
        let count = (rows * ENTRY).div_ceil(memory).clamp(2, MOST);
        // An eighth of the cap for buffers, but no less than a page each.
        let buffer = (memory / 8 / count).clamp(4 << 10, 256 << 10) as usize;
        let mut files = Self { parts: Vec::new() };
        for i in 0..count {
            let path = temp_path(&dir.join(format!("exact-{i:03}")))?;
            let open = File::options().read(true).write(true).create_new(true).open(&path);
            let file = open.map_err(|e| Error::io(&path, e))?;
            let file = Mutex::new(BufWriter::with_capacity(buffer, file));
            files.parts.push(Partition { path, file });
        }
        Ok(files)
    }

    /// Appends records, empty ones aside. Their order in a file does not matter.
    pub fn write(&self, records: &[Record]) -> Result<()> {
        for record in records.iter().filter(|record| !record.empty) {
            let at = (u128::from(record.high) * self.parts.len() as u128) >> 64;
            let part = &self.parts[at as usize];
            let mut bytes = [0u8; RECORD];
            bytes[..8].copy_from_slice(&record.high.to_le_bytes());
            bytes[8..16].copy_from_slice(&record.low.to_le_bytes());
            bytes[16..24].copy_from_slice(&record.row.to_le_bytes());
            bytes[24..].copy_from_slice(&record.priority.to_le_bytes());
            let mut file = part.file.lock().unwrap_or_else(|p| p.into_inner());
            file.write_all(&bytes).map_err(|e| Error::io(&part.path, e))?;
        }
        Ok(())
    }

    /// Writes the representatives of all rows that are in the files.
    pub fn group(self, representative: &mut [u64], job: &Job) -> Result<()> {
        for part in &self.parts {
            let mut file = part.file.lock().unwrap_or_else(|p| p.into_inner());
            file.flush().map_err(|e| Error::io(&part.path, e))?;
        }
        for part in &self.parts {
            // One entry per distinct text: a million copies of one text take no more than one.
            let mut first: HashMap<(u64, u64), (u32, u64)> = HashMap::new();
            part.read(job, |record| {
                let own = (record.priority, record.row);
                let best = first.entry((record.high, record.low)).or_insert(own);
                *best = own.min(*best);
            })?;
            part.read(job, |record| {
                let best = first.get(&(record.high, record.low));
                if let (Some(place), Some(&(_, row))) =
                    (representative.get_mut(record.row as usize), best)
                {
                    *place = row;
                }
            })?;
        }
        Ok(())
    }
}

impl Partition {
    fn read(&self, job: &Job, mut each: impl FnMut(Record)) -> Result<()> {
        let file = File::open(&self.path).map_err(|e| Error::io(&self.path, e))?;
        let mut file = BufReader::with_capacity(64 << 10, file);
        let mut bytes = [0u8; RECORD];
        for count in 0u64.. {
            if count % 4096 == 0 {
                job.check()?;
            }
            match file.read_exact(&mut bytes) {
                Ok(()) => {}
                Err(e) if e.kind() == ErrorKind::UnexpectedEof => break,
                Err(e) => return Err(Error::io(&self.path, e)),
            }
            let [high, low, row] = [0, 8, 16]
                .map(|at| bytes[at..].first_chunk().map_or(0, |b| u64::from_le_bytes(*b)));
            let priority = bytes.last_chunk().map_or(0, |b| u32::from_le_bytes(*b));
            each(Record { empty: false, high, low, priority, row });
        }
        Ok(())
    }
}

impl Drop for Partitions {
    fn drop(&mut self) {
        for part in &self.parts {
            // What cannot be removed now, sweep_tmp removes when this process is gone.
            let _ = fs::remove_file(&part.path);
        }
    }
}
