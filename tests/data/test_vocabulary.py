"""The trained WordPiece is deterministic and lower-cases; named tokenizers are found or refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from embkit.data import vocabulary
from embkit.errors import CorruptError, UsageError

CORPUS = [
    f"The {a} {b} {c}s quickly over naïve Straße {i}"
    for i, (a, b, c) in enumerate(
        (a, b, c)
        for a in ("red", "blue", "broken", "shiny")
        for b in ("fox", "car", "engine", "parser")
        for c in ("jump", "compile", "link", "walk")
    )
]
_PROGRAM = """
import sys, json
from embkit.data.vocabulary import train_wordpiece
print(train_wordpiece(json.load(sys.stdin), vocab_size=300))
"""


def test_training_is_the_same_in_every_process() -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    seen = set()
    for seed in ("1", "2", "3"):
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM],
            input=json.dumps(CORPUS),
            capture_output=True,
            text=True,
            check=True,
            env={**env, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": seed},
        )
        seen.add(done.stdout)
    assert len(seen) == 1
    assert seen == {vocabulary.train_wordpiece(CORPUS, vocab_size=300) + "\n"}


def test_the_tokenizer_is_a_lower_casing_wordpiece() -> None:
    text = vocabulary.train_wordpiece(CORPUS, vocab_size=300)
    tokenizer = Tokenizer.from_str(text)
    assert tokenizer.get_vocab_size() <= 300
    assert [tokenizer.id_to_token(i) for i in range(5)] == list(vocabulary.SPECIAL)
    upper, lower = tokenizer.encode("The RED Fox"), tokenizer.encode("the red fox")
    assert upper.ids == lower.ids
    assert upper.tokens[0] == "[CLS]" and upper.tokens[-1] == "[SEP]"
    assert "[UNK]" not in upper.tokens
    assert tokenizer.encode("naïve").ids == tokenizer.encode("naive").ids
    assert tokenizer.encode("語").tokens == ["[CLS]", "[UNK]", "[SEP]"]
    model = json.loads(text)["model"]
    assert model["type"] == "WordPiece"
    # Frequent words are whole pieces: something was learned beyond the alphabet.
    assert "engine" in model["vocab"] and "quickly" in model["vocab"]


def test_canonical_json_is_a_fixed_point_without_truncation() -> None:
    text = vocabulary.train_wordpiece(CORPUS, vocab_size=300)
    assert vocabulary.canonical(text) == text
    tokenizer = Tokenizer.from_str(text)
    tokenizer.enable_truncation(7)
    tokenizer.enable_padding(length=9)
    assert vocabulary.canonical(tokenizer.to_str()) == text


def test_the_directory_loads_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    text = vocabulary.train_wordpiece(CORPUS, vocab_size=300)
    vocabulary.write(tmp_path, text, {})
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.pad_token == "[PAD]" and loaded.mask_token == "[MASK]"
    assert loaded("red engine")["input_ids"] == Tokenizer.from_str(text).encode("red engine").ids
    again, config = vocabulary.load_tokenizer(tmp_path)
    assert again == text
    assert config["cls_token"] == "[CLS]"
    assert vocabulary.load_tokenizer(loaded)[0] == text


def test_a_vocabulary_smaller_than_the_alphabet_is_refused() -> None:
    with pytest.raises(UsageError, match="too small for this corpus") as caught:
        vocabulary.train_wordpiece(CORPUS, vocab_size=20)
    assert "give at least" in str(caught.value)


def test_unknown_and_broken_tokenizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match="Unknown tokenizer 'no-such/tokenizer-of-mine'"):
        vocabulary.load_tokenizer("no-such/tokenizer-of-mine")
    with pytest.raises(UsageError, match="Unknown tokenizer"):
        vocabulary.load_tokenizer(tmp_path / "no" / "such" / "place")
    with pytest.raises(UsageError, match=r"no tokenizer\.json"):
        vocabulary.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(CorruptError, match="no tokenizer"):
        vocabulary.load_tokenizer(tmp_path)


def test_rare_characters_beyond_the_limit_become_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "_ALPHABET", 5)
    tokenizer = Tokenizer.from_str(vocabulary.train_wordpiece(["aaa bbb aab abb c"], vocab_size=30))
    assert tokenizer.encode("ab").tokens[1] != "[UNK]"
    tokenizer = Tokenizer.from_str(
        vocabulary.train_wordpiece(["eeeee ddddd aaa bbb ccc x"], vocab_size=30)
    )
    assert tokenizer.encode("x").tokens == ["[CLS]", "[UNK]", "[SEP]"]
