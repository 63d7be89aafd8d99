//! Lines of a plain, zstd or gzip file, in a fixed window and with a limit on each line.
//!
//! Oddity: compression is recognised by the file's first bytes, not by its name, because datasets
//! are often renamed; but a name that promises compression (`.zst`, `.gz`) must keep the promise.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use embkit_core::{Error, Job, Result};

/// Bytes read from the file, and bytes of decoded text, held at a time besides the current line.
const WINDOW: usize = 1 << 20;
/// Largest zstd window accepted, as a power of two: 128 MiB, the limit of the `zstd` command.
const ZSTD_WINDOW_LOG: u32 = 27;
/// Bytes kept of a line over the limit, enough for an excerpt.
const HEAD: usize = 4096;

/// How the bytes of an input are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Packing {
    Plain,
    Zstd,
    Gzip,
}

impl Packing {
    fn of(path: &Path, head: &[u8]) -> Result<Self> {
        let found = match head {
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            // A skippable frame may come first (pzstd writes them).
            [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            [0x1f, 0x8b, ..] => Self::Gzip,
            _ => Self::Plain,
        };
        let promised = match path.extension().and_then(|e| e.to_str()) {
            Some("zst" | "zstd") => Some((Self::Zstd, "zstd")),
            Some("gz") => Some((Self::Gzip, "gzip")),
            _ => None,
        };
        match promised {
            Some((packing, name)) if packing != found => Err(Error::Corrupt {
                path: path.to_path_buf(),
                what: format!("the name says {name}, the content is not {name}"),
                fix: "Compress the file again, or remove the suffix if it is plain text".into(),
            }),
            _ => Ok(found),
        }
    }
}

/// One line of the input, without its line end.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Line<'a> {
    /// A line within the limit.
    Whole(&'a [u8]),
    /// The first bytes of a line over the limit.
    TooLong(&'a [u8]),
}

/// Lines read together, so that threads can parse them.
#[derive(Default)]
pub(crate) struct Block {
    bytes: Vec<u8>,
    /// Number and end in `bytes` of each line, and whether it is whole.
    lines: Vec<(u64, usize, bool)>,
}

impl Block {
    pub(crate) fn len(&self) -> usize {
        self.lines.len()
    }

    /// The number of line `i` of the block in the input, and the line.
    pub(crate) fn get(&self, i: usize) -> (u64, Line<'_>) {
        let start = i.checked_sub(1).and_then(|before| self.lines.get(before));
        let start = start.map_or(0, |(_, end, _)| *end);
        let (number, end, whole) = self.lines.get(i).copied().unwrap_or((0, start, true));
        let bytes = self.bytes.get(start..end).unwrap_or_default();
        (number, if whole { Line::Whole(bytes) } else { Line::TooLong(bytes) })
    }
}

/// A streaming reader of lines. Memory: two windows, the current line, the decoder's window.
pub(crate) struct Lines<'p> {
    reader: Box<dyn BufRead + 'p>,
    path: &'p Path,
    packing: Packing,
    limit: usize,
    line: Vec<u8>,
    number: u64,
}

impl<'p> Lines<'p> {
    /// Opens a file. Errors: `Io` when it cannot be opened, `Corrupt` when it is empty or its
    /// packing is not what its name says.
    pub(crate) fn open(path: &'p Path, limit: usize) -> Result<Self> {
        let io = |source| Error::Io { path: path.to_path_buf(), source };
        let mut file = BufReader::with_capacity(WINDOW, File::open(path).map_err(io)?);
        // `fill_buf` may return fewer bytes than a magic number only at the end of the file or on
        // a pipe; neither is a compressed file that we could read.
        let head = file.fill_buf().map_err(io)?;
        if head.is_empty() {
            return Err(empty(path));
        }
        let packing = Packing::of(path, head)?;
        Self::unpack(file, packing, path, limit)
    }

    /// Reads lines of plain text in memory; `path` names them in errors.
    pub(crate) fn of_bytes(bytes: &'p [u8], path: &'p Path, limit: usize) -> Result<Self> {
        if bytes.is_empty() {
            return Err(empty(path));
        }
        Self::unpack(bytes, Packing::Plain, path, limit)
    }

