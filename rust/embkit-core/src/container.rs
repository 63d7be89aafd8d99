//! The one container: a `.safetensors` file whose data is aligned and checksummed.
//!
//! Any safetensors reader opens these files. Ours maps them, checks every length before it
//! allocates anything, and verifies 64 KiB blocks with CRC-32C: on first touch by default.
//! Oddity: `crc` (and a `pad` of up to three zero bytes before it) are ordinary tensors for other
//! readers, and hidden by ours. The specification is `docs/formats.md`.

use crate::header::{self, ALIGN, BLOCK, CRC, Entry, HEADER_CRC, Header, MAX_HEADER, PAD, PREFIX};
use crate::mmap::Map;
use crate::{Error, Result, crc32c, crc32c_append, publish};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Element types, with the names the safetensors header uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Deserialize)]
#[allow(missing_docs, non_camel_case_types, clippy::upper_case_acronyms)]
pub enum Dtype {
    BOOL,
    U8,
    I8,
    F8_E4M3,
    F8_E5M2,
    U16,
    I16,
    F16,
    BF16,
    U32,
    I32,
    F32,
    U64,
    I64,
    F64,
}

use Dtype::*;
const DTYPES: [Dtype; 15] =
    [BOOL, U8, I8, F8_E4M3, F8_E5M2, U16, I16, F16, BF16, U32, I32, F32, U64, I64, F64];

impl Dtype {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            BOOL | U8 | I8 | F8_E4M3 | F8_E5M2 => 1,
            U16 | I16 | F16 | BF16 => 2,
            U32 | I32 | F32 => 4,
            U64 | I64 | F64 => 8,
        }
    }

    /// The name in the header, such as `"U16"`.
    pub fn name(self) -> &'static str {
        match self {
            BOOL => "BOOL",
            U8 => "U8",
            I8 => "I8",
            F8_E4M3 => "F8_E4M3",
            F8_E5M2 => "F8_E5M2",
            U16 => "U16",
            I16 => "I16",
            F16 => "F16",
            BF16 => "BF16",
            U32 => "U32",
            I32 => "I32",
            F32 => "F32",
            U64 => "U64",
            I64 => "I64",
            F64 => "F64",
        }
    }

    /// The type called `name`; [`Error::Usage`] lists the known ones otherwise.
    pub fn parse(name: &str) -> Result<Dtype> {
        DTYPES.into_iter().find(|d| d.name() == name).ok_or_else(|| {
            let known: Vec<_> = DTYPES.iter().map(|d| d.name()).collect();
            Error::usage(
                format!("unknown dtype '{name}'"),
                format!("Use one of {}", known.join(", ")),
            )
        })
    }
}

/// A Rust type that a tensor can be read as in place.
pub trait Element: bytemuck::Pod {
    /// The header's name for it.
    const DTYPE: Dtype;
}
macro_rules! element {
    ($($t:ty => $d:ident),*) => { $(impl Element for $t { const DTYPE: Dtype = $d; })* };
}
element!(u8 => U8, i8 => I8, u16 => U16, i16 => I16, u32 => U32, i32 => I32, f32 => F32,
         u64 => U64, i64 => I64, f64 => F64);

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

/// The first embkit that reads what this one writes: raised when a format's version is. Written
/// into each file, so that an older embkit can name the one that is needed.
pub const SINCE: &str = "0.1.0";

/// What a manifest records about a file, and checks when it is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileInfo {
    /// Bytes of the file.
    pub length: u64,
    /// CRC-32C of the length field, the header and its padding.
    pub header_crc: u32,
    /// CRC-32C of the `crc` tensor's bytes.
    pub crc_crc: u32,
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
        entry(PAD, U8, &[pad], pad);
    }
    entry(CRC, U32, &[blocks], blocks * 4);
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

/// The `version` key, when it is a number.
fn version_of(metadata: &BTreeMap<String, String>) -> Option<u32> {
    metadata.get("version")?.parse().ok()
}

/// When the 64 KiB blocks are compared with their checksums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verify {
    /// When a tensor is first asked for: the default.
    FirstTouch,
    /// All of them when the file is opened.
    Open,
    /// Never (the header is still checked).
    Off,
}

impl Verify {
    /// From `"first-touch"`, `"open"` or `"off"`.
    pub fn parse(word: &str) -> Result<Verify> {
        match word {
            "first-touch" => Ok(Verify::FirstTouch),
            "open" => Ok(Verify::Open),
            "off" => Ok(Verify::Off),
            _ => Err(Error::usage(
                format!("unknown verify mode '{word}'"),
                "Use 'first-touch', 'open' or 'off'",
            )),
        }
    }
}

