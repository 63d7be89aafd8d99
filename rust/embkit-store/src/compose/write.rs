//! Rows of stores as the shards of a new one, one shard in memory at a time.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use embkit_core::container::{self, Container, Tensor, Verify};
use embkit_core::{Error, Job, Result, publish};

use super::Plan;
use super::shards::{Ids, Stores, View};
use crate::tokenize::{RAW_FORMAT, TEXTS_FORMAT, VERSION, name, parse_name};

/// The two files of a shard, in the order in which they are published.
const STEMS: [&str; 2] = ["raw", "texts"];
/// Bytes of a row beside its tokens, and how many times its token bytes a shard's texts and rows
/// may have: the same rule by which tokenisation cuts.
const ROW_BYTES: u64 = 32;
const SIDE_FACTOR: u64 = 3;
/// Rows between two looks at the job.
const CHECK_ROWS: usize = 1 << 10;

/// What was written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Number of shards.
    pub shards: usize,
    /// Rows in all shards.
    pub rows: u64,
    /// Tokens in all shards.
    pub tokens: u64,
    /// Rows that were cut or are exactly as long as their limit.
    pub truncated: u64,
    /// Rows in shards that were linked, not copied.
    pub linked: u64,
    /// Rows taken over from an earlier, unfinished run.
    pub adopted: u64,
}

/// Writes the rows of `plan` as the shards of a store into `out_dir`, which must exist. `digest`
/// names the work: shards of an earlier run with the same digest are kept when they verify, others
/// removed. `max_length` is the limit in tokens by role. Counts rows on `job`.
///
/// While the rows are those of the first store its shards keep their boundaries, and a shard
/// without any change is hard-linked (or copied, across file systems). From there on shards are
/// cut at `shard_bytes` of tokens.
///
/// Errors: `Usage` for columns of another length or rows beyond the end, `Corrupt` for a damaged
/// store, `Io`, `Cancelled`. After an error the directory holds whole shards.
pub fn write(
    job: &Job,
    out_dir: &Path,
    stores: &Stores,
    plan: Plan,
    digest: &str,
    max_length: [u32; 3],
    shard_bytes: u64,
) -> Result<Report> {
    let rows = plan.row.len();
    let lengths = [plan.text_id.len(), plan.cluster.len(), plan.role.len(), plan.source.len()];
    if rows == 0 || lengths.iter().any(|len| *len != rows) {
        return Err(Error::usage(
            format!("columns of {rows}, {lengths:?} rows"),
            "Pass columns of one length, of at least one row",
        ));
    }
    publish::sweep_tmp(out_dir)?;
    let views = stores.views()?;
    let mut writer = Writer {
        job,
        dir: out_dir,
        stores,
        views,
        plan,
        digest,
        max_length,
        report: Report::default(),
    };
    let mut at = 0;
    while at < rows {
        job.check()?;
        let index = writer.report.shards;
        let boundary = writer.boundary(at);
        let n = match boundary {
            Some((shard, n)) if writer.unchanged(shard, at) => writer.link(index, shard, n)?,
            _ => match writer.adopt(index, at)? {
                Some(n) => n,
                None => writer.copy(index, at, boundary.map(|(_, n)| n), shard_bytes)?,
            },
        };
        at += n;
        writer.report.shards += 1;
        writer.report.rows += n as u64;
    }
    writer.finish()?;
    Ok(writer.report)
}

struct Writer<'a> {
    job: &'a Job,
    dir: &'a Path,
    stores: &'a Stores,
    views: Vec<View<'a>>,
    plan: Plan<'a>,
    digest: &'a str,
    max_length: [u32; 3],
    report: Report,
}

/// Rows of the shard in the making.
#[derive(Default)]
struct Open {
    narrow: Vec<u16>,
    wide: Vec<u32>,
    offsets: Vec<u64>,
    prompt_len: Vec<u16>,
    raw: Vec<u8>,
    raw_offsets: Vec<u64>,
    truncated: u64,
}

