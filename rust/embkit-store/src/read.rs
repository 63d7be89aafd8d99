//! Token shards as one table of rows, and batches gathered from it.
//!
//! Opening maps the files and compares lengths; it touches no data. A gather verifies the blocks
//! that it reads (unless that is switched off), checks every bound, and fills the caller's buffers.
//! A [`Store`] is `Send + Sync` and can be read from many threads at once.
//!
//! Oddity: rows are global; the shard of a row is found by a search over the shards' first rows.

mod ahead;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use embkit_core::container::{Column, Container, Dtype, Element, FileInfo, Verify};
use embkit_core::{Error, Result, TextShard};

use crate::simd;
pub use crate::simd::{Flag, TokenId};
use crate::tokenize::{RAW_FORMAT, TEXTS_FORMAT, VERSION, list, name, parse_name};
pub(crate) use ahead::AHEAD;
use ahead::Announced;

/// A token shard and, where the store has them, its texts.
struct Shard {
    texts: Container,
    raw: Option<Container>,
    tokens: Tokens,
    offsets: Column<u64>,
    text_id: Column<u64>,
    cluster: Column<u64>,
    role: Column<u8>,
    source: Column<u16>,
    prompt_len: Column<u16>,
}

/// The token column of a shard.
#[derive(Clone, Copy)]
enum Tokens {
    Narrow(Column<u16>),
    Wide(Column<u32>),
}

/// Tokens in place.
enum Ids<'a> {
    Narrow(&'a [u16]),
    Wide(&'a [u32]),
}

/// An open store.
pub struct Store {
    dir: PathBuf,
    shards: Vec<Shard>,
    /// First row of each shard, then the number of rows.
    first: Vec<u64>,
    tokens: u64,
    announced: Announced,
}

/// Where the tokens of a row are: found once, then copied.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    shard: u32,
    len: u32,
    start: u64,
}

impl Span {
    /// Number of tokens.
    #[inline]
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// Whether the row has no tokens.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl Store {
    /// Opens the shards in a directory.
    ///
    /// Errors: `Io` when the directory or a file cannot be read; `Corrupt` when there are no
    /// shards, one is missing, damaged, or does not continue the one before; `Version`.
    pub fn open(dir: impl AsRef<Path>, verify: Verify) -> Result<Self> {
        Self::open_recorded(dir, verify, None)
    }

    /// [`Store::open`] of exactly the files that a manifest records: each is opened once, and
    /// compared with its record.
    ///
    /// Errors: also `Corrupt` for a shard that the manifest does not have, or has otherwise.
    pub fn open_recorded(
        dir: impl AsRef<Path>,
        verify: Verify,
        recorded: Option<&BTreeMap<String, FileInfo>>,
    ) -> Result<Self> {
        let dir = dir.as_ref();
        let open = |file: String| {
            let found = Container::open(dir.join(&file), verify)?;
            match recorded.map(|r| r.get(&file)) {
                None => {}
                Some(Some(record)) => found.expect_info(*record)?,
                Some(None) => {
                    return Err(Error::corrupt(found.path(), "is not in the store's manifest"));
                }
            }
            Ok(found)
        };
        let count = shard_count(dir)?;
        let mut store = Self {
            dir: dir.into(),
            shards: Vec::new(),
            first: vec![0],
            tokens: 0,
            announced: Announced::default(),
        };
        let has_raw = dir.join(name("raw", 0, Some(count))).exists();
        for index in 0..count {
            let texts = open(name("texts", index, Some(count)))?;
            texts.expect(TEXTS_FORMAT, VERSION)?;
            let raw = match has_raw {
                true => Some(open(name("raw", index, Some(count)))?),
                false => None,
            };
            let shard = Shard::new(texts, raw)?;
            let first = store.rows();
            let (rows, tokens) = shard.check(first)?;
            store.first.push(first + rows);
            store.tokens += tokens;
            store.shards.push(shard);
        }
        Ok(store)
    }

    /// Switches reading ahead from a cold disk off (or on again, as it is at first).
    pub fn read_ahead(&mut self, on: bool) {
        self.announced = Announced::new(on);
    }

    /// Number of rows.
    pub fn rows(&self) -> u64 {
        self.first.last().copied().unwrap_or(0)
    }

    /// Number of tokens.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Number of shards.
    pub fn shards(&self) -> usize {
        self.shards.len()
    }

    /// The directory it was opened from.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Number of tokens of each row.
    pub fn lengths(&self, rows: &[u64]) -> Result<Vec<u32>> {
        rows.iter().map(|row| Ok(self.span(*row)?.len)).collect()
    }

