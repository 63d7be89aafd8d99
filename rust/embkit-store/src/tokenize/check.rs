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
