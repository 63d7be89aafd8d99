//! The JSON header of a `.safetensors` file, parsed as hostile input.
//!
//! Oddity: embkit's own headers carry a checksum of themselves as their first metadata key, at a
//! fixed place, so that a flipped bit in a name or a shape is seen without the manifest.

use crate::container::{Dtype, FileInfo};
use crate::{Error, Result, crc32c};
use serde::de::DeserializeSeed;
use std::collections::BTreeMap;
use std::path::Path;

mod json;

use json::{Raw, RawSeed};

/// Largest header in bytes: far above any real one, far below what would hurt.
pub(crate) const MAX_HEADER: usize = 16 << 20;
/// Highest rank of a tensor.
pub(crate) const MAX_RANK: usize = 8;
/// Longest tensor name in bytes.
pub(crate) const MAX_NAME: usize = 512;
/// Most `__metadata__` keys.
pub(crate) const MAX_METADATA: usize = 64;
/// Data begins at a multiple of this.
pub(crate) const ALIGN: usize = 4096;
/// Bytes covered by one checksum.
pub(crate) const BLOCK: usize = 64 << 10;
/// The tensor of checksums, last in the file.
pub(crate) const CRC: &str = "crc";
/// Zero bytes (1 to 3) before `crc` when it would not be aligned otherwise.
pub(crate) const PAD: &str = "pad";
/// How each of our headers begins; eight hex digits of CRC-32C follow.
pub(crate) const PREFIX: &[u8] = b"{\"__metadata__\":{\"header_crc32c\":\"";
/// The metadata key of that checksum.
pub(crate) const HEADER_CRC: &str = "header_crc32c";

/// One tensor: where it lies in the file and what it is.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) name: Box<str>,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Box<[usize]>,
    /// First byte, counted from the start of the file.
    pub(crate) start: usize,
    /// One past the last byte.
    pub(crate) end: usize,
}

/// A header whose tensors are known to tile the data section exactly.
#[derive(Debug)]
pub(crate) struct Header {
    /// Sorted by name.
    pub(crate) entries: Vec<Entry>,
    pub(crate) metadata: BTreeMap<String, String>,
    /// First byte of the data section.
    pub(crate) data: usize,
}

impl Header {
    /// The entry called `name`.
    pub(crate) fn find(&self, name: &str) -> Option<&Entry> {
        let i = self.entries.binary_search_by(|e| (*e.name).cmp(name)).ok()?;
        self.entries.get(i)
    }
}

/// Parses and checks the header of any safetensors file: sizes before allocation, names unique,
/// shapes without overflow, tensors tiling the data section without gap or overlap.
pub(crate) fn parse(path: &Path, file: &[u8]) -> Result<Header> {
    let bad = |what: String| Error::corrupt(path, what);
    let Some((length, rest)) = file.split_first_chunk::<8>() else {
        return Err(bad(format!("has {} bytes, too short for a header length", file.len())));
    };
    let length = u64::from_le_bytes(*length);
    let length = match usize::try_from(length) {
        Ok(n) if n <= MAX_HEADER => n,
        _ => return Err(bad(format!("claims a header of {length} bytes, above {MAX_HEADER}"))),
    };
    let Some(json) = rest.get(..length) else {
        return Err(bad(format!("ends inside its header of {length} bytes")));
    };
    let data = 8 + length; // both small
    let mut reader = serde_json::Deserializer::from_slice(json);
    let raw = RawSeed { entries: count_entries(json) }
        .deserialize(&mut reader)
        .and_then(|raw| reader.end().map(|()| raw))
        .map_err(|e| bad(format!("has a header that is not safetensors JSON ({e})")))?;
    let size = file.len() - data; // `rest.get` above says data <= file.len()

    let Raw { mut entries, metadata } = raw;
    for e in &mut entries {
        check(e, size).map_err(|what| bad(format!("tensor '{}' {what}", e.name)))?;
        (e.start, e.end) = (data + e.start, data + e.end);
    }
    tile(&mut entries, data, file.len()).map_err(bad)?;
    entries.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    let twice = entries.iter().zip(entries.iter().skip(1)).find(|(a, b)| a.name == b.name);
    if let Some((a, _)) = twice {
        return Err(bad(format!("names tensor '{}' twice", a.name)));
    }
    Ok(Header { entries, metadata, data })
}

