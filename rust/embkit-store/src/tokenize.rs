//! Distinct texts to token shards.
//!
//! Rows are encoded on all threads in waves and appended in input order; shards are cut by size
//! alone. So the files do not depend on the number of threads, nor on how often the run was killed:
//! shards that an earlier run published are verified and kept, the rest is written again.
//!
//! Oddity: a single text is encoded in one piece, so cancelling waits for the texts in hand.

mod encode;
mod shards;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use embkit_core::container::FileInfo;
use embkit_core::{Error, Job, Result, TextShard, Texts, blake3_hex, par, publish};

pub use encode::{BACKEND, Encoded, Encoder};
use shards::Writer;
pub use shards::{RAW_FORMAT, TEXTS_FORMAT, VERSION};
pub(crate) use shards::{list, name, parse_name};

/// Default size of a shard's tokens in bytes.
pub const SHARD_BYTES: u64 = 64 << 20;
/// Rows that one thread encodes at a time.
const BLOCK_ROWS: usize = 32;
/// Bytes of text and number of rows in a wave, at most; they bound the memory between shards.
const WAVE_BYTES: u64 = 8 << 20;
const WAVE_ROWS: usize = 1 << 15;

/// What each output row is: all columns have one length, the number of rows.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// The distinct texts.
    pub texts: &'a [TextShard<'a>],
    /// Row of the text among `texts`.
    pub row: &'a [u64],
    /// Index of its prompt in [`Settings::prompts`].
    pub prompt: &'a [u16],
    /// 0 query, 1 passage, 2 both.
    pub role: &'a [u8],
    /// Index of its source, copied to the store.
    pub source: &'a [u16],
    /// Identity of the text without its prompt, copied to the store.
    pub text_id: &'a [u64],
    /// Cluster of near duplicates, copied to the store.
    pub cluster: &'a [u64],
}

/// How rows are encoded and cut.
#[derive(Clone, Copy, Debug)]
pub struct Settings<'a> {
    /// The prompts; an empty one is no prompt.
    pub prompts: &'a [String],
    /// Content of `tokenizer.json`.
    pub tokenizer_json: &'a str,
    /// Limit in tokens, special tokens included, by role.
    pub max_length: &'a [u32],
    /// Token bytes of a shard, at most (a longer single row is a shard of its own).
    pub shard_bytes: u64,
    /// Threads, 0 for [`par::threads`].
    pub threads: usize,
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Number of shards.
    pub shards: usize,
    /// Rows in all shards.
    pub rows: u64,
    /// Tokens in all shards.
    pub tokens: u64,
    /// Rows that were cut to their `max_length`.
    pub truncated: u64,
    /// Rows taken over from an earlier, unfinished run.
    pub adopted: u64,
    /// [`BACKEND`].
    pub backend: String,
    /// Every file with what a manifest records of it.
    pub files: BTreeMap<String, FileInfo>,
}

/// Encodes every row and writes the shards of a store into `out_dir`, which is created when it is
/// missing. Counts rows on `job`.
///
/// Errors: `Usage` for columns of unequal length, a row, prompt or role out of range, or no rows;
/// `Corrupt` for an unreadable tokenizer; `Io`; `Cancelled`. After an error the directory holds
/// whole shards, which the next call with the same arguments takes over.
pub fn tokenize(job: &Job, out_dir: &Path, inputs: Inputs, settings: Settings) -> Result<Report> {
    let texts = Texts::new(inputs.texts)?;
    check(&inputs, &settings, &texts)?;
    let encoder = Encoder::new(settings.tokenizer_json, settings.max_length)?;
    let prompt_len = prompt_lengths(&encoder, &settings)?;
    fs::create_dir_all(out_dir).map_err(|e| Error::io(out_dir, e))?;
    publish::sweep_tmp(out_dir)?;

    let params = params(&inputs, &settings);
    let mut writer = Writer::new(out_dir, &inputs, params, settings.shard_bytes, encoder.wide());
    let adopted = writer.adopt(&texts)?;
    job.advance(adopted as u64);
    let mut next = adopted;
    while next < inputs.row.len() {
        job.check()?;
        let wave = wave(&inputs, &settings, &texts, next);
        let encoded = par::try_map_blocks(wave.len(), BLOCK_ROWS, settings.threads, |block| {
            let rows = wave.start + block.start..wave.start + block.end;
            let encoded = rows.map(|i| {
                job.check()?;
                encode_row(&encoder, &inputs, &settings, &texts, i)
            });
            let encoded = encoded.collect::<Result<Vec<Encoded>>>()?;
            job.advance(encoded.len() as u64);
            Ok(encoded)
        })?;
        for (i, row) in wave.clone().zip(encoded.into_iter().flatten()) {
            let (prompt, role, raw) = (column(inputs.prompt, i)?, column(inputs.role, i)?, i);
            let raw = texts.try_get(column(inputs.row, raw)? as usize).unwrap_or_default();
            let len = prompt_len.get(usize::from(role)).and_then(|p| p.get(usize::from(prompt)));
            // A prompt that was itself cut cannot be longer than the row.
            let len = len.copied().unwrap_or(0).min(row.ids.len());
            let len = u16::try_from(len).map_err(|_| {
                Error::usage(format!("prompt {prompt} has {len} tokens"), "Use a shorter prompt")
            })?;
            writer.push(&row.ids, row.truncated, len, raw)?;
        }
        next = wave.end;
    }
    let files = writer.finish()?;
    Ok(Report {
        shards: writer.shards(),
        rows: inputs.row.len() as u64,
        tokens: writer.tokens,
        truncated: writer.truncated,
        adopted: adopted as u64,
        backend: BACKEND.to_string(),
        files,
    })
}