    /// Identity of each row's text, without its prompt.
    pub fn text_id(&self, rows: &[u64]) -> Result<Vec<u64>> {
        rows.iter().map(|row| self.value(*row, |s| s.text_id)).collect()
    }

    /// Cluster of each row's text.
    pub fn cluster(&self, rows: &[u64]) -> Result<Vec<u64>> {
        rows.iter().map(|row| self.cluster_of(*row)).collect()
    }

    /// Role of each row: 0 query, 1 passage, 2 both.
    pub fn role(&self, rows: &[u64]) -> Result<Vec<u8>> {
        rows.iter().map(|row| self.role_of(*row)).collect()
    }

    /// Source of each row, as an index into the manifest's list.
    pub fn source(&self, rows: &[u64]) -> Result<Vec<u16>> {
        rows.iter().map(|row| self.value(*row, |s| s.source)).collect()
    }

    /// Tokens of each row's prompt, counted as sentence-transformers does.
    pub fn prompt_len(&self, rows: &[u64]) -> Result<Vec<u16>> {
        rows.iter().map(|row| self.prompt_len_of(*row)).collect()
    }

    /// Cluster of one row's text.
    #[inline]
    pub fn cluster_of(&self, row: u64) -> Result<u64> {
        self.value(row, |s| s.cluster)
    }

    /// Role of one row: 0 query, 1 passage, 2 both.
    pub fn role_of(&self, row: u64) -> Result<u8> {
        self.value(row, |s| s.role)
    }

    /// Tokens of one row's prompt.
    pub fn prompt_len_of(&self, row: u64) -> Result<u16> {
        self.value(row, |s| s.prompt_len)
    }

    /// The row of the same text without a prompt: itself, or one of its neighbours.
    ///
    /// Errors: `Usage` when the store has no such row.
    pub fn plain_of(&self, row: u64) -> Result<u64> {
        if self.prompt_len_of(row)? == 0 {
            return Ok(row);
        }
        // The forms of a text lie side by side, one per prompt.
        let text = self.value(row, |s| s.text_id)?;
        let after = row + 1..self.rows();
        let (mut before, mut after) = ((0..row).rev(), after);
        let sides: [&mut dyn Iterator<Item = u64>; 2] = [&mut after, &mut before];
        for side in sides {
            for other in side {
                if self.value(other, |s| s.text_id)? != text {
                    break;
                }
                if self.prompt_len_of(other)? == 0 {
                    return Ok(other);
                }
            }
        }
        Err(Error::usage(
            format!("{}: row {row} has no form without its prompt", self.dir.display()),
            "Tokenize again with prompt_dropout, or set prompt_dropout = 0",
        ))
    }

    /// The text of a row, without its prompt.
    /// Errors: `Usage` when the row does not exist or the store has no raw files, `Corrupt`.
    pub fn text(&self, row: u64) -> Result<&str> {
        let (shard, local) = self.locate(row)?;
        let raw = self.shards.get(shard).and_then(|s| s.raw.as_ref()).ok_or_else(|| {
            Error::usage(
                format!("{}: the store has no texts (raw-*.safetensors)", self.dir.display()),
                "Copy them beside the token shards, or tokenize again",
            )
        })?;
        let offsets: &[u64] = raw.slice_untouched("offsets")?;
        raw.verify_range("offsets", local * 8..(local + 2) * 8)?;
        let bytes: &[u8] = raw.slice_untouched("text")?;
        let text = TextShard { bytes, offsets }.get(local);
        let text = text.ok_or_else(|| self.broken(row))?;
        let start = offsets.get(local).copied().unwrap_or(0) as usize;
        raw.verify_range("text", start..start + text.len())?;
        std::str::from_utf8(text)
            .map_err(|e| Error::corrupt(raw.path(), format!("text row {row} is not UTF-8 ({e})")))
    }

    /// Packs rows one after the other into `tokens`, and writes where each begins (and the last
    /// ends) into `cu_seqlens`, which has one element more than `rows`. What is left of `tokens`
    /// stays as it is. Returns the number of tokens.
    ///
    /// Errors: `Usage` when a row does not exist or a buffer does not fit (nothing is written to
    /// `tokens` then), `Corrupt` when the shard is damaged.
    pub fn gather<T: TokenId>(
        &self,
        rows: &[u64],
        tokens: &mut [T],
        cu_seqlens: &mut [i32],
    ) -> Result<usize> {
        if cu_seqlens.len() != rows.len() + 1 {
            return Err(Error::usage(
                format!("cu_seqlens has {} elements for {} rows", cu_seqlens.len(), rows.len()),
                "Pass one element more than rows",
            ));
        }
        self.prefetch_offsets(rows);
        let spans: Vec<Span> = rows.iter().map(|row| self.span(*row)).collect::<Result<_>>()?;
        let total: usize = spans.iter().map(Span::len).sum();
        if total > tokens.len() || i32::try_from(total).is_err() {
            return Err(Error::usage(
                format!("{} rows have {total} tokens, the buffer {}", rows.len(), tokens.len()),
                "Pass a longer buffer (below 2^31 tokens), or fewer rows",
            ));
        }
        let mut rest = tokens;
        let mut at = 0;
        let mut ends = cu_seqlens.iter_mut();
        if let Some(zero) = ends.next() {
            *zero = 0;
        }
        for ((i, span), end) in spans.iter().enumerate().zip(ends) {
            self.prefetch_tokens(spans.get(i + AHEAD));
            let (now, later) = rest.split_at_mut(span.len());
            self.copy(*span, now)?;
            at += now.len();
            *end = at as i32;
            rest = later;
        }
        Ok(total)
    }

