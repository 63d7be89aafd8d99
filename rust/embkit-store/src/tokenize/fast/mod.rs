//! The fast path: BERT's WordPiece and byte-level BPE with exactly the ids of crate `tokenizers`.
//!
//! [`Fast::new`] knows a tokenizer by its parts, or says what it does not know. [`Fast::encode`]
//! says of each text whether it is inside of what is exact here; the library does the others. What
//! characters mean is asked of the library ([`chars`]); merges and matches follow from the
//! vocabulary alone, one way; and a sample of every input is compared before it is used
//! (`check.rs`), so that an error in here costs time and never an id.
//!
//! Oddity: positions in this folder are its own, never a file's, so they index.
#![allow(clippy::indexing_slicing)]

mod bpe;
mod chars;
mod split;
mod table;
mod wordpiece;

use std::collections::HashMap;

use aho_corasick::AhoCorasick;
use serde_json::Value;
use tokenizers::{Model, NormalizedString, Normalizer, NormalizerWrapper, Tokenizer};
use unicode_normalization::{IsNormalized, is_nfc_quick};

use bpe::Bpe;
use chars::{BertChars, Classes};
use split::{GPT2, LLAMA3, Pattern, QWEN2};
use table::{Cache, Ids, PADDING};
use wordpiece::WordPiece;

/// What a manifest calls this code. The number goes up when it is changed.
pub const FAST: &str = "embkit fast path 1";

/// A tokenizer of a known kind.
pub(super) struct Fast {
    kind: Kind,
    /// Finds added tokens ("[MASK]"), which the library cuts out of a text before all else.
    added: Option<AhoCorasick>,
    /// Ids that the post-processor puts before and behind.
    before: Vec<u32>,
    after: Vec<u32>,
}

enum Kind {
    WordPiece(Box<WordPiece>),
    Bpe { bpe: Box<Bpe>, nfc: bool, space: bool },
}

/// What one thread needs beside: buffers and the cache of pieces.
#[derive(Default)]
pub(super) struct Scratch {
    text: String,
    buffer: Vec<u8>,
    cache: Cache,
    ids: Ids,
}

/// Where a text is cut.
#[derive(Clone, Copy)]
pub(super) struct Cut {
    /// Most ids, those of the post-processor included.
    pub(super) length: usize,
    /// Whether the beginning is cut off instead of the end.
    pub(super) left: bool,
}

impl Fast {
    /// The fast form of a tokenizer, or why there is none.
    pub(super) fn new(tokenizer: &Tokenizer) -> Result<Self, String> {
        let normalizer = serde_json::to_value(tokenizer.get_normalizer()).unwrap_or_default();
        let pre = serde_json::to_value(tokenizer.get_pre_tokenizer()).unwrap_or_default();
        let mut model = serde_json::to_value(tokenizer.get_model()).unwrap_or_default();
        let post = serde_json::to_value(tokenizer.get_post_processor()).unwrap_or_default();
        let (before, after) =
            template(&post).ok_or_else(|| format!("the post-processor {}", kind(&post)))?;
        let name = kind(&model).to_string();
        let kind = match name.as_str() {
            "WordPiece" => {
                Kind::WordPiece(Box::new(word_piece(tokenizer, &normalizer, &pre, &model)?))
            }
            "BPE" => byte_level(tokenizer, &normalizer, &pre, &mut model)?,
            other => return Err(format!("the model {other}")),
        };
        Ok(Self { kind, added: added(tokenizer)?, before, after })
    }

