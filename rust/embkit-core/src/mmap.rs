//! The read-only memory map: one of the three places where `unsafe` is allowed.
//!
//! A file that is truncated by someone else while it is mapped raises SIGBUS; published files are
//! only ever replaced by rename, so embkit itself never does that (documented as out of scope).

use crate::{Error, Result};
use std::fs::File;
use std::path::Path;

/// A whole file, mapped read-only, or a copy of one.
pub(crate) enum Map {
    /// Of a file that is not empty: the system refuses to map nothing.
    File(memmap2::Mmap),
    /// In 8-byte words, so that tensors are aligned as in a map; and the number of bytes.
    Copy(Vec<u64>, usize),
}

impl Map {
    /// Maps the regular file at `path`.
    pub(crate) fn open(path: &Path) -> Result<Map> {
        // Looked at before it is opened: opening a pipe would wait for a writer.
        let meta = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
        if !meta.is_file() {
            return Err(Error::usage(
                format!("{}: is not a regular file", path.display()),
                "Give the path of a .safetensors file",
            ));
        }
        let file = File::open(path).map_err(|e| Error::io(path, e))?;
        let length = file.metadata().map_err(|e| Error::io(path, e))?.len();
        if length == 0 {
            return Ok(Map::Copy(Vec::new(), 0));
        }
        // SAFETY: the map is read-only and private to us; embkit replaces files by rename and never
        // writes into a published one, so the bytes behind the slice do not change. A foreign
        // process that writes in place breaks that, as it would for every mmap reader.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(|e| Error::io(path, e))?;
        Ok(Map::File(map))
    }

    /// Copies `bytes`.
    pub(crate) fn copy(bytes: &[u8]) -> Map {
        let mut words = vec![0u64; bytes.len().div_ceil(8)];
        let target: &mut [u8] = bytemuck::cast_slice_mut(&mut words);
        for (to, from) in target.iter_mut().zip(bytes) {
            *to = *from;
        }
        Map::Copy(words, bytes.len())
    }

    /// Asks the system to read a range ahead; it may decline, and a range outside does nothing.
    pub(crate) fn will_need(&self, range: std::ops::Range<usize>) {
        if let Map::File(map) = self
            && range.start < range.end
            && range.end <= map.len()
        {
            // Advice cannot fail in a way that matters: without it the read only waits.
            let _ = map.advise_range(memmap2::Advice::WillNeed, range.start, range.len());
        }
    }

    /// The file's bytes.
    #[inline]
    pub(crate) fn bytes(&self) -> &[u8] {
        match self {
            Map::File(map) => map,
            Map::Copy(words, n) => bytemuck::cast_slice(words).get(..*n).unwrap_or_default(),
        }
    }
}
