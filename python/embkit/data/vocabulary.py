"""Tokenizers: train a WordPiece on a corpus, or find the tokenizer.json that a name stands for.

Oddity: the trainer of the ``tokenizers`` package is not deterministic, because it numbers the
``##x`` pieces in the order of a randomly seeded hash map and breaks ties by those numbers. Naming
every single character and its ``##`` form up front fixes all numbers, and with them the result.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from embkit.errors import CorruptError, UsageError

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_CONFIG = {
    "cls_token": "[CLS]",
    "do_lower_case": True,
    "mask_token": "[MASK]",
    "model_max_length": 512,
    "pad_token": "[PAD]",
    "sep_token": "[SEP]",
    "tokenizer_class": "PreTrainedTokenizerFast",  # transformers 4 and 5 both know it
    "unk_token": "[UNK]",
}
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")
_HUB_SECONDS = 5
_ALPHABET = 1000  # distinct characters kept, most frequent first
_TRAIN_CHARS = 200_000_000  # of corpus text; enough for any vocabulary size used here


def train_wordpiece(texts: Iterable[str], *, vocab_size: int) -> str:
    """Train a lower-casing BERT WordPiece; the same texts in the same order give the same bytes.

    Args:
        texts: the corpus; only the first 200 million characters count.
        vocab_size: pieces in all, special tokens included.

    Returns:
        tokenizer.json, canonical.

    Raises:
        UsageError: ``vocab_size`` leaves no room beside the characters of the corpus.
    """
    normalizer = normalizers.BertNormalizer(lowercase=True)
    corpus = list(_head(texts))
    alphabet = _alphabet(corpus, normalizer)
    needed = len(SPECIAL) + 2 * len(alphabet)
    if vocab_size < needed:
        raise UsageError(
            f"vocab_size = {vocab_size} is too small for this corpus.",
            fix=f"it has {len(alphabet)} characters: give at least {needed}, better 4000 or more",
        )
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=[*SPECIAL, *(f"##{c}" for c in alphabet)],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        continuing_subword_prefix="##",
    )
    tokenizer.train_from_iterator(corpus, trainer)
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    # Our own numbering: special tokens first, then the pieces in the order they were learned.
    order = [*SPECIAL, *(p for p, _ in pieces if p not in SPECIAL)]
    return _assemble({piece: i for i, piece in enumerate(order)})


def canonical(tokenizer_json: str) -> str:
    """The same tokenizer without truncation and padding as canonical JSON: what is hashed."""
    content = json.loads(Tokenizer.from_str(tokenizer_json).to_str())
    content["truncation"] = content["padding"] = None
    return json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def ending_with(tokenizer_json: str, token: str) -> str:
    """The tokenizer with a token behind each text, as Qwen3-Embedding has ``<|endoftext|>``.

    It stands in the post-processor, so that whoever loads the file appends it, and cutting a text
    leaves room for it. A tokenizer that ends its texts so already is returned as it is.

    Raises:
        UsageError: the vocabulary has no such token, or the post-processor is of a kind that ends
            texts in its own way.
    """
    tokenizer = Tokenizer.from_str(tokenizer_json)
    number = tokenizer.token_to_id(token)
    if number is None:
        raise UsageError(
            f"The tokenizer has no token {token!r}.",
            where="tokenizer.end_token",
            fix="give a token of its vocabulary as it is spelled there",
        )
    if tokenizer.encode("a").ids[-1:] == [number]:
        return tokenizer_json
    content = json.loads(tokenizer_json)
    post = content["post_processor"] or {"type": "Sequence", "processors": []}
    parts = post["processors"] if post["type"] == "Sequence" else [post]
    last = parts[-1] if parts and parts[-1]["type"] == "TemplateProcessing" else None
    if any(part["type"] not in ("ByteLevel", "TemplateProcessing") for part in parts):
        raise UsageError(
            f"The tokenizer's post-processor ({post['type']}) ends texts in its own way.",
            where="tokenizer.end_token",
            fix="leave end_token out, or give a tokenizer with a template",
        )
    if last is None:
        a, b = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
        last = {
            "type": "TemplateProcessing", "single": [a], "pair": [a, b], "special_tokens": {},
        }  # fmt: skip
        parts = [*parts, last]
    for side, kind in (("single", 0), ("pair", 1)):
        last[side] = [*last[side], {"SpecialToken": {"id": token, "type_id": kind}}]
    last["special_tokens"][token] = {"id": token, "ids": [number], "tokens": [token]}
    one = parts[0] if len(parts) == 1 else {"type": "Sequence", "processors": parts}
    return canonical(json.dumps({**content, "post_processor": one}, ensure_ascii=False))


def load_tokenizer(source: Any) -> tuple[str, dict[str, Any]]:
    """Find a tokenizer.

    Args:
        source: a ``tokenizers.Tokenizer``, a fast tokenizer of transformers, a tokenizer.json, a
            directory that holds one, or a model id of the Hugging Face hub.

    Returns:
        tokenizer.json (canonical) and the content of tokenizer_config.json (maybe empty).

    Raises:
        UsageError: nothing of that name, or only a slow tokenizer. CorruptError: a broken file.
    """
    backend = getattr(source, "backend_tokenizer", source)
    if isinstance(backend, Tokenizer):
        return canonical(backend.to_str()), {}
    path = Path(source)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        if path.is_dir():
            raise UsageError(
                "The directory has no tokenizer.json.",
                where=path,
                fix="save a fast tokenizer there: AutoTokenizer.from_pretrained(DIR)"
                ".save_pretrained(DIR)",
            )
        file = _from_hub(str(source))
    try:
        text = canonical(file.read_text(encoding="utf-8"))
    except Exception as error:  # the tokenizers package raises bare Exception
        raise CorruptError(
            f"This file is no tokenizer: {error}", where=file, fix="copy or save it again"
        ) from error
    config = file.with_name("tokenizer_config.json")
    if not config.is_file():
        return text, {}
    try:
        return text, dict(json.loads(config.read_text(encoding="utf-8")))
    except ValueError as error:
        raise CorruptError(f"Not JSON: {error}", where=config, fix="copy it again") from error


def write(directory: Path, tokenizer_json: str, config: dict[str, Any]) -> None:
    """Write tokenizer.json and tokenizer_config.json, loadable by ``AutoTokenizer``."""
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = Tokenizer.from_str(tokenizer_json)
    full = {k: v for k, v in _CONFIG.items() if not _absent(vocabulary, v)} | config
    if full.get("tokenizer_class") == "TokenizersBackend":  # only transformers 5 has it
        full["tokenizer_class"] = "PreTrainedTokenizerFast"
    (directory / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    text = json.dumps(full, indent=1, sort_keys=True, ensure_ascii=False, default=str)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def _absent(vocabulary: Tokenizer, value: Any) -> bool:
    return isinstance(value, str) and value in SPECIAL and vocabulary.token_to_id(value) is None


def _head(texts: Iterable[str]) -> Iterator[str]:
    left = _TRAIN_CHARS
    for text in texts:
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return


def _alphabet(corpus: list[str], normalizer: Any) -> list[str]:
    """The most frequent characters after normalisation, sorted.

    Characters are counted first and normalised then, one by one: lower-casing and accents do not
    look at their neighbours, and a corpus has far fewer characters than letters.
    """
    seen: Counter[str] = Counter()
    for start in range(0, len(corpus), 1024):
        seen.update("".join(corpus[start : start + 1024]))
    counts: Counter[str] = Counter()
    for character, count in seen.items():
        for normal in normalizer.normalize_str(character):
            if not normal.isspace():
                counts[normal] += count
    return sorted(sorted(counts, key=lambda c: (-counts[c], c))[:_ALPHABET])


def _assemble(vocabulary: dict[str, int]) -> str:
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(t, vocabulary[t]) for t in ("[CLS]", "[SEP]")],
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.add_special_tokens(list(SPECIAL))
    return canonical(tokenizer.to_str())


def _from_hub(name: str) -> Path:
    """tokenizer.json of a model id: from the local cache, else the hub with a short timeout."""
    nowhere = UsageError(
        f"Unknown tokenizer {name!r}: no such file or directory, and no model id that can be "
        "reached.",
        fix="check the spelling; without network, download it first and give its directory",
    )
    if not _HUB_ID.match(name):
        raise nowhere
    from huggingface_hub import HfApi, hf_hub_download

    for offline in (True, False):
        try:
            if not offline:  # a download alone tries again for half a minute before it gives up
                HfApi().model_info(name, timeout=_HUB_SECONDS)
            file = hf_hub_download(name, "tokenizer.json", local_files_only=offline)
        except Exception as error:  # the hub client has a dozen kinds, all of them mean "not here"
            nowhere.__cause__ = error
            continue
        with suppress(Exception):  # beside it, if the model has one
            hf_hub_download(name, "tokenizer_config.json", local_files_only=offline)
        return Path(file)
    raise nowhere
