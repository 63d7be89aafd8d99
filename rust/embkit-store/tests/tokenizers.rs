//! The fast path against crate `tokenizers`, differentially: tokenizers of every known kind, texts
//! of every kind that could tell them apart, and characters of every block. EMBKIT_TEST_FULL=1 takes
//! ten times as many.

mod common;

use common::{Rng, bytelevel, wordpiece};
use embkit_store::tokenize::{Backend, Encoder};
use serde_json::{Map, Value, json};

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

fn full() -> bool {
    std::env::var_os("EMBKIT_TEST_FULL").is_some_and(|v| v == "1")
}

/// Pieces whose neighbours matter to some tokenizer.
const PIECES: &[&str] = &[
    " ",
    "  ",
    "\t",
    "\n",
    "\r\n",
    "\n\n",
    " \n ",
    "\u{a0}",
    "\u{3000}",
    "\u{2028}",
    "\u{85}",
    "\u{0}",
    "\u{7}",
    "\u{7f}",
    "\u{ad}",
    "\u{200b}",
    "\u{200d}",
    "\u{feff}",
    "\u{fffd}",
    "'",
    "'s",
    "'S",
    "'ſ",
    "'re",
    "'LL",
    "'vE",
    "’s",
    "it's",
    "a",
    "the",
    "The",
    "THE",
    "tool",
    "search",
    "searching",
    "packaging",
    "zebra",
    "x",
    "qqqq",
    "1",
    "12",
    "1234",
    "½",
    "²",
    "٣",
    "Ⅷ",
    "一",
    "中文",
    "漢字かな",
    "한국어",
    "ㅎㅏ",
    "é",
    "e\u{301}",
    "a\u{323}\u{307}",
    "a\u{307}\u{323}",
    "Å",
    "\u{212b}",
    "ﬁ",
    "ß",
    "İ",
    "ı",
    "Σς",
    "ς",
    "ǅ",
    "हिन्दी",
    "ไทย",
    "עִברִית",
    "العَرَبِيَّة",
    "\u{302e}",
    "\u{1d165}",
    "👩\u{200d}👩\u{200d}👧",
    "🇩🇪",
    "👍🏽",
    "!",
    "?!",
    "...",
    "#",
    "##ing",
    "-",
    "--",
    "_",
    "a_b",
    "[MASK]",
    "[mask]",
    "[ MASK ]",
    "<|end|>",
    "[CLS]",
    "$",
    "+",
    "^",
    "`",
    "|",
    "~",
    "€",
    "«",
    "\u{e000}",
    "\u{10ffff}",
    "\u{378}",
    "𝒳",
    "query: ",
    "passage: ",
    "Ġ",
    "ĠĠ",
    "▁",
];

fn text(rng: &mut Rng, most: u64) -> String {
    let mut out = String::new();
    for _ in 0..rng.below(most + 1) {
        match rng.below(8) {
            0 => out.extend(char::from_u32(rng.below(0x3000) as u32)),
            1 => out.extend(char::from_u32(rng.below(0x11_0000) as u32)),
            2 => {
                let (c, n) = ([' ', 'a', '\'', '中', '1', '\n', '-'], 1 + rng.below(140));
                out.extend(std::iter::repeat_n(c[rng.below(7) as usize], n as usize));
            }
            _ => out.push_str(PIECES[rng.below(PIECES.len() as u64) as usize]),
        }
        if rng.below(3) == 0 {
            out.push(' ');
        }
    }
    out
}

/// A BERT with these flags of its normaliser.
fn bert(clean: bool, chinese: bool, accents: Value, lower: bool) -> String {
    let mut json: Value = serde_json::from_str(&wordpiece(0)).unwrap();
    json["normalizer"] = json!({"type": "BertNormalizer", "clean_text": clean,
        "handle_chinese_chars": chinese, "strip_accents": accents, "lowercase": lower});
    let vocab = json["model"]["vocab"].as_object_mut().unwrap();
    let more = [
        "中", "文", "##文", "é", "##é", "क", "##्", "İ", "i̇", "ss", "!", "'", "-", "Ab", "##Z",
        "ᄒ", "##ᅡ",
    ];
    for piece in more {
        let id = vocab.len();
        vocab.insert(piece.into(), json!(id));
    }
    json["model"]["max_input_chars_per_word"] = json!(20);
    json.to_string()
}