    /// Writes rows side by side, each as wide as the longest, to the front of `ids` and `mask`, with
    /// `pad` and zeros after the end of a row. Returns the width; what is left of the buffers stays
    /// as it is.
    ///
    /// Errors: `Usage` when a row does not exist or a buffer is too short (nothing is written
    /// then); `Corrupt` when the shard is damaged.
    pub fn gather_padded<T: TokenId, M: Flag>(
        &self,
        rows: &[u64],
        ids: &mut [T],
        mask: &mut [M],
        pad: T,
    ) -> Result<usize> {
        self.prefetch_offsets(rows);
        let spans: Vec<Span> = rows.iter().map(|row| self.span(*row)).collect::<Result<_>>()?;
        let width = spans.iter().map(Span::len).max().unwrap_or(0);
        let size = rows.len().checked_mul(width);
        if size.is_none_or(|size| size > ids.len().min(mask.len())) {
            return Err(Error::usage(
                format!(
                    "{} rows of width {width} for buffers of {} and {}",
                    rows.len(),
                    ids.len(),
                    mask.len()
                ),
                "Pass buffers of at least rows x the longest row",
            ));
        }
        // Rows without a token leave no chunks.
        let ids = ids.chunks_exact_mut(width.max(1));
        let mask = mask.chunks_exact_mut(width.max(1));
        for (((i, span), ids), mask) in spans.iter().enumerate().zip(ids).zip(mask) {
            self.prefetch_tokens(spans.get(i + AHEAD));
            self.copy_padded(*span, ids, mask, pad)?;
        }
        Ok(width)
    }

    /// Where the tokens of a row are. Errors: `Usage` when there is no such row, `Corrupt`.
    #[inline]
    pub fn span(&self, row: u64) -> Result<Span> {
        let (index, local) = self.locate(row)?;
        let shard = self.shards.get(index).ok_or_else(|| self.broken(row))?;
        let ends = shard.texts.items(shard.offsets, local..local + 2)?;
        let Some(&[start, end]) = ends else { return Err(self.broken(row)) };
        if start > end || end > shard.token_count() as u64 {
            return Err(self.broken(row));
        }
        let len = u32::try_from(end - start).map_err(|_| self.broken(row))?;
        Ok(Span { shard: index as u32, len, start })
    }

    /// Copies the tokens of a span, whose length `out` has, after verifying their blocks.
    #[inline]
    pub fn copy<T: TokenId>(&self, span: Span, out: &mut [T]) -> Result<()> {
        match self.ids(span)? {
            Ids::Narrow(ids) => simd::widen(ids, out),
            Ids::Wide(ids) => simd::widen(ids, out),
        }
        Ok(())
    }

    /// [`Store::copy`] into a row of a rectangle at least as wide, with its mask; `pad` and zeros
    /// behind the end.
    #[inline]
    pub fn copy_padded<T: TokenId, M: Flag>(
        &self,
        span: Span,
        out: &mut [T],
        mask: &mut [M],
        pad: T,
    ) -> Result<()> {
        match self.ids(span)? {
            Ids::Narrow(ids) => simd::pad(ids, out, mask, pad),
            Ids::Wide(ids) => simd::pad(ids, out, mask, pad),
        }
        Ok(())
    }

