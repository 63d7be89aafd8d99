//! Builders of container files that share no code with the crate.
#![allow(dead_code)]

use embkit_core::{Error, crc32c};
use std::collections::BTreeMap;

/// Metadata of a file of some kind.
pub fn meta(format: &str, version: u32) -> BTreeMap<String, String> {
    BTreeMap::from([("format".into(), format.into()), ("version".into(), version.to_string())])
}

/// The message of an error that is expected.
pub fn message<T>(result: Result<T, Error>) -> String {
    match result {
        Ok(_) => panic!("expected an error"),
        Err(e) => e.to_string(),
    }
}

/// A sound file taken apart: header JSON without padding, data section.
pub fn parts(file: &[u8]) -> (String, Vec<u8>) {
    let n = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let json = String::from_utf8(file[8..8 + n].to_vec()).unwrap();
    (json.trim_end().to_owned(), file[8 + n..].to_vec())
}

/// A file from header JSON and data section, padded to 4096, checksums as they are.
pub fn build(json: &str, data: &[u8]) -> Vec<u8> {
    let total = (8 + json.len()).next_multiple_of(4096);
    let mut file = ((total - 8) as u64).to_le_bytes().to_vec();
    file.extend(json.bytes());
    file.resize(total, b' ');
    file.extend(data);
    file
}

/// The file with its header checksum (if it has one at its place) made right.
pub fn reseal(file: &[u8]) -> Vec<u8> {
    let mut file = file.to_vec();
    let Some(n) = file.first_chunk::<8>().map(|b| u64::from_le_bytes(*b) as usize) else {
        return file;
    };
    let end = n.saturating_add(8);
    if end > file.len() || n < 42 {
        return file;
    }
    file[42..50].fill(b'0');
    let crc = crc32c(&file[..end]);
    file[42..50].copy_from_slice(format!("{crc:08x}").as_bytes());
    file
}
