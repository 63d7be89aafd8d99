//! The one container: a `.safetensors` file whose data is aligned and checksummed.
//!
//! Any safetensors reader opens these files. Ours maps them, checks every length before it
//! allocates anything, and verifies 64 KiB blocks with CRC-32C: on first touch by default.
//! Oddity: `crc` (and a `pad` of up to three zero bytes before it) are ordinary tensors for other
//! readers, and hidden by ours. The specification is `docs/formats.md`.

use crate::header::{self, BLOCK, CRC, Entry, Header, PAD};
use crate::mmap::Map;
use crate::{Error, Result, crc32c};
use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

mod dtype;
mod write;

pub use dtype::{Dtype, Element};
pub use write::{Tensor, write};

/// The newest version of a format that this embkit reads: files and manifests of a newer one are
/// refused when they are opened, whoever opens them. All formats (docs/formats.md) are at 1; one
/// that is raised gets a case here, and [`SINCE`] the release that reads it.
pub fn newest(_format: &str) -> u32 {
    1
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

/// Where a tensor lies in its file, looked up once: for readers that touch single rows, where the
/// search for the name would cost more than the row. Belongs to the [`Container`] that gave it.
#[derive(Debug)]
pub struct Column<T> {
    start: usize,
    len: usize,
    element: PhantomData<T>,
}

impl<T> Clone for Column<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Column<T> {}

impl<T> Column<T> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// An open file. Cheap to share between threads (`Send + Sync`).
pub struct Container {
    path: PathBuf,
    map: Map,
    header: Header,
    info: Option<FileInfo>, // none for a foreign file
    data: Range<usize>,     // the checksummed bytes: empty for a foreign file
    verify: Verify,
    seen: Vec<AtomicU64>, // one bit per verified block
}

impl Container {
    /// Opens a file that embkit wrote.
    ///
    /// [`Error::Io`] when it cannot be read, [`Error::Corrupt`] when header, layout or (with
    /// [`Verify::Open`]) data contradict a checksum, [`Error::Version`] for a format of ours that is
    /// newer than [`newest`].
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
        c.data = c.header.data..c.header.find(CRC).map_or(c.header.data, |crc| crc.start);
        let blocks = c.data.len().div_ceil(BLOCK);
        c.seen = (0..blocks.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        if let Some(format) = c.metadata().get("format").filter(|f| f.starts_with("embkit.")) {
            c.expect(format, newest(format))?;
        }
        if verify == Verify::Open {
            c.verify_all()?;
        }
        Ok(c)
    }

    fn any(path: &Path, map: Map, verify: Verify) -> Result<Container> {
        let header = header::parse(path, map.bytes())?;
        let (path, data) = (path.to_owned(), 0..0);
        Ok(Container { path, map, header, info: None, data, verify, seen: Vec::new() })
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

    /// Where the tensor called `name` lies; errors as [`Container::slice`]. Verifies nothing.
    pub fn column<T: Element>(&self, name: &str) -> Result<Column<T>> {
        let entry = self.entry(name)?;
        let len = self.cast::<T>(name, self.view(entry))?.len();
        Ok(Column { start: entry.start, len, element: PhantomData })
    }

    /// Elements `range` of a column of this file in place, their blocks verified as [`Verify`]
    /// says. `None` when the range does not lie inside the column.
    #[inline]
    pub fn items<T: Element>(
        &self,
        column: Column<T>,
        range: Range<usize>,
    ) -> Result<Option<&[T]>> {
        if range.start > range.end || range.end > column.len {
            return Ok(None);
        }
        let start = column.start + range.start * size_of::<T>();
        let end = column.start + range.end * size_of::<T>();
        self.touch(start, end)?;
        let bytes = self.map.bytes().get(start..end).unwrap_or_default();
        Ok(bytemuck::try_cast_slice(bytes).ok())
    }

    /// Elements `range` of a column as far as they lie inside it, without verifying any block:
    /// for readers that only want them near the processor before they ask for [`Container::items`].
    #[inline]
    pub fn peek<T: Element>(&self, column: Column<T>, range: Range<usize>) -> &[T] {
        let start = column.start + range.start.min(column.len) * size_of::<T>();
        let end = column.start + range.end.min(column.len) * size_of::<T>();
        bytemuck::try_cast_slice(self.map.bytes().get(start..end).unwrap_or_default())
            .unwrap_or_default()
    }

    /// Asks the system to read elements `range` of a column into memory, without waiting; with the
    /// rest of their blocks where those will have to be verified.
    pub fn will_need<T: Element>(&self, column: Column<T>, range: Range<usize>) {
        let size = size_of::<T>();
        let (start, end) = (range.start.min(column.len), range.end.min(column.len));
        let (mut start, mut end) = (column.start + start * size, column.start + end * size);
        if start < end && !self.is_verified(start, end) {
            let block = |at: usize| self.data.start + (at - self.data.start) / BLOCK * BLOCK;
            (start, end) = (block(start), (block(end - 1) + BLOCK).min(self.data.end));
        }
        self.map.will_need(start..end);
    }

    /// Verifies every block that was not verified before.
    pub fn verify_all(&self) -> Result<()> {
        self.check_blocks(self.data.start, self.data.end)
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

    #[inline]
    fn touch(&self, start: usize, end: usize) -> Result<()> {
        if start >= end || self.is_verified(start, end) {
            return Ok(());
        }
        self.check_blocks(start, end)
    }

    /// Whether nothing is left to verify, as far as one look tells: most reads lie in one block
    /// that was verified before.
    #[inline]
    fn is_verified(&self, start: usize, end: usize) -> bool {
        if self.verify == Verify::Off {
            return true;
        }
        let block = start.wrapping_sub(self.data.start) / BLOCK;
        block == (end - 1).wrapping_sub(self.data.start) / BLOCK
            && self
                .seen
                .get(block / 64)
                .is_some_and(|word| word.load(Ordering::Relaxed) & (1 << (block % 64)) != 0)
    }

    /// Verifies the blocks that overlap bytes `start..end` of the file.
    fn check_blocks(&self, start: usize, end: usize) -> Result<()> {
        let data = self.data.clone();
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
    // A file may claim a format of 16 MiB: a message quotes the beginning.
    let short = |text: &str| text.chars().take(64).collect::<String>();
    let name = path.display();
    if found != Some(format) {
        let found = short(found.unwrap_or("a file without a format"));
        return Err(Error::usage(
            format!("{name}: is {found}, not {format}"),
            "Give the path of a file or directory of that kind",
        ));
    }
    let format = short(format);
    match version() {
        (Some(v), _) if v >= 1 && v <= newest => Ok(v),
        (Some(v), needs) if v > newest => Err(Error::Version {
            path: path.to_owned(),
            found: match needs {
                Some(n) => format!("{format} version {v} (needs embkit {} or newer)", short(&n)),
                None => format!("{format} version {v}"),
            },
            supported: format!("{format} up to version {newest}"),
        }),
        _ => Err(Error::corrupt(path, "has no usable version number")),
    }
}
