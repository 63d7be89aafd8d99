//! Distinct texts to token shards.
//!
//! Rows are encoded on all threads in waves and appended in input order; shards are cut by size
//! alone. So the files do not depend on the number of threads, nor on how often the run was killed:
//! shards that an earlier run published are verified and kept, the rest is written again.
//!
//! Oddity: a single text is encoded in one piece, so cancelling waits for the texts in hand.

mod check;
mod encode;
mod fast;
mod shards;

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::Path;
use std::sync::mpsc;
use std::thread;

use embkit_core::container::FileInfo;
use embkit_core::{Error, Job, Result, TextShard, Texts, blake3_hex, par, publish};

pub use encode::{Backend, Encoded, Encoder, REFERENCE, Rows};
pub use fast::FAST;
pub use shards::{RAW_FORMAT, TEXTS_FORMAT, VERSION};
use shards::{Target, Writer, joined};
pub(crate) use shards::{list, name, parse_name};

/// Default size of a shard's tokens in bytes.
pub const SHARD_BYTES: u64 = 64 << 20;
/// Rows that one thread encodes at a time.
const BLOCK_ROWS: usize = 128;
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
    /// Which code makes the ids. No byte depends on it.
    pub backend: Backend,
    /// Whether a text above its limit is an error instead of being cut.
    pub refuse_long: bool,
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
    /// What made the ids ([`Encoder::backend`]).
    pub backend: String,
    /// Why [`REFERENCE`] made all ids, when it did.
    pub slow: Option<String>,
    /// Every file with what a manifest records of it.
    pub files: BTreeMap<String, FileInfo>,
}

/// Encodes every row and writes the shards of a store into `out_dir`, which is created when it is
/// missing. Counts rows on `job`.
///
/// Errors: `Usage` for columns of unequal length, a row, prompt or role out of range, no rows, or
/// texts above their limit with `refuse_long`; `Corrupt` for an unreadable tokenizer; `Io`;
/// `Cancelled`. After an error the directory holds whole shards, which the next call with the same
/// arguments takes over.
pub fn tokenize(job: &Job, out_dir: &Path, inputs: Inputs, settings: Settings) -> Result<Report> {
    let texts = Texts::new(inputs.texts)?;
    check(&inputs, &settings, &texts)?;
    let mut encoder = Encoder::new(settings.tokenizer_json, settings.max_length, settings.backend)?;
    let input = Input { columns: &inputs, settings: &settings, texts: &texts };
    if encoder.slow().is_none()
        && let Some(reason) = check::disagreement(job, &encoder, input)?
    {
        encoder.without_fast(reason);
    }
    let prompt_len = prompt_lengths(&encoder, &settings)?;
    fs::create_dir_all(out_dir).map_err(|e| Error::io(out_dir, e))?;
    publish::sweep_tmp(out_dir)?;

    let target = Target {
        dir: out_dir,
        inputs: &inputs,
        params: params(&inputs, &settings),
        shard_bytes: settings.shard_bytes,
        wide: encoder.wide(),
    };
    let add = |writer: &mut Writer, wave: Range<usize>, encoded: Vec<Rows>| {
        job.check()?;
        let mut next = wave;
        for rows in encoded {
            let mut start = 0;
            for ((end, truncated), i) in rows.ends.iter().zip(&mut next) {
                let ids = rows.ids.get(start..*end).unwrap_or_default();
                start = *end;
                let len = input.prompt_len(i, &prompt_len, ids.len())?;
                writer.push(ids, *truncated, len, input.bytes(i)?)?;
            }
        }
        Ok(())
    };
    let threads = if settings.threads == 0 { par::threads() } else { settings.threads };
    let report = thread::scope(|scope| {
        let mut writer = Writer::new(&target, (threads > 1).then_some(scope));
        let adopted = writer.adopt(&texts)?;
        job.advance(adopted as u64);
        if threads == 1 {
            waves(job, &encoder, input, adopted, |wave, rows| add(&mut writer, wave, rows))?;
        } else {
            // Laying out and publishing goes on beside the encoding of the next wave.
            let (send, receive) = mpsc::sync_channel::<(Range<usize>, Vec<Rows>)>(1);
            let worker = scope.spawn(move || {
                for (wave, rows) in receive {
                    add(&mut writer, wave, rows)?;
                }
                Ok::<_, Error>(writer)
            });
            // When the writer is gone, its error is the one that counts.
            let stopped = || Error::Cancelled;
            let encoded = waves(job, &encoder, input, adopted, |wave, rows| {
                send.send((wave, rows)).map_err(|_| stopped())
            });
            drop(send);
            writer = joined(worker)?;
            encoded?;
        }
        let files = writer.finish()?;
        Ok::<_, Error>(Report {
            shards: writer.shards(),
            rows: inputs.row.len() as u64,
            tokens: writer.tokens,
            truncated: writer.truncated,
            adopted: adopted as u64,
            backend: encoder.backend(),
            slow: encoder.slow().map(str::to_owned),
            files,
        })
    })?;
    if settings.refuse_long && report.truncated > 0 {
        return Err(too_long(job, &encoder, input, report.truncated));
    }
    Ok(report)
}