    fn unpack<R: BufRead + 'p>(
        raw: R,
        packing: Packing,
        path: &'p Path,
        limit: usize,
    ) -> Result<Self> {
        let window = |r: Box<dyn Read + 'p>| Box::new(BufReader::with_capacity(WINDOW, r)) as _;
        let reader: Box<dyn BufRead + 'p> = match packing {
            Packing::Plain => Box::new(raw),
            Packing::Gzip => window(Box::new(flate2::bufread::MultiGzDecoder::new(raw))),
            Packing::Zstd => {
                let io = |source| Error::Io { path: path.to_path_buf(), source };
                let mut decoder = zstd::stream::read::Decoder::with_buffer(raw).map_err(io)?;
                decoder.window_log_max(ZSTD_WINDOW_LOG).map_err(io)?;
                window(Box::new(decoder))
            }
        };
        Ok(Self { reader, path, packing, limit, line: Vec::new(), number: 0 })
    }

    /// The next line with its number (from 1), or `None` at the end.
    /// Errors: `Corrupt` when the compressed stream is cut or damaged, `Io` when reading fails.
    /// Looks at `job` for each window, so that even one endless line can be cancelled.
    pub(crate) fn next(&mut self, job: &Job) -> Result<Option<(u64, Line<'_>)>> {
        self.line.clear();
        let mut seen = 0_usize;
        let mut ended = false;
        while !ended {
            job.check()?;
            let chunk = match self.reader.fill_buf() {
                Ok([]) => break,
                Ok(chunk) => chunk,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(self.broken(e)),
            };
            let (text, used) = match memchr::memchr(b'\n', chunk) {
                Some(at) => {
                    ended = true;
                    (chunk.get(..at).unwrap_or_default(), at + 1)
                }
                None => (chunk, chunk.len()),
            };
            // Past the limit only the head is kept and the rest is skipped. The slack is for a
            // carriage return, which is not part of the line.
            let room = (self.limit + 1).saturating_sub(self.line.len()).min(text.len());
            self.line.extend_from_slice(text.get(..room).unwrap_or_default());
            seen = seen.saturating_add(text.len());
            self.reader.consume(used);
        }
        if seen == 0 && !ended {
            return Ok(None);
        }
        self.number += 1;
        if seen == self.line.len() && self.line.last() == Some(&b'\r') {
            self.line.pop();
            seen -= 1;
        }
        let line = if seen > self.limit {
            // Do not hold 64 MiB for the rest of the file because of one bad line.
            self.line.truncate(HEAD);
            self.line.shrink_to(HEAD);
            Line::TooLong(&self.line)
        } else if self.number == 1 {
            Line::Whole(self.line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&self.line))
        } else {
            Line::Whole(&self.line)
        };
        Ok(Some((self.number, line)))
    }

    /// The next lines, about `bytes` of them; empty at the end. Errors: as [`Self::next`].
    pub(crate) fn block(&mut self, job: &Job, bytes: usize) -> Result<Block> {
        let mut block = Block::default();
        while block.bytes.len() < bytes && block.lines.len() < bytes / 16 {
            let Some((number, line)) = self.next(job)? else { break };
            let (line, whole) = match line {
                Line::Whole(line) => (line, true),
                Line::TooLong(head) => (head, false),
            };
            block.bytes.extend_from_slice(line);
            block.lines.push((number, block.bytes.len(), whole));
        }
        Ok(block)
    }

    /// Lines read so far.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    fn broken(&self, e: io::Error) -> Error {
        let name = match self.packing {
            // A decoder reports its own findings without an OS code, the disk always has one.
            Packing::Zstd if e.raw_os_error().is_none() => "zstd",
            Packing::Gzip if e.raw_os_error().is_none() => "gzip",
            _ => return Error::Io { path: self.path.to_path_buf(), source: e },
        };
        let how = if e.kind() == io::ErrorKind::UnexpectedEof { "truncated" } else { "corrupt" };
        Error::Corrupt {
            path: self.path.to_path_buf(),
            what: format!("{how} {name} stream after line {}: {e}", self.number),
            fix: format!("Fetch or compress the file again; `{name} -t` checks it"),
        }
    }
}

/// The error of a file without any row.
pub(crate) fn empty(path: &Path) -> Error {
    Error::Corrupt {
        path: path.to_path_buf(),
        what: "the file is empty: no rows".into(),
        fix: "Write one JSON object a line, or remove the file".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(bytes: &[u8], limit: usize) -> Vec<(u64, bool, Vec<u8>)> {
        let mut lines = Lines::of_bytes(bytes, Path::new("x"), limit).unwrap();
        let mut out = Vec::new();
        while let Some((n, line)) = lines.next(&Job::new()).unwrap() {
            out.push(match line {
                Line::Whole(b) => (n, true, b.to_vec()),
                Line::TooLong(b) => (n, false, b.to_vec()),
            });
        }
        out
    }

    #[test]
    fn line_ends_and_limits() {
        let got = all(b"\xef\xbb\xbfab\r\n\nabcd\r\nabcde\nabc", 4);
        let whole = |n, b: &[u8]| (n, true, b.to_vec());
        assert_eq!(
            got,
            [
                // The mark counts as part of the line, so this one is over the limit ...
                (1, false, b"\xef\xbb\xbfab".to_vec()),
                whole(2, b""),
                whole(3, b"abcd"),
                (4, false, b"abcde".to_vec()),
                whole(5, b"abc"),
            ]
        );
        // ... and here it is taken off.
        assert_eq!(all(b"\xef\xbb\xbfab\n", 8), [whole(1, b"ab")]);
    }

    #[test]
    fn a_long_line_is_skipped_without_being_held() {
        let mut text = vec![b'x'; 10 * WINDOW];
        text.extend_from_slice(b"\nshort\n");
        let mut lines = Lines::of_bytes(&text, Path::new("x"), 2 * WINDOW).unwrap();
        let (_, line) = lines.next(&Job::new()).unwrap().unwrap();
        assert_eq!(line, Line::TooLong(&text[..HEAD]));
        assert!(lines.line.capacity() <= 4 * WINDOW);
        let (n, line) = lines.next(&Job::new()).unwrap().unwrap();
        assert_eq!((n, line), (2, Line::Whole(b"short")));
        assert!(lines.next(&Job::new()).unwrap().is_none());
    }
}
