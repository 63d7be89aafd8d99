//! Texts to ids exactly as the exported model will at serving time.
//!
//! The prompt and the text are one string, special tokens are added, and what is over the limit is
//! cut the way transformers' fast tokenizers do with `truncation=True`: inside the special tokens.

use std::collections::HashSet;
use std::path::PathBuf;

use embkit_core::{Error, Result};
use tokenizers::{PostProcessor, Tokenizer, TruncationDirection, TruncationParams};

/// What the manifest calls the library that made the ids. Equals the pin in `Cargo.toml`.
pub const BACKEND: &str = "tokenizers 0.23.2";

/// A tokenizer with one truncation length per role.
pub struct Encoder {
    /// One per distinct length; roles point into it.
    by_length: Vec<(u32, Tokenizer)>,
    max_length: Vec<u32>,
    direction: TruncationDirection,
    special: HashSet<u32>,
    wide: bool,
}

/// The ids of one text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// Token ids with special tokens.
    pub ids: Vec<u32>,
    /// Whether tokens were cut off.
    pub truncated: bool,
}

impl Encoder {
    /// Reads a `tokenizer.json`; `max_length[role]` is the limit of a role in tokens, special
    /// tokens included. Padding settings in the file are ignored.
    ///
    /// Errors: `Corrupt` when the text is no tokenizer that this library knows, `Usage` when a
    /// limit leaves no room beside the special tokens.
    pub fn new(tokenizer_json: &str, max_length: &[u32]) -> Result<Self> {
        let mut tokenizer: Tokenizer =
            tokenizer_json.parse().map_err(|e: tokenizers::Error| Error::Corrupt {
                path: PathBuf::from("tokenizer.json"),
                what: format!("is not a tokenizer that {BACKEND} reads: {e}"),
                fix: "Save it again with `tokenizer.save_pretrained(...)` of a fast tokenizer"
                    .into(),
            })?;
        tokenizer.with_padding(None);
        let direction =
            tokenizer.get_truncation().map_or(TruncationDirection::Right, |t| t.direction);
        let added = tokenizer.get_post_processor().map_or(0, |p| p.added_tokens(false));
        let special = tokenizer
            .get_added_tokens_decoder()
            .into_iter()
            .filter_map(|(id, token)| token.special.then_some(id))
            .collect();
        let largest = tokenizer.get_vocab(true).into_values().max().unwrap_or(0);

        let mut by_length: Vec<(u32, Tokenizer)> = Vec::new();
        for length in max_length {
            if by_length.iter().any(|(l, _)| l == length) {
                continue;
            }
            if *length as usize <= added {
                return Err(Error::usage(
                    format!("max_length {length} leaves no room beside {added} special tokens"),
                    format!("Use a max_length of at least {}", added + 1),
                ));
            }
            let mut own = tokenizer.clone();
            let truncation = TruncationParams {
                // The library stops reading a text once it has the limit, and then says that
                // tokens were cut only if it has more of them than fit. Without special tokens
                // that needs one above the limit, which `encode` takes off again.
                max_length: *length as usize + usize::from(added == 0),
                direction,
                ..TruncationParams::default()
            };
            own.with_truncation(Some(truncation)).map_err(|e| failed("set the truncation", &e))?;
            by_length.push((*length, own));
        }
        let wide = largest > u32::from(u16::MAX);
        Ok(Self { by_length, max_length: max_length.to_vec(), direction, special, wide })
    }

    /// Whether ids need 32 bits.
    pub fn wide(&self) -> bool {
        self.wide
    }

    /// The ids of `prompt` and `text` as one string.
    pub fn encode(&self, role: u8, prompt: &str, text: &str) -> Result<Encoded> {
        let wanted = self.max_length.get(usize::from(role));
        let found = self.by_length.iter().find(|(l, _)| Some(l) == wanted);
        let Some((length, tokenizer)) = found else {
            return Err(Error::usage(
                format!("no max_length for role {role}"),
                "Give one max_length per role: query, passage, both",
            ));
        };
        // Without a prompt the text is not copied.
        let encoding = if prompt.is_empty() {
            tokenizer.encode_fast(text, true)
        } else {
            tokenizer.encode_fast([prompt, text].concat(), true)
        };
        let encoding = encoding.map_err(|e| failed("encode a text", &e))?;
        let mut ids = encoding.get_ids().to_vec();
        let above = ids.len().saturating_sub(*length as usize);
        match self.direction {
            TruncationDirection::Right => ids.truncate(*length as usize),
            TruncationDirection::Left => drop(ids.drain(..above)),
        }
        let truncated = above > 0 || !encoding.get_overflowing().is_empty();
        Ok(Encoded { ids, truncated })
    }

    /// Tokens of the prompt as sentence-transformers counts them: the prompt alone with its special
    /// tokens, without a special token at the end. 0 for no prompt.
    pub fn prompt_len(&self, role: u8, prompt: &str) -> Result<usize> {
        if prompt.is_empty() {
            return Ok(0);
        }
        let ids = self.encode(role, "", prompt)?.ids;
        let ends_special = ids.last().is_some_and(|id| self.special.contains(id));
        Ok(ids.len() - usize::from(ends_special))
    }
}

fn failed(what: &str, e: &tokenizers::Error) -> Error {
    Error::usage(
        format!("the tokenizer could not {what}: {e}"),
        "Check that tokenizer.json is complete (an unknown token, above all)",
    )
}
