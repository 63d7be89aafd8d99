//! Checksums and hashes, each with one use.
//!
//! CRC-32C finds damage, XXH3-128 names texts inside a run (fast, not against an adversary: texts
//! are merged only after their 128 bits agree), BLAKE3 names files and digests between machines.

use crate::{Error, Result};
use std::fs::File;
use std::path::Path;

/// CRC-32C (Castagnoli) of `bytes`.
pub fn crc32c(bytes: &[u8]) -> u32 {
    ::crc32c::crc32c(bytes)
}

/// CRC-32C of what gave `crc`, followed by `bytes`.
pub fn crc32c_append(crc: u32, bytes: &[u8]) -> u32 {
    ::crc32c::crc32c_append(crc, bytes)
}

/// XXH3-128 (seed 0) of `bytes`: the identity of a text.
pub fn hash128(bytes: &[u8]) -> u128 {
    xxhash_rust::xxh3::xxh3_128(bytes)
}

/// The low 64 bits of [`hash128`]: what the `text_id` columns hold.
pub fn text_id(bytes: &[u8]) -> u64 {
    hash128(bytes) as u64
}

/// BLAKE3 of `bytes` as 64 hex digits.
pub fn blake3_hex(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

/// BLAKE3 of a file's content as 64 hex digits, read through a small buffer.
pub fn blake3_file(path: &Path) -> Result<String> {
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(file).map_err(|e| Error::io(path, e))?;
    Ok(hasher.finalize().to_hex().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_test_vectors() {
        assert_eq!(crc32c(b"123456789"), 0xE306_9283); // RFC 3720, B.4's polynomial
        assert_eq!(crc32c_append(crc32c(b"1234"), b"56789"), 0xE306_9283);
        assert_eq!(hash128(b""), 0x99aa_06d3_0147_98d8_6001_c324_468d_497f); // xxHash's own table
        assert_eq!(text_id(b""), 0x6001_c324_468d_497f);
        assert!(blake3_hex(b"").starts_with("af1349b9f5f9a1a6a0404dea36dcc949"));
    }

    #[test]
    fn a_file_hashes_like_its_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let bytes: Vec<u8> = (0..200_001u32).map(|i| (i % 251) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(blake3_file(&path).unwrap(), blake3_hex(&bytes));
        assert!(matches!(blake3_file(&dir.path().join("no")), Err(Error::Io { .. })));
    }
}
