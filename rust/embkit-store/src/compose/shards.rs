//! The shards of one or more stores as one list of rows.

use std::path::{Path, PathBuf};

use embkit_core::container::{Container, Dtype, Verify};
use embkit_core::{Error, Result, TextShard};

use crate::tokenize::{RAW_FORMAT, TEXTS_FORMAT, VERSION, name};

/// Several open stores; rows count on from store to store.
pub struct Stores {
    pub(super) shards: Vec<Shard>,
    /// First row of each shard, then the number of rows.
    first: Vec<u64>,
    /// First row of each store, then the number of rows.
    store_first: Vec<u64>,
    /// Shards of the first store.
    pub(super) of_first: usize,
    wide: bool,
}

/// A token shard and its texts.
pub(super) struct Shard {
    pub(super) texts: Container,
    pub(super) raw: Container,
}

/// Tokens of a shard in place.
#[derive(Clone, Copy)]
pub(super) enum Ids<'a> {
    Narrow(&'a [u16]),
    Wide(&'a [u32]),
}

/// The columns of a shard in place; `tokens` and the bytes of `raw` are verified row by row.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    pub(super) shard: &'a Shard,
    pub(super) tokens: Ids<'a>,
    pub(super) offsets: &'a [u64],
    pub(super) text_id: &'a [u64],
    pub(super) cluster: &'a [u64],
    pub(super) role: &'a [u8],
    pub(super) source: &'a [u16],
    pub(super) prompt_len: &'a [u16],
    pub(super) raw: TextShard<'a>,
}

impl Stores {
    /// Opens stores, each given by its directory and its number of shards.
    ///
    /// Errors: `Io`, `Corrupt` for a shard that is missing or whose columns disagree, `Usage` for
    /// stores of different token types.
    pub fn open(stores: &[(PathBuf, usize)]) -> Result<Self> {
        let mut all = Self {
            shards: Vec::new(),
            first: vec![0],
            store_first: vec![0],
            of_first: stores.first().map_or(0, |(_, shards)| *shards),
            wide: false,
        };
        for (dir, count) in stores {
            for index in 0..*count {
                let open = |stem, format| {
                    let path = dir.join(name(stem, index, Some(*count)));
                    let container = Container::open(path, Verify::FirstTouch)?;
                    container.expect(format, VERSION)?;
                    Ok(container)
                };
                let shard =
                    Shard { texts: open("texts", TEXTS_FORMAT)?, raw: open("raw", RAW_FORMAT)? };
                let rows = shard.check()?;
                let wide = shard.texts.get_untouched("tokens")?.dtype == Dtype::U32;
                if all.shards.is_empty() {
                    all.wide = wide;
                }
                if wide != all.wide {
                    return Err(Error::usage(
                        format!("{}: has tokens of another type", dir.display()),
                        "Tokenize all stores with one tokenizer",
                    ));
                }
                all.first.push(all.rows() + rows);
                all.shards.push(shard);
            }
            all.store_first.push(all.rows());
        }
        Ok(all)
    }

    /// Rows of all stores.
    pub fn rows(&self) -> u64 {
        self.first.last().copied().unwrap_or(0)
    }

    /// First row of each store, then the number of rows.
    pub fn starts(&self) -> &[u64] {
        &self.store_first
    }

    /// Whether tokens have 32 bits.
    pub(super) fn wide(&self) -> bool {
        self.wide
    }

    /// First row of a shard.
    pub(super) fn first_row(&self, shard: usize) -> u64 {
        self.first.get(shard).copied().unwrap_or_else(|| self.rows())
    }

    pub(super) fn views(&self) -> Result<Vec<View<'_>>> {
        self.shards.iter().map(Shard::view).collect()
    }

    /// Shard and local row of a row.
    pub(super) fn locate(&self, row: u64) -> Result<(usize, usize)> {
        if row >= self.rows() {
            return Err(Error::usage(
                format!("row {row} of stores with {} rows", self.rows()),
                "Pass rows below the count",
            ));
        }
        // The last shard that starts at or before the row; empty ones are never the last.
        let shard = self.first.partition_point(|f| *f <= row).saturating_sub(1);
        Ok((shard, (row - self.first_row(shard)) as usize))
    }
}

impl Shard {
    /// Compares the lengths of all columns; returns the rows.
    fn check(&self) -> Result<u64> {
        let view = self.view()?;
        let rows = view.offsets.len().saturating_sub(1);
        let lengths = [
            ("text_id", view.text_id.len()),
            ("cluster", view.cluster.len()),
            ("role", view.role.len()),
            ("source", view.source.len()),
            ("prompt_len", view.prompt_len.len()),
            ("offsets of the texts", view.raw.len()),
        ];
        match lengths.into_iter().find(|(_, len)| *len != rows) {
            Some((column, len)) => Err(Error::corrupt(
                self.texts.path(),
                format!("'{column}' has {len} of {rows} rows"),
            )),
            None => Ok(rows as u64),
        }
    }

    fn view(&self) -> Result<View<'_>> {
        let tokens = match self.texts.get_untouched("tokens")?.dtype {
            Dtype::U16 => Ids::Narrow(self.texts.slice_untouched("tokens")?),
            _ => Ids::Wide(self.texts.slice_untouched("tokens")?),
        };
        let raw = TextShard {
            bytes: self.raw.slice_untouched("text")?,
            offsets: self.raw.slice("offsets")?,
        };
        Ok(View {
            shard: self,
            tokens,
            offsets: self.texts.slice("offsets")?,
            text_id: self.texts.slice("text_id")?,
            cluster: self.texts.slice("cluster")?,
            role: self.texts.slice("role")?,
            source: self.texts.slice("source")?,
            prompt_len: self.texts.slice("prompt_len")?,
            raw,
        })
    }

    pub(super) fn broken(&self, local: usize) -> Error {
        let path: &Path = self.texts.path();
        Error::corrupt(path, format!("the offsets of its row {local} lie outside"))
    }
}

impl<'a> View<'a> {
    /// Verified text of a local row, without its prompt.
    pub(super) fn text(&self, local: usize) -> Result<&'a [u8]> {
        let text = self.raw.get(local).ok_or_else(|| self.shard.broken(local))?;
        let start = self.raw.offsets.get(local).copied().unwrap_or(0) as usize;
        self.shard.raw.verify_range("text", start..start + text.len())?;
        Ok(text)
    }

    /// Verified place of a local row's tokens.
    pub(super) fn span(&self, local: usize) -> Result<std::ops::Range<usize>> {
        let (size, total) = match self.tokens {
            Ids::Narrow(ids) => (2, ids.len()),
            Ids::Wide(ids) => (4, ids.len()),
        };
        match (self.offsets.get(local), self.offsets.get(local + 1)) {
            (Some(start), Some(end)) if start <= end && *end <= total as u64 => {
                let span = *start as usize..*end as usize;
                self.shard.texts.verify_range("tokens", span.start * size..span.end * size)?;
                Ok(span)
            }
            _ => Err(self.shard.broken(local)),
        }
    }
}