/// Encodes the rows from `start` on, wave by wave.
fn waves(
    job: &Job,
    encoder: &Encoder,
    input: Input,
    start: usize,
    mut add: impl FnMut(Range<usize>, Vec<Rows>) -> Result<()>,
) -> Result<()> {
    let mut next = start;
    while next < input.columns.row.len() {
        job.check()?;
        let wave = wave(input, next);
        let threads = input.settings.threads;
        let encoded = par::try_map_blocks(wave.len(), BLOCK_ROWS, threads, |block| {
            let rows = block.map(|i| {
                job.check()?;
                input.row(wave.start + i)
            });
            let encoded = encoder.encode_rows(rows)?;
            job.advance(encoded.ends.len() as u64);
            Ok(encoded)
        })?;
        next = wave.end;
        add(wave, encoded)?;
    }
    Ok(())
}

/// The rows to encode.
#[derive(Clone, Copy)]
struct Input<'a> {
    columns: &'a Inputs<'a>,
    settings: &'a Settings<'a>,
    texts: &'a Texts<'a>,
}

impl<'a> Input<'a> {
    /// The text of row `i`, without its prompt.
    fn bytes(&self, i: usize) -> Result<&'a [u8]> {
        Ok(self.texts.try_get(column(self.columns.row, i)? as usize).unwrap_or_default())
    }

    /// Role, prompt and text of row `i`.
    fn row(&self, i: usize) -> Result<(u8, &'a str, &'a str)> {
        let prompt = usize::from(column(self.columns.prompt, i)?);
        let prompt = self.settings.prompts.get(prompt).map_or("", String::as_str);
        let text = self.texts.str(column(self.columns.row, i)? as usize)?;
        Ok((column(self.columns.role, i)?, prompt, text))
    }

    /// Tokens of row `i`'s prompt, by role and prompt.
    fn prompt_len(&self, i: usize, known: &[Vec<usize>], len: usize) -> Result<u16> {
        let (role, prompt) = (column(self.columns.role, i)?, column(self.columns.prompt, i)?);
        let known = known.get(usize::from(role)).and_then(|p| p.get(usize::from(prompt)));
        // A prompt that was itself cut cannot be longer than the row.
        let len = known.copied().unwrap_or(0).min(len);
        u16::try_from(len).map_err(|_| {
            Error::usage(format!("prompt {prompt} has {len} tokens"), "Use a shorter prompt")
        })
    }
}

/// The error of `refuse_long`: the first text above its limit, and how many there are.
fn too_long(job: &Job, encoder: &Encoder, input: Input, count: u64) -> Error {
    let mut first = String::from("the first is not known");
    for i in 0..input.columns.row.len() {
        let found = job.check().and_then(|()| input.row(i)).and_then(|(role, prompt, text)| {
            let long = encoder.encode(role, prompt, text)?.truncated;
            Ok(if long { Some(encoder.full_length(prompt, text)?) } else { None })
        });
        match found {
            Err(error) => return error,
            Ok(None) => {}
            Ok(Some(length)) => {
                let limit = input.columns.role.get(i).map(|role| usize::from(*role));
                let limit = limit.and_then(|role| input.settings.max_length.get(role));
                first = format!(
                    "the first is row {i} with {length} tokens of {}",
                    limit.copied().unwrap_or(0)
                );
                break;
            }
        }
    }
    Error::usage(
        format!("{count} texts are longer than their limit: {first}"),
        "Raise max_length, cut the texts, or let them be truncated",
    )
}

/// Value `i` of a column whose length was checked.
fn column<T: Copy>(values: &[T], i: usize) -> Result<T> {
    values.get(i).copied().ok_or_else(|| Error::usage(format!("no row {i}"), "Pass equal lengths"))
}

/// The next rows to encode together. Small shards get small waves, so that a killed run has left
/// its first shards behind by then.
fn wave(input: Input, start: usize) -> Range<usize> {
    let limit = input.settings.shard_bytes.min(WAVE_BYTES);
    let (mut end, mut bytes) = (start, 0);
    while let Ok(text) = input.bytes(end) {
        bytes += text.len() as u64;
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

/// Digest of what decides the shards' bytes, beside the columns and texts, which are compared. The
/// fast path is not in it: with or without it the ids are those of the library.
fn params(inputs: &Inputs, settings: &Settings) -> String {
    let value = serde_json::json!({
        "backend": REFERENCE,
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