fn encode_row(
    encoder: &Encoder,
    inputs: &Inputs,
    settings: &Settings,
    texts: &Texts,
    i: usize,
) -> Result<Encoded> {
    let prompt = usize::from(column(inputs.prompt, i)?);
    let prompt = settings.prompts.get(prompt).map_or("", String::as_str);
    let text = texts.str(column(inputs.row, i)? as usize)?;
    encoder.encode(column(inputs.role, i)?, prompt, text)
}

/// Value `i` of a column whose length was checked.
fn column<T: Copy>(values: &[T], i: usize) -> Result<T> {
    values.get(i).copied().ok_or_else(|| Error::usage(format!("no row {i}"), "Pass equal lengths"))
}

/// The next rows to encode together. Small shards get small waves, so that a killed run has left
/// its first shards behind by then.
fn wave(
    inputs: &Inputs,
    settings: &Settings,
    texts: &Texts,
    start: usize,
) -> std::ops::Range<usize> {
    let limit = settings.shard_bytes.min(WAVE_BYTES);
    let (mut end, mut bytes) = (start, 0);
    while let Some(row) = inputs.row.get(end) {
        bytes += texts.try_get(*row as usize).unwrap_or_default().len() as u64;
        end += 1;
        if bytes >= limit || end - start == WAVE_ROWS {
            break;
        }
    }
    start..end
}

/// Prompt lengths in tokens, by role and prompt.
fn prompt_lengths(encoder: &Encoder, settings: &Settings) -> Result<Vec<Vec<usize>>> {
    let roles = 0..settings.max_length.len().min(usize::from(u8::MAX)) as u8;
    let of_role =
        |role| settings.prompts.iter().map(|p| encoder.prompt_len(role, p)).collect::<Result<_>>();
    roles.map(of_role).collect()
}

/// Digest of what decides the shards' bytes, beside the columns and texts, which are compared.
fn params(inputs: &Inputs, settings: &Settings) -> String {
    let value = serde_json::json!({
        "backend": BACKEND,
        "max_length": settings.max_length,
        "prompt": blake3_hex(bytemuck::cast_slice(inputs.prompt)),
        "prompts": settings.prompts,
        "rows": inputs.row.len(),
        "shard_bytes": settings.shard_bytes,
        "tokenizer": blake3_hex(settings.tokenizer_json.as_bytes()),
    });
    blake3_hex(value.to_string().as_bytes())
}

fn check(inputs: &Inputs, settings: &Settings, texts: &Texts) -> Result<()> {
    let rows = inputs.row.len();
    for (name, len) in [
        ("prompt", inputs.prompt.len()),
        ("role", inputs.role.len()),
        ("source", inputs.source.len()),
        ("text_id", inputs.text_id.len()),
        ("cluster", inputs.cluster.len()),
    ] {
        if len != rows {
            return Err(Error::usage(
                format!("column '{name}' has {len} values for {rows} rows"),
                "Pass columns of one length",
            ));
        }
    }
    if rows == 0 {
        return Err(Error::usage("there are no rows to tokenize", "Check the records before"));
    }
    if settings.shard_bytes == 0 {
        return Err(Error::usage("shard_bytes is 0", "Use 67108864, the default"));
    }
    let beyond = |what: &str, value: u64, row: usize, count: usize| {
        Err(Error::usage(
            format!("row {row} has {what} {value}, but there are {count}"),
            format!("Pass {what} values below {count}"),
        ))
    };
    if let Some(i) = inputs.row.iter().position(|r| *r >= texts.len() as u64) {
        return beyond("text", column(inputs.row, i)?, i, texts.len());
    }
    let prompts = settings.prompts.len();
    if let Some(i) = inputs.prompt.iter().position(|p| usize::from(*p) >= prompts) {
        return beyond("prompt", column(inputs.prompt, i)?.into(), i, prompts);
    }
    let roles = settings.max_length.len();
    if let Some(i) = inputs.role.iter().position(|r| usize::from(*r) >= roles) {
        return beyond("role", column(inputs.role, i)?.into(), i, roles);
    }
    Ok(())
}
