//! Where distinct texts go: raw shards in a directory, one in memory at a time, or all in memory.
//!
//! A shard is `raw-00003.safetensors` until the number of shards is known, then
//! `raw-00003-of-00016.safetensors`. Shards are cut by size alone, so the files depend on the texts
//! and on nothing else.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use embkit_core::container::{self, Container, Tensor, Verify};
use embkit_core::{Error, Result, publish};

use crate::tokenize::{RAW_FORMAT, VERSION, name, parse_name};

/// Default size of a shard's texts in bytes.
pub const TEXT_BYTES: u64 = 64 << 20;
/// Bytes of a row beside its text, and their limit in times the text's: keeps files of very short
/// texts below 256 MiB.
const ROW_BYTES: u64 = 24;
const SIDE_FACTOR: u64 = 2;

/// Texts in rows, the last ones in memory.
pub(crate) struct Shards {
    /// `None` keeps everything in memory.
    dir: Option<(PathBuf, u64)>,
    /// First row of each shard on disk, then of `open`.
    first: Vec<usize>,
    open: Held,
}

/// Texts in memory.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Held {
    pub(crate) text: Vec<u8>,
    /// One more than texts.
    pub(crate) offsets: Vec<u64>,
    pub(crate) text_id: Vec<u64>,
    /// Shards written, none when all texts are here.
    pub(crate) shards: usize,
}

impl Held {
    fn empty() -> Self {
        Self { text: Vec::new(), offsets: vec![0], text_id: Vec::new(), shards: 0 }
    }

    fn truncate(&mut self, rows: usize) {
        self.offsets.truncate(rows + 1);
        self.text_id.truncate(rows);
        self.text.truncate(self.offsets.last().map_or(0, |end| *end as usize));
    }
}

impl Shards {
    pub(crate) fn in_memory() -> Self {
        Self { dir: None, first: vec![0], open: Held::empty() }
    }

    /// Shards in `dir`, which must exist; those of an earlier, unfinished run are removed.
    pub(crate) fn in_directory(dir: &Path, text_bytes: u64) -> Result<Self> {
        publish::settle(dir, &[], &list(dir)?)?;
        Ok(Self { dir: Some((dir.to_path_buf(), text_bytes)), ..Self::in_memory() })
    }

    pub(crate) fn push(&mut self, text: &[u8], text_id: u64) -> Result<()> {
        if let Some((_, most)) = self.dir {
            let rows = self.open.text_id.len() as u64;
            let full = (self.open.text.len() + text.len()) as u64 > most
                || (rows + 1) * ROW_BYTES > most.saturating_mul(SIDE_FACTOR);
            if full && rows > 0 {
                self.publish()?;
            }
        }
        self.open.text.extend_from_slice(text);
        self.open.offsets.push(self.open.text.len() as u64);
        self.open.text_id.push(text_id);
        Ok(())
    }

    /// Forgets every text from row `len` on; a shard on disk that holds some of them is read back.
    pub(crate) fn truncate(&mut self, len: usize) -> Result<()> {
        while self.first.len() > 1 && self.first.last().is_some_and(|first| *first > len) {
            self.first.pop();
            let Some((dir, _)) = &self.dir else { continue };
            let path = dir.join(name("raw", self.first.len() - 1, None));
            if self.first.last().is_some_and(|first| *first <= len) {
                let shard = Container::open(&path, Verify::Open)?;
                self.open = Held {
                    text: shard.slice("text")?.to_vec(),
                    offsets: shard.slice("offsets")?.to_vec(),
                    text_id: shard.slice("text_id")?.to_vec(),
                    shards: 0,
                };
            }
            fs::remove_file(&path).map_err(|e| Error::io(&path, e))?;
        }
        self.open.truncate(len - self.first.last().copied().unwrap_or(0).min(len));
        Ok(())
    }

    /// Writes what is left and gives every shard its last name. The texts, or none of them when
    /// they are on disk.
    pub(crate) fn finish(mut self) -> Result<Held> {
        if self.dir.is_none() {
            return Ok(self.open);
        }
        if !self.open.text_id.is_empty() || self.first.len() == 1 {
            self.publish()?;
        }
        let Some((dir, _)) = &self.dir else { return Ok(self.open) };
        let of = self.first.len() - 1;
        let renames: Vec<(PathBuf, PathBuf)> = (0..of)
            .map(|i| (dir.join(name("raw", i, None)), dir.join(name("raw", i, Some(of)))))
            .collect();
        publish::settle(dir, &renames, &[])?;
        Ok(Held { shards: of, ..Held::empty() })
    }

    fn publish(&mut self) -> Result<()> {
        let Some((dir, _)) = &self.dir else { return Ok(()) };
        let meta = [("format", RAW_FORMAT.to_string()), ("version", VERSION.to_string())];
        let meta: BTreeMap<String, String> =
            meta.into_iter().map(|(key, value)| (key.to_string(), value)).collect();
        let tensors = [
            Tensor::vector("text", &self.open.text),
            Tensor::vector("offsets", &self.open.offsets),
            Tensor::vector("text_id", &self.open.text_id),
            Tensor::vector("cluster", &self.open.text_id), // its own, before deduplication
        ];
        container::write(&dir.join(name("raw", self.first.len() - 1, None)), &tensors, &meta)?;
        let first = self.first.last().copied().unwrap_or(0);
        self.first.push(first + self.open.text_id.len());
        // The room is kept for the next shard.
        self.open.truncate(0);
        Ok(())
    }
}

/// The raw shards in a directory, under any name.
fn list(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(|e| Error::io(dir, e))? {
        let entry = entry.map_err(|e| Error::io(dir, e))?;
        if let Some(("raw", _, _)) = entry.file_name().to_str().and_then(parse_name) {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_survive_cuts_and_truncation() {
        let texts: Vec<String> = (0..50).map(|i| "x".repeat(i % 7) + &i.to_string()).collect();
        for keep in [0, 1, 9, 20, 49, 50] {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join("raw-00000-of-00009.safetensors"), b"stale").unwrap();
            let mut shards = Shards::in_directory(dir.path(), 20).unwrap();
            let mut want = Shards::in_memory();
            let push = |shards: &mut Shards, range: std::ops::Range<usize>| {
                for i in range {
                    shards.push(texts[i].as_bytes(), i as u64).unwrap();
                }
            };
            push(&mut shards, 0..50);
            shards.truncate(keep).unwrap();
            push(&mut shards, 10..30);
            push(&mut want, 0..keep);
            push(&mut want, 10..30);
            let (got, want) = (shards.finish().unwrap(), want.finish().unwrap());
            let (mut text, mut ids) = (Vec::new(), Vec::new());
            for path in list(dir.path()).unwrap() {
                let shard = Container::open(&path, Verify::Open).unwrap();
                let bytes: &[u8] = shard.slice("text").unwrap();
                assert!(bytes.len() <= 20, "{path:?}");
                text.extend_from_slice(bytes);
                ids.extend_from_slice(shard.slice::<u64>("text_id").unwrap());
            }
            assert_eq!((text, ids), (want.text, want.text_id));
            assert_eq!(list(dir.path()).unwrap().len(), got.shards);
        }
    }
}