impl Writer<'_> {
    /// The shard of the first store that starts at output row `at` with all of its rows in their
    /// places, and their number. Not its last shard when rows follow: that one is filled up.
    fn boundary(&self, at: usize) -> Option<(usize, usize)> {
        let shard = (0..self.stores.of_first).find(|s| self.stores.first_row(*s) == at as u64)?;
        let n = (self.stores.first_row(shard + 1) - at as u64) as usize;
        let last = shard + 1 == self.stores.of_first;
        if last && at + n < self.plan.row.len() {
            return None;
        }
        // A row of another store here brings longer tokens for the same text.
        let others = self.stores.starts().get(1).copied().unwrap_or(0);
        let in_place =
            |rows: &[u64]| rows.iter().zip(at as u64..).all(|(row, i)| *row == i || *row >= others);
        let rows = self.plan.row.get(at..at + n);
        (n > 0 && rows.is_some_and(in_place)).then_some((shard, n))
    }

    /// Whether all rows of a shard stay as they are.
    fn unchanged(&self, shard: usize, at: usize) -> bool {
        let Some(view) = self.views.get(shard) else { return false };
        let rows = at..at + view.text_id.len();
        let same_rows = |r: &[u64]| r.iter().zip(at as u64..).all(|(row, i)| *row == i);
        self.plan.row.get(rows.clone()).is_some_and(same_rows)
            && self.plan.text_id.get(rows.clone()) == Some(view.text_id)
            && self.plan.cluster.get(rows.clone()) == Some(view.cluster)
            && self.plan.role.get(rows.clone()) == Some(view.role)
            && self.plan.source.get(rows) == Some(view.source)
    }

    fn link(&mut self, index: usize, shard: usize, n: usize) -> Result<usize> {
        let Some(from) = self.stores.shards.get(shard) else { return Ok(n) };
        for (stem, file) in STEMS.into_iter().zip([&from.raw, &from.texts]) {
            let to = self.dir.join(name(stem, index, None));
            let temp = publish::temp_path(&to)?;
            if fs::hard_link(file.path(), &temp).is_err() {
                fs::copy(file.path(), &temp).map_err(|e| Error::io(&temp, e))?;
            }
            fs::rename(&temp, &to).map_err(|e| Error::io(&to, e))?;
            // A rename between two links of one file does nothing and leaves both names.
            let _ = fs::remove_file(&temp);
        }
        let truncated = from.texts.metadata().get("truncated").and_then(|t| t.parse().ok());
        self.report.truncated += truncated.unwrap_or(0_u64);
        self.report.tokens += self.views.get(shard).and_then(|v| v.offsets.last()).unwrap_or(&0);
        self.report.linked += n as u64;
        self.job.advance(n as u64);
        Ok(n)
    }

    /// Keeps the shard that an earlier run with the same digest has written for row `at`; whatever
    /// is wrong with it, it is written again. Returns its rows.
    fn adopt(&mut self, index: usize, at: usize) -> Result<Option<usize>> {
        let open = |path: &PathBuf, format| {
            let c = Container::open(path, Verify::Open).ok()?;
            c.expect(format, VERSION).ok()?;
            let same = c.metadata().get("params").map(String::as_str) == Some(self.digest)
                && c.metadata().get("first_row") == Some(&at.to_string());
            same.then_some(c)
        };
        let files = list(self.dir)?;
        let of = |stem| files.iter().filter(move |(s, i, _)| *s == stem && *i == index);
        let Some((raw, texts)) = of("raw").zip(of("texts")).find_map(|(raw, texts)| {
            Some((open(&raw.2, RAW_FORMAT)?, open(&texts.2, TEXTS_FORMAT)?))
        }) else {
            return Ok(None);
        };
        let number = |key| texts.metadata().get(key).and_then(|v| v.parse::<u64>().ok());
        let (Some(n), Some(truncated)) = (number("rows"), number("truncated")) else {
            return Ok(None);
        };
        let offsets = texts.slice::<u64>("offsets")?;
        if n == 0 || offsets.len() as u64 != n + 1 || at as u64 + n > self.plan.row.len() as u64 {
            return Ok(None);
        }
        for (stem, file) in STEMS.into_iter().zip([&raw, &texts]) {
            let to = self.dir.join(name(stem, index, None));
            if file.path() != to {
                fs::rename(file.path(), &to).map_err(|e| Error::io(&to, e))?;
            }
        }
        self.report.tokens += offsets.last().copied().unwrap_or(0);
        self.report.truncated += truncated;
        self.report.adopted += n;
        self.job.advance(n);
        Ok(Some(n as usize))
    }

    /// Writes the next shard: `exactly` so many rows, or as many as fit. Returns how many.
    fn copy(
        &mut self,
        index: usize,
        at: usize,
        exactly: Option<usize>,
        shard_bytes: u64,
    ) -> Result<usize> {
        let id_bytes = if self.stores.wide() { 4 } else { 2 };
        let side = shard_bytes.saturating_mul(SIDE_FACTOR);
        let mut open = Open { offsets: vec![0], raw_offsets: vec![0], ..Open::default() };
        let end = exactly.map_or(self.plan.row.len(), |n| at + n);
        let mut rows = 0;
        for (i, row) in self.plan.row.iter().enumerate().take(end).skip(at) {
            if rows % CHECK_ROWS == 0 {
                self.job.check()?;
            }
            let (shard, local) = self.stores.locate(*row)?;
            let Some(view) = self.views.get(shard) else { break };
            let (span, text) = (view.span(local)?, view.text(local)?);
            let tokens = (open.narrow.len() + open.wide.len() + span.len()) as u64;
            let full = tokens * id_bytes > shard_bytes
                || (open.raw.len() + text.len()) as u64 > side
                || (rows as u64 + 1) * ROW_BYTES > side;
            if full && rows > 0 && exactly.is_none() {
                break;
            }
            let role = self.plan.role.get(i).copied().unwrap_or(0);
            let limit = self.max_length.get(usize::from(role)).copied().unwrap_or(u32::MAX);
            open.truncated += u64::from(span.len() >= limit as usize);
            match view.tokens {
                Ids::Narrow(ids) => open.narrow.extend_from_slice(ids.get(span).unwrap_or(&[])),
                Ids::Wide(ids) => open.wide.extend_from_slice(ids.get(span).unwrap_or(&[])),
            }
            open.offsets.push((open.narrow.len() + open.wide.len()) as u64);
            open.prompt_len.push(view.prompt_len.get(local).copied().unwrap_or(0));
            open.raw.extend_from_slice(text);
            open.raw_offsets.push(open.raw.len() as u64);
            rows += 1;
        }
        self.publish(index, at, rows, &open)?;
        self.report.tokens += open.offsets.last().copied().unwrap_or(0);
        self.report.truncated += open.truncated;
        self.job.advance(rows as u64);
        Ok(rows)
    }

    fn publish(&self, index: usize, at: usize, rows: usize, open: &Open) -> Result<()> {
        let meta = |format: &str| {
            BTreeMap::from([
                ("format".to_string(), format.to_string()),
                ("version".to_string(), VERSION.to_string()),
                ("params".to_string(), self.digest.to_string()),
                ("first_row".to_string(), at.to_string()),
                ("rows".to_string(), rows.to_string()),
                ("truncated".to_string(), open.truncated.to_string()),
            ])
        };
        let raw = [Tensor::vector("text", &open.raw), Tensor::vector("offsets", &open.raw_offsets)];
        container::write(&self.dir.join(name("raw", index, None)), &raw, &meta(RAW_FORMAT))?;
        let tokens = match self.stores.wide() {
            true => Tensor::vector("tokens", &open.wide),
            false => Tensor::vector("tokens", &open.narrow),
        };
        fn part<T>(column: &[T], at: usize, rows: usize) -> &[T] {
            column.get(at..at + rows).unwrap_or_default()
        }
        let columns = [
            tokens,
            Tensor::vector("offsets", &open.offsets),
            Tensor::vector("text_id", part(self.plan.text_id, at, rows)),
            Tensor::vector("cluster", part(self.plan.cluster, at, rows)),
            Tensor::vector("role", part(self.plan.role, at, rows)),
            Tensor::vector("source", part(self.plan.source, at, rows)),
            Tensor::vector("prompt_len", &open.prompt_len),
        ];
        container::write(
            &self.dir.join(name("texts", index, None)),
            &columns,
            &meta(TEXTS_FORMAT),
        )?;
        Ok(())
    }

    /// Gives every file its final name and removes shards that do not belong to the set.
    fn finish(&self) -> Result<()> {
        let of = self.report.shards;
        let mut renames = Vec::new();
        for (index, stem) in (0..of).flat_map(|i| STEMS.map(|stem| (i, stem))) {
            let to = self.dir.join(name(stem, index, Some(of)));
            // Two links of one file: a rename would do nothing and leave both names.
            let _ = fs::remove_file(&to);
            renames.push((self.dir.join(name(stem, index, None)), to));
        }
        let belongs = |path: &PathBuf| renames.iter().any(|(from, _)| from == path);
        let rest = list(self.dir)?.into_iter().map(|(_, _, path)| path);
        let rest: Vec<PathBuf> = rest.filter(|path| !belongs(path)).collect();
        publish::settle(self.dir, &renames, &rest)
    }
}

/// The shard files in a directory: stem, index, path; in a fixed order.
fn list(dir: &Path) -> Result<Vec<(&'static str, usize, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(|e| Error::io(dir, e))? {
        let entry = entry.map_err(|e| Error::io(dir, e))?;
        if let Some((stem, index, _)) = entry.file_name().to_str().and_then(parse_name) {
            found.push((stem, index, entry.path()));
        }
    }
    found.sort();
    Ok(found)
}
