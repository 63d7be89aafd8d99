//! Laying out, checksumming and publishing a container.

use super::{Dtype, Element, FileInfo, SINCE, version_of};
use crate::header::{self, ALIGN, BLOCK, CRC, HEADER_CRC, MAX_HEADER, PAD, PREFIX};
use crate::{Error, Result, crc32c, crc32c_append, publish};
use std::collections::BTreeMap;
use std::path::Path;

/// A tensor to write: row-major little-endian bytes.
#[derive(Clone, Debug)]
pub struct Tensor<'a> {
    /// Its name: not empty, and not `crc`, `pad` or `__metadata__`.
    pub name: &'a str,
    /// Its element type.
    pub dtype: Dtype,
    /// Its dimensions, at most eight.
    pub shape: Vec<usize>,
    /// Its elements: product of `shape` times `dtype.size()` bytes.
    pub bytes: &'a [u8],
}

impl<'a> Tensor<'a> {
    /// A vector.
    pub fn vector<T: Element>(name: &'a str, values: &'a [T]) -> Tensor<'a> {
        Tensor::shaped(name, &[values.len()], values)
    }

    /// A tensor of any shape; [`write`] checks that it fits the values.
    pub fn shaped<T: Element>(name: &'a str, shape: &[usize], values: &'a [T]) -> Tensor<'a> {
        let bytes = bytemuck::cast_slice(values);
        Tensor { name, dtype: T::DTYPE, shape: shape.to_vec(), bytes }
    }
}

/// Writes and publishes a container ([`publish::publish_file`]). Tensors are laid out by descending
/// element size, then by name, whatever their order here, so equal content is equal bytes.
///
/// `metadata` must hold `format` (such as `"embkit.texts"`) and `version` (a positive integer);
/// `embkit` is added ([`SINCE`]) unless given.
/// [`Error::Usage`] when a tensor's bytes do not fit its shape, a name is reserved or double, or the
/// header would exceed 16 MiB; [`Error::Io`] when the system refuses, with nothing left behind.
pub fn write(
    path: &Path,
    tensors: &[Tensor],
    metadata: &BTreeMap<String, String>,
) -> Result<FileInfo> {
    let order = layout(tensors, metadata)?;
    let mut metadata = metadata.clone();
    metadata.entry("embkit".into()).or_insert_with(|| SINCE.into());
    let size: usize = order.iter().map(|t| t.bytes.len()).sum();
    let pad = vec![0u8; size.next_multiple_of(4) - size];
    let parts: Vec<&[u8]> = order.iter().map(|t| t.bytes).chain([pad.as_slice()]).collect();
    let table = block_crcs(&parts);
    let table: &[u8] = bytemuck::cast_slice(&table);

    let head = encode(&order, pad.len(), table.len() / 4, &metadata)?;
    let info = FileInfo {
        length: (head.len() + size + pad.len() + table.len()) as u64,
        header_crc: crc32c(&head),
        crc_crc: crc32c(table),
    };
    let all: Vec<&[u8]> = [head.as_slice()].into_iter().chain(parts).chain([table]).collect();
    publish::publish_parts(path, &all)?;
    Ok(info)
}

