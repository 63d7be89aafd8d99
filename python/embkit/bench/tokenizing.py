"""Rows `store.tokenize` and `store.tokenize.bpe`: text to published shards, ids as the library's.

The rivals give ids only, in memory. Ours ends on the disk with checksums, identities and raw text,
and includes the comparison of a sample that every run begins with.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from embkit import _rust
from embkit.bench import Case
from embkit.bench.corpus import digest, text_shard, texts

LENGTH = 128


def tokenize(quick: bool) -> Case:
    """BERT's WordPiece."""
    return _case("store.tokenize", word_piece(quick), quick)


def tokenize_bpe(quick: bool) -> Case:
    """GPT-2's byte-level BPE."""
    return _case("store.tokenize.bpe", byte_level(quick), quick)


def write_store(tokenizer_json: str, quick: bool, out: Path | str) -> dict[str, Any]:
    """Tokenise the corpus into ``out``; what the Rust side reports."""
    shard, row, zeros, role = _table(quick)
    return dict(
        _rust.tokenize(
            str(out), [shard], row, zeros, [""], role, zeros, row, row, tokenizer_json, [LENGTH] * 3
        )
    )


@cache
def word_piece(quick: bool) -> str:
    """A tokenizer.json trained on some of the corpus."""
    from tokenizers import BertWordPieceTokenizer

    trained = BertWordPieceTokenizer()
    trained.train_from_iterator(texts(quick)[:20_000], vocab_size=16_000, show_progress=False)
    return str(trained.to_str())


@cache
def byte_level(quick: bool) -> str:
    """A tokenizer.json trained on some of the corpus."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=32_000,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
    )
    trained.train_from_iterator(texts(quick)[:20_000], trainer)
    return str(trained.to_str())


@cache
def _table(quick: bool) -> tuple[Any, ...]:
    items = texts(quick)
    n = len(items)
    zeros = np.zeros(n, np.uint16)
    return text_shard(items), np.arange(n, dtype=np.uint64), zeros, np.full(n, 2, np.uint8)


class _Store:
    """What our way made; read only when it is compared."""

    def __init__(self, tokenizer_json: str, quick: bool) -> None:
        self.home = tempfile.TemporaryDirectory(prefix="embkit-bench-")
        write_store(tokenizer_json, quick, self.home.name)

    def ids(self) -> np.ndarray:
        store = _rust.Store(self.home.name)
        rows = np.arange(store.rows, dtype=np.uint64)
        flat = np.empty(int(store.lengths(rows).sum()), np.int64)
        store.gather(rows, flat, np.empty(len(rows) + 1, np.int32))
        return flat


def _case(name: str, tokenizer_json: str, quick: bool) -> Case:
    items = list(texts(quick))
    _table(quick)  # built before anything is timed

    def hugging_face() -> np.ndarray:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(tokenizer_json)
        tokenizer.enable_truncation(LENGTH)
        tokenizer.no_padding()
        # The library's own switch for one thread.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        ids: list[np.ndarray] = []
        # In batches: all encodings at once would be gigabytes, and mostly page faults.
        for start in range(0, len(items), 1000):
            done = tokenizer.encode_batch_fast(items[start : start + 1000])
            ids.extend(np.asarray(e.ids, np.int32) for e in done)
        return np.concatenate(ids)

    def check(ours: _Store, theirs: np.ndarray) -> None:
        np.testing.assert_array_equal(ours.ids(), theirs)

    rivals: dict[str, Any] = {"HF tokenizers": hugging_face}
    skipped = {}
    try:
        rivals["tokie, ids only"] = _tokie(tokenizer_json, items)
    except ImportError as error:
        skipped["tokie"] = str(error)
    return Case(
        name=name,
        unit="MB/s",
        work=sum(len(t.encode()) for t in items) / 1e6,
        ours=lambda: _Store(tokenizer_json, quick),
        rivals=rivals,
        check=check,
        floor="15x HF tokenizers, 1x tokie",
        goal="45 MB/s",
        facts={
            "n": len(items),
            "data": digest(text_shard(tuple(items))[0]),
            "backend": write_store_backend(tokenizer_json, quick),
        },
        skipped=skipped,
    )


def write_store_backend(tokenizer_json: str, quick: bool) -> str:
    """What makes the ids of this tokenizer on the corpus."""
    with tempfile.TemporaryDirectory(prefix="embkit-bench-") as out:
        return str(write_store(tokenizer_json, quick, out)["backend"])


def _tokie(tokenizer_json: str, items: list[str]) -> Any:
    """Tokie's flat interface: ids of all texts in one array, and where each begins.

    Raises:
        ImportError: not installed.
    """
    tokie: Any = importlib.import_module("tokie")
    with tempfile.TemporaryDirectory(prefix="embkit-bench-") as home:
        path = Path(home) / "tokenizer.json"
        path.write_text(tokenizer_json, encoding="utf-8")
        tokenizer = tokie.Tokenizer.from_json(str(path))
    tokenizer.enable_truncation(max_length=LENGTH)
    return lambda: np.asarray(tokenizer.encode_batch_flat(items)[0])
