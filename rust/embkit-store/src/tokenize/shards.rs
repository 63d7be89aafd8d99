//! The token shards of a run: cut, published, adopted, renamed.
//!
//! A shard is built in memory and published whole as `texts-00003.safetensors` with its row-aligned
//! `raw-00003.safetensors` (the raw file first, so a texts file always has its partner). Once the
//! count is known all are renamed to `texts-00003-of-00016.safetensors`. A run that was killed
//! finds its shards under either name and keeps those that verify.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use embkit_core::container::{self, Container, FileInfo, Tensor, Verify};
use embkit_core::{Error, Result, Texts, publish};

use super::Inputs;

/// The `format` of token shards.
pub const TEXTS_FORMAT: &str = "embkit.texts";
/// The `format` of their row-aligned texts.
pub const RAW_FORMAT: &str = "embkit.raw";
/// Version of both.
pub const VERSION: u32 = 1;
/// The two files of a shard, in the order in which they are published.
const STEMS: [(&str, &str); 2] = [("raw", RAW_FORMAT), ("texts", TEXTS_FORMAT)];
/// Bytes of a row beside its tokens, rounded up (offset, text_id, cluster, role, source, prompt).
const ROW_BYTES: u64 = 32;
/// Raw bytes and row bytes of a shard may be this many times its token bytes: with the default of
/// 64 MiB no file is over 256 MiB, however short or long the texts are.
const SIDE_FACTOR: u64 = 3;

/// Name of a shard's file; `of` is the number of shards once it is known.
pub(crate) fn name(stem: &str, index: usize, of: Option<usize>) -> String {
    match of {
        Some(of) => format!("{stem}-{index:05}-of-{of:05}.safetensors"),
        None => format!("{stem}-{index:05}.safetensors"),
    }
}

/// Reads a name back: stem, index, number of shards. `None` for any other file.
pub(crate) fn parse_name(file: &str) -> Option<(&'static str, usize, Option<usize>)> {
    let body = file.strip_suffix(".safetensors")?;
    let (stem, rest) = body.split_once('-')?;
    let (stem, _) = STEMS.into_iter().find(|(s, _)| *s == stem)?;
    let number =
        |digits: &str| match digits.len() >= 5 && digits.bytes().all(|b| b.is_ascii_digit()) {
            true => digits.parse::<usize>().ok(),
            false => None,
        };
    match rest.split_once("-of-") {
        Some((index, of)) => Some((stem, number(index)?, Some(number(of)?))),
        None => Some((stem, number(rest)?, None)),
    }
}

/// The shard files in a directory, by stem and index, in a fixed order.
pub(crate) fn list(dir: &Path) -> Result<BTreeMap<(&'static str, usize), Vec<PathBuf>>> {
    let mut found: BTreeMap<_, Vec<PathBuf>> = BTreeMap::new();
    for entry in fs::read_dir(dir).map_err(|e| Error::io(dir, e))? {
        let entry = entry.map_err(|e| Error::io(dir, e))?;
        if let Some((stem, index, _)) = entry.file_name().to_str().and_then(parse_name) {
            found.entry((stem, index)).or_default().push(entry.path());
        }
    }
    for paths in found.values_mut() {
        paths.sort();
    }
    Ok(found)
}

/// Rows of the shard in the making.
#[derive(Default)]
struct Open {
    first_row: usize,
    narrow: Vec<u16>,
    wide: Vec<u32>,
    offsets: Vec<u64>,
    prompt_len: Vec<u16>,
    raw: Vec<u8>,
    raw_offsets: Vec<u64>,
    truncated: u64,
}

/// A shard on disk.
struct Done {
    /// Where raw and texts are now, in the order of [`STEMS`].
    paths: [PathBuf; 2],
    infos: [FileInfo; 2],
}

/// Writes shards in row order.
pub(crate) struct Writer<'a> {
    dir: &'a Path,
    inputs: &'a Inputs<'a>,
    /// Digest of everything else that decides the bytes; shards of another digest are not adopted.
    params: String,
    shard_bytes: u64,
    is_wide: bool,
    open: Open,
    done: Vec<Done>,
    pub(crate) tokens: u64,
    pub(crate) truncated: u64,
}

impl<'a> Writer<'a> {
    pub(crate) fn new(
        dir: &'a Path,
        inputs: &'a Inputs<'a>,
        params: String,
        shard_bytes: u64,
        is_wide: bool,
    ) -> Self {
        let mut writer = Self {
            dir,
            inputs,
            params,
            shard_bytes,
            is_wide,
            open: Open::default(),
            done: Vec::new(),
            tokens: 0,
            truncated: 0,
        };
        writer.restart(0);
        writer
    }