    /// Appends the ids of `prompt` and `text` as one string; whether some were cut off. `None`
    /// when this text is for the library, with nothing appended.
    pub(super) fn encode(
        &self,
        prompt: &str,
        text: &str,
        cut: Cut,
        scratch: &mut Scratch,
        out: &mut Vec<u32>,
    ) -> Option<bool> {
        let Scratch { text: joined, buffer, cache, ids } = scratch;
        if prompt.is_empty() && text.is_empty() {
            return None;
        }
        let whole = match (&self.kind, prompt) {
            (Kind::WordPiece(_), "") => text,
            (kind, _) => {
                joined.clear();
                let first = if prompt.is_empty() { text } else { prompt };
                if matches!(kind, Kind::Bpe { space: true, .. }) && !first.starts_with(' ') {
                    joined.push(' ');
                }
                joined.push_str(prompt);
                joined.push_str(text);
                let len = joined.len();
                joined.extend(std::iter::repeat_n('\0', PADDING));
                &joined[..len]
            }
        };
        if self.added.as_ref().is_some_and(|added| added.is_match(whole)) {
            return None;
        }
        ids.clear();
        let room = cut.length.saturating_sub(self.before.len() + self.after.len());
        let stop = if cut.left { usize::MAX - 1 } else { room };
        let done = match &self.kind {
            Kind::WordPiece(model) => model.encode(whole, stop, buffer, cache, ids),
            Kind::Bpe { nfc, .. } if *nfc && !is_nfc(whole) => false,
            Kind::Bpe { bpe, .. } => bpe.encode(whole, stop, joined.as_bytes(), cache, ids),
        };
        if !done {
            return None;
        }
        let ids = ids.as_slice();
        let above = ids.len().saturating_sub(room);
        out.extend_from_slice(&self.before);
        out.extend_from_slice(if cut.left { &ids[above..] } else { &ids[..ids.len() - above] });
        out.extend_from_slice(&self.after);
        Some(above > 0)
    }
}

/// Whether NFC leaves the text as it is, for certain.
fn is_nfc(text: &str) -> bool {
    text.is_ascii() || is_nfc_quick(text.chars()) == IsNormalized::Yes
}

/// The `type` of a part, or "none".
fn kind(part: &Value) -> &str {
    part["type"].as_str().unwrap_or("none")
}

fn word_piece(
    tokenizer: &Tokenizer,
    normalizer: &Value,
    pre: &Value,
    model: &Value,
) -> Result<WordPiece, String> {
    let (Some(own), "BertNormalizer") = (tokenizer.get_normalizer(), kind(normalizer)) else {
        return Err(format!("the normaliser {} with WordPiece", kind(normalizer)));
    };
    let (Some(cutter), "BertPreTokenizer") = (tokenizer.get_pre_tokenizer(), kind(pre)) else {
        return Err(format!("the pre-tokenizer {} with WordPiece", kind(pre)));
    };
    let lower = normalizer["lowercase"].as_bool().unwrap_or(true);
    let strips = normalizer["strip_accents"].as_bool().unwrap_or(lower);
    let chars = BertChars::new(own.clone(), cutter.clone(), strips)
        .ok_or("a BERT that reads ASCII in another way")?;
    let vocab = tokenizer.get_model().get_vocab();
    let unknown = model["unk_token"].as_str().and_then(|token| vocab.get(token));
    let unknown = *unknown.ok_or("a vocabulary without the unknown token")?;
    let prefix = model["continuing_subword_prefix"].as_str().ok_or("no prefix of subwords")?;
    let most = model["max_input_chars_per_word"].as_u64().ok_or("no limit to a word")?;
    Ok(WordPiece::new(chars, &vocab, prefix, unknown, most as usize))
}

fn byte_level(
    tokenizer: &Tokenizer,
    normalizer: &Value,
    pre: &Value,
    model: &mut Value,
) -> Result<Kind, String> {
    let nfc = match kind(normalizer) {
        "none" => false,
        "NFC" => true,
        other => return Err(format!("the normaliser {other} with BPE")),
    };
    let (pattern, space) =
        pattern(pre).ok_or_else(|| format!("the pre-tokenizer {} with BPE", kind(pre)))?;
    let off = |field: &str| matches!(&model[field], Value::Null | Value::Bool(false));
    let empty = |field: &str| model[field].as_str().is_none_or(str::is_empty);
    let none = model["dropout"].as_f64().is_none_or(|dropout| dropout == 0.0);
    let plain = ["continuing_subword_prefix", "end_of_word_suffix"].into_iter().all(empty);
    if !(none && plain && off("byte_fallback")) {
        return Err("a BPE with dropout, affixes or byte fallback".into());
    }
    let whole = !off("ignore_merges");
    let merges: Vec<(String, String)> = serde_json::from_value(model["merges"].take())
        .map_err(|e| format!("merges of another form ({e})"))?;
    let vocab = tokenizer.get_model().get_vocab();
    let bpe = Classes::new()
        .and_then(|classes| Bpe::new(classes, pattern, &vocab, &merges, whole))
        .ok_or("a BPE whose vocabulary lacks bytes or repeats ids")?;
    Ok(Kind::Bpe { bpe: Box::new(bpe), nfc, space })
}

