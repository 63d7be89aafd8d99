//! The token shards of a run: cut, published, adopted, renamed.
//!
//! A shard is built in memory and published whole as `texts-00003.safetensors` with its row-aligned
//! `raw-00003.safetensors`; one without the other counts for nothing. Once the count is known all are renamed to `texts-00003-of-00016.safetensors`. A run that was killed
//! finds its shards under either name and keeps those that verify.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::thread::{self, Scope, ScopedJoinHandle};

use embkit_core::container::{self, Container, FileInfo, Tensor, Verify};
use embkit_core::{Error, Result, Texts, publish};

use super::Inputs;

/// The `format` of token shards.
pub const TEXTS_FORMAT: &str = "embkit.texts";
/// The `format` of their row-aligned texts.
pub const RAW_FORMAT: &str = "embkit.raw";
/// Version of both.
pub const VERSION: u32 = 1;
/// The two files of a shard.
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

impl Open {
    fn at(first_row: usize) -> Self {
        Self { first_row, offsets: vec![0], raw_offsets: vec![0], ..Self::default() }
    }

    fn rows(&self) -> usize {
        self.prompt_len.len()
    }
}

/// A shard on disk.
struct Done {
    /// Where raw and texts are now, in the order of [`STEMS`].
    paths: [PathBuf; 2],
    infos: [FileInfo; 2],
}

/// Where shards go and what their rows are.
pub(crate) struct Target<'a> {
    pub(crate) dir: &'a Path,
    pub(crate) inputs: &'a Inputs<'a>,
    /// Digest of everything else that decides the bytes; shards of another digest are not adopted.
    pub(crate) params: String,
    pub(crate) shard_bytes: u64,
    pub(crate) wide: bool,
}

/// Writes shards in row order. With a scope, a full shard is published beside what goes on, one at
/// a time.
pub(crate) struct Writer<'scope, 'a> {
    target: &'a Target<'a>,
    scope: Option<&'scope Scope<'scope, 'a>>,
    open: Open,
    done: Vec<Done>,
    /// The shard that is being published.
    busy: Option<ScopedJoinHandle<'scope, Result<Done>>>,
    pub(crate) tokens: u64,
    pub(crate) truncated: u64,
}