    /// The tokens of a span in place, verified.
    #[inline]
    fn ids(&self, span: Span) -> Result<Ids<'_>> {
        let Some(shard) = self.shards.get(span.shard as usize) else { return Ok(Ids::Wide(&[])) };
        let range = span.start as usize..span.start as usize + span.len();
        Ok(match shard.tokens {
            Tokens::Narrow(c) => Ids::Narrow(shard.texts.items(c, range)?.unwrap_or_default()),
            Tokens::Wide(c) => Ids::Wide(shard.texts.items(c, range)?.unwrap_or_default()),
        })
    }

    #[inline]
    fn locate(&self, row: u64) -> Result<(usize, usize)> {
        if row >= self.rows() {
            return Err(Error::usage(
                format!("row {row} of a store with {} rows ({})", self.rows(), self.dir.display()),
                "Pass rows below the count; a table that has such rows belongs to another store",
            ));
        }
        let shard = self.first.partition_point(|f| *f <= row).saturating_sub(1);
        let first = self.first.get(shard).copied().unwrap_or(0);
        Ok((shard, (row - first) as usize))
    }

    #[inline]
    fn value<T: Element>(&self, row: u64, column: impl Fn(&Shard) -> Column<T>) -> Result<T> {
        let (index, local) = self.locate(row)?;
        let shard = self.shards.get(index).ok_or_else(|| self.broken(row))?;
        match shard.texts.items(column(shard), local..local + 1)? {
            Some(&[value]) => Ok(value),
            _ => Err(self.broken(row)),
        }
    }

    fn broken(&self, row: u64) -> Error {
        Error::corrupt(&self.dir, format!("the offsets of row {row} lie outside its shard"))
    }
}

impl Shard {
    fn new(texts: Container, raw: Option<Container>) -> Result<Self> {
        let tokens = match texts.get_untouched("tokens")?.dtype {
            Dtype::U16 => Tokens::Narrow(texts.column("tokens")?),
            _ => Tokens::Wide(texts.column("tokens")?),
        };
        Ok(Self {
            tokens,
            offsets: texts.column("offsets")?,
            text_id: texts.column("text_id")?,
            cluster: texts.column("cluster")?,
            role: texts.column("role")?,
            source: texts.column("source")?,
            prompt_len: texts.column("prompt_len")?,
            texts,
            raw,
        })
    }

    #[inline]
    fn token_count(&self) -> usize {
        match self.tokens {
            Tokens::Narrow(column) => column.len(),
            Tokens::Wide(column) => column.len(),
        }
    }

    /// Compares the lengths of all columns, and the place of the shard in the store.
    /// Returns its rows and tokens.
    fn check(&self, first_row: u64) -> Result<(u64, u64)> {
        let path = self.texts.path();
        for container in [Some(&self.texts), self.raw.as_ref()].into_iter().flatten() {
            let said = container.metadata().get("first_row");
            if said != Some(&first_row.to_string()) {
                let said = said.map_or("nothing", String::as_str);
                return Err(Error::corrupt(
                    container.path(),
                    format!("should start at row {first_row} but says {said}"),
                ));
            }
        }
        let rows = self.offsets.len().checked_sub(1).ok_or_else(|| {
            Error::corrupt(path, "'offsets' is empty, it should have one element more than rows")
        })?;
        let lengths = [
            ("text_id", self.text_id.len()),
            ("cluster", self.cluster.len()),
            ("role", self.role.len()),
            ("source", self.source.len()),
            ("prompt_len", self.prompt_len.len()),
        ];
        for (column, len) in lengths {
            if len != rows {
                return Err(Error::corrupt(path, format!("'{column}' has {len} of {rows} rows")));
            }
        }
        if let Some(raw) = &self.raw {
            raw.expect(RAW_FORMAT, VERSION)?;
            let offsets = raw.slice_untouched::<u64>("offsets")?.len();
            if offsets != rows + 1 {
                return Err(Error::corrupt(
                    raw.path(),
                    format!("has {offsets} offsets for the {rows} rows of its token shard"),
                ));
            }
        }
        Ok((rows as u64, self.token_count() as u64))
    }
}

/// The number of shards, by the files' names; every one of them must be there.
fn shard_count(dir: &Path) -> Result<usize> {
    let found = list(dir)?;
    let texts: Vec<&PathBuf> =
        found.iter().filter(|((stem, _), _)| *stem == "texts").flat_map(|(_, p)| p).collect();
    let counts = texts.iter().filter_map(|p| parse_name(p.file_name()?.to_str()?)?.2);
    let corrupt = |what: String| Err(Error::corrupt(dir, what));
    let Some(count) = counts.clone().max() else {
        return corrupt(match texts.len() {
            0 => "holds no token shards (texts-00000-of-*.safetensors)".into(),
            n => format!("holds {n} token shards of a tokenize run that did not finish"),
        });
    };
    if counts.clone().any(|c| c != count) || texts.len() > count {
        return corrupt("holds token shards of two different runs".into());
    }
    let has = |index: &usize| dir.join(name("texts", *index, Some(count))).exists();
    if let Some(index) = (0..count).find(|i| !has(i)) {
        return corrupt(format!("lacks {}", name("texts", index, Some(count))));
    }
    Ok(count)
}