/// A byte-level BPE whose merges are learned from nothing but chance: many, of many bytes.
fn bpe(pre: Value, whole: bool, added: bool, normalizer: Value) -> String {
    let mut json: Value = serde_json::from_str(&bytelevel()).unwrap();
    let mut vocab: Vec<(String, u64)> = json["model"]["vocab"]
        .as_object()
        .unwrap()
        .iter()
        .map(|(piece, id)| (piece.clone(), id.as_u64().unwrap()))
        .collect();
    vocab.sort_by_key(|(_, id)| *id);
    let mut pieces: Vec<String> = vocab.into_iter().map(|(piece, _)| piece).collect();
    let mut merges: Vec<[String; 2]> =
        serde_json::from_value(json["model"]["merges"].clone()).unwrap();
    let mut rng = Rng(3);
    let often: Vec<char> = "Ġatehesrcokig-1'äĊ¸¶æĠĠ".chars().collect();
    let pick = |rng: &mut Rng, pieces: &[String]| match rng.below(2) {
        0 => often[rng.below(often.len() as u64) as usize].to_string(),
        _ => pieces[256 + rng.below(pieces.len() as u64 - 256) as usize].clone(),
    };
    while merges.len() < 1500 {
        let (a, b) = (pick(&mut rng, &pieces), pick(&mut rng, &pieces));
        let pair = [a, b];
        if pair.concat().chars().count() > 12 || merges.contains(&pair) {
            continue;
        }
        if !pieces.contains(&pair.concat()) {
            pieces.push(pair.concat());
        }
        merges.push(pair);
    }
    // No UTF-8 has this byte, and real vocabularies leave it out.
    let unused = pieces.iter().position(|piece| piece == "ÿ").unwrap();
    pieces[unused] = "in place of a byte".into();
    // In the vocabulary, but no merge makes it: `ignore_merges` takes it.
    pieces.push("Ġzebra".into());
    let vocab: Map<String, Value> =
        pieces.iter().zip(0..).map(|(piece, id)| (piece.clone(), json!(id))).collect();
    if added {
        let of = |token: &str, id: usize, normalized: bool| {
            json!({"id": id, "content": token, "single_word": false, "lstrip": false,
                   "rstrip": true, "normalized": normalized, "special": !normalized})
        };
        let n = vocab.len();
        json["added_tokens"] = json!([of("<|end|>", n, false), of("\n\n", n + 1, true)]);
        json["post_processor"] = json!({"type": "Sequence", "processors": [
            {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true},
            {"type": "TemplateProcessing",
             "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|end|>", "type_id": 0}}],
             "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
             "special_tokens": {"<|end|>": {"id": "<|end|>", "ids": [n], "tokens": ["<|end|>"]}}}]});
    }
    json["model"]["vocab"] = Value::Object(vocab);
    json["model"]["merges"] = json!(merges);
    json["model"]["ignore_merges"] = json!(whole);
    json["pre_tokenizer"] = pre;
    json["normalizer"] = normalizer;
    json.to_string()
}

fn level(prefix: bool, regex: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": true, "use_regex": regex})
}

fn after(first: Value, regex: bool) -> Value {
    json!({"type": "Sequence", "pretokenizers": [first, level(false, regex)]})
}

fn split(pattern: &str) -> Value {
    json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false})
}

/// Every kind that the fast path knows.
fn known() -> Vec<(String, String)> {
    let mut out = Vec::new();
    for flags in 0..24 {
        let (clean, chinese, lower) = (flags & 1 > 0, flags & 2 > 0, flags & 4 > 0);
        let accents = [Value::Null, json!(true), json!(false)][flags / 8].clone();
        let name = format!("bert clean={clean} chinese={chinese} accents={accents} lower={lower}");
        out.push((name, bert(clean, chinese, accents, lower)));
    }
    let digits = json!({"type": "Digits", "individual_digits": true});
    let qwen = LLAMA3.replace("{1,3}", "");
    for (name, json) in [
        ("gpt2", bpe(level(false, true), false, false, Value::Null)),
        ("gpt2 with a space", bpe(level(true, true), false, true, Value::Null)),
        ("gpt2 nfc", bpe(level(false, true), false, true, json!({"type": "NFC"}))),
        ("smollm", bpe(after(digits, true), false, true, Value::Null)),
        ("llama3", bpe(after(split(LLAMA3), false), true, true, Value::Null)),
        ("qwen2", bpe(after(split(&qwen), false), false, false, json!({"type": "NFC"}))),
    ] {
        out.push((name.into(), json));
    }
    out
}

fn cut_left(json: &str) -> String {
    let mut json: Value = serde_json::from_str(json).unwrap();
    json["truncation"] =
        json!({"direction": "Left", "max_length": 3, "strategy": "LongestFirst", "stride": 0});
    json.to_string()
}

/// Whether the fast path took the text, which it may not always, with the library's ids.
fn same(name: &str, encoder: &Encoder, role: u8, prompt: &str, text: &str) -> bool {
    let right = encoder.reference(role, prompt, text).unwrap();
    let fast = encoder.fast(role, prompt, text).unwrap();
    let took = fast.is_some();
    let got = fast.unwrap_or_else(|| encoder.encode(role, prompt, text).unwrap());
    assert_eq!(got, right, "{name}, role {role}, {prompt:?} + {text:?}");
    took
}

