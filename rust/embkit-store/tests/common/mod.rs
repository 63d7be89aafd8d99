//! Tokenizers and texts for tests, made from a seed.
#![allow(dead_code)] // each test file uses its own part

use serde_json::{Map, Value, json};

/// A small generator (SplitMix64): the same numbers everywhere.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

const WORDS: [&str; 12] = [
    "the", "Debian", "package", "tool", "zebra", "naïve", "中文", "search", "42", "!?", "ﬁ",
    "engine",
];

/// A text of up to `most` words, at least one.
pub fn text(rng: &mut Rng, most: u64) -> String {
    let words: Vec<&str> =
        (0..=rng.below(most)).map(|_| WORDS[rng.below(WORDS.len() as u64) as usize]).collect();
    words.join(" ")
}

/// Distinct texts as one raw shard: bytes and offsets.
pub fn table(texts: &[String]) -> (Vec<u8>, Vec<u64>) {
    let mut offsets = vec![0];
    let mut bytes = Vec::new();
    for text in texts {
        bytes.extend_from_slice(text.as_bytes());
        offsets.push(bytes.len() as u64);
    }
    (bytes, offsets)
}

/// A BERT tokenizer: special tokens 0 to 4, some words, every small letter, with a padding and a
/// truncation of its own that must not matter. `extra` more tokens make the vocabulary wide.
pub fn wordpiece(extra: usize) -> String {
    let special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];
    let mut vocab: Vec<String> = special.iter().map(|t| t.to_string()).collect();
    vocab.extend(
        ["the", "tool", "search", "##ing", "pack", "##age", "query", ":"].map(String::from),
    );
    vocab.extend(('a'..='z').chain('0'..='9').flat_map(|c| [c.to_string(), format!("##{c}")]));
    vocab.extend((0..extra).map(|i| format!("[unused{i}]")));
    vocab.push("zebra".into());
    let map: Map<String, Value> =
        vocab.iter().enumerate().map(|(i, t)| (t.clone(), json!(i))).collect();
    let added: Vec<Value> = special
        .iter()
        .enumerate()
        .map(|(i, t)| {
            json!({"id": i, "content": t, "single_word": false, "lstrip": false,
                             "rstrip": false, "normalized": false, "special": true})
        })
        .collect();
    json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 40}, "direction": "Right", "pad_to_multiple_of": null,
                    "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"},
        "added_tokens": added,
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
                       "strip_accents": null, "lowercase": true},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                       {"SpecialToken": {"id": "[SEP]", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"[CLS]": {"id": "[CLS]", "ids": [2], "tokens": ["[CLS]"]},
                               "[SEP]": {"id": "[SEP]", "ids": [3], "tokens": ["[SEP]"]}}},
        "decoder": null,
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": map},
    })
    .to_string()
}

/// A byte-level BPE tokenizer without special tokens.
pub fn bytelevel() -> String {
    // The printable stand-ins of the 256 bytes, as GPT-2 has them.
    let plain: Vec<u32> = (33..=126).chain(161..=172).chain(174..=255).collect();
    let others =
        (0..256u32).filter(|b| !plain.contains(b)).enumerate().map(|(i, _)| 256 + i as u32);
    let mut vocab: Vec<String> = plain
        .iter()
        .copied()
        .chain(others)
        .map(|c| char::from_u32(c).unwrap().to_string())
        .collect();
    let merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("e", "r"), ("Ġ", "t")];
    vocab.extend(merges.iter().map(|(a, b)| format!("{a}{b}")));
    let map: Map<String, Value> =
        vocab.iter().enumerate().map(|(i, t)| (t.clone(), json!(i))).collect();
    let merges: Vec<Value> = merges.iter().map(|(a, b)| json!([a, b])).collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": null,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                  "ignore_merges": false, "vocab": map, "merges": merges},
    })
    .to_string()
}
