//! What each character means to a tokenizer, asked of crate `tokenizers` itself.
//!
//! The tables of another library would be of another Unicode version, and every difference would be
//! a wrong id. So a page of 256 characters is made when a text first needs it, by running the
//! library's own normaliser, pre-tokenizer or regex on each character alone. The first page, which
//! holds ASCII, is always there.

use std::sync::OnceLock;

use tokenizers::utils::SysRegex;
use tokenizers::{
    Normalizer, NormalizerWrapper, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer,
    PreTokenizerWrapper,
};
use unicode_normalization::char::canonical_combining_class;

const PAGES: usize = 0x11_0000 / 256;

/// Pages made on demand.
struct Pages<T> {
    pages: Vec<OnceLock<T>>,
}

impl<T> Pages<T> {
    fn new() -> Self {
        Self { pages: (0..PAGES).map(|_| OnceLock::new()).collect() }
    }

    fn page(&self, c: char, make: impl Fn(u32) -> T) -> &T {
        let number = c as u32 / 256;
        self.pages[number as usize].get_or_init(|| make(number * 256))
    }
}

/// BERT: each character becomes some text in which a space ends a word, so that the words of a
/// text are the pieces between spaces of its characters' texts, one after the other.
pub(super) struct BertChars {
    normalizer: NormalizerWrapper,
    pre_tokenizer: PreTokenizerWrapper,
    decomposes: bool,
    /// Of each ASCII character up to 4 bytes as they lie in memory, and how many.
    pub(super) ascii: [([u8; 4], u8); 128],
    pages: Pages<BertPage>,
}

struct BertPage {
    text: String,
    /// Where each character's text ends.
    ends: [u32; 256],
    slow: [bool; 256],
}

impl BertChars {
    /// `decomposes`: the normaliser applies NFD (to strip accents). `None` when an ASCII character
    /// does not behave as it does in every known BERT.
    pub(super) fn new(
        normalizer: NormalizerWrapper,
        pre_tokenizer: PreTokenizerWrapper,
        decomposes: bool,
    ) -> Option<Self> {
        let (ascii, pages) = ([([0; 4], 0); 128], Pages::new());
        let mut chars = Self { normalizer, pre_tokenizer, decomposes, ascii, pages };
        for byte in 0..128_u8 {
            let text = chars.of(char::from(byte))?.as_bytes();
            let mut bytes = [0; 4];
            bytes.get_mut(..text.len())?.copy_from_slice(text);
            let len = text.len() as u8;
            chars.ascii[usize::from(byte)] = (bytes, len);
        }
        // The text is cut at spaces before anything else.
        (chars.ascii[usize::from(b' ')] == ([b' ', 0, 0, 0], 1)).then_some(chars)
    }

    /// The text of a character; `None` when it depends on its neighbours.
    pub(super) fn of(&self, c: char) -> Option<&str> {
        let page = self.pages.page(c, |first| self.make(first));
        let at = c as usize % 256;
        let start = if at == 0 { 0 } else { page.ends[at - 1] };
        match page.slow[at] {
            true => None,
            false => page.text.get(start as usize..page.ends[at] as usize),
        }
    }

    fn make(&self, first: u32) -> BertPage {
        let mut page = BertPage { text: String::new(), ends: [0; 256], slow: [false; 256] };
        for i in 0..256 {
            match char::from_u32(first + i as u32).and_then(|c| self.ask(c)) {
                Some(text) => page.text.push_str(&text),
                None => page.slow[i] = true,
            }
            page.ends[i] = page.text.len() as u32;
        }
        page
    }

    fn ask(&self, c: char) -> Option<String> {
        let mut normal = c.to_string().as_str().into();
        self.normalizer.normalize(&mut normal).ok()?;
        // Canonical order is the one thing that looks at neighbours: it moves characters of a
        // class other than 0. Most are accents, which are gone by now; a text with another one
        // goes to the library.
        let moves = |c| canonical_combining_class(c) != 0;
        if self.decomposes && normal.get().chars().any(moves) {
            return None;
        }
        // Between two letters, so that it shows whether it parts them.
        let mut pieces = PreTokenizedString::from(format!("a{}a", normal.get()));
        self.pre_tokenizer.pre_tokenize(&mut pieces).ok()?;
        let splits = pieces.get_splits(OffsetReferential::Normalized, OffsetType::None);
        let words: Vec<&str> = splits.into_iter().map(|(text, _, _)| text).collect();
        let text = words.join(" ");
        Some(text.strip_prefix('a')?.strip_suffix('a')?.to_string())
    }
}

/// What the splitting regexes distinguish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// `\p{L}`
    Letter,
    /// `\p{N}`
    Number,
    /// `\s`
    Space,
    /// Anything else.
    Other,
}

/// The classes of all characters.
pub(super) struct Classes {
    letter: SysRegex,
    number: SysRegex,
    space: SysRegex,
    pub(super) ascii: [Class; 128],
    pages: Pages<[Class; 256]>,
}

impl Classes {
    pub(super) fn new() -> Option<Self> {
        let regex = |pattern| SysRegex::new(pattern).ok();
        let mut classes = Self {
            letter: regex(r"\p{L}")?,
            number: regex(r"\p{N}")?,
            space: regex(r"\s")?,
            ascii: [Class::Other; 128],
            pages: Pages::new(),
        };
        classes.ascii = std::array::from_fn(|i| classes.of(char::from(i as u8)));
        Some(classes)
    }

    pub(super) fn of(&self, c: char) -> Class {
        self.pages.page(c, |first| self.make(first))[c as usize % 256]
    }

    fn make(&self, first: u32) -> [Class; 256] {
        std::array::from_fn(|i| match char::from_u32(first + i as u32) {
            Some(c) => self.ask(c.encode_utf8(&mut [0; 4])),
            None => Class::Other,
        })
    }

    fn ask(&self, text: &str) -> Class {
        let is = |regex: &SysRegex| regex.find_iter(text).next().is_some();
        match (is(&self.letter), is(&self.number), is(&self.space)) {
            (true, ..) => Class::Letter,
            (_, true, _) => Class::Number,
            (_, _, true) => Class::Space,
            _ => Class::Other,
        }
    }
}
