//! Texts to ids exactly as the exported model will at serving time.
//!
//! The prompt and the text are one string, special tokens are added, and what is over the limit is
//! cut the way transformers' fast tokenizers do with `truncation=True`: inside the special tokens.
//! Crate `tokenizers` says what is right; [`super::fast`] does most texts of most tokenizers, with
//! the same ids.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Mutex;

use embkit_core::{Error, Result};
use tokenizers::{PostProcessor, Tokenizer, TruncationDirection, TruncationParams};

use super::fast::{Cut, FAST, Fast, Scratch};

/// The library whose ids are right. Equals the pin in `Cargo.toml`.
pub const REFERENCE: &str = "tokenizers 0.23.2";

/// Which code makes the ids; they are the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backend {
    /// The fast path where it is exact, [`REFERENCE`] elsewhere.
    #[default]
    Auto,
    /// [`REFERENCE`] alone.
    Tokenizers,
}

impl Backend {
    /// Reads `"auto"` or `"tokenizers"`.
    pub fn parse(name: &str) -> Result<Self> {
        match name {
            "auto" => Ok(Self::Auto),
            "tokenizers" => Ok(Self::Tokenizers),
            _ => Err(Error::usage(
                format!("there is no tokenizer backend '{name}'"),
                "Use 'auto' or 'tokenizers'",
            )),
        }
    }
}

/// A tokenizer with one truncation length per role.
pub struct Encoder {
    /// One per distinct length; roles point into it.
    by_length: Vec<(u32, Tokenizer)>,
    max_length: Vec<u32>,
    direction: TruncationDirection,
    special: HashSet<u32>,
    wide: bool,
    fast: std::result::Result<Fast, String>,
    /// Scratch of threads that are not encoding now, with what their caches have learned.
    idle: Mutex<Vec<Scratch>>,
}

/// The ids of one text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// Token ids with special tokens.
    pub ids: Vec<u32>,
    /// Whether tokens were cut off.
    pub truncated: bool,
}

/// The ids of several texts.
#[derive(Clone, Debug, Default)]
pub struct Rows {
    /// Ids of all rows, one after the other.
    pub ids: Vec<u32>,
    /// Where each row ends in `ids`, and whether tokens were cut off.
    pub ends: Vec<(usize, bool)>,
}

impl Encoder {
    /// Reads a `tokenizer.json`; `max_length[role]` is the limit of a role in tokens, special
    /// tokens included. Padding settings in the file are ignored.
    ///
    /// Errors: `Corrupt` when the text is no tokenizer that the library knows, `Usage` when a
    /// limit leaves no room beside the special tokens.
    pub fn new(tokenizer_json: &str, max_length: &[u32], backend: Backend) -> Result<Self> {
        let mut tokenizer: Tokenizer =
            tokenizer_json.parse().map_err(|e: tokenizers::Error| Error::Corrupt {
                path: PathBuf::from("tokenizer.json"),
                what: format!("is not a tokenizer that {REFERENCE} reads: {e}"),
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
        let fast = match backend {
            Backend::Auto => Fast::new(&tokenizer),
            Backend::Tokenizers => Err("it was asked for".into()),
        };

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
                // that needs one above the limit, which `reference` takes off again.
                max_length: *length as usize + usize::from(added == 0),
                direction,
                ..TruncationParams::default()
            };
            own.with_truncation(Some(truncation)).map_err(|e| failed("set the truncation", &e))?;
            by_length.push((*length, own));
        }
        let wide = largest > u32::from(u16::MAX);
        let (max_length, idle) = (max_length.to_vec(), Mutex::default());
        Ok(Self { by_length, max_length, direction, special, wide, fast, idle })
    }

    /// Whether ids need 32 bits.
    pub fn wide(&self) -> bool {
        self.wide
    }

    /// What makes the ids, for a manifest.
    pub fn backend(&self) -> String {
        match &self.fast {
            Ok(_) => format!("{FAST} + {REFERENCE}"),
            Err(_) => REFERENCE.to_string(),
        }
    }

    /// Why there is no fast path, when there is none.
    pub fn slow(&self) -> Option<&str> {
        self.fast.as_ref().err().map(String::as_str)
    }

    /// Takes another tokenizer's fast path, which is wrong.
    #[cfg(test)]
    pub(super) fn take_fast(&mut self, other: Self) {
        (self.fast, self.idle) = (other.fast, other.idle); // caches hold its ids
    }

    /// Gives up the fast path.
    pub(super) fn without_fast(&mut self, reason: String) {
        self.fast = Err(reason);
    }

    /// The ids of `prompt` and `text` as one string.
    pub fn encode(&self, role: u8, prompt: &str, text: &str) -> Result<Encoded> {
        let mut rows = Rows::default();
        self.with_scratch(|scratch| self.push(role, prompt, text, scratch, &mut rows))?;
        let truncated = rows.ends.first().is_some_and(|(_, truncated)| *truncated);
        Ok(Encoded { ids: rows.ids, truncated })
    }

