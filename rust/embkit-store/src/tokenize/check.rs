//! Is the fast path right on this input? A sample of it is encoded twice before anything is written.
//!
//! The sample is taken over lengths and shares of non-ASCII bytes, so that rare kinds of text are
//! in it too, and it depends on the input alone: a run that goes on after a kill decides as the
//! first one did.

use embkit_core::{Job, Result, par};

use super::encode::Encoder;
use super::{BLOCK_ROWS, Input};

/// Rows that are compared, at most.
const MOST: usize = 2000;
/// Beside these few, one row in so many is compared.
const FEW: usize = 128;
const ONE_IN: usize = 256;
/// Classes by length (powers of four from 16 bytes on) and by non-ASCII share.
const LENGTHS: usize = 8;
const SHARES: usize = 4;

/// Compares fast path and library on a sample. `None` when all ids are the same, or else the first
/// row that differs, in words.
pub(super) fn disagreement(job: &Job, encoder: &Encoder, input: Input) -> Result<Option<String>> {
    let sample = sample(input, input.settings.threads)?;
    let compared = par::try_map_blocks(sample.len(), 16, input.settings.threads, |block| {
        for row in sample.get(block).unwrap_or_default() {
            job.check()?;
            // A row that cannot be read is told when it is its turn.
            let Ok((role, prompt, text)) = input.row(*row) else { continue };
            // Texts that the fast path leaves to the library need no check.
            if let Some(fast) = encoder.fast(role, prompt, text)?
                && fast != encoder.reference(role, prompt, text)?
            {
                return Ok(Some(*row));
            }
        }
        Ok(None)
    })?;
    let first = compared.into_iter().flatten().next();
    Ok(first.map(|row| format!("its ids of row {row} differ from those of the library")))
}

/// Rows to compare, ascending: the same number of each class as far as it has them, evenly spread.
fn sample(input: Input, threads: usize) -> Result<Vec<usize>> {
    let rows = input.columns.row.len();
    let wanted = MOST.min(FEW + rows / ONE_IN).min(rows);
    let classes = par::try_map_blocks(rows, 32 * BLOCK_ROWS, threads, |block| {
        block.map(|row| Ok((class(input.bytes(row)?), row))).collect::<Result<Vec<_>>>()
    })?;
    let mut of_class = vec![Vec::new(); LENGTHS * SHARES];
    for (class, row) in classes.into_iter().flatten() {
        if let Some(rows) = of_class.get_mut(class) {
            rows.push(row);
        }
    }
    // The smallest classes first: what they leave of their part goes to the others.
    of_class.retain(|rows| !rows.is_empty());
    of_class.sort_by_key(Vec::len);
    let (mut out, classes) = (Vec::with_capacity(wanted), of_class.len());
    for (i, rows) in of_class.iter().enumerate() {
        let part = (wanted - out.len()).div_ceil(classes - i).min(rows.len());
        out.extend((0..part).filter_map(|k| rows.get(k * rows.len() / part)));
    }
    out.sort_unstable();
    Ok(out)
}

fn class(text: &[u8]) -> usize {
    let other = text.iter().filter(|byte| !byte.is_ascii()).count();
    let share = match other {
        0 => 0,
        n if n * 10 < text.len() => 1,
        n if n * 2 < text.len() => 2,
        _ => 3,
    };
    let length = (text.len() / 16 + 1).ilog(4) as usize;
    length.min(LENGTHS - 1) * SHARES + share
}

#[cfg(test)]
#[path = "../../tests/common/mod.rs"]
mod common;

#[cfg(test)]
mod tests {
    use super::super::{Backend, Inputs, SHARD_BYTES, Settings};
    use super::common::{table, wordpiece};
    use super::*;
    use embkit_core::{TextShard, Texts};

    fn with_input<T>(texts: &[String], json: &str, work: impl FnOnce(Input) -> T) -> T {
        let (bytes, offsets) = table(texts);
        let rows: Vec<u64> = (0..texts.len() as u64).collect();
        let zeros = vec![0; texts.len()];
        let shards = [TextShard { bytes: &bytes, offsets: &offsets }];
        let columns = Inputs {
            texts: &shards,
            row: &rows,
            prompt: &zeros,
            role: &vec![0; texts.len()],
            source: &zeros,
            text_id: &rows,
            cluster: &rows,
        };
        let settings = Settings {
            prompts: &[String::new()],
            tokenizer_json: json,
            max_length: &[64],
            shard_bytes: SHARD_BYTES,
            threads: 2,
            backend: Backend::Auto,
            refuse_long: false,
        };
        let texts = Texts::new(columns.texts).unwrap();
        work(Input { columns: &columns, settings: &settings, texts: &texts })
    }

    /// Ten thousand short texts, and one each of some rare kinds at the end.
    fn texts() -> Vec<String> {
        let mut texts: Vec<String> = (0..10_000).map(|i| format!("tool {i}")).collect();
        texts.extend(["naïve tool".repeat(40), "中文".into(), "search ".repeat(5000), "é".into()]);
        texts
    }

    #[test]
    fn every_kind_of_text_is_in_the_sample_at_any_number_of_threads() {
        let texts = texts();
        with_input(&texts, &wordpiece(0), |input| {
            let found = sample(input, 1).unwrap();
            assert_eq!(found, sample(input, 3).unwrap());
            assert_eq!(found.len(), FEW + texts.len() / ONE_IN);
            assert!(found.ends_with(&[10_000, 10_001, 10_002, 10_003]));
            assert!(found.windows(2).all(|pair| pair[0] < pair[1]));
        });
        with_input(&texts[..5], &wordpiece(0), |input| {
            assert_eq!(sample(input, 1).unwrap(), [0, 1, 2, 3, 4]);
        });
    }

    #[test]
    fn a_wrong_fast_path_is_found_before_anything_is_written() {
        let json = wordpiece(0);
        // It differs in one rare word only, which one text of all has.
        let wrong = json.replace("\"zebra\":", "\"zebrb\":");
        assert_ne!(json, wrong);
        let mut texts = texts();
        texts[10_001] = "zebra 中文".into();
        with_input(&texts, &json, |input| {
            let encoder = |json| Encoder::new(json, &[64], Backend::Auto).unwrap();
            let mut own = encoder(&json);
            assert_eq!(disagreement(&Job::new(), &own, input).unwrap(), None);
            own.take_fast(encoder(&wrong));
            let found = disagreement(&Job::new(), &own, input).unwrap().unwrap();
            assert!(found.contains("row 10001 differ"), "{found}");
        });
    }
}
