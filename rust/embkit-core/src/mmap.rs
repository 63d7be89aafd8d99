//! The read-only memory map: one of the three places where `unsafe` is allowed.
//!
//! A file that is truncated by someone else while it is mapped raises SIGBUS; published files are
//! only ever replaced by rename, so embkit itself never does that (documented as out of scope).

use crate::{Error, Result};
use std::fs::File;
use std::path::Path;

/// A whole file, mapped read-only. An empty file is an empty slice.
pub(crate) struct Map(Option<memmap2::Mmap>);

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
            return Ok(Map(None)); // the system refuses to map nothing
        }
        // SAFETY: the map is read-only and private to us; embkit replaces files by rename and never
        // writes into a published one, so the bytes behind the slice do not change. A foreign
        // process that writes in place breaks that, as it would for every mmap reader.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(|e| Error::io(path, e))?;
        Ok(Map(Some(map)))
    }

    /// The file's bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        self.0.as_deref().unwrap_or(&[])
    }
}