    /// [`Self::encode`] by the fast path alone; `None` for a text that it leaves to [`REFERENCE`].
    pub fn fast(&self, role: u8, prompt: &str, text: &str) -> Result<Option<Encoded>> {
        let (length, _) = self.of_role(role)?;
        let mut ids = Vec::new();
        let truncated = self.with_scratch(|s| self.try_fast(length, prompt, text, s, &mut ids));
        Ok(truncated.map(|truncated| Encoded { ids, truncated }))
    }

    /// [`Self::encode`] by [`REFERENCE`] alone.
    pub fn reference(&self, role: u8, prompt: &str, text: &str) -> Result<Encoded> {
        let (length, tokenizer) = self.of_role(role)?;
        // Without a prompt the text is not copied.
        let encoding = if prompt.is_empty() {
            tokenizer.encode_fast(text, true)
        } else {
            tokenizer.encode_fast([prompt, text].concat(), true)
        };
        let encoding = encoding.map_err(|e| failed("encode a text", &e))?;
        let mut ids = encoding.get_ids().to_vec();
        let above = ids.len().saturating_sub(length as usize);
        match self.direction {
            TruncationDirection::Right => ids.truncate(length as usize),
            TruncationDirection::Left => drop(ids.drain(..above)),
        }
        let truncated = above > 0 || !encoding.get_overflowing().is_empty();
        Ok(Encoded { ids, truncated })
    }

    /// Encodes several rows, each `(role, prompt, text)`, until one is an error.
    pub fn encode_rows<'a>(
        &self,
        rows: impl Iterator<Item = Result<(u8, &'a str, &'a str)>>,
    ) -> Result<Rows> {
        let mut out = Rows::default();
        self.with_scratch(|scratch| {
            for row in rows {
                let (role, prompt, text) = row?;
                self.push(role, prompt, text, scratch, &mut out)?;
            }
            Ok(())
        })?;
        Ok(out)
    }

    /// Tokens of `prompt` and `text` without any limit, special tokens included.
    pub fn full_length(&self, prompt: &str, text: &str) -> Result<usize> {
        let Some((_, tokenizer)) = self.by_length.first() else { return Ok(0) };
        let mut tokenizer = tokenizer.clone();
        tokenizer.with_truncation(None).map_err(|e| failed("set the truncation", &e))?;
        let encoding = tokenizer.encode_fast([prompt, text].concat(), true);
        Ok(encoding.map_err(|e| failed("encode a text", &e))?.len())
    }

    fn push(
        &self,
        role: u8,
        prompt: &str,
        text: &str,
        scratch: &mut Scratch,
        out: &mut Rows,
    ) -> Result<()> {
        let (length, _) = self.of_role(role)?;
        let done = self.try_fast(length, prompt, text, scratch, &mut out.ids);
        let truncated = match done {
            Some(truncated) => truncated,
            None => {
                let encoded = self.reference(role, prompt, text)?;
                out.ids.extend_from_slice(&encoded.ids);
                encoded.truncated
            }
        };
        out.ends.push((out.ids.len(), truncated));
        Ok(())
    }

    /// Appends the ids and says whether the text was cut, or leaves it to the library.
    fn try_fast(
        &self,
        length: u32,
        prompt: &str,
        text: &str,
        scratch: &mut Scratch,
        out: &mut Vec<u32>,
    ) -> Option<bool> {
        let left = matches!(self.direction, TruncationDirection::Left);
        let cut = Cut { length: length as usize, left };
        self.fast.as_ref().ok()?.encode(prompt, text, cut, scratch, out)
    }

    fn of_role(&self, role: u8) -> Result<(u32, &Tokenizer)> {
        let wanted = self.max_length.get(usize::from(role));
        let found = self.by_length.iter().find(|(length, _)| Some(length) == wanted);
        found.map(|(length, tokenizer)| (*length, tokenizer)).ok_or_else(|| {
            Error::usage(
                format!("no max_length for role {role}"),
                "Give one max_length per role: query, passage, both",
            )
        })
    }

    fn with_scratch<T>(&self, work: impl FnOnce(&mut Scratch) -> T) -> T {
        let idle = || self.idle.lock().unwrap_or_else(|e| e.into_inner());
        let mut scratch = idle().pop().unwrap_or_default();
        let out = work(&mut scratch);
        idle().push(scratch);
        out
    }

    /// Tokens of the prompt as sentence-transformers counts them: the prompt alone with its special
    /// tokens, without a special token at the end. 0 for no prompt.
    pub fn prompt_len(&self, role: u8, prompt: &str) -> Result<usize> {
        if prompt.is_empty() {
            return Ok(0);
        }
        let ids = self.reference(role, "", prompt)?.ids;
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