/// How a pre-tokenizer cuts, and whether it puts a space in front.
fn pattern(pre: &Value) -> Option<(Pattern, bool)> {
    let is = |part: &Value, field: &str, value: bool| part[field].as_bool() == Some(value);
    let level = |part: &Value, regex| kind(part) == "ByteLevel" && is(part, "use_regex", regex);
    if level(pre, true) {
        return Some((Pattern::Gpt2 { digits: false }, is(pre, "add_prefix_space", true)));
    }
    let parts = pre["pretokenizers"].as_array().filter(|_| kind(pre) == "Sequence")?;
    let [first, last] = parts.as_slice() else { return None };
    if !is(last, "add_prefix_space", false) {
        return None;
    }
    if kind(first) == "Digits" && is(first, "individual_digits", true) && level(last, true) {
        return Some((Pattern::Gpt2 { digits: true }, false));
    }
    let isolated = first["behavior"].as_str() == Some("Isolated") && is(first, "invert", false);
    if kind(first) != "Split" || !isolated || !level(last, false) {
        return None;
    }
    match first["pattern"]["Regex"].as_str()? {
        GPT2 => Some((Pattern::Gpt2 { digits: false }, false)),
        LLAMA3 => Some((Pattern::Llama3 { digits: 3 }, false)),
        QWEN2 => Some((Pattern::Llama3 { digits: 1 }, false)),
        _ => None,
    }
}

/// The ids before and behind a single text.
fn template(post: &Value) -> Option<(Vec<u32>, Vec<u32>)> {
    let id = |value: &Value| u32::try_from(value.as_u64()?).ok();
    match kind(post) {
        "none" | "ByteLevel" => Some((Vec::new(), Vec::new())),
        "BertProcessing" | "RobertaProcessing" => {
            Some((vec![id(&post["cls"][1])?], vec![id(&post["sep"][1])?]))
        }
        "TemplateProcessing" => {
            let mut sides = [Vec::new(), Vec::new()];
            let mut texts = 0;
            for part in post["single"].as_array()? {
                if let Some(token) = part["SpecialToken"]["id"].as_str() {
                    for value in post["special_tokens"][token]["ids"].as_array()? {
                        sides.get_mut(texts)?.push(id(value)?);
                    }
                } else {
                    texts += 1;
                }
            }
            let [before, after] = sides;
            (texts == 1).then_some((before, after))
        }
        "Sequence" => {
            let parts = post["processors"].as_array()?.iter();
            let mut adding = parts.filter(|part| kind(part) != "ByteLevel");
            match (adding.next(), adding.next()) {
                (None, _) => Some((Vec::new(), Vec::new())),
                (Some(part), None) if kind(part) != "Sequence" => template(part),
                _ => None,
            }
        }
        _ => None,
    }
}

/// What finds an added token in a text.
fn added(tokenizer: &Tokenizer) -> Result<Option<AhoCorasick>, String> {
    let tokens: HashMap<u32, _> = tokenizer.get_added_tokens_decoder().into_iter().collect();
    let normalizer = tokenizer.get_normalizer();
    // A text may become its normal form only by NFC, of which the fast path takes none that changes.
    let other = normalizer.is_some_and(|n| !matches!(n, NormalizerWrapper::NFC(_)));
    for token in tokens.values().filter(|token| token.normalized) {
        let mut normal = NormalizedString::from(token.content.as_str());
        let done = normalizer.map_or(Ok(()), |n| n.normalize(&mut normal));
        if other || done.is_err() || normal.get() != token.content {
            return Err(format!("the added token {:?}, which is normalised", token.content));
        }
    }
    let contents: Vec<&str> =
        tokens.values().map(|t| t.content.as_str()).filter(|t| !t.is_empty()).collect();
    if contents.is_empty() {
        return Ok(None);
    }
    AhoCorasick::new(contents).map(Some).map_err(|e| format!("its added tokens ({e})"))
}
