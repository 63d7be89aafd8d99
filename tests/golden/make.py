"""Write one tiny file of every kind: `python tests/golden/make.py DIR`.

The files beside this script are what the first released version wrote (docs/formats.md). They never
change: a format that changes gets a new version, new golden files, and keeps the old ones readable.
The writers are the real ones where they can run alone (records tables, Rust tokenisation,
checkpoints, manifests); the columns of the others are spelled out here.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

from embkit import _rust, container
from embkit.data.tables import Examples, Texts

TEXTS = ["naïve café", "", "你好", "plain words"]
NAN = float("nan")


def u64(*values: int) -> np.ndarray:
    return np.array(values, np.uint64)


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def _shard() -> tuple[np.ndarray, np.ndarray]:
    parts = [t.encode() for t in TEXTS]
    ends = np.cumsum([0, *map(len, parts)])
    return np.frombuffer(b"".join(parts), np.uint8), ends.astype(np.uint64)


def records(out: Path) -> None:
    """raw (of records) and examples."""
    ids = u64(11, 2**64 - 1, 33, 44)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        Texts(shards=[_shard()], text_id=ids, cluster=u64(11, 11, 33, 44)).save(work)
        shutil.copy(work / "raw-00000-of-00001.safetensors", out / "raw-v1.safetensors")
        Examples(
            name="t",
            kind="retrieval",
            query=u64(0, 2, 3),
            positive_offsets=u64(0, 1, 1, 3),
            positive=u64(1, 2, 0),
            negative_offsets=u64(0, 2, 2, 2),
            negative=u64(2, 3),
            negative_score=f32(0.25, NAN),
            score=f32(NAN, 1.0, -0.0),
            label=np.array([-1, 0, 2**31 - 1], np.int32),
            weight=f32(1.0, 0.5, 1e-30),
            provenance=np.array([0, 0, 1], np.uint32),
        ).save(work, index=3)
        shutil.copy(work / "examples-t.safetensors", out / "examples-v1.safetensors")


def store(out: Path) -> None:
    """texts and raw (of a store), made by tokenisation."""
    vocab = {"[UNK]": 0, "plain": 1, "words": 2, "café": 3, "q": 4, ":": 5}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": None, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None,
        "decoder": None, "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        _rust.tokenize(
            folder, [_shard()], u64(0, 2, 3, 3), np.array([1, 0, 0, 1], np.uint16), ["", "q: "],
            np.array([0, 1, 1, 2], np.uint8), np.array([0, 0, 1, 1], np.uint16),
            u64(11, 33, 44, 44), u64(11, 33, 44, 44), json.dumps(tokenizer), [4, 8, 8],
        )  # fmt: skip
        for kind, name in (("texts", "texts"), ("raw", "store-raw")):
            source = Path(folder) / f"{kind}-00000-of-00001.safetensors"
            shutil.copy(source, out / f"{name}-v1.safetensors")


def tables(out: Path) -> None:
    """clusters, filters, scores, negatives, embeddings, text_embeddings."""
    container.save(
        out / "clusters-v1.safetensors",
        {
            "text_id": u64(11, 22, 33),
            "cluster": u64(11, 11, 33),
            "representative": u64(0, 0, 2),
            "similarity": f32(1.0, 0.875, 1.0),
        },
        kind="embkit.clusters",
    )
    container.save(
        out / "filters-v1.safetensors",
        {
            "text_id": u64(11, 22, 33),
            "failed_query": np.array([0, 1, 2**31], np.uint32),
            "failed_passage": np.array([2, 0, 2**31 + 2], np.uint32),
            "language": np.array([0, 1, 2], np.uint16),
        },
        kind="embkit.filters",
        metadata={"rules": "max_words max_digit_share", "languages": "und epo eng"},
    )
    container.save(
        out / "scores-v1.safetensors",
        {"positive_offsets": u64(0, 2, 2, 3), "score": f32(0.5, NAN, -0.25)},
        kind="embkit.scores",
        metadata={"task": "t", "threshold": "0.4"},
    )
    container.save(
        out / "negatives-v1.safetensors",
        {
            "offsets": u64(0, 2, 2, 3),
            "row": u64(3, 1, 0),
            "score": f32(0.5, 0.25, -0.125),
            "rank": np.array([0, 4, 1], np.uint32),
        },
        kind="embkit.negatives",
        metadata={"task": "t"},
    )
    container.save(
        out / "embeddings-v1.safetensors",
        {"row": u64(0, 2), "embedding": f32(0.6, 0.8, 0.0, -1.0, 0.0, 0.0).reshape(2, 3)},
        kind="embkit.embeddings",
        metadata={
            "model": "0" * 64,
            "pooling": "mean",
            "width": "3",
            "normalised": "true",
            "prompts": '{"passage": "", "query": "q: "}',
        },
    )
    container.save(
        out / "text_embeddings-v1.safetensors",
        {
            "key": np.arange(32, dtype=np.uint8).reshape(2, 16),
            "embedding": f32(0.6, -0.8, 3.0, 0.0).reshape(2, 2),
        },
        kind="embkit.text_embeddings",
        metadata={"model": "0" * 64, "normalised": "false"},
    )


def checkpoint(out: Path) -> None:
    """Model, optimizer and state.json of a checkpoint."""
    import torch

    from embkit.train import checkpoint as writer

    model = {
        "encoder.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "half": torch.tensor([1.0, -2.0, 3.5], dtype=torch.bfloat16),
        "scale": torch.tensor(0.5, dtype=torch.float64),
    }
    optimizer = {
        "exp_avg.encoder.weight": torch.zeros(2, 3),
        "rng.torch": torch.arange(5, dtype=torch.uint8),
    }
    with tempfile.TemporaryDirectory() as folder:
        done = writer.save(
            Path(folder) / "checkpoints",
            step=100,
            model=model,
            optimizer=optimizer,
            state={"seed": 7, "cursor": {"t": 100}, "config": {"lr": 5e-4, "betas": [0.9, 0.999]}},
        )
        shutil.copy(done / "model.safetensors", out / "checkpoint-model-v1.safetensors")
        shutil.copy(done / "optimizer.safetensors", out / "checkpoint-optimizer-v1.safetensors")
        shutil.copy(done / "state.json", out / "state-v1.json")


def manifest(out: Path) -> None:
    """A manifest with everything that canonical JSON has to decide."""
    container.write_manifest(
        out,
        {
            "format": "embkit.store",
            "version": 1,
            "embkit": "0.1.0",
            "digest": "ab" * 32,
            "files": {"texts-00000-of-00001.safetensors": {
                "length": 4200, "header_crc": 4294967295, "crc_crc": 0}},
            "counts": {"rows": 2**64 - 1, "tokens": -1, "zero": 0},
            "numbers": [1.5, -0.0, 1e16, 1e-5, 123456789.125, 5e-324, 1.7976931348623157e308],
            "text": "é\u2028\"\\\n\u0001\U0001f600/",
            "empty": [{}, [], None, True, False],
        },
    )  # fmt: skip
    (out / "manifest.json").rename(out / "manifest-v1.json")


def main(out: Path) -> None:
    """Write every golden file into ``out``."""
    for write in (records, store, tables, checkpoint, manifest):
        write(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
