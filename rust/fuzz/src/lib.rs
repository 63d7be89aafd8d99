//! What the targets share: files put together from a fuzzer's bytes, with their checksums right, so
//! that the fuzzer gets past them.

use embkit_core::crc32c;
use std::path::Path;
use tempfile::TempDir;

/// Rows of the store of [`seed_store`].
pub const ROWS: usize = 6;

/// A container from header JSON (after the checksum's key) and data, sealed.
pub fn sealed(json: &[u8], data: &[u8]) -> Vec<u8> {
    let prefix = b"{\"__metadata__\":{\"header_crc32c\":\"00000000\"";
    let total = (8 + prefix.len() + json.len()).next_multiple_of(4096);
    let mut file = ((total - 8) as u64).to_le_bytes().to_vec();
    file.extend(prefix);
    file.extend(json);
    file.resize(total, b' ');
    let digits = format!("{:08x}", crc32c(&file));
    file[42..50].copy_from_slice(digits.as_bytes());
    file.extend(data);
    for block in data.chunks(65536) {
        file.extend(crc32c(block).to_le_bytes());
    }
    file
}

/// The fuzzer's bytes as a file: as they are, or split at the first newline into header and data.
pub fn file(input: &[u8]) -> Vec<u8> {
    match input.split_first() {
        Some((0, rest)) => rest.to_vec(),
        Some((_, rest)) => {
            let at = rest.iter().position(|b| *b == b'\n').unwrap_or(rest.len());
            sealed(&rest[..at], rest.get(at + 1..).unwrap_or_default())
        }
        None => Vec::new(),
    }
}

/// A directory in memory, where there is one.
pub fn scratch() -> TempDir {
    let memory = Path::new("/dev/shm");
    let made = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    made.expect("a scratch directory")
}

/// A sound store of one shard: the golden one.
pub fn seed_store() -> TempDir {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/store-v1");
    let dir = scratch();
    for stem in ["raw", "texts"] {
        let name = format!("{stem}-00000-of-00001.safetensors");
        std::fs::copy(golden.join(&name), dir.path().join(&name)).expect("the golden store");
    }
    dir
}