    fn restart(&mut self, first_row: usize) {
        self.open = Open { first_row, ..Open::default() };
        self.open.offsets.push(0);
        self.open.raw_offsets.push(0);
    }

    /// Keeps the shards of an earlier run from the first one on, as long as they verify and belong
    /// to this one. Returns the number of rows that are done.
    pub(crate) fn adopt(&mut self, texts: &Texts) -> Result<usize> {
        let found = list(self.dir)?;
        let none = Vec::new();
        loop {
            let index = self.done.len();
            let paths = |stem| found.get(&(stem, index)).unwrap_or(&none).iter();
            let pairs = paths("raw").flat_map(|raw| paths("texts").map(move |t| (raw, t)));
            let good = pairs.into_iter().find_map(|(raw, t)| self.verify(raw, t, texts));
            let Some((done, rows, tokens, truncated)) = good else {
                return Ok(self.open.first_row);
            };
            self.done.push(done);
            self.tokens += tokens;
            self.truncated += truncated;
            self.restart(self.open.first_row + rows);
        }
    }

    /// A pair of files that is exactly what this run would write next, with its rows, tokens and
    /// truncated texts. Any fault means that the shard is written again, so faults are not told.
    fn verify(&self, raw: &Path, tokens: &Path, texts: &Texts) -> Option<(Done, usize, u64, u64)> {
        let open = |path: &Path, format| {
            let c = Container::open(path, Verify::Open).ok()?;
            c.expect(format, VERSION).ok()?;
            let same = c.metadata().get("params") == Some(&self.params)
                && c.metadata().get("first_row") == Some(&self.open.first_row.to_string());
            same.then_some(c)
        };
        let raw_file = open(raw, RAW_FORMAT)?;
        let file = open(tokens, TEXTS_FORMAT)?;
        let rows: usize = file.metadata().get("rows")?.parse().ok()?;
        let range = self.open.first_row..self.open.first_row.checked_add(rows)?;
        let same_columns = rows > 0
            && file.slice::<u64>("text_id").ok()? == self.inputs.text_id.get(range.clone())?
            && file.slice::<u64>("cluster").ok()? == self.inputs.cluster.get(range.clone())?
            && file.slice::<u8>("role").ok()? == self.inputs.role.get(range.clone())?
            && file.slice::<u16>("source").ok()? == self.inputs.source.get(range.clone())?;
        let offsets = raw_file.slice::<u64>("offsets").ok()?;
        let bytes = raw_file.slice::<u8>("text").ok()?;
        if !same_columns || offsets.len() != rows + 1 {
            return None;
        }
        let there = TextShardRows { bytes, offsets };
        for (local, row) in self.inputs.row.get(range)?.iter().enumerate() {
            if there.get(local)? != texts.try_get(usize::try_from(*row).ok()?)? {
                return None;
            }
        }
        let count = *file.slice::<u64>("offsets").ok()?.last()?;
        let truncated = file.metadata().get("truncated")?.parse().ok()?;
        let infos = [raw_file.info()?, file.info()?];
        let done = Done { paths: [raw.to_path_buf(), tokens.to_path_buf()], infos };
        Some((done, rows, count, truncated))
    }

    /// Adds the next row, after publishing the shard that it does not fit into.
    pub(crate) fn push(
        &mut self,
        ids: &[u32],
        truncated: bool,
        prompt_len: u16,
        raw: &[u8],
    ) -> Result<()> {
        let id_bytes = if self.is_wide { 4 } else { 2 };
        let rows = self.open.prompt_len.len() as u64;
        let tokens = (self.open.narrow.len() + self.open.wide.len() + ids.len()) as u64;
        let side = self.shard_bytes.saturating_mul(SIDE_FACTOR);
        let full = tokens * id_bytes > self.shard_bytes
            || (self.open.raw.len() + raw.len()) as u64 > side
            || (rows + 1) * ROW_BYTES > side;
        if full && rows > 0 {
            self.publish()?;
        }
        let open = &mut self.open;
        if self.is_wide {
            open.wide.extend_from_slice(ids);
        } else {
            // The largest id of the vocabulary fits, so this never cuts.
            open.narrow.extend(ids.iter().map(|id| *id as u16));
        }
        open.offsets.push((open.narrow.len() + open.wide.len()) as u64);
        open.prompt_len.push(prompt_len);
        open.raw.extend_from_slice(raw);
        open.raw_offsets.push(open.raw.len() as u64);
        open.truncated += u64::from(truncated);
        Ok(())
    }