/// A tensor in a mapped file.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions.
    pub shape: &'a [usize],
    /// Row-major little-endian elements.
    pub bytes: &'a [u8],
}

/// An open file. Cheap to share between threads (`Send + Sync`).
pub struct Container {
    path: PathBuf,
    map: Map,
    header: Header,
    info: Option<FileInfo>, // none for a foreign file
    verify: Verify,
    seen: Vec<AtomicU64>, // one bit per verified block
}

impl Container {
    /// Opens a file that embkit wrote.
    ///
    /// [`Error::Io`] when it cannot be read, [`Error::Corrupt`] when header, layout or (with
    /// [`Verify::Open`]) data contradict a checksum.
    pub fn open(path: impl AsRef<Path>, verify: Verify) -> Result<Container> {
        let path = path.as_ref();
        Container::ours(path, Map::open(path)?, verify)
    }

    /// [`Container::open`] on a copy of `bytes`; `path` only names it in errors.
    pub fn from_bytes(path: &Path, bytes: &[u8], verify: Verify) -> Result<Container> {
        Container::ours(path, Map::copy(bytes), verify)
    }

    /// Opens a plain safetensors file of another program: same checks of the header, no checksums.
    pub fn open_foreign(path: impl AsRef<Path>) -> Result<Container> {
        let path = path.as_ref();
        Container::any(path, Map::open(path)?, Verify::Off)
    }

    /// [`Container::open_foreign`] on a copy of `bytes`; `path` only names it in errors.
    pub fn foreign_from_bytes(path: &Path, bytes: &[u8]) -> Result<Container> {
        Container::any(path, Map::copy(bytes), Verify::Off)
    }

    fn ours(path: &Path, map: Map, verify: Verify) -> Result<Container> {
        let mut c = Container::any(path, map, verify)?;
        c.info = Some(header::check_ours(&c.path, c.map.bytes(), &c.header)?);
        let blocks = c.data().len().div_ceil(BLOCK);
        c.seen = (0..blocks.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        if verify == Verify::Open {
            c.verify_all()?;
        }
        Ok(c)
    }

    fn any(path: &Path, map: Map, verify: Verify) -> Result<Container> {
        let header = header::parse(path, map.bytes())?;
        Ok(Container { path: path.to_owned(), map, header, info: None, verify, seen: Vec::new() })
    }

    /// The path it was opened from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The `__metadata__` strings (with `header_crc32c` when embkit wrote the file).
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.header.metadata
    }

    /// Length and checksums, as the manifest has them; `None` for a foreign file.
    pub fn info(&self) -> Option<FileInfo> {
        self.info
    }

    /// Refuses a file of another kind ([`Error::Usage`]) or of a newer version than `newest`
    /// ([`Error::Version`], naming the embkit the file says it needs). Returns the version.
    pub fn expect(&self, format: &str, newest: u32) -> Result<u32> {
        expect(
            &self.path,
            self.metadata().get("format").map(String::as_str),
            format,
            newest,
            || (version_of(self.metadata()), self.metadata().get("embkit").cloned()),
        )
    }

    /// Compares length and checksums with what a manifest recorded.
    pub fn expect_info(&self, recorded: FileInfo) -> Result<()> {
        if self.info == Some(recorded) {
            return Ok(());
        }
        Err(Error::corrupt(&self.path, "is not the file that its manifest describes"))
    }