/// Checks the tensors and puts them into file order.
fn layout<'t, 'a>(
    tensors: &'t [Tensor<'a>],
    metadata: &BTreeMap<String, String>,
) -> Result<Vec<&'t Tensor<'a>>> {
    let usage = |what: String, fix: &str| Err(Error::usage(what, fix));
    if !metadata.contains_key("format") || version_of(metadata).is_none_or(|v| v == 0) {
        return usage("metadata lacks 'format' or a positive 'version'".into(), "Give both");
    }
    if metadata.contains_key(HEADER_CRC) || metadata.len() + 2 > header::MAX_METADATA {
        return usage(
            format!("metadata has the reserved key '{HEADER_CRC}' or more than 62 keys"),
            "Leave that key out and put long tables into tensors",
        );
    }
    let mut order: Vec<&Tensor> = tensors.iter().collect();
    order.sort_by(|a, b| b.dtype.size().cmp(&a.dtype.size()).then(a.name.cmp(b.name)));
    let mut names: Vec<&str> = tensors.iter().map(|t| t.name).collect();
    names.sort_unstable();
    if let Some((a, _)) = names.iter().zip(names.iter().skip(1)).find(|(a, b)| a == b) {
        return usage(format!("two tensors are called '{a}'"), "Give each its own name");
    }
    for t in &order {
        if ["", CRC, PAD, "__metadata__"].contains(&t.name) {
            return usage(format!("the tensor name '{}' is reserved", t.name), "Choose another");
        }
        if t.name.len() > header::MAX_NAME {
            let what = format!("a tensor name of {} bytes", t.name.len());
            return usage(what, "Use at most 512 bytes");
        }
        let fits = t.shape.iter().try_fold(t.dtype.size(), |n, &d| n.checked_mul(d));
        if t.shape.len() > header::MAX_RANK || fits != Some(t.bytes.len()) {
            return usage(
                format!(
                    "tensor '{}' of {} {:?} was given {} bytes",
                    t.name,
                    t.dtype.name(),
                    t.shape,
                    t.bytes.len()
                ),
                "Pass exactly the bytes of its shape, with at most 8 dimensions",
            );
        }
    }
    Ok(order)
}

/// CRC-32C of each 64 KiB block of the concatenated parts.
fn block_crcs(parts: &[&[u8]]) -> Vec<u32> {
    let size: usize = parts.iter().map(|p| p.len()).sum();
    let mut out = Vec::with_capacity(size.div_ceil(BLOCK));
    let (mut crc, mut filled) = (0, 0);
    for part in parts {
        let mut rest = *part;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min(BLOCK - filled));
            crc = crc32c_append(crc, now);
            filled += now.len();
            rest = later;
            if filled == BLOCK {
                out.push(crc);
                (crc, filled) = (0, 0);
            }
        }
    }
    if filled > 0 {
        out.push(crc);
    }
    out
}

/// Length field, JSON and padding, with the header's own checksum filled in.
fn encode(
    order: &[&Tensor],
    pad: usize,
    blocks: usize,
    metadata: &BTreeMap<String, String>,
) -> Result<Vec<u8>> {
    let string = |s: &str| serde_json::Value::from(s).to_string();
    let mut json = String::from_utf8_lossy(PREFIX).into_owned();
    json.push_str("00000000\"");
    for (k, v) in metadata {
        json.push_str(&format!(",{}:{}", string(k), string(v)));
    }
    json.push('}');
    let mut at = 0;
    let mut entry = |name: &str, dtype: Dtype, shape: &[usize], size: usize| {
        let dims: Vec<String> = shape.iter().map(usize::to_string).collect();
        let (name, dtype, dims) = (string(name), dtype.name(), dims.join(","));
        let (a, b) = (at, at + size);
        at = b;
        json.push_str(&format!(
            ",{name}:{{\"dtype\":\"{dtype}\",\"shape\":[{dims}],\"data_offsets\":[{a},{b}]}}"
        ));
    };
    for t in order {
        entry(t.name, t.dtype, &t.shape, t.bytes.len());
    }
    if pad > 0 {
        entry(PAD, Dtype::U8, &[pad], pad);
    }
    entry(CRC, Dtype::U32, &[blocks], blocks * 4);
    json.push('}');

    let total = (8 + json.len()).next_multiple_of(ALIGN);
    if total - 8 > MAX_HEADER {
        return Err(Error::usage(
            format!("the header would have {} bytes, above {MAX_HEADER}", total - 8),
            "Write fewer tensors or shorter metadata",
        ));
    }
    let mut head = ((total - 8) as u64).to_le_bytes().to_vec();
    head.extend_from_slice(json.as_bytes());
    head.resize(total, b' ');
    let digits = format!("{:08x}", header::sealed_crc(&head));
    let at = 8 + PREFIX.len();
    head.splice(at..at + 8, digits.into_bytes());
    Ok(head)
}
