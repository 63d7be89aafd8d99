//! The JSON header of a `.safetensors` file, parsed as hostile input.
//!
//! Oddity: embkit's own headers carry a checksum of themselves as their first metadata key, at a
//! fixed place, so that a flipped bit in a name or a shape is seen without the manifest.

use crate::container::{Dtype, FileInfo};
use crate::{Error, Result, crc32c};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

/// Largest header in bytes: far above any real one, far below what would hurt.
pub(crate) const MAX_HEADER: usize = 16 << 20;
/// Highest rank of a tensor.
pub(crate) const MAX_RANK: usize = 8;
/// Most `__metadata__` keys.
pub(crate) const MAX_METADATA: usize = 1024;
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
    let raw: Raw = serde_json::from_slice(json)
        .map_err(|e| bad(format!("has a header that is not safetensors JSON ({e})")))?;
    let size = file.len() - data; // `rest.get` above says data <= file.len()

    let mut entries = Vec::with_capacity(raw.tensors.len());
    for (name, t) in raw.tensors {
        let t = check(t, size).map_err(|what| bad(format!("tensor '{name}' {what}")))?;
        let (dtype, shape, a, b) = t;
        entries.push(Entry { name, dtype, shape, start: data + a, end: data + b });
    }
    tile(&mut entries, data, file.len()).map_err(bad)?;
    entries.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    let twice = entries.iter().zip(entries.iter().skip(1)).find(|(a, b)| a.name == b.name);
    if let Some((a, _)) = twice {
        return Err(bad(format!("names tensor '{}' twice", a.name)));
    }
    Ok(Header { entries, metadata: raw.metadata, data })
}

type Checked = (Dtype, Box<[usize]>, usize, usize);

/// Shape times element size must equal the span, and the span must lie inside `size`.
fn check(t: RawTensor, size: usize) -> std::result::Result<Checked, String> {
    let (a, b) = t.data_offsets;
    let (a, b) = match (usize::try_from(a), usize::try_from(b)) {
        (Ok(a), Ok(b)) if a <= b && b <= size => (a, b),
        _ => return Err(format!("spans bytes {a}..{b} of a data section of {size}")),
    };
    let mut bytes = Some(t.dtype.size());
    let mut shape = Vec::with_capacity(t.shape.rank);
    for &d in t.shape.dims.iter().take(t.shape.rank) {
        let d = usize::try_from(d).map_err(|_| format!("has a dimension of {d}"))?;
        bytes = bytes.and_then(|n| n.checked_mul(d));
        shape.push(d);
    }
    match bytes {
        Some(n) if n == b - a => Ok((t.dtype, shape.into(), a, b)),
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
    if header.data % ALIGN != 0 {
        return Err(bad(format!("has data at byte {}, not a multiple of {ALIGN}", header.data)));
    }
    for e in &header.entries {
        if e.start % e.dtype.size() != 0 {
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

struct Raw {
    metadata: BTreeMap<String, String>,
    tensors: Vec<(Box<str>, RawTensor)>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTensor {
    dtype: Dtype,
    shape: Shape,
    data_offsets: (u64, u64),
}

/// A shape kept inline: a rank of a million must not cost a megabyte.
struct Shape {
    dims: [u64; MAX_RANK],
    rank: usize,
}

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(d: D) -> std::result::Result<Shape, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = Shape;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                write!(f, "a list of at most {MAX_RANK} dimensions")
            }
            fn visit_seq<A: SeqAccess<'de>>(
                self,
                mut seq: A,
            ) -> std::result::Result<Shape, A::Error> {
                let mut shape = Shape { dims: [0; MAX_RANK], rank: 0 };
                while let Some(d) = seq.next_element::<u64>()? {
                    let slot = shape.dims.get_mut(shape.rank);
                    *slot.ok_or_else(|| A::Error::custom("more than 8 dimensions"))? = d;
                    shape.rank += 1;
                }
                Ok(shape)
            }
        }
        d.deserialize_seq(V)
    }
}

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(d: D) -> std::result::Result<Raw, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = Raw;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a safetensors header")
            }
            fn visit_map<A: MapAccess<'de>>(
                self,
                mut map: A,
            ) -> std::result::Result<Raw, A::Error> {
                let mut raw = Raw { metadata: BTreeMap::new(), tensors: Vec::new() };
                let mut seen = false;
                while let Some(name) = map.next_key::<Box<str>>()? {
                    if &*name != "__metadata__" {
                        raw.tensors.push((name, map.next_value()?));
                    } else if std::mem::replace(&mut seen, true) {
                        return Err(A::Error::custom("__metadata__ twice"));
                    } else {
                        raw.metadata = map.next_value::<Metadata>()?.0;
                    }
                }
                Ok(raw)
            }
        }
        d.deserialize_map(V)
    }
}

struct Metadata(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for Metadata {
    fn deserialize<D: Deserializer<'de>>(d: D) -> std::result::Result<Metadata, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = Metadata;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a map of strings to strings")
            }
            fn visit_map<A: MapAccess<'de>>(
                self,
                mut map: A,
            ) -> std::result::Result<Metadata, A::Error> {
                let mut out = BTreeMap::new();
                while let Some((k, v)) = map.next_entry::<String, String>()? {
                    if out.len() == MAX_METADATA {
                        return Err(A::Error::custom("more than 1024 metadata keys"));
                    }
                    if out.insert(k, v).is_some() {
                        return Err(A::Error::custom("a metadata key twice"));
                    }
                }
                Ok(Metadata(out))
            }
        }
        d.deserialize_map(V)
    }
}