impl<'scope, 'a: 'scope> Writer<'scope, 'a> {
    pub(crate) fn new(target: &'a Target<'a>, scope: Option<&'scope Scope<'scope, 'a>>) -> Self {
        Self {
            target,
            scope,
            open: Open::at(0),
            done: Vec::new(),
            busy: None,
            tokens: 0,
            truncated: 0,
        }
    }

    /// Keeps the shards of an earlier run from the first one on, as long as they verify and belong
    /// to this one. Returns the number of rows that are done.
    pub(crate) fn adopt(&mut self, texts: &Texts) -> Result<usize> {
        let found = list(self.target.dir)?;
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
            self.open = Open::at(self.open.first_row + rows);
        }
    }

    /// A pair of files that is exactly what this run would write next, with its rows, tokens and
    /// truncated texts. Any fault means that the shard is written again, so faults are not told.
    fn verify(&self, raw: &Path, tokens: &Path, texts: &Texts) -> Option<(Done, usize, u64, u64)> {
        let open = |path: &Path, format| {
            let c = Container::open(path, Verify::Open).ok()?;
            c.expect(format, VERSION).ok()?;
            let same = c.metadata().get("params") == Some(&self.target.params)
                && c.metadata().get("first_row") == Some(&self.open.first_row.to_string());
            same.then_some(c)
        };
        let raw_file = open(raw, RAW_FORMAT)?;
        let file = open(tokens, TEXTS_FORMAT)?;
        let rows: usize = file.metadata().get("rows")?.parse().ok()?;
        let range = self.open.first_row..self.open.first_row.checked_add(rows)?;
        let inputs = self.target.inputs;
        let same_columns = rows > 0
            && file.slice::<u64>("text_id").ok()? == inputs.text_id.get(range.clone())?
            && file.slice::<u64>("cluster").ok()? == inputs.cluster.get(range.clone())?
            && file.slice::<u8>("role").ok()? == inputs.role.get(range.clone())?
            && file.slice::<u16>("source").ok()? == inputs.source.get(range.clone())?;
        let offsets = raw_file.slice::<u64>("offsets").ok()?;
        let bytes = raw_file.slice::<u8>("text").ok()?;
        if !same_columns || offsets.len() != rows + 1 {
            return None;
        }
        let there = TextShardRows { bytes, offsets };
        for (local, row) in inputs.row.get(range)?.iter().enumerate() {
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
        let id_bytes = if self.target.wide { 4 } else { 2 };
        let rows = self.open.rows() as u64;
        let tokens = (self.open.narrow.len() + self.open.wide.len() + ids.len()) as u64;
        let side = self.target.shard_bytes.saturating_mul(SIDE_FACTOR);
        let full = tokens * id_bytes > self.target.shard_bytes
            || (self.open.raw.len() + raw.len()) as u64 > side
            || (rows + 1) * ROW_BYTES > side;
        if full && rows > 0 {
            self.publish()?;
        }
        let open = &mut self.open;
        if self.target.wide {
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

    /// Publishes the rows in hand as the next shard, after the one before.
    fn publish(&mut self) -> Result<()> {
        self.wait()?;
        let next = self.open.first_row + self.open.rows();
        let open = std::mem::replace(&mut self.open, Open::at(next));
        self.tokens += open.offsets.last().copied().unwrap_or(0);
        self.truncated += open.truncated;
        let (target, index) = (self.target, self.done.len());
        match self.scope {
            Some(scope) => self.busy = Some(scope.spawn(move || target.write(index, &open, true))),
            None => self.done.push(target.write(index, &open, false)?),
        }
        Ok(())
    }

    fn wait(&mut self) -> Result<()> {
        if let Some(busy) = self.busy.take() {
            self.done.push(joined(busy)?);
        }
        Ok(())
    }

    /// Publishes the last shard, gives every file its final name, and removes shard files that do
    /// not belong to the set. Returns the files with what a manifest records of them.
    pub(crate) fn finish(&mut self) -> Result<BTreeMap<String, FileInfo>> {
        if self.open.rows() > 0 {
            self.publish()?;
        }
        self.wait()?;
        let dir = self.target.dir;
        let mut files = BTreeMap::new();
        let mut renames = Vec::new();
        let of = self.done.len();
        for (index, done) in self.done.iter().enumerate() {
            for (((stem, _), path), info) in STEMS.iter().zip(&done.paths).zip(&done.infos) {
                let name = name(stem, index, Some(of));
                let to = dir.join(&name);
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
        let mut left_over: Vec<PathBuf> = list(dir)?.into_values().flatten().collect();
        left_over.retain(|path| !of_this_run(path));
        publish::settle(dir, &renames, &left_over)?;
        Ok(files)
    }

    /// Number of shards on disk.
    pub(crate) fn shards(&self) -> usize {
        self.done.len()
    }
}

impl Target<'_> {
    /// Writes and publishes one shard; with `beside` its two files at the same time.
    fn write(&self, index: usize, open: &Open, beside: bool) -> Result<Done> {
        let range = open.first_row..open.first_row + open.rows();
        let meta = |format: &str| {
            BTreeMap::from([
                ("format".to_string(), format.to_string()),
                ("version".to_string(), VERSION.to_string()),
                ("params".to_string(), self.params.clone()),
                ("first_row".to_string(), open.first_row.to_string()),
                ("rows".to_string(), open.rows().to_string()),
                ("truncated".to_string(), open.truncated.to_string()),
            ])
        };
        let [raw_path, path] = STEMS.map(|(stem, _)| self.dir.join(name(stem, index, None)));
        let raw = [Tensor::vector("text", &open.raw), Tensor::vector("offsets", &open.raw_offsets)];
        let cut = || Error::usage("the columns are shorter than the rows", "Pass equal lengths");
        let inputs = self.inputs;
        let columns = [
            match self.wide {
                true => Tensor::vector("tokens", &open.wide),
                false => Tensor::vector("tokens", &open.narrow),
            },
            Tensor::vector("offsets", &open.offsets),
            Tensor::vector("text_id", inputs.text_id.get(range.clone()).ok_or_else(cut)?),
            Tensor::vector("cluster", inputs.cluster.get(range.clone()).ok_or_else(cut)?),
            Tensor::vector("role", inputs.role.get(range.clone()).ok_or_else(cut)?),
            Tensor::vector("source", inputs.source.get(range).ok_or_else(cut)?),
            Tensor::vector("prompt_len", &open.prompt_len),
        ];
        let write_raw = || container::write(&raw_path, &raw, &meta(RAW_FORMAT));
        let write_texts = || container::write(&path, &columns, &meta(TEXTS_FORMAT));
        let infos = match beside {
            true => thread::scope(|scope| {
                let raw = scope.spawn(write_raw);
                let texts = write_texts();
                Ok::<_, Error>([joined(raw)?, texts?])
            })?,
            false => [write_raw()?, write_texts()?],
        };
        Ok(Done { paths: [raw_path, path], infos })
    }
}

/// What a thread returns; its panic goes on in this one.
pub(crate) fn joined<T>(thread: ScopedJoinHandle<T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
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