/// An upper bound of the tensors in a header, found before any is parsed, so that their list is
/// allocated once: each has this key, and no string can hold it with its quotes unescaped.
fn count_entries(json: &[u8]) -> usize {
    const KEY: &[u8] = b"\"data_offsets\"";
    let (mut n, mut rest) = (0, json);
    while let Some(at) = rest.iter().position(|b| *b == b'"') {
        rest = rest.get(at..).unwrap_or_default();
        let step = if rest.starts_with(KEY) { KEY.len() } else { 1 };
        n += usize::from(step > 1);
        rest = rest.get(step..).unwrap_or_default();
    }
    n
}

/// Shape times element size must equal the span, and the span must lie inside `size`.
fn check(e: &Entry, size: usize) -> std::result::Result<(), String> {
    let (a, b) = (e.start, e.end);
    if a > b || b > size {
        return Err(format!("spans bytes {a}..{b} of a data section of {size}"));
    }
    match e.shape.iter().try_fold(e.dtype.size(), |n, &d| n.checked_mul(d)) {
        Some(n) if n == b - a => Ok(()),
        Some(n) => Err(format!("needs {n} bytes for its shape but spans {}", b - a)),
        None => Err("has a shape whose size overflows".into()),
    }
}

/// Orders the entries by position and refuses gaps, overlaps and bytes after the last.
fn tile(entries: &mut [Entry], data: usize, file: usize) -> std::result::Result<(), String> {
    entries.sort_unstable_by_key(|e| (e.start, e.end));
    let mut at = data;
    for e in entries.iter() {
        if e.start != at {
            return Err(format!(
                "has tensor '{}' at byte {} where byte {at} was due: tensors must follow each other",
                e.name, e.start
            ));
        }
        at = e.end;
    }
    if at == file { Ok(()) } else { Err(format!("has {} bytes after its last tensor", file - at)) }
}

/// Checks what embkit adds to safetensors: header checksum, alignment, and the `crc` tensor's place
/// and size. Returns the file's facts and the span of the checksummed data.
pub(crate) fn check_ours(path: &Path, file: &[u8], header: &Header) -> Result<FileInfo> {
    let bad = |what: String| Error::corrupt(path, what);
    let head = file.get(..header.data).unwrap_or_default();
    let Some(digits) = stored_header_crc(head) else {
        return Err(Error::Corrupt {
            path: path.to_owned(),
            what: "has no embkit header checksum".into(),
            fix:
                "If it is a plain safetensors file of another program, open it as a foreign file; \
                  if embkit wrote it, it is damaged: restore it or run its stage again"
                    .into(),
        });
    };
    let actual = sealed_crc(head);
    if digits != format!("{actual:08x}").as_bytes() {
        return Err(bad("has a header that does not match its checksum".into()));
    }
    if !header.data.is_multiple_of(ALIGN) {
        return Err(bad(format!("has data at byte {}, not a multiple of {ALIGN}", header.data)));
    }
    for e in &header.entries {
        if !e.start.is_multiple_of(e.dtype.size()) {
            return Err(bad(format!("has tensor '{}' at unaligned byte {}", e.name, e.start)));
        }
    }
    let Some(crc) = header.find(CRC) else {
        return Err(bad("has no tensor 'crc'".into()));
    };
    let blocks = (crc.start - header.data).div_ceil(BLOCK);
    if crc.dtype != Dtype::U32 || *crc.shape != [blocks] || crc.end != file.len() {
        return Err(bad(format!("has a tensor 'crc' that is not the last one, U32 [{blocks}]")));
    }
    let table = file.get(crc.start..crc.end).unwrap_or_default();
    Ok(FileInfo { length: file.len() as u64, header_crc: crc32c(head), crc_crc: crc32c(table) })
}

/// The eight digits at their fixed place, if the header begins as ours do.
fn stored_header_crc(head: &[u8]) -> Option<&[u8]> {
    let rest = head.get(8..)?.strip_prefix(PREFIX)?;
    rest.get(..8)
}

/// CRC-32C of the length, the header and its padding, with the eight digits read as zeros.
pub(crate) fn sealed_crc(head: &[u8]) -> u32 {
    let at = 8 + PREFIX.len();
    let crc = crc32c(head.get(..at).unwrap_or(head));
    let crc = crate::crc32c_append(crc, b"00000000");
    crate::crc32c_append(crc, head.get(at + 8..).unwrap_or_default())
}
