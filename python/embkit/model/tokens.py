"""Text to token ids outside the store: for encoding, evaluation and export.

A wrapper around one ``tokenizers.Tokenizer`` whose own truncation and padding are switched off, so
that the same tokenizer.json has one fingerprint wherever it was saved. Ids travel as one flat array
with offsets, as in the store; padding happens per micro-batch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from embkit.errors import CorruptError, UsageError

# Special tokens by their usual spellings, for tokenizers that come without a config.
_SPELLINGS = {
    "pad_token": ("[PAD]", "<pad>", "<|endoftext|>"),
    "unk_token": ("[UNK]", "<unk>"),
    "cls_token": ("[CLS]", "<s>"),
    "sep_token": ("[SEP]", "</s>"),
    "mask_token": ("[MASK]", "<mask>"),
}
# Fields of a tokenizer_config.json that transformers 4 and 5 both understand.
_PORTABLE = (
    "add_prefix_space", "bos_token", "clean_up_tokenization_spaces", "cls_token", "do_lower_case",
    "eos_token", "mask_token", "model_input_names", "pad_token", "padding_side", "sep_token",
    "strip_accents", "tokenize_chinese_chars", "tokenizer_class", "truncation_side", "unk_token",
)  # fmt: skip


class TextTokenizer:
    """A tokenizer that gives flat ids and knows its padding id and fingerprint.

    Args:
        tokenizer: any ``tokenizers.Tokenizer``; copied, never changed.
        config: the content of its tokenizer_config.json, when there is one.
    """

    def __init__(self, tokenizer: Tokenizer, config: dict[str, Any] | None = None) -> None:
        plain = json.loads(tokenizer.to_str())
        plain["truncation"] = plain["padding"] = None
        self.json = json.dumps(plain, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        self._plain = Tokenizer.from_str(self.json)
        self._by_length: dict[int, Tokenizer] = {}
        self.config = _portable_config(config or {}, self._plain)
        pad = self.config.get("pad_token")
        self.pad_id: int = (self._plain.token_to_id(pad) if pad else None) or 0

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return int(self._plain.get_vocab_size(with_added_tokens=True))

    @property
    def fingerprint(self) -> str:
        """Hex BLAKE3 of the canonical tokenizer.json without truncation and padding."""
        from embkit import _rust

        return _rust.blake3(self.json.encode())

    def lower_cased(self) -> TextTokenizer:
        """The same behind a lower-casing of the text, unless it does that by itself."""
        if self._plain.normalizer and self._plain.normalizer.normalize_str("A") == "a":
            return self
        plain = json.loads(self.json)
        own = plain.get("normalizer")
        parts = [{"type": "Lowercase"}, *([own] if own else [])]
        plain["normalizer"] = {"type": "Sequence", "normalizers": parts}
        return TextTokenizer(Tokenizer.from_str(json.dumps(plain)), self.config)

    def __deepcopy__(self, memo: dict[int, Any]) -> TextTokenizer:
        return self  # nothing in it changes; copies of an encoder share it

    def ids(self, texts: Sequence[str], *, max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokenise texts, special tokens included, truncated on the right.

        Args:
            texts: n strings, prompts already in front.
            max_length: tokens a text keeps, special tokens included.

        Returns:
            Flat ids int64 [T] and offsets int64 [n + 1].
        """
        tokenizer = self._by_length.get(max_length)
        if tokenizer is None:
            tokenizer = Tokenizer.from_str(self.json)
            tokenizer.enable_truncation(max_length)
            self._by_length[max_length] = tokenizer
        rows = [e.ids for e in tokenizer.encode_batch_fast([str(t).strip() for t in texts])]
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(r) for r in rows], out=offsets[1:])
        flat = np.fromiter((i for row in rows for i in row), np.int64, count=int(offsets[-1]))
        return flat, offsets

    def prompt_length(self, prompt: str) -> int:
        """Tokens that a prompt puts in front of a text, BOS or CLS included.

        Counted as sentence-transformers does: tokenise the prompt alone and leave out a closing
        special token.
        """
        if not prompt:
            return 0
        encoding = self._plain.encode(prompt)
        closing = bool(encoding.special_tokens_mask) and encoding.special_tokens_mask[-1] == 1
        return len(encoding.ids) - int(closing)


def pad(
    flat: np.ndarray, offsets: np.ndarray, rows: np.ndarray, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Padded ids and mask, int64 [b, L], of some rows of a flat array."""
    start = offsets[rows]
    lengths = offsets[rows + 1] - start
    width = max(int(lengths.max(initial=0)), 1)
    column = np.arange(width)
    mask = column < lengths[:, None]
    at = np.where(mask, start[:, None] + column, 0)
    ids = np.where(mask, flat[at] if len(flat) else 0, pad_id)
    return ids, mask.astype(np.int64)


def load_tokenizer(source: Any) -> TextTokenizer:
    """A tokenizer from whatever names one.

    Args:
        source: a TextTokenizer, a ``tokenizers.Tokenizer``, a transformers fast tokenizer, a
            tokenizer.json, or a directory that holds one (tokenizer_config.json is read if there).

    Raises:
        UsageError: no such file, or no tokenizer.json in the directory.
        CorruptError: the file is no tokenizer.
    """
    if isinstance(source, TextTokenizer):
        return source
    if isinstance(source, Tokenizer):
        return TextTokenizer(source)
    backend = getattr(source, "backend_tokenizer", None)
    if isinstance(backend, Tokenizer):
        return TextTokenizer(backend, {k: v for k, v in source.init_kwargs.items()})
    path = Path(source)
    if path.is_dir() and not (path / "tokenizer.json").is_file():
        raise UsageError(
            "The directory has no tokenizer.json.",
            where=path,
            fix="save a fast tokenizer there: AutoTokenizer.from_pretrained(...)"
            ".save_pretrained(DIR)",
        )
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise UsageError(
            "No such tokenizer.", where=path, fix="give a directory or a tokenizer.json"
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the tokenizers package raises bare Exception
        raise CorruptError(
            f"This file is no tokenizer: {error}", where=file, fix="copy or train it again"
        ) from error
    config = file.with_name("tokenizer_config.json")
    return TextTokenizer(tokenizer, read_json(config) if config.is_file() else None)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CorruptError: it is missing, no JSON, or no object.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise CorruptError(
            f"{path.name} is missing.", where=path, fix="copy the whole model directory again"
        ) from error
    except ValueError as error:
        raise CorruptError(f"Not JSON: {error}", where=path, fix="copy the file again") from error
    if not isinstance(value, dict):
        raise CorruptError("Expected a JSON object.", where=path, fix="copy the file again")
    return value


def _portable_config(config: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """A tokenizer_config.json that transformers 4 reads: plain strings, a class it knows."""
    out: dict[str, Any] = {}
    for key in _PORTABLE:
        value = config.get(key)
        if isinstance(value, dict):  # an AddedToken as older files write it
            value = value.get("content")
        if value is not None and not hasattr(value, "content"):
            out[key] = value
        elif value is not None:
            out[key] = str(value)
    for key, spellings in _SPELLINGS.items():
        found = next((s for s in spellings if tokenizer.token_to_id(s) is not None), None)
        if key not in out and found is not None:
            out[key] = found
    if "pad_token" not in out and "eos_token" in out:  # language models often have none
        out["pad_token"] = out["eos_token"]
    if out.get("tokenizer_class") in (None, "TokenizersBackend"):  # transformers 5 only
        out["tokenizer_class"] = "PreTrainedTokenizerFast"
    return out