#[test]
fn the_same_ids_on_texts_of_every_kind() {
    let texts = if full() { 900 } else { 90 };
    let limits: Vec<u32> = (3..12).chain([40, 100_000]).collect();
    for (name, json) in known() {
        let mut fast = 0;
        for json in [json.clone(), cut_left(&json)] {
            let encoder = Encoder::new(&json, &limits, Backend::Auto).unwrap();
            assert_eq!(encoder.slow(), None, "{name}");
            let mut rng = Rng(17);
            for i in 0..texts {
                let prompt = ["", "", "query: ", "é", " ", "[MA"][rng.below(6) as usize];
                let text = text(&mut rng, [3, 10, 40][i % 3]);
                let role = rng.below(limits.len() as u64) as u8;
                let took = same(&name, &encoder, role, prompt, &text);
                fast += usize::from(took && !text.is_empty());
            }
        }
        // Else nothing is compared. Half of these texts have an accent that may move or no NFC.
        assert!(fast * 4 > texts * 2, "{name}: {fast} of {texts} texts took the fast path");
    }
}

#[test]
fn the_same_ids_on_every_character() {
    for (i, (name, json)) in known().into_iter().enumerate() {
        let encoder = Encoder::new(&json, &[100_000], Backend::Auto).unwrap();
        let (mut c, mut all, mut fast) = (i as u32, 0, 0);
        while c < 0x11_0000 {
            if let Some(c) = char::from_u32(c) {
                let text = format!("ab{c}c '{c} 1{c}2 {c}{c} \n{c}x!{c}");
                fast += usize::from(same(&name, &encoder, 0, "", &text));
                same(&name, &encoder, 0, "", &format!("{c}\u{301}{c}\u{323}{c}"));
                all += 1;
            }
            // More where the letters are.
            c += match c {
                _ if full() => 29,
                0..0x3100 => 97,
                0x3100..0x2_0000 => 1009,
                _ => 60_013,
            };
        }
        assert!(fast * 10 > all * 9, "{name}: {fast} of {all} characters took the fast path");
    }
}

/// Words, documents and characters without any end to them.
#[test]
fn the_same_ids_on_long_texts() {
    let n = if full() { 300_000 } else { 5_000 };
    let mut rng = Rng(1);
    let letters: String = (0..n).map(|_| (b'a' + rng.below(6) as u8) as char).collect();
    let (a, zh, line) = ("a".repeat(n), "中".repeat(n / 3), "-".repeat(n));
    let long = [a, letters, zh, " ".repeat(n), line, text(&mut rng, n as u64 / 20)];
    for (name, json) in known().into_iter().skip(7).step_by(4) {
        let encoder = Encoder::new(&json, &[100_000, 50], Backend::Auto).unwrap();
        for text in &long {
            for role in 0..2 {
                same(&name, &encoder, role, "q: ", text);
            }
        }
    }
}

/// What the fast path does not know goes to the library, whole, and says why.
#[test]
fn other_tokenizers_are_left_to_the_library() {
    let (bert, level) = (wordpiece(0), bytelevel());
    let with = |json: &str, at: &str, value: Value| {
        let mut json: Value = serde_json::from_str(json).unwrap();
        *json.pointer_mut(at).unwrap() = value;
        json.to_string()
    };
    let added = json!([{"id": 0, "content": "Pack", "single_word": false, "lstrip": false,
                        "rstrip": false, "normalized": true, "special": false}]);
    for (json, word) in [
        (with(&bert, "/normalizer", json!({"type": "Lowercase"})), "normaliser Lowercase"),
        (with(&bert, "/pre_tokenizer", json!({"type": "Whitespace"})), "pre-tokenizer Whitespace"),
        (with(&bert, "/added_tokens", added), "added token"),
        (with(&level, "/normalizer", json!({"type": "NFKC"})), "normaliser NFKC"),
        (with(&level, "/pre_tokenizer", split(r"\w+|\W+")), "pre-tokenizer Split"),
        (with(&level, "/pre_tokenizer", Value::Null), "pre-tokenizer none"),
        (with(&level, "/model/dropout", json!(0.5)), "dropout"),
        (with(&level, "/model/unk_token", json!("x")).replace("\"Ā\":", "\"Āx\":"), "lacks bytes"),
    ] {
        let encoder = Encoder::new(&json, &[20], Backend::Auto).unwrap();
        let why = encoder.slow().unwrap_or_default();
        assert!(why.contains(word), "{why:?} does not name {word:?}");
        assert_eq!(encoder.backend(), "tokenizers 0.23.2");
    }
    let forced = Encoder::new(&bert, &[20], Backend::Tokenizers).unwrap();
    assert_eq!(forced.backend(), "tokenizers 0.23.2");
    let fast = Encoder::new(&bert, &[20], Backend::Auto).unwrap();
    assert_eq!(fast.backend(), "embkit fast path 1 + tokenizers 0.23.2");
    assert!(Backend::parse("tokie").is_err());
}
