"""Bench group `store`: text to token shards and shuffled padded batches, beside HF and numpy."""

from __future__ import annotations

import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from embkit import _rust, container
from embkit.bench import Case
from embkit.bench.corpus import digest, text_shard, texts

_LENGTH, _BATCH = 128, 32


@cache
def _tokenizer(quick: bool) -> str:
    """A WordPiece tokenizer.json trained on some of the corpus."""
    from tokenizers import BertWordPieceTokenizer

    trained = BertWordPieceTokenizer()
    trained.train_from_iterator(texts(quick)[:20_000], vocab_size=16_000, show_progress=False)
    return str(trained.to_str())


def _tokenize(quick: bool, out: Path) -> dict[str, Any]:
    items = texts(quick)
    n = len(items)
    zeros = np.zeros(n, np.uint16)
    return dict(
        _rust.tokenize(
            str(out), [text_shard(items)], np.arange(n, dtype=np.uint64), zeros, [""],
            np.full(n, 2, np.uint8), zeros, np.arange(n, dtype=np.uint64),
            np.arange(n, dtype=np.uint64), _tokenizer(quick), [_LENGTH] * 3,
        )
    )  # fmt: skip


@cache
def _store(quick: bool) -> tuple[Any, Any]:
    """An open store, and the folder that lives as long as it."""
    home = tempfile.TemporaryDirectory(prefix="embkit-bench-")
    _tokenize(quick, Path(home.name))
    return _rust.Store(home.name), home


def tokenize(quick: bool) -> Case:
    """Text to published shards, ids identical to Hugging Face `tokenizers`."""
    items = texts(quick)
    megabytes = sum(len(t.encode()) for t in items) / 1e6

    def ours() -> np.ndarray:
        with tempfile.TemporaryDirectory() as out:
            _tokenize(quick, Path(out))
            store = _rust.Store(out)
            return _all_tokens(store)

    def hugging_face() -> np.ndarray:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(_tokenizer(quick))
        tokenizer.enable_truncation(_LENGTH)
        tokenizer.no_padding()
        ids = [e.ids for e in tokenizer.encode_batch_fast(list(items))]
        return np.concatenate([np.asarray(i, np.int64) for i in ids])

    return Case(
        name="store.tokenize",
        unit="MB/s",
        work=megabytes,
        ours=ours,
        rivals={"HF tokenizers": hugging_face},
        check=np.testing.assert_array_equal,
        floor="1x HF tokenizers",
        goal="45 MB/s",
        facts={"n": len(items), "data": digest(text_shard(items)[0])},
    )


def _all_tokens(store: Any) -> np.ndarray:
    rows = np.arange(store.rows, dtype=np.uint64)
    flat = np.empty(int(store.lengths(rows).sum()), np.int64)
    store.gather(rows, flat, np.empty(len(rows) + 1, np.int32))
    return flat


def batches(quick: bool) -> Case:
    """Shuffled padded int64 batches of 32 rows, ready for torch."""
    store, _home = _store(quick)
    n = int(store.rows)
    order = np.asarray(_rust.permute(n, 7, 0, n))
    groups = [order[i : i + _BATCH] for i in range(0, n - _BATCH + 1, _BATCH)]
    lengths = store.lengths(np.arange(n, dtype=np.uint64)).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    flat = _all_tokens(store)

    def ours() -> tuple[np.ndarray, np.ndarray]:
        """One call a batch, into buffers that stay; the views are what torch.from_numpy takes."""
        flat_ids = np.empty(_BATCH * _LENGTH, np.int64)
        flat_mask = np.empty_like(flat_ids)
        for rows in groups:
            size = _BATCH * store.gather_padded(rows, flat_ids, flat_mask, 0)
            ids, mask = flat_ids[:size].reshape(_BATCH, -1), flat_mask[:size].reshape(_BATCH, -1)
        return ids, mask

    def collate() -> tuple[np.ndarray, np.ndarray]:
        """The best numpy way known: one scatter through the mask."""
        for rows in groups:
            at = rows.astype(np.int64)
            size = lengths[at]
            keep = np.arange(int(size.max())) < size[:, None]
            ids, mask = np.zeros(keep.shape, np.int64), keep.astype(np.int64)
            source = np.repeat(offsets[at] - np.concatenate([[0], np.cumsum(size)[:-1]]), size)
            ids[keep] = flat[source + np.arange(len(source))]
        return ids, mask

    tokens = float(sum(lengths[g.astype(np.int64)].sum() for g in groups))
    copy = np.empty_like(flat)
    started = time.process_time()
    for _ in range(8):
        np.copyto(copy, flat)
    rate = 8 * len(flat) / max(time.process_time() - started, 1e-9)
    return Case(
        name="store.batches",
        unit="tokens/s",
        work=tokens,
        ours=ours,
        rivals={"numpy collate": collate},
        check=np.testing.assert_equal,
        limit=("int64 copy", rate),
        floor="1.7x numpy collate",
        goal="250 Mtokens/s",
        facts={"n": n, "batch": _BATCH, "data": digest(flat)},
    )


def write(quick: bool) -> Case:
    """Token shards to disk; ours with checksum, fsync and rename."""
    tokens = np.random.default_rng(0).integers(0, 16_000, (4 if quick else 64) << 20, np.uint16)
    home = tempfile.TemporaryDirectory(prefix="embkit-bench-")
    path = Path(home.name)

    def ours() -> int:
        container.save(path / "a.safetensors", {"tokens": tokens}, kind="embkit.bench")
        return len(tokens)

    def plain() -> int:
        tokens.tofile(path / "b.bin")
        return len(tokens)

    case = Case(
        name="store.write",
        unit="tokens/s",
        work=len(tokens),
        ours=ours,
        rivals={"numpy tofile, no checksum or fsync": plain},
        check=np.testing.assert_equal,
        floor="1x numpy",
        goal="200 Mtokens/s",
        facts={"bytes": int(tokens.nbytes), "folder": home},
    )
    case.facts = {"bytes": int(tokens.nbytes)}
    case.ours.__dict__["folder"] = home  # lives as long as the case
    return case


CASES = (tokenize, batches, write)
