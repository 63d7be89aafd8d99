//! The same results by the shortest code: what the tests and benches compare with.
//!
//! Oddity: these hold everything in memory and check nothing.

use embkit_core::{Error, Result};
use tokenizers::{Tokenizer, TruncationParams};
use unicode_normalization::UnicodeNormalization;

/// Distinct texts by their NFC strings, in order of first appearance, and the row of each input.
pub fn distinct(texts: &[&str]) -> (Vec<String>, Vec<u64>) {
    let (mut kept, mut keys, mut rows) = (Vec::new(), Vec::<String>::new(), Vec::new());
    for text in texts {
        let key: String = text.nfc().collect();
        let row = keys.iter().position(|k| *k == key).unwrap_or_else(|| {
            kept.push(text.to_string());
            keys.push(key);
            kept.len() - 1
        });
        rows.push(row as u64);
    }
    (kept, rows)
}

/// Encodes each (prompt + text) one after the other with the library's full `encode`.
/// `max_length` as in [`crate::tokenize::Settings`], one for all.
pub fn encode(tokenizer_json: &str, texts: &[String], max_length: usize) -> Result<Vec<Vec<u32>>> {
    let failed = |e: tokenizers::Error| Error::usage(e.to_string(), "Use a sound tokenizer");
    let mut tokenizer: Tokenizer = tokenizer_json.parse().map_err(failed)?;
    let truncation = TruncationParams { max_length, ..TruncationParams::default() };
    tokenizer.with_truncation(Some(truncation)).map_err(failed)?;
    tokenizer.with_padding(None);
    texts
        .iter()
        .map(|text| Ok(tokenizer.encode(text.as_str(), true).map_err(failed)?.get_ids().to_vec()))
        .collect()
}

/// Rows one after the other, and where each begins and the last ends.
pub fn pack(rows: &[&[u32]]) -> (Vec<i64>, Vec<i32>) {
    let (mut tokens, mut cu_seqlens) = (Vec::new(), vec![0]);
    for row in rows {
        tokens.extend(row.iter().map(|id| i64::from(*id)));
        cu_seqlens.push(tokens.len() as i32);
    }
    (tokens, cu_seqlens)
}

/// Rows of one width, filled with `pad`, and the mask of what is not filling.
pub fn pad(rows: &[&[u32]], width: usize, pad: i64) -> (Vec<i64>, Vec<u8>) {
    let (mut ids, mut mask) = (Vec::new(), Vec::new());
    for row in rows {
        for at in 0..width {
            ids.push(row.get(at).map_or(pad, |id| i64::from(*id)));
            mask.push(u8::from(at < row.len()));
        }
    }
    (ids, mask)
}