    /// Names of the tensors, sorted, without `crc` and `pad`.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let ours = self.info.is_some();
        let names = self.header.entries.iter().map(|e| &*e.name);
        names.filter(move |n| !ours || (*n != CRC && *n != PAD))
    }

    /// Whether there is a tensor called `name`.
    pub fn has(&self, name: &str) -> bool {
        self.header.find(name).is_some()
    }

    /// The tensor called `name`, its blocks verified as [`Verify`] says.
    pub fn get(&self, name: &str) -> Result<View<'_>> {
        let e = self.entry(name)?;
        self.touch(e.start, e.end)?;
        Ok(self.view(e))
    }

    /// The tensor called `name` without verifying any block: call [`Container::verify_range`] for
    /// the bytes that are then read.
    pub fn get_untouched(&self, name: &str) -> Result<View<'_>> {
        Ok(self.view(self.entry(name)?))
    }

    /// Verifies the blocks under bytes `range` of a tensor; free when they were verified before.
    pub fn verify_range(&self, name: &str, range: Range<usize>) -> Result<()> {
        let e = self.entry(name)?;
        if range.start > range.end || range.end > e.end - e.start {
            return Err(Error::usage(
                format!("bytes {range:?} of tensor '{name}' of {} bytes", e.end - e.start),
                "Ask for bytes inside the tensor",
            ));
        }
        self.touch(e.start + range.start, e.start + range.end)
    }

    /// A tensor as a slice in place, verified as [`Verify`] says. [`Error::Corrupt`] when the
    /// tensor is missing, of another type, or (in a foreign file) not aligned.
    pub fn slice<T: Element>(&self, name: &str) -> Result<&[T]> {
        let view = self.get(name)?;
        self.cast(name, view)
    }

    /// [`Container::slice`] without verifying any block, as [`Container::get_untouched`].
    pub fn slice_untouched<T: Element>(&self, name: &str) -> Result<&[T]> {
        let view = self.get_untouched(name)?;
        self.cast(name, view)
    }

    /// Verifies every block that was not verified before.
    pub fn verify_all(&self) -> Result<()> {
        let data = self.data();
        self.check_blocks(data.start, data.end)
    }

    fn cast<'a, T: Element>(&self, name: &str, view: View<'a>) -> Result<&'a [T]> {
        if view.dtype != T::DTYPE {
            let (is, want) = (view.dtype.name(), T::DTYPE.name());
            return Err(Error::corrupt(&self.path, format!("has '{name}' as {is}, not {want}")));
        }
        bytemuck::try_cast_slice(view.bytes)
            .map_err(|e| Error::corrupt(&self.path, format!("has '{name}' at an odd place ({e})")))
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        self.header.find(name).ok_or_else(|| {
            let mut has: Vec<_> = self.names().take(20).collect();
            if self.names().count() > has.len() {
                has.push("...");
            }
            Error::corrupt(
                &self.path,
                format!("has no tensor '{name}' (it has: {})", has.join(", ")),
            )
        })
    }

    fn view<'a>(&'a self, e: &'a Entry) -> View<'a> {
        let bytes = self.map.bytes().get(e.start..e.end).unwrap_or_default();
        View { dtype: e.dtype, shape: &e.shape, bytes }
    }

    /// The checksummed bytes of the file: empty for a foreign file.
    fn data(&self) -> Range<usize> {
        match (self.info, self.header.find(CRC)) {
            (Some(_), Some(crc)) => self.header.data..crc.start,
            _ => 0..0,
        }
    }

    fn touch(&self, start: usize, end: usize) -> Result<()> {
        if self.verify == Verify::Off { Ok(()) } else { self.check_blocks(start, end) }
    }

    /// Verifies the blocks that overlap bytes `start..end` of the file.
    fn check_blocks(&self, start: usize, end: usize) -> Result<()> {
        let data = self.data();
        let (start, end) = (start.max(data.start), end.min(data.end));
        if start >= end {
            return Ok(()); // nothing there, or the crc tensor itself
        }
        let bytes = self.map.bytes().get(data.clone()).unwrap_or_default();
        let table = self.map.bytes().get(data.end..).unwrap_or_default();
        for b in (start - data.start) / BLOCK..(end - data.start).div_ceil(BLOCK) {
            let (Some(word), bit) = (self.seen.get(b / 64), 1u64 << (b % 64)) else { continue };
            if word.load(Ordering::Relaxed) & bit != 0 {
                continue;
            }
            let block = bytes.get(b * BLOCK..bytes.len().min((b + 1) * BLOCK)).unwrap_or_default();
            if table.get(b * 4..b * 4 + 4) != Some(&crc32c(block).to_le_bytes()) {
                let from = data.start + b * BLOCK;
                return Err(Error::corrupt(
                    &self.path,
                    format!("bytes {from}..{} do not match their checksum", from + block.len()),
                ));
            }
            // Relaxed is enough: the bytes are immutable, two threads may at worst both check.
            word.fetch_or(bit, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// The common rule for kinds and versions of containers and manifests.
pub(crate) fn expect(
    path: &Path,
    found: Option<&str>,
    format: &str,
    newest: u32,
    version: impl FnOnce() -> (Option<u32>, Option<String>),
) -> Result<u32> {
    let name = path.display();
    if found != Some(format) {
        let found = found.unwrap_or("a file without a format");
        return Err(Error::usage(
            format!("{name}: is {found}, not {format}"),
            "Give the path of a file or directory of that kind",
        ));
    }
    match version() {
        (Some(v), _) if v >= 1 && v <= newest => Ok(v),
        (Some(v), needs) if v > newest => Err(Error::Version {
            path: path.to_owned(),
            found: match needs {
                Some(n) => format!("{format} version {v} (needs embkit {n} or newer)"),
                None => format!("{format} version {v}"),
            },
            supported: format!("{format} up to version {newest}"),
        }),
        _ => Err(Error::corrupt(path, "has no usable version number")),
    }
}