    fn publish(&mut self) -> Result<()> {
        let open = std::mem::take(&mut self.open);
        let rows = open.prompt_len.len();
        let range = open.first_row..open.first_row + rows;
        let index = self.done.len();
        let meta = |format: &str| {
            BTreeMap::from([
                ("format".to_string(), format.to_string()),
                ("version".to_string(), VERSION.to_string()),
                ("params".to_string(), self.params.clone()),
                ("first_row".to_string(), open.first_row.to_string()),
                ("rows".to_string(), rows.to_string()),
                ("truncated".to_string(), open.truncated.to_string()),
            ])
        };
        let raw_path = self.dir.join(name("raw", index, None));
        let raw = [Tensor::vector("text", &open.raw), Tensor::vector("offsets", &open.raw_offsets)];
        let raw_info = container::write(&raw_path, &raw, &meta(RAW_FORMAT))?;

        let cut = || Error::usage("the columns are shorter than the rows", "Pass equal lengths");
        let path = self.dir.join(name("texts", index, None));
        let tokens = match self.is_wide {
            true => Tensor::vector("tokens", &open.wide),
            false => Tensor::vector("tokens", &open.narrow),
        };
        let columns = [
            tokens,
            Tensor::vector("offsets", &open.offsets),
            Tensor::vector("text_id", self.inputs.text_id.get(range.clone()).ok_or_else(cut)?),
            Tensor::vector("cluster", self.inputs.cluster.get(range.clone()).ok_or_else(cut)?),
            Tensor::vector("role", self.inputs.role.get(range.clone()).ok_or_else(cut)?),
            Tensor::vector("source", self.inputs.source.get(range.clone()).ok_or_else(cut)?),
            Tensor::vector("prompt_len", &open.prompt_len),
        ];
        let info = container::write(&path, &columns, &meta(TEXTS_FORMAT))?;

        self.tokens += open.offsets.last().copied().unwrap_or(0);
        self.truncated += open.truncated;
        self.done.push(Done { paths: [raw_path, path], infos: [raw_info, info] });
        self.restart(range.end);
        Ok(())
    }

    /// Publishes the last shard, gives every file its final name, and removes shard files that do
    /// not belong to the set. Returns the files with what a manifest records of them.
    pub(crate) fn finish(&mut self) -> Result<BTreeMap<String, FileInfo>> {
        if !self.open.prompt_len.is_empty() {
            self.publish()?;
        }
        let mut files = BTreeMap::new();
        let mut renames = Vec::new();
        let of = self.done.len();
        for (index, done) in self.done.iter().enumerate() {
            for (((stem, _), path), info) in STEMS.iter().zip(&done.paths).zip(&done.infos) {
                let name = name(stem, index, Some(of));
                let to = self.dir.join(&name);
                if *path != to {
                    renames.push((path.clone(), to));
                }
                files.insert(name, *info);
            }
        }
        let sources: BTreeSet<&PathBuf> = renames.iter().map(|(from, _)| from).collect();
        let of_this_run = |path: &PathBuf| {
            let name = path.file_name().and_then(|n| n.to_str());
            sources.contains(path) || name.is_some_and(|n| files.contains_key(n))
        };
        let mut left_over: Vec<PathBuf> = list(self.dir)?.into_values().flatten().collect();
        left_over.retain(|path| !of_this_run(path));
        publish::settle(self.dir, &renames, &left_over)?;
        Ok(files)
    }

    /// Number of shards on disk.
    pub(crate) fn shards(&self) -> usize {
        self.done.len()
    }
}

/// Local rows of a raw shard.
type TextShardRows<'a> = embkit_core::TextShard<'a>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_others_are_left_alone() {
        for (stem, _) in STEMS {
            for of in [None, Some(12), Some(123_456)] {
                for index in [0, 7, 99_999, 100_000] {
                    assert_eq!(parse_name(&name(stem, index, of)), Some((stem, index, of)));
                }
            }
        }
        for other in [
            "texts-00000.safetensors.tmp",
            "texts-0.safetensors",
            "texts-+0000.safetensors",
            "other-00000.safetensors",
            "texts.safetensors",
            "texts-00000-of-.safetensors",
        ] {
            assert_eq!(parse_name(other), None, "{other}");
        }
    }
}
